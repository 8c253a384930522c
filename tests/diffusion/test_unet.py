"""U-Nets: GDF's names and sets at the true architectures, and features against diffusers' full pass in miniature."""

from __future__ import annotations

import json
from itertools import zip_longest

import pytest
import torch
from conftest import make_vae
from diffusers.models.attention_processor import AttnProcessor

from mmaselect.backbones import ASelectDiT
from mmaselect.diffusion.families.unet import BETAS, UNet
from mmaselect.diffusion.loading import initialise
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

SMALL = dict(
    sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
    attention_head_dim=4, down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
)  # fmt: skip
XL = dict(
    SMALL, transformer_layers_per_block=(1, 2, 1), addition_embed_type='text_time', addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 10, use_linear_projection=True,
)  # fmt: skip
PROMPT = dict(prompt_embeds=torch.randn(1, 7, 12), pooled_prompt_embeds=torch.randn(1, 10))


def make_network(arch):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(**arch)
    initialise(network, 0)
    return network.eval()


def full_pass(arch, latent, timestep):
    """Every site, from hooks on diffusers' untouched model."""
    network, seen = make_network(arch), {}
    # It computes the weights, which the fused kernel does not give.
    network.set_attn_processor(AttnProcessor())
    for tap, site in UNet.catalogue(network).items():
        if tap.component.endswith('-map'):
            attention = network.get_submodule(site.module.removesuffix('.to_k'))

            def weigh(*args, tap=tap, attention=attention, compute=attention.get_attention_scores):
                weights = compute(*args)
                seen[tap] = weights.unflatten(0, (-1, attention.heads)).mean(1)
                return weights

            attention.get_attention_scores = weigh
            continue
        module = network.get_submodule(site.module)
        register = module.register_forward_pre_hook if site.reads_input else module.register_forward_hook

        def keep(_, inputs, output=None, tap=tap):
            value = inputs if output is None else output
            seen[tap] = value[0] if isinstance(value, tuple) else value

        register(keep)
    more = {}
    if 'addition_embed_type' in arch:
        height, width = (8 * side for side in latent.shape[2:])
        times = torch.tensor([[height, width, 0, 0, height, width]]).float().expand(len(latent), -1)
        more['added_cond_kwargs'] = dict(
            text_embeds=PROMPT['pooled_prompt_embeds'].expand(len(latent), -1), time_ids=times
        )
    with torch.no_grad():
        network(latent, timestep, PROMPT['prompt_embeds'].expand(len(latent), -1, -1), **more)
    return seen


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
@pytest.mark.parametrize('timestep', [49, 600])
@pytest.mark.parametrize('arch', [SMALL, XL], ids=['sd', 'xl'])
def test_every_tap_equals_a_hook_on_the_full_pass(arch, timestep, size):
    latent = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    network = make_network(arch)
    taps = list(UNet.catalogue(network))
    model = UNet(network, taps, UNet.make_process({}, 1.0), prompt=PROMPT).eval()
    with torch.no_grad():
        read = model(latent, timestep)
    expected = full_pass(arch, latent, timestep + 1)
    assert set(read) == set(expected) == set(taps)
    for tap, maps in read.items():
        channels, stride = model.shapes[tap]
        if tap.component.endswith('self-map'):
            channels = size[0] * size[1] // stride**2
        if tap.component.endswith('cross-map'):
            assert channels == 77
            channels = PROMPT['prompt_embeds'].shape[1]
        assert maps.shape == (2, channels, size[0] // stride, size[1] // stride)
        value = expected[tap]
        tokens = value.flatten(2) if value.dim() == 4 else value.transpose(1, 2)
        # A convolution at batch 1 and at batch 2 sums in another order.
        assert (maps.flatten(2) - tokens).norm() < 1e-5 * tokens.norm(), tap


@pytest.mark.parametrize(
    'name',
    [
        'up-level1-repeat1-vit-block0-cross-q',
        'mid-repeat1-res-out',
        'down-level0-repeat0-vit-out',
        'up-level1-repeat0-vit-block0-self-map',
        'mid-vit-block0-cross-map',
    ],
)
def test_what_lies_behind_a_tap_is_neither_kept_nor_run(name):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    network = make_network(SMALL)
    tap = UNet.tap_names(SMALL)[name]
    used = UNet.plan(network.config, [tap]).parameters
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key not in used:
                parameter.fill_(float('nan'))
        model = UNet(network, [tap], UNet.make_process({}, 1.0), prompt=PROMPT).eval()
        found = model(latent, 99)[tap]
    expected = full_pass(SMALL, latent, 100)[tap]
    torch.testing.assert_close(
        found.flatten(), (expected if expected.dim() == 4 else expected.transpose(1, 2)).flatten()
    )
    assert len(used) < len(make_network(SMALL).state_dict())


@pytest.mark.parametrize(
    'arch,millions,ids',
    # Published: 860 M, 866 M and 2,567 M parameters; GDF counts 197 and 612 ids.
    [('sd1.5', 859.5, 197), ('sd2.1', 865.9, 197), ('sdxl', 2567.5, 612)],
)
def test_the_published_architectures(arch, millions, ids):
    config = UNet.complete(UNet.architectures[arch])
    count = sum(parameter.numel() for parameter in UNet._network(config).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    names = UNet.tap_names(config)
    assert len(set(names.values())) == len(names) == len(UNet.known_taps(config)) == ids


@pytest.mark.parametrize(
    'arch,taps,expected',
    [
        ('sd1.5', 'gdf-sd15', [(1280, 16), (1280, 16), (640, 32), (320, 64)]),
        ('sd1.5', 'legacy-sd15', [(1280, 16), (1280, 32), (640, 64), (320, 64)]),
        ('sdxl', 'gdf-sdxl', [(1280, 32), (1280, 32), (640, 64), (640, 64)]),
        ('sdxl', 'legacy-sdxl', [(1280, 64), (640, 128), (320, 128)]),
    ],
)
def test_gdfs_sets_have_the_published_sizes(arch, taps, expected):
    """Channels, and the side of the map at the model's own size."""
    with torch.device('meta'):
        backbone = ASelectDiT(dict(type='UNet', arch=arch), taps=taps, timestep=50)
    side = 8 * UNet.architectures[arch]['sample_size']
    assert [(c, side // s) for c, s in zip_longest(backbone.out_channels, backbone.strides)] == expected


def test_maps_have_a_channel_for_each_key():
    names = UNet.tap_names(UNet.architectures['sd1.5'])
    spec = DiffusionSpec('UNet', arch='sd1.5')
    taps = [names[f'up-level1-repeat1-vit-block0-{kind}-map'] for kind in ('self', 'cross')]
    assert spec.shapes(taps) == {taps[0]: (16 * 16, 32), taps[1]: (77, 32)}
    used = UNet.plan(spec.config, [names['up-level1-repeat1-vit-block0-self-map']]).parameters
    block = 'up_blocks.1.attentions.1.transformer_blocks.0.attn1'
    assert {name for name in used if name.startswith(block)} == {f'{block}.to_q.weight', f'{block}.to_k.weight'}


def test_maps_are_computed_where_they_are_asked_for_alone(monkeypatch):
    def never(*args):
        raise AssertionError('computed a map')

    monkeypatch.setattr('mmaselect.diffusion.network.attention_map', never)
    network, latent = make_network(SMALL), torch.randn(1, 4, 8, 8)
    spec = DiffusionSpec('UNet', arch=SMALL)
    taps = [tap for (tap,) in spec.alternatives('auto', 'auto')]
    model = UNet(network, taps, UNet.make_process({}, 1.0), prompt=PROMPT).eval()
    with torch.no_grad():
        assert len(model(latent, 100)) == len(taps)
    with pytest.raises(AssertionError, match='computed a map'):
        UNet(make_network(SMALL), [Tap(1, 'vit-block0-self-map')], UNet.make_process({}, 1.0), prompt=PROMPT)(latent, 1)


def test_the_process_is_that_of_its_scheduler():
    """GDF's t = 50 is told as 51 and noised by abar[51], as diffusers' PNDM does."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1,
                              skip_prk_steps=True)  # fmt: skip
    process = UNet.make_process(dict(scheduler.config), 1.0)
    scheduler.set_timesteps(20)
    assert process.network_timestep(50) == scheduler.timesteps[-2] == 51
    latent, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = scheduler.add_noise(latent, noise, torch.tensor([51]))
    torch.testing.assert_close(process.add_noise(latent, noise, 50), expected)
    torch.testing.assert_close(UNet.make_process({}, 1.0).alphas_cumprod, process.alphas_cumprod)
    assert UNet.make_process({}, 1.0).offset == BETAS['steps_offset']


def test_xls_euler_scales_its_input_to_the_same():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    scheduler.set_timesteps(1000)
    process = UNet.make_process(dict(scheduler.config, steps_offset=0), 1.0)
    latent, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    time = torch.tensor([500.0])
    noisy = scheduler.scale_model_input(scheduler.add_noise(latent, noise, time), time[0])
    torch.testing.assert_close(process.add_noise(latent, noise, 500), noisy, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
    from mmaselect.diffusion.loading import Source

    folder = tmp_path_factory.mktemp('sd')
    make_network(SMALL).save_pretrained(folder / 'unet')
    make_vae(4).save_pretrained(folder / 'vae')
    (folder / 'scheduler').mkdir()
    (folder / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(BETAS))
    save_prompt(default_prompt_file(Source(folder)), {'prompt_embeds': PROMPT['prompt_embeds']}, '', 'tiny')
    return folder


def test_a_folder_from_image_to_maps(folder):
    names = ['up-level1-repeat0-vit-block0-self-k', 'up-level0-upsampler-out']
    backbone = ASelectDiT(dict(type='UNet', pretrained=str(folder)), taps=names, timestep=50).eval()
    assert (backbone.out_channels, backbone.strides, backbone.multiple) == ((32, 32), (16, 16), 32)
    assert "block=11, component='vit-block0-self-k', block=10, component='upsampler-out'" in repr(backbone)
    one, other = backbone(torch.randn(2, 3, 64, 96))
    assert (one.shape, other.shape) == ((2, 32, 4, 6), (2, 32, 4, 6))
    state = backbone.state_dict()
    again = ASelectDiT(dict(type='UNet', pretrained=str(folder)), taps=names, timestep='auto').eval()
    again.load_state_dict(state)
    assert (again.timestep, again.taps) == (50, backbone.taps)


def test_blocks_and_components_of_a_unet():
    spec = DiffusionSpec('UNet', arch=SMALL)
    # Both ends, two downward units and two that change the size, ...: each unit is a block.
    assert spec.num_blocks == 1 + 5 + 2 + 8 + 1
    with pytest.raises(InputError, match=r"compile='default' is not for UNet: leave it out"):
        DiffusionSpec('UNet', arch=SMALL, compile=True).load([Tap(1, 'res-out')])
    assert spec.alternatives('auto', 'vit-out') == [
        (Tap(block, 'vit-out'),) for block, component in UNet.known_taps(SMALL) if component == 'vit-out'
    ]
    # Softmax maps are read when they are named.
    assert len(spec.alternatives('auto', 'auto')) == len(UNet.known_taps(SMALL)) - 2 * 7
    assert spec.alternatives(1, 'vit-block0-self-map') == [(Tap(1, 'vit-block0-self-map'),)]
    with pytest.raises(InputError, match=r"component='vit-out' is not in block 2; choose from: downsampler-out"):
        spec.alternatives(2, 'vit-out')
    with pytest.raises(
        InputError,
        match=r"taps='up-level9-out' is not known: give .* or one of unet-in, unet-after",
    ):
        spec.alternatives(0, 'x', ['up-level9-out'])
    with pytest.raises(InputError, match=r'shift=3.0 is not valid for UNet: only rectified flow has a res'):
        DiffusionSpec('UNet', arch=SMALL, shift=3.0).load([Tap(1, 'res-out')])
    with pytest.raises(InputError, match="taps='gdf' is not known; choose from: gdf-sd15, gdf-sdxl"):
        spec.alternatives(0, 'x', 'gdf')
