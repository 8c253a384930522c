"""Sana: features against hooks on diffusers' full pass in miniature, scheduler, autoencoder, published sizes."""

from __future__ import annotations

import json

import pytest
import torch

from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
from mmaselect.diffusion.families import Sana
from mmaselect.diffusion.latent import DCEncoder
from mmaselect.diffusion.loading import Source, initialise
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

TINY = dict(
    num_layers=3, attention_head_dim=8, num_attention_heads=4, cross_attention_head_dim=16, num_cross_attention_heads=2,
    cross_attention_dim=32, caption_channels=12, in_channels=32, out_channels=32, sample_size=8,
)  # fmt: skip
CASES = {'sana': TINY, 'sana1.5': dict(TINY, qk_norm='rms_norm_across_heads')}
#: DC-AE's kinds of blocks, both ways to go down, and its multi-scale attention.
DCAE = dict(
    latent_channels=32, attention_head_dim=8, scaling_factor=0.41407,
    encoder_block_types=('ResBlock', 'EfficientViTBlock'), decoder_block_types=('ResBlock', 'EfficientViTBlock'),
    encoder_block_out_channels=(16, 64), decoder_block_out_channels=(16, 64), encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    downsample_block_type='conv', upsample_block_type='interpolate',
)  # fmt: skip
PROMPT = dict(prompt_embeds=torch.randn(1, 5, 12))


def make_network(arch):
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(**arch)
    initialise(network, 0)
    return network.eval()


def make_dcae():
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    return AutoencoderDC(**DCAE).eval()


def make_latent(height=8, width=8, batch=2):
    return torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(1))


def make_family(arch, taps, normalised=False, network=None, shift=1.0):
    process = Sana.make_process({}, shift)
    return Sana(network or make_network(arch), taps, process, normalised, PROMPT).eval()


def full_pass(arch, latent, timestep):
    """What every tap should give, as maps, by hooks on the untouched model, called as diffusers' pipeline does."""
    network, seen = make_network(arch).to(latent.dtype), {}
    for number, block in enumerate(network.transformer_blocks):
        attention = block.attn1
        modules = dict(
            query=attention.to_q, key=attention.to_k, value=attention.to_v, attention=attention, output=block
        )
        if arch.get('qk_norm'):
            modules.update(norm_query=attention.norm_q, norm_key=attention.norm_k)
        for name, module in modules.items():

            def keep(_, __, output, number=number, name=name):
                seen[Tap(number, name)] = output.transpose(1, 2).unflatten(2, latent.shape[2:])

            module.register_forward_hook(keep)
    with torch.no_grad():
        time = torch.tensor(float(timestep)).expand(len(latent)) * network.config.timestep_scale
        prompt = PROMPT['prompt_embeds'].to(latent).expand(len(latent), -1, -1)
        network(latent, encoder_hidden_states=prompt, timestep=time)
    return seen


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
@pytest.mark.parametrize('timestep', [50, 600])
@pytest.mark.parametrize('case', CASES)
def test_every_tap_equals_a_hook_on_the_full_pass(case, timestep, size):
    """In float64: linear attention divides by small sums, which makes much of float32's rounding on some processors."""
    arch = dict(CASES[case], timestep_scale=0.5)
    latent, taps = make_latent(*size).double(), [tap for tap in Sana.known_taps(arch) if tap.component != 'modulated']
    with torch.no_grad():
        read = make_family(arch, taps).double()(latent, timestep)
    expected = full_pass(arch, latent, timestep)
    assert set(read) == set(taps)
    for tap, maps in read.items():
        torch.testing.assert_close(maps, expected[tap], rtol=1e-5, atol=1e-5)


def test_query_and_key_after_their_norm():
    latent, taps = make_latent(8, 12), [Tap(1, 'query'), Tap(2, 'key')]
    with torch.no_grad():
        read = make_family(CASES['sana1.5'], taps, normalised=True)(latent, 300)
    expected = full_pass(CASES['sana1.5'], latent, 300)
    for tap in taps:
        torch.testing.assert_close(read[tap], expected[Tap(tap.block, f'norm_{tap.component}')], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('component', ['query', 'attention', 'output'])
def test_what_a_tap_does_not_need_may_be_anything(component):
    network, latent, tap = make_network(TINY), make_latent(), Tap(1, component)
    used = Sana.plan(network.config, [tap]).parameters
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in used:
                parameter.fill_(float('nan'))
        found = make_family(TINY, [tap], network=network)(latent, 300)[tap]
    assert not any('blocks.2' in name for name in used)
    torch.testing.assert_close(found, full_pass(TINY, latent, 300)[tap], rtol=1e-5, atol=1e-5)


def test_process_and_time_are_those_of_its_scheduler():
    """Sana's pipelines come with a DPM solver on flow sigmas; a shift of 3 is what its 1024-pixel models have."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.0)
    scheduler.set_timesteps(20)
    model = make_family(TINY, [Tap(0, 'query')], shift=3.0)
    latent, noise = make_latent(), torch.randn(2, 32, 8, 8)
    for step in (1, 10, 19):
        told, sigma = scheduler.timesteps[step], scheduler.sigmas[step].item()
        # What a shift of 3 has made of it.
        timestep = 1000 * sigma / (3 - 2 * sigma)
        # Diffusers rounds what it tells to whole steps.
        assert model.time(timestep) == pytest.approx(told.item(), abs=1)
        expected = scheduler.add_noise(latent, noise, told[None])
        torch.testing.assert_close(model.process.add_noise(latent, noise, timestep), expected)


def test_sprint_is_refused():
    with pytest.raises(InputError, match='guidance_embeds=True is Sana-Sprint, which is no rectified flow'):
        Sana.known_taps(dict(TINY, guidance_embeds=True))


@pytest.mark.parametrize(
    'arch,millions,blocks,channels',
    # arXiv 2410.10629, table of architectures: 590 M and 1,604 M parameters; 2501.18427: 4.8 B.
    [('sana-600m-1024', 590, 28, 1152), ('sana-1600m-1024', 1604, 20, 2240), ('sana1.5-4800m-1024', 4800, 60, 2240)],
)
def test_the_published_architectures(arch, millions, blocks, channels):
    spec = DiffusionSpec('Sana', arch=arch)
    count = sum(parameter.numel() for parameter in Sana._network(spec.config).parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02)
    assert (spec.num_blocks, spec.factor, spec.multiple) == (blocks, 32, 32)
    taps = [Tap(block, name) for block in (0, blocks - 1) for name in ('query', 'output')]
    assert spec.shapes(taps) == dict.fromkeys(taps, (channels, 32))


def test_the_published_autoencoder():
    """DC-AE f32c32: 32 pixels per latent pixel, 32 channels."""
    from mmaselect.diffusion.latent import VAE_CONFIGS

    with torch.device('meta'):
        encoder = DCEncoder(VAE_CONFIGS[32])
        assert encoder(torch.empty(1, 3, 1024, 512)).shape == (1, 32, 32, 16)
    assert (encoder.factor, encoder.channels, encoder.scaling_factor) == (32, 32, 0.41407)
    assert not any('decoder' in name for name, _ in encoder.named_parameters())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sana')
    make_network(TINY).save_pretrained(folder / 'transformer')
    make_dcae().save_pretrained(folder / 'vae')
    save_prompt(default_prompt_file(Source(folder)), PROMPT, '', 'tiny')
    return folder


@pytest.mark.parametrize('named', [False, True])
def test_a_folder_from_image_to_maps(folder, named, tmp_path):
    spec = DiffusionSpec('Sana', pretrained=str(folder), vae=str(folder / 'vae') if named else None)
    tap, images = Tap(1, 'output'), torch.rand(2, 3, 16, 24) * 2 - 1
    assert spec.shapes([tap]) == {tap: (32, 2)}
    model = spec.load([tap])
    with torch.no_grad():
        expected = make_dcae().encode(images).latent * 0.41407
        latent = model.encode(images)
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
        maps = model(latent, torch.zeros(32, 8, 12), 400)[tap]
    assert not any('decoder' in name for name, _ in model.named_parameters())
    torch.testing.assert_close(maps, full_pass(TINY, expected * 0.6, 400)[tap], rtol=1e-4, atol=1e-4)


def test_float16_leaves_the_autoencoder_in_float32(folder):
    model = DiffusionSpec('Sana', pretrained=str(folder), dtype='float16').load([Tap(0, 'query')])
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    assert model.family.dtype == torch.float16


def test_random_weights_come_with_a_random_autoencoder():
    spec = DiffusionSpec('Sana', arch=TINY)
    assert (spec.factor, spec.multiple) == (32, 32)
    assert json.loads(json.dumps(spec.config))['in_channels'] == 32
