"""U-Nets without conditions: features against diffusers' full pass in miniature, published sizes, DifFeed's blocks."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch

from mmaselect.backbones import ASelectDiT
from mmaselect.diffusion.families import ADM
from mmaselect.diffusion.loading import initialise
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.errors import InputError

SMALL = dict(
    sample_size=16, layers_per_block=1, block_out_channels=(8, 16, 16), norm_num_groups=4, attention_head_dim=4
)
CASES = {
    'adm': dict(
        SMALL, out_channels=6, resnet_time_scale_shift='scale_shift', downsample_type='resnet', upsample_type='resnet',
        down_block_types=('ResnetDownsampleBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'ResnetUpsampleBlock2D'),
    ),
    'ddpm': dict(
        SMALL, in_channels=4, out_channels=4, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
    ),
}  # fmt: skip


def make_network(case):
    from diffusers import UNet2DModel

    network = UNet2DModel(**CASES[case])
    initialise(network, 0)
    return network.eval()


def full_pass(case, latent, timestep):
    """Every tap by GDF's way to name it, from hooks on diffusers' untouched model."""
    network, seen = make_network(case), {}

    def keep(name, module):
        module.register_forward_hook(lambda _, __, output: seen.__setitem__(name, output))

    keep('unet-after-conv-in', network.conv_in)
    keep('unet-out', network.conv_out)
    network.conv_in.register_forward_pre_hook(lambda _, inputs: seen.__setitem__('unet-in', inputs[0]))
    stages = {f'down-level{n}': block for n, block in enumerate(network.down_blocks)}
    stages |= {'mid': network.mid_block} | {f'up-level{n}': block for n, block in enumerate(network.up_blocks)}
    for name, block in stages.items():
        for n, resnet in enumerate(block.resnets):
            keep(f'{name}-repeat{n}-res-increment', resnet.conv2)
            keep(f'{name}-repeat{n}-res-out', resnet)
        for n, attention in enumerate(getattr(block, 'attentions', ())):
            keep(f'{name}-repeat{n}-attn-out', attention)
            for part in 'qkv':
                keep(f'{name}-repeat{n}-self-{part}', getattr(attention, f'to_{part}'))
        for kind in ('downsampler', 'upsampler'):
            for sampler in getattr(block, f'{kind}s', None) or ():
                keep(f'{name}-{kind}-out', sampler)
    with torch.no_grad():
        network(latent, timestep)
    return seen


def make_latent(case, height=16, width=16, batch=2):
    channels = CASES[case].get('in_channels', 3)
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('size', [(16, 16), (16, 24)])
@pytest.mark.parametrize('timestep', [50, 600])
@pytest.mark.parametrize('case', CASES)
def test_every_tap_equals_a_hook_on_the_full_pass(case, timestep, size):
    latent, names = make_latent(case, *size), ADM.tap_names(CASES[case])
    model = ADM(make_network(case), list(names.values()), ADM.make_process({}, 1.0)).eval()
    with torch.no_grad():
        read = model(latent, timestep)
    expected = full_pass(case, latent, timestep)
    assert set(names) == set(expected)
    for name, tap in names.items():
        channels, stride = model.shapes[tap]
        assert read[tap].shape == (2, channels, size[0] // stride, size[1] // stride)
        value = expected[name] if expected[name].dim() == 4 else expected[name].transpose(1, 2)
        # A convolution at batch 1 and at batch 2 sums in another order.
        assert (read[tap].flatten(2) - value.flatten(2)).norm() < 1e-5 * value.norm(), name


@pytest.mark.parametrize('name', ['down-level1-repeat0-self-k', 'mid-repeat0-attn-out', 'up-level0-upsampler-out'])
def test_what_lies_behind_a_tap_is_neither_kept_nor_run(name):
    network, latent, tap = make_network('adm'), make_latent('adm'), ADM.tap_names(CASES['adm'])[name]
    used = ADM.plan(network.config, [tap]).parameters
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key not in used:
                parameter.fill_(float('nan'))
        found = ADM(network, [tap], ADM.make_process({}, 1.0)).eval()(latent, 100)[tap]
    expected = full_pass('adm', latent, 100)[name]
    expected = expected if expected.dim() == 4 else expected.transpose(1, 2)
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    assert len(used) < len(make_network('adm').state_dict())


@pytest.mark.parametrize(
    'arch,millions',
    # arXiv 2105.05233, its table of LSUN at 256 pixels, which is ADM without classes: 552 M parameters. 2006.11239,
    # appendix B: 114 M at 256 pixels, 35.7 M for CIFAR-10.
    [('adm-256', 552.8), ('ddpm-256', 113.7), ('ddpm-cifar10', 35.7)],
)
def test_the_published_architectures(arch, millions):
    spec = DiffusionSpec('ADM', arch=arch, latent='pixels')
    count = sum(parameter.numel() for parameter in ADM._network(spec.config).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    names = ADM.tap_names(spec.config)
    assert len(set(names.values())) == len(names) == len(ADM.known_taps(spec.config))


def test_diffeeds_blocks_have_the_published_sizes():
    """Blocks 19, 24 and 30 of ADM at 256 pixels: 1024, 1024 and 512 channels on maps of 8, 16 and 64 pixels."""
    with torch.device('meta'):
        backbone = ASelectDiT(dict(type='ADM', arch='adm-256', latent='pixels'), taps='diffeed', timestep=150)
    assert list(zip_longest(backbone.out_channels, backbone.strides)) == [(1024, 32), (1024, 16), (512, 4)]


def test_process_and_time_are_those_of_its_scheduler():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    model = ADM(make_network('adm'), [ADM.tap_names(CASES['adm'])['unet-in']], ADM.make_process({}, 1.0))
    assert (model.time(150), model.time(1000)) == (150, 999)
    latent, noise = make_latent('adm'), torch.randn(2, 3, 16, 16)
    expected = scheduler.add_noise(latent, noise, torch.tensor([150]))
    torch.testing.assert_close(model.process.add_noise(latent, noise, 150), expected)


def test_a_folder_from_pixels_to_maps(tmp_path):
    make_network('adm').save_pretrained(tmp_path / 'unet')
    names = ['up-level1-repeat1-attn-out', 'mid-repeat1-res-out']
    diffusion = dict(type='ADM', pretrained=str(tmp_path), latent='pixels')
    backbone = ASelectDiT(diffusion, taps=names, timestep=100).eval()
    assert (backbone.out_channels, backbone.strides, backbone.multiple) == ((16, 16), (2, 4), 4)
    latent, noise = make_latent('adm', 16, 24), torch.randn(2, 3, 16, 24)
    model = DiffusionSpec(**diffusion).load([ADM.tap_names(CASES['adm'])[name] for name in names])
    read = model(model.encode(latent), noise, 100)
    noisy = ADM.make_process({}, 1.0).add_noise(latent, noise, 100)
    for value, name in zip_longest(read.values(), reversed(names)):
        torch.testing.assert_close(value, full_pass('adm', noisy, 100)[name], rtol=1e-4, atol=1e-4)


def test_a_model_of_classes_is_refused():
    with pytest.raises(InputError, match='num_class_embeds=1000: ADM is unconditional, this model needs a class'):
        ADM.known_taps(dict(CASES['adm'], num_class_embeds=1000))
