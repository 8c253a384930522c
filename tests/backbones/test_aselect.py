"""``ASelectDiT`` as a toolbox sees it."""

from __future__ import annotations

import copy
import math
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, needs_torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from torch import nn

from mmaselect import ASelectDiT
from mmaselect.backbones.aselect import IMAGENET_MEAN, IMAGENET_STD
from mmaselect.diffusion.reader import align, pad_to_cells
from mmaselect.errors import InputError

PIXELS = dict(
    type='SiT',
    arch=dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3),
    latent='pixels',
)


def build(**fields):
    known = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return ASelectDiT(**{**dict(diffusion=PIXELS, block=1, timestep=100, **known), **fields})


def images(batch=2, height=8, width=8):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('scope', ('mmengine', 'mmpretrain', 'mmseg'))
def test_it_resolves_from_every_scope(scope):
    import importlib

    registry = MODELS if scope == 'mmengine' else importlib.import_module(f'{scope}.registry').MODELS
    assert isinstance(registry.build(dict(type='ASelectDiT', diffusion=PIXELS, block=1, timestep=1)), ASelectDiT)


def test_maps_are_a_tuple_in_the_order_of_the_config():
    backbone = build(block=[2, 0], component=['query', 'output'])
    maps = backbone(images(height=8, width=12))
    assert isinstance(maps, tuple)
    assert [tuple(value.shape) for value in maps] == [(2, 16, 4, 6)] * 4
    assert backbone.out_channels == (16,) * 4
    for value, (block, component) in zip_longest(maps, ((2, 'query'), (2, 'output'), (0, 'query'), (0, 'output'))):
        single = build(block=block, component=component)(images(height=8, width=12))[0]
        torch.testing.assert_close(value, single, rtol=1e-5, atol=1e-6)


def test_one_block_can_feed_several_levels():
    maps = build(block=[1, 1, 1, 1])(images())
    assert len(maps) == 4
    assert all(torch.equal(value, maps[0]) for value in maps)


@pytest.mark.parametrize('block', [1, [0, 1, 1, 2]])
def test_a_head_may_begin_with_a_group_norm(block):
    """On the CPU its backward crashes on channels-last maps that need no gradient (torch 2.13)."""
    maps = build(block=block)(images(batch=8))
    assert all(value.is_contiguous() for value in maps)
    norm = nn.GroupNorm(1, 16)
    norm(maps[0]).square().sum().backward()
    assert torch.isfinite(norm.weight.grad).all()


def test_channels_are_known_without_weights(model_folder):
    with torch.device('meta'):
        backbone = MODELS.build(
            dict(type='ASelectDiT', diffusion=dict(type='SD3', arch='sd3.5-large', latent='vae'), block=[9, 20])
        )
    assert (backbone.out_channels, backbone.strides, backbone.multiple) == ((2432, 2432), (16, 16), 16)
    with pytest.raises(InputError, match='ASelectDiT was built on the meta device'):
        backbone.diffusion  # noqa: B018


def test_nothing_of_the_frozen_model_can_be_trained_or_saved():
    model = nn.Sequential(build(), nn.Conv2d(16, 2, 1))
    assert [name for name, _ in model[0].named_parameters()] == []
    assert [name for name, _ in model[0].named_buffers()] == []
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1)))
    trained = {id(parameter) for group in wrapper.optimizer.param_groups for parameter in group['params']}
    assert trained == {id(parameter) for parameter in model[1].parameters()}
    before = {name: value.clone() for name, value in model[0].diffusion.state_dict().items()}
    model.train()
    assert not model[0].diffusion.training
    wrapper.update_params(model[1](model[0](images())[0]).square().mean())
    # The timestep is fixed: what feeds constants alone has gone.
    left = {name: value for name, value in model[0].diffusion.state_dict().items() if value.numel()}
    assert 0.5 < len(left) / len(before) < 1
    assert all(torch.equal(value, before[name]) for name, value in left.items())
    assert not model[0](images())[0].requires_grad
    for state in (model.state_dict(), get_state_dict(model)):
        assert set(state) == {'0.timestep', '0.recipe', '0.taps', '1.weight', '1.bias'}


def test_an_average_of_weights_shares_the_frozen_model_and_a_later_choice():
    from mmengine.model import ExponentialMovingAverage

    model = nn.Sequential(build(timestep='auto'), nn.Conv2d(16, 2, 1))
    average = ExponentialMovingAverage(model)
    model[0].set_choice(250)
    average.update_parameters(model)
    assert average.module[0].diffusion is model[0].diffusion
    assert average.module.state_dict()['0.timestep'] == 250
    assert len(list(average.module.parameters())) == 2
    copied = copy.deepcopy(model)
    assert torch.equal(copied[0](images())[0], model[0](images())[0])


def test_a_checkpoint_brings_its_timestep():
    source, target = build(timestep='auto'), build(timestep='auto')
    assert math.isnan(source.state_dict()['timestep'])
    source.set_choice(37.5)
    for load in (target.load_state_dict, lambda state: load_state_dict(target, state, strict=True)):
        target._frozen.timesteps = None
        load(source.state_dict())
        assert target.timestep == 37.5
    state = source.state_dict()
    target.load_state_dict(state)
    assert set(state) == {'timestep', 'recipe', 'taps'}


def test_a_checkpoint_of_other_frozen_weights_is_refused():
    other = build(diffusion=dict(PIXELS, seed=1))
    short = r'[0-9a-f]{12}\.\.\.'
    with pytest.raises(InputError, match=rf'on other features: weights={short} in the config, {short} in training'):
        build().load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="trained on block 2 query, but the config says block=1, component='query'"):
        load_state_dict(build(), build(block=2).state_dict())


def test_a_checkpoint_of_another_timestep_is_refused():
    with pytest.raises(InputError, match=r'timestep=50 in the config, but the checkpoint was trained at 100: set'):
        build(timestep=50).load_state_dict(build().state_dict())


def test_features_do_not_depend_on_the_batch():
    for noise in ('fixed', 'fresh'):
        backbone = build(noise=noise, timestep=600).eval()
        together = backbone(images(5))[0]
        for index in (0, 3):
            alone = backbone(images(5)[index : index + 1])[0]
            torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-6)
        order = torch.tensor([4, 2, 0, 1, 3])
        torch.testing.assert_close(backbone(images(5)[order])[0], together[order], rtol=1e-5, atol=1e-6)


def test_noise_in_training_and_evaluation():
    x = images(1).expand(2, -1, -1, -1)
    fixed = build(noise='fixed', timestep=600)
    fresh = build(noise='fresh', timestep=600)
    assert torch.equal(fixed.train()(x)[0], fixed.eval()(x)[0])
    torch.testing.assert_close(*fixed(x)[0])
    first, second = fresh.train()(x)[0], fresh.train()(x)[0]
    assert not torch.allclose(first, second, atol=0.01)
    assert not torch.allclose(first[0], first[1], atol=0.01)
    torch.testing.assert_close(fresh.eval()(x)[0], fresh.eval()(x)[0])
    # Own noise per image: two images get two noises, which a constant feature offset would hide.
    a, b = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.01)
    assert not torch.allclose(fresh(a)[0], fresh(b)[0], atol=0.05)
    assert torch.allclose(fixed(a)[0], fixed(b)[0], atol=0.05)
    assert not torch.allclose(build(noise_seed=1, timestep=600)(x)[0], fixed(x)[0], atol=0.01)


@pytest.mark.parametrize('fields,said', [({}, 1), ({'timestep': 0}, 0), ({'noise': 'fresh'}, 0)])
def test_images_of_another_size_than_the_crops_have_another_fixed_noise(monkeypatch, fields, said):
    backbone = build(**{'timestep': 600, 'noise': 'fixed', **fields})
    lines = []
    monkeypatch.setattr(backbone, '_say', lambda message, level: lines.append(message))
    crop, whole = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 12)
    backbone.eval()(whole)
    backbone.train()(crop)
    backbone.eval()(crop)
    assert not lines
    for _ in range(2):
        backbone(whole)
    expected = (
        "trained on latents of 8x8, and is tested on 8x12, which have another; set noise='fresh', or test windows"
    )
    assert [expected in line for line in lines] == [True] * said


def test_the_normalisation_is_undone():
    pixels = torch.randint(0, 256, (1, 3, 8, 8)).float()
    normalised = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    expected = pixels / 127.5 - 1
    torch.testing.assert_close(build().to_unit_range(normalised), expected, rtol=0, atol=1e-5)
    plain = build(mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(plain.to_unit_range(pixels), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_brings_its_normalisation():
    """Where the config does not say it, and there is no runner to ask."""
    source, target = build(mean=(1, 2, 3), std=(4, 5, 6)), build(mean=None, std=None)
    with pytest.raises(InputError, match='nothing has said how images are normalised: add dict'):
        target.train()(images())
    # Tools that count operations need no numbers.
    target.eval()(images())
    assert (target.mean, target.std) == (IMAGENET_MEAN, IMAGENET_STD)
    copied = copy.deepcopy(target)
    target.load_state_dict(source.state_dict())
    for backbone in (target, copied):
        assert (backbone.mean, backbone.std) == ((1, 2, 3), (4, 5, 6))
    with pytest.raises(
        InputError, match=r'trained on other features: mean=\[0.0, 2.0, 3.0\] in the config, \[1.0, 2.0'
    ):
        build(mean=(0, 2, 3), std=(4, 5, 6)).load_state_dict(source.state_dict())
    with pytest.raises(InputError, match=r'mean=\(1, 2, 3\), std=None: give both, or neither to take the data_prepro'):
        build(mean=(1, 2, 3), std=None)


def test_sizes_between_patches_are_padded():
    backbone = build()
    assert backbone(images(height=9, width=11))[0].shape == (2, 16, 5, 6)
    padded = pad_to_cells(images(height=9, width=11), backbone.multiple)
    assert padded.shape == (2, 3, 10, 12)
    assert torch.equal(padded[..., 9, :], padded[..., 8, :])


def test_an_image_shifted_by_a_patch_shifts_the_map_by_a_cell():
    """Read before any attention and without positions, a cell sees its own pixels only."""
    diffusion = dict(PIXELS, arch=dict(PIXELS['arch'], patch_size=4))
    backbone = build(diffusion=diffusion, block=0, timestep=0)
    table = backbone.diffusion.family.transformer.pos_embed
    table.forward = lambda latent: table.proj(latent).flatten(2).transpose(1, 2)
    wide = images(height=16, width=28)
    left, right = backbone(wide[..., :24])[0], backbone(wide[..., 4:])[0]
    assert left.shape == (2, 16, 4, 6)
    torch.testing.assert_close(left[..., 1:], right[..., :-1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(left, right, atol=0.1)


@pytest.mark.parametrize('height,width', ((16, 16), (18, 16), (13, 27)))
def test_cells_divide_the_image_evenly_also_where_it_was_padded(height, width):
    """Each cell of a map that holds the position of its middle must hold that of an even division of the image."""
    rows, columns = -(-height // 4), -(-width // 4)
    y, x = (torch.arange(count) * 4 + 2.0 for count in (rows, columns))
    positions = torch.stack(torch.meshgrid(y, x, indexing='ij'))[None].expand(3, -1, -1, -1)
    expected = torch.stack(
        torch.meshgrid(
            (torch.arange(rows) + 0.5) * height / rows, (torch.arange(columns) + 0.5) * width / columns, indexing='ij'
        )
    )
    actual = align(positions, (height, width), 4)
    # Beyond the middle of the first cell the map has no values to interpolate between.
    torch.testing.assert_close(actual[0].clamp(min=2), expected.clamp(min=2), rtol=0, atol=1e-4)
    if (height, width) == (16, 16):
        assert actual is positions


def test_an_image_larger_than_the_position_table(model_folder):
    backbone = ASelectDiT(dict(type='SD3', pretrained=model_folder('SD3')), block=0, timestep=0).eval()
    with pytest.raises(InputError, match=r'latent of 34x32 is larger than the 32x32 of the position table of SD3'):
        backbone(images(height=272, width=256))


def test_an_image_smaller_than_a_patch():
    with pytest.raises(InputError, match='an image of 1x8 is smaller than one patch: this model needs at least 2x2'):
        build()(images(height=1))


def test_a_timestep_that_nobody_chose():
    with pytest.raises(InputError, match=r"timestep='auto', but nothing has chosen one: add dict\(type='TimestepSelec"):
        build(timestep='auto')(images())


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(timestep=1001), r'timestep=1001 is not a timestep: give a number from 0 \(clean\) to 1000'),
        (dict(timestep='best'), "timestep='best' is not valid: give a number from 0 to 1000, or several, or 'auto'"),
        (dict(block=3), 'block=3 is out of range: the model has 3 blocks, 0 to 2'),
        (dict(block=-1), 'block=-1 is out of range'),
        (
            dict(component='q'),
            "component='q' is not known; choose from: modulated, query, key, value, attention, output",
        ),
        (dict(noise='none'), "noise='none' is not known; choose from: fixed, fresh"),
        (dict(std=(1, 0, 1)), 'std=0 is not valid: give a number above 0'),
        (dict(diffusion=dict(type='Imagen')), "diffusion.type='Imagen' is not known; choose from: SD3, DiT, SiT"),
    ],
)
def test_arguments_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        build(**fields)


def test_to_moves_the_frozen_model_along_and_leaves_it_its_precision():
    backbone = build().to(torch.float16)
    assert next(backbone.diffusion.parameters()).dtype == torch.float32
    assert backbone.to('meta').diffusion.device.type == 'meta'
    # Strategies that shard a model call no to(): the frozen one goes where the images are.
    backbone, asked = build(), []
    backbone.follow = asked.append
    backbone(images())
    assert asked == [torch.device('cpu')]
    ASelectDiT.follow(backbone, torch.device('meta'))
    assert backbone.diffusion.device.type == 'meta'


def test_a_model_that_gets_its_place_late_has_its_frozen_weights():
    """FSDP's ``skip_init_weights`` builds a model on the meta device, and gives it memory by ``to_empty()``."""
    exact = build()(images())[0]
    with torch.device('meta'):
        late = nn.Sequential(build(), nn.Conv2d(16, 2, 1))
    with pytest.raises(InputError, match='was built on the meta device and has no weights'):
        _ = late.half().to('meta')[0].diffusion
    late.to_empty(device='cpu')
    torch.testing.assert_close(late[0](images())[0], exact)
    # Once there, they keep their values.
    torch.testing.assert_close(late.to_empty(device='cpu')[0](images())[0], exact)


def test_half_gives_maps_in_the_dtype_of_the_images():
    exact = build()(images())[0]
    model = nn.Sequential(build(), nn.Conv2d(16, 2, 1)).half()
    maps = model[0](images().half())[0]
    assert maps.dtype == torch.float16
    torch.testing.assert_close(maps.float(), exact, rtol=2e-3, atol=2e-3)
    assert build()(images().double())[0].dtype == torch.float64
    if torch.__version__ >= '2.6':  # before, there is no convolution in float16 on a CPU
        assert model[1](maps).dtype == torch.float16


def test_what_the_toolboxes_tools_ask_of_a_backbone():
    backbone = build(block=[0, 2], timestep='auto', num_timesteps=2)
    assert backbone.out_indices == (0, 1, 2, 3)
    assert [name for name, _ in backbone.named_modules() if name.startswith('maps.')] == [
        f'maps.{number}' for number in backbone.out_indices
    ]


def test_class_activation_maps_get_the_gradient_of_the_map():
    """Grad-CAM weights each channel with the mean gradient; behind it, here, a mean and a linear layer."""
    backbone, head = build().eval(), nn.Linear(16, 3)
    seen = {}

    def take(module, inputs, output):
        seen['map'] = output
        output.register_hook(lambda gradient: seen.__setitem__('gradient', gradient))

    handle = backbone.maps[0].register_forward_hook(take)
    head(backbone(images())[0].mean((2, 3)))[:, 1].sum().backward()
    torch.testing.assert_close(seen['map'], build()(images())[0], rtol=0, atol=0)
    torch.testing.assert_close(seen['gradient'].sum((2, 3)), head.weight[1].expand(2, 16))
    handle.remove()
    assert not backbone(images())[0].requires_grad


def test_cost_is_counted_before_a_choice():
    """Of the blocks that a choice may take the last one: what costs the most."""
    from mmengine.analysis import FlopAnalyzer

    counted = {}
    for name, fields in {
        'open': dict(block='auto', timestep='auto'),
        'first': dict(block=0),
        'last': dict(block=2),
    }.items():
        backbone = build(**fields).eval()
        counted[name] = FlopAnalyzer(backbone, images(batch=1)).unsupported_ops_warnings(False).total()
        assert backbone.decided == (name != 'open')
    assert counted['open'] == counted['last'] > counted['first'] > 0
    with pytest.raises(InputError, match='nothing has chosen one'):
        build(timestep='auto').eval()(images())


class Classifier(nn.Module):
    """Any head; the noise belongs to the backbone in it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = build(), nn.Linear(16, 3)

    def forward(self, batch):
        return self.head(self.backbone(batch)[0].mean((2, 3)))


@pytest.mark.parametrize(
    'export',
    [
        lambda model: torch.jit.trace(model, images()),
        pytest.param(
            lambda model: torch.export.export(model, (images(),), strict=False).module(),
            marks=needs_torch('2.6', 'torch.export'),
        ),
    ],
)
def test_an_exported_model_has_the_noise_as_a_constant(export):
    model = Classifier().eval().requires_grad_(False)
    other = images().flip(0) * 1.5
    torch.testing.assert_close(export(model)(other), model(other))
    # Nothing of the tracer is kept.
    torch.testing.assert_close(model(other), Classifier.forward(model, other), rtol=0, atol=0)
    assert {type(noise) for noise in model.backbone._noise_cache.values()} == {torch.Tensor}


def test_a_trace_draws_no_noise():
    """What ONNX has no operator for; the graph is what its exporter gets."""
    graph = torch.jit.trace(Classifier().eval(), images()).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert 'aten::linear' in kinds
    assert not {kind for kind in kinds if 'rand' in kind or 'normal_' in kind}


def test_amp_computes_the_frozen_part_in_its_own_precision_only_if_that_is_float32():
    exact = build()(images())[0]
    seen = []
    for dtype in ('float32', 'bfloat16'):
        backbone = build(diffusion=dict(PIXELS, dtype=dtype))
        layer = backbone.diffusion.family.transformer.transformer_blocks[1].attn1.to_q
        handle = layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        outside = backbone(images())[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            inside = backbone(images())[0]
        handle.remove()
        assert inside.dtype == outside.dtype == torch.float32
        assert (inside - exact).norm() / exact.norm() < 0.03
        if dtype == 'bfloat16':
            assert torch.equal(inside, outside)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]


def test_sd3_from_image_to_map(model_folder):
    backbone = ASelectDiT(dict(type='SD3', pretrained=model_folder('SD3.5-medium')), block=2, timestep=200).eval()
    assert (backbone.strides, backbone.out_channels) == ((16,), (TINY['SD3']['num_attention_heads'] * 16,))
    assert backbone(images(height=64, width=96))[0].shape == (2, 64, 4, 6)
    assert 'SD3, block=2' in repr(backbone)


def test_several_timesteps_and_blocks_give_several_maps():
    backbone = build(block=[0, 2], timestep=[300, 100])
    assert backbone.out_channels == (16,) * 4
    expected = [build(block=block, timestep=timestep)(images())[0] for timestep in (300, 100) for block in (0, 2)]
    for value, single in zip_longest(backbone(images()), expected):
        torch.testing.assert_close(value, single, rtol=1e-5, atol=1e-5)
    again = build(block=[0, 2], timestep='auto', num_timesteps=2)
    load_state_dict(again, backbone.state_dict(), strict=True)
    assert again.timesteps == (300, 100)
    with pytest.raises(InputError, match=r'timestep=\[100.0\]: this backbone was built for 2 of them'):
        again.set_choice(100)


def test_block_and_component_can_be_left_open():
    backbone = build(block='auto', component='auto', timestep='auto')
    assert (len(backbone.alternatives), len(backbone.out_channels)) == (backbone.spec.num_blocks * 5, 1)
    with pytest.raises(InputError, match=r"block='auto', but nothing has chosen one: add dict\(type='Timestep"):
        backbone(images())
    backbone.set_choice(100, [(1, 'value')])
    explicit = build(block=1, component='value', timestep=100)
    torch.testing.assert_close(backbone(images())[0], explicit(images())[0])
    # Nothing behind the choice is kept, and the identity is that of a model that never had it.
    assert backbone.identity == explicit.identity
    assert not list(backbone.diffusion.family.transformer.transformer_blocks[2].parameters())
    open_again = build(block='auto', component='auto', timestep='auto')
    assert open_again.identity != explicit.identity
    load_state_dict(open_again, backbone.state_dict(), strict=True)
    assert (open_again.timestep, open_again.taps) == (100, ((1, 'value'),))
    torch.testing.assert_close(open_again(images())[0], explicit(images())[0])
    with pytest.raises(InputError, match=r"block=2, component='query' was not loaded: this model reads value of"):
        backbone.set_choice(100, [(2, 'query')])


class Head(nn.Module):
    """Calls the backbone as a toolbox's model does: with the data samples at hand."""

    def forward(self, backbone, inputs, data_samples):
        return backbone(inputs)


@pytest.mark.parametrize('training', (True, False))
def test_an_image_that_is_not_finite_is_named(training):
    backbone = build(component='output').train(training)
    batch, samples = images(3), [SimpleNamespace(img_path=f'{number}.png') for number in range(3)]
    backbone(batch)
    batch[1, 0, 2, 2] = math.nan
    said = 'features are not finite at timestep 100, block 1, output: the latent is not finite either: the images'
    with pytest.raises(InputError, match=f'^1.png: {said}'):
        Head()(backbone, batch, samples)
    with pytest.raises(InputError, match=f'^image 1 of the batch: {said}'):
        backbone(batch)


@needs_torch('2.6', 'float16 on a CPU')
def test_a_dtype_that_overflows_is_no_fault_of_an_image():
    backbone = build(diffusion=dict(PIXELS, dtype='float16'), component='output')
    backbone(images(3))
    with torch.no_grad():
        for name, parameter in backbone.diffusion.named_parameters():
            if 'transformer_blocks.1' in name:
                parameter.fill_(6e4)
    said = r'features are not finite at timestep 100, block 1, output: .* or torch\.float16 overflows'
    with pytest.raises(InputError, match=f'^{said}$'):
        backbone(images(3))


@pytest.mark.parametrize('shape', ((2, 4, 8, 8), (2, 1, 8, 8), (3, 8, 8)))
def test_images_that_are_not_rgb(shape):
    with pytest.raises(InputError, match=r'images of shape .* are not valid: expected RGB, \(B, 3, H, W\)'):
        build()(torch.zeros(shape))


@needs_torch('2.6', 'torch.export')
def test_what_is_exported_is_not_looked_at():
    backbone = build().eval()
    expected = backbone(images())[0]
    exported = torch.export.export(backbone, (images(),), strict=False).module()
    torch.testing.assert_close(exported(images())[0], expected)


def test_weights_behind_constants_go_when_the_timestep_is_known():
    """From the config, a choice or a checkpoint; what a checkpoint says stays the same."""

    def size(backbone):
        return sum(parameter.nbytes for parameter in backbone.diffusion.family.transformer.parameters())

    fixed, chosen, loaded = build(), build(timestep='auto'), build(timestep='auto')
    whole, before = size(fixed), fixed.state_dict()
    (expected,) = fixed(images())
    left, after = size(fixed), fixed.state_dict()
    assert left < 0.75 * whole
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    chosen.set_choice(100)
    loaded.load_state_dict(after)
    for backbone in (fixed, chosen, loaded):
        assert torch.equal(backbone(images())[0], expected)
        assert size(backbone) == left
    # The head's precision is not the frozen model's; what moves computes its constants anew.
    assert torch.equal(chosen.half()(images())[0], expected)
    chosen.set_choice(900)
    assert torch.equal(chosen(images())[0], build(timestep=900)(images())[0])
    assert size(chosen) == left
