"""Encoders of FLUX.2's and Qwen-Image's autoencoders against what their pipelines make of an image."""

from __future__ import annotations

import pytest
import torch
from diffusion.test_more_families import CASES, PROMPT, full_pass, make_network

from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
from mmaselect.diffusion.families import Flux2, QwenImage
from mmaselect.diffusion.latent import VAE_CONFIGS, Flux2Encoder, QwenImageEncoder
from mmaselect.diffusion.loading import Source
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap

pytestmark = pytest.mark.skipif(
    not (Flux2.is_available() and QwenImage.is_available()),
    reason=f'Flux2 and QwenImage need diffusers >= {Flux2.least_diffusers}',
)


def make_flux2_vae():
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=4,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def make_qwen_vae():
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip


def flux2_latents(vae, images):
    """Of diffusers' pipeline."""
    from diffusers import Flux2Pipeline

    pipeline = Flux2Pipeline.__new__(Flux2Pipeline)
    pipeline.__dict__['vae'] = vae
    return pipeline._encode_vae_image(images, None)


def qwen_latents(vae, images):
    """As diffusers' image-to-image pipeline has it."""
    mean, std = (torch.tensor(getattr(vae.config, f'latents_{name}')).view(1, -1, 1, 1) for name in ('mean', 'std'))
    return (vae.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std


@pytest.mark.parametrize(
    'case,make,latents,factor',
    [('flux2-klein', make_flux2_vae, flux2_latents, 4), ('qwen-image', make_qwen_vae, qwen_latents, 4)],
)
def test_a_folder_from_image_to_maps(tmp_path, case, make, latents, factor):
    family, arch = CASES[case]
    vae = make()
    vae.save_pretrained(tmp_path / 'vae')
    make_network(family, arch).save_pretrained(tmp_path / 'transformer')
    save_prompt(default_prompt_file(Source(tmp_path)), {'prompt_embeds': PROMPT['prompt_embeds']}, '', 'tiny')
    spec, tap = DiffusionSpec(family.name, pretrained=str(tmp_path)), Tap(1, 'output')
    assert spec.factor == factor
    model, images = spec.load([tap]), torch.rand(2, 3, 32, 48) * 2 - 1
    assert not any('decoder' in name for name, _ in model.named_parameters())
    with torch.no_grad():
        expected = latents(vae, images)
        found = model.encode(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        maps = model(found, torch.zeros_like(found), 400)[tap]
    torch.testing.assert_close(maps, full_pass(family, arch, 0.6 * expected, 400)[tap], rtol=1e-4, atol=1e-4)


def test_the_published_autoencoders():
    """FLUX.2: 128 channels on cells of 16 pixels; Qwen-Image: 16 on cells of 8."""
    with torch.device('meta'):
        qwen = QwenImageEncoder({})
        assert qwen(torch.empty(1, 3, 64, 96)).shape == (1, 16, 8, 12)
        flux2 = Flux2Encoder(VAE_CONFIGS[128])
    assert (qwen.factor, qwen.channels, flux2.factor, flux2.channels) == (8, 16, 16, 128)
    assert (Flux2.latent_channels(Flux2.complete({})), QwenImage.latent_channels(QwenImage.complete({}))) == (128, 16)
    spec = DiffusionSpec('Flux2', arch='flux.2-klein-4b')
    assert (spec.factor, spec.multiple) == (16, 16)


def test_random_weights_of_flux2_have_a_latent():
    spec = DiffusionSpec('Flux2', arch=dict(CASES['flux2-klein'][1], in_channels=128))
    with torch.no_grad():
        latent = spec.load([Tap(0, 'query')]).encode(torch.rand(1, 3, 32, 32))
    assert latent.shape == (1, 128, 2, 2)
    assert latent.isfinite().all()
