"""The fusion neck: a learned mean of normalised maps."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmaselect.errors import InputError
from mmaselect.necks import SoftmaxFusion


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
