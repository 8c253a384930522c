"""The necks: a learned mean of normalised maps, and a class token that attends to a map."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmaselect.errors import InputError
from mmaselect.necks import AttentionPooling, SoftmaxFusion


def maps(count, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * (index + 1) * torch.randn(8, 6, 4, 5, generator=generator) + index for index in range(count)]


def normal(value):
    mean, variance = value.mean((0, 2, 3), keepdim=True), value.var((0, 2, 3), keepdim=True, correction=0)
    return (value - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize('scope', ('mmpretrain', 'mmseg'))
def test_it_resolves_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build(dict(type='SoftmaxFusion', in_channels=6, num_maps=2)), SoftmaxFusion)
        pooling = dict(type='AttentionPooling', in_channels=6, embed_dims=8, num_heads=2)
        assert isinstance(MODELS.build(pooling), AttentionPooling)


def test_it_begins_as_a_mean_and_learns_one_number_per_map():
    neck = SoftmaxFusion(6, 3)
    assert sum(parameter.numel() for parameter in neck.parameters()) == 3
    values = maps(3)
    (fused,) = neck(values)
    torch.testing.assert_close(fused, sum(map(normal, values)) / 3, rtol=1e-4, atol=1e-5)
    # Scale and offset of a map do not matter: queries of different timesteps differ in both.
    (other,) = SoftmaxFusion(6, 3)([values[0], 100 * values[1] + 7, values[2]])
    torch.testing.assert_close(other, fused, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        neck.logits.copy_(torch.tensor([[0.0, 50.0, 0.0]]))
    torch.testing.assert_close(neck(values)[0], normal(values[1]), rtol=1e-4, atol=1e-5)


def test_levels_stay_apart():
    """Maps come timestep by timestep, block by block: with two blocks, 0 and 2 are of the same block."""
    values = maps(4)
    first, second = SoftmaxFusion(6, 4, num_outputs=2)(values)
    torch.testing.assert_close(first, (normal(values[0]) + normal(values[2])) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, (normal(values[1]) + normal(values[3])) / 2, rtol=1e-4, atol=1e-5)


def test_maps_of_unlike_size_and_width():
    """As a U-Net gives them: two blocks of two timesteps, 6 and 4 wide; the maps of the first one differ in size."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 4), (4, 2, 2), (6, 2, 2), (4, 2, 2)]
    values = [torch.randn(8, *shape, generator=generator) for shape in shapes]
    first, second = SoftmaxFusion([6, 4, 6, 4], 4, num_outputs=2)(values)
    larger = torch.nn.functional.interpolate(normal(values[2]), (4, 4), mode='bilinear')
    torch.testing.assert_close(first, (normal(values[0]) + larger) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, (normal(values[1]) + normal(values[3])) / 2, rtol=1e-4, atol=1e-5)
    for channels in ([6, 4, 4, 4], [6, 4, 6]):
        with pytest.raises(InputError, match=r'in_channels=.* is not valid: give 4 numbers, equal for those that'):
            SoftmaxFusion(channels, 4, num_outputs=2)


def test_it_finds_the_map_that_helps():
    neck, head = SoftmaxFusion(6, 2), torch.nn.Linear(6, 1)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([*neck.parameters(), *head.parameters()], lr=0.05)
    for _ in range(200):
        useful = torch.randn(32, 6, 2, 2, generator=generator)
        useless = torch.randn(32, 6, 2, 2, generator=generator)
        target = useful.mean((2, 3)) @ torch.arange(6.0)
        optimizer.zero_grad()
        error = head(neck([useless, useful])[0].mean((2, 3)))[:, 0] - target
        error.square().mean().backward()
        optimizer.step()
    assert neck.weights[0, 1] > 0.9


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(in_channels=0, num_maps=2), 'in_channels=0 is not valid'),
        (dict(in_channels=6, num_maps=True), 'num_maps=True is not valid'),
        (dict(in_channels=6, num_maps=3, num_outputs=2), 'num_maps=3 is not a multiple of num_outputs=2'),
    ],
)
def test_arguments_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        SoftmaxFusion(**fields)


def test_another_number_of_maps():
    with pytest.raises(InputError, match='built for num_maps=3, but 2 came in'):
        SoftmaxFusion(6, 3)(maps(2))


def make_pooling(seed=0, **fields):
    torch.manual_seed(seed)
    neck = AttentionPooling(**(dict(in_channels=6, embed_dims=16, num_heads=4) | fields)).eval()
    with torch.no_grad():
        neck.token.normal_()
    return neck


def test_attention_pooling_is_a_vision_transformer_s_class_token():
    """Against the same equations written out: normalise, project, two pre-norm blocks, the token."""
    neck = make_pooling()
    (features,) = maps(1)
    (pooled,) = neck([features])
    normed = (features - features.mean((1, 2, 3), keepdim=True)) / (
        features.var((1, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    tokens = normed.permute(0, 2, 3, 1).reshape(8, 20, 6) @ neck.projection.weight.T + neck.projection.bias
    tokens = torch.cat([neck.token.expand(8, 1, 16), tokens], 1)
    for block in neck.blocks:
        attention, inner = block.self_attn, block.norm1(tokens)
        query, key, value = (
            (inner @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(8, 21, 3, 4, 4).unbind(2)
        )
        weights = (torch.einsum('bqhd,bkhd->bhqk', query, key) / 2).softmax(-1)
        read = torch.einsum('bhqk,bkhd->bqhd', weights, value).reshape(8, 21, 16)
        tokens = tokens + read @ attention.out_proj.weight.T + attention.out_proj.bias
        hidden = torch.nn.functional.gelu(block.norm2(tokens) @ block.linear1.weight.T + block.linear1.bias)
        tokens = tokens + hidden @ block.linear2.weight.T + block.linear2.bias
    torch.testing.assert_close(pooled, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_attention_pooling_takes_any_size_and_no_notice_of_order_and_scale():
    neck = make_pooling()
    (features,) = maps(1)
    (pooled,) = neck([features])
    assert pooled.shape == (8, 16)
    shuffled = features.flatten(2)[:, :, torch.randperm(20)].view_as(features)
    torch.testing.assert_close(neck([shuffled])[0], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(neck([100 * features + 7])[0], pooled, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(neck([features.flip(1)])[0], pooled, atol=1e-2)
    assert neck([features[:, :, :3, :2]])[0].shape == (8, 16)


def test_attention_pooling_learns_on_maps_of_a_frozen_transformer():
    """They are channels-last and need no gradient, where the backward of torch's group norm crashes on the CPU."""
    neck = make_pooling().train()
    frozen = torch.randn(8, 4, 5, 6).permute(0, 3, 1, 2)
    assert frozen.is_contiguous(memory_format=torch.channels_last)
    neck([frozen])[0].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in neck.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values()), gradients


def test_attention_pooling_finds_the_one_cell_that_tells():
    """A mean over 36 cells dilutes it; attention need not."""
    neck, head = make_pooling(embed_dims=32, num_layers=1), torch.nn.Linear(32, 2)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([*neck.parameters(), *head.parameters()], lr=3e-3)
    for step in range(200):
        features = torch.randn(64, 6, 6, 6, generator=generator)
        label = torch.randint(2, (64,), generator=generator)
        cells = torch.randint(36, (64,), generator=generator)
        # Either sign is as likely in the first channel; only the marked cell's goes with the label.
        features.flatten(2)[torch.arange(64), 1, cells] = 8.0
        features.flatten(2)[torch.arange(64), 0, cells] = 3.0 * (2 * label - 1).float()
        logits = head(neck([features])[0])
        if step == 199:
            assert (logits.argmax(1) == label).float().mean() > 0.9
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(in_channels=0), 'in_channels=0 is not valid'),
        (dict(num_layers=1.5), 'num_layers=1.5 is not valid'),
        (dict(embed_dims=10), 'embed_dims=10 is not a multiple of num_heads=4'),
        (dict(mlp_ratio=0), r'mlp_ratio=0 is not valid: give a number above 0'),
        (dict(dropout=1.0), r'dropout=1.0 is not valid: give a number of at least 0 and below 1'),
    ],
)
def test_arguments_of_attention_pooling_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        make_pooling(**fields)


def test_attention_pooling_takes_one_map():
    with pytest.raises(InputError, match='takes one map, but 2 came in: fuse them with SoftmaxFusion'):
        make_pooling()(maps(2))
