"""Small autoencoders: the encoder against diffusers' and against a pass written by hand, and its statistics."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED_DATA, TINY, make_tiny
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mmaselect
from mmaselect.diffusion.latent import find_vae, load_vae
from mmaselect.diffusion.loading import Identity
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

TAEF2 = SHARED_DATA / 'taef2'
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 0.25]
TAPS = (Tap(0, 'query'),)


def load(folder, **fields):
    identity = Identity()
    return load_vae(*find_vae(folder), identity, torch.float32, **fields).eval(), identity.digest()


def spec(**fields):
    return DiffusionSpec('DiT', arch=TINY['DiT'], **fields)


def by_hand(file, images):
    """The encoder as data/README.md describes it: nothing but functions and the file's tensors."""
    weights = {name: value.float() for name, value in load_file(file).items()}
    last = max(int(name.split('.')[0]) for name in weights)
    maps = (images + 1) / 2
    for layer in range(last + 1):
        if f'{layer}.weight' in weights:
            stride = 1 if layer in (0, last) else 2
            maps = F.conv2d(maps, weights[f'{layer}.weight'], weights.get(f'{layer}.bias'), stride, padding=1)
            continue
        if f'{layer}.pool.0.weight' in weights:
            branch = F.conv2d(maps, weights[f'{layer}.pool.0.weight'])
            branch = F.group_norm(branch, 4, weights[f'{layer}.pool.1.weight'], weights[f'{layer}.pool.1.bias'])
            maps = maps + F.conv2d(branch.relu(), weights[f'{layer}.pool.3.weight'])
        inner = maps
        for place in (0, 2, 4):
            name = f'{layer}.conv.{place}'
            inner = F.conv2d(inner, weights[f'{name}.weight'], weights[f'{name}.bias'], padding=1)
            inner = inner.relu() if place < 4 else inner
        maps = (inner + maps).relu()
    return maps


@pytest.fixture
def diffusers_folder(tmp_path):
    """An AutoencoderTiny, as diffusers saves it."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 2, 1), decoder_block_out_channels=(8, 8, 8),
        num_decoder_blocks=(1, 1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / 'vae')
    return tmp_path, vae


def test_diffusers_own(diffusers_folder):
    folder, vae = diffusers_folder
    encoder, identity = load(folder)
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latents
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)
    assert (encoder.factor, encoder.channels) == (4, 4)
    assert not [name for name in encoder.state_dict() if 'decoder' in name]
    # In the folder's own config.json, as diffusers names them.
    path = folder / 'vae/config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'latents_mean': MEAN, 'latents_std': STD}))
    standardised, other = load(folder)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(standardised(images), (expected - mean) / std, rtol=1e-6, atol=1e-6)
    assert other != identity
    # Fields go before the file.
    again, third = load(folder, statistics=(STD, STD))
    with torch.no_grad():
        torch.testing.assert_close(again(images), (expected - std) / std, rtol=1e-6, atol=1e-6)
    assert len({identity, other, third}) == 3


def test_a_raw_file_with_the_pooling_branch(tmp_path):
    folder = make_tiny(tmp_path)
    encoder, _ = load(folder)
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        expected = by_hand(folder / 'tiny_encoder.safetensors', images)
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)
    assert expected.shape == (2, 4, 4, 3)


@pytest.mark.skipif(not TAEF2.is_dir(), reason='needs ../shared/data/taef2')
def test_taef2():
    """FLUX.2's space: 32 channels at an eighth of the size."""
    encoder, _ = load(TAEF2)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        expected = by_hand(TAEF2 / 'taef2_encoder.safetensors', images)
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)
    assert (encoder.factor, encoder.channels, expected.shape) == (8, 32, (2, 32, 8, 6))


def test_a_model_in_a_tiny_space(tmp_path):
    folder = make_tiny(tmp_path)
    plain = spec(vae=folder)
    # Patches of 2x2 latent pixels; no weight is read for it.
    assert plain.multiple == 16
    model = plain.load(TAPS)
    own = spec(vae=folder, latents_mean=MEAN, latents_std=STD).load(TAPS)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(own.encode(images), (model.encode(images) - mean) / std, rtol=1e-5, atol=1e-6)
    assert own.identity != model.identity
    assert (
        own.identity
        == mmaselect.load(
            dict(type='DiT', arch=TINY['DiT'], vae=folder, latents_mean=MEAN, latents_std=STD), 0, 'query'
        ).identity
    )
    assert spec(vae=folder, latents_mean=STD, latents_std=STD).load(TAPS).identity != own.identity


def test_statistics_of_a_kl_are_diffusers_own(model_folder):
    """(z - mean) * scaling_factor / std, where a scaling factor is set, as its pipelines do."""
    fields = dict(vae=model_folder('DiT') / 'vae', latents_mean=MEAN, latents_std=STD)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    plain = spec(vae=fields['vae']).load(TAPS).encode(images)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    expected = (plain / 0.5 - mean) * 0.5 / std
    torch.testing.assert_close(spec(**fields).load(TAPS).encode(images), expected, rtol=1e-5, atol=1e-6)


def test_random_weights_have_statistics_too():
    model, plain = spec(latents_mean=MEAN, latents_std=STD).load(TAPS), spec().load(TAPS)
    assert model.identity != plain.identity


@pytest.mark.parametrize(
    'change,message',
    [
        (
            dict(latents_mean=MEAN),
            r'latents_std=None is not valid: give 4 finite numbers, one per channel .* or neither',
        ),
        (dict(latents_mean=MEAN[:3], latents_std=STD), 'latents_mean has 3 numbers: give 4 finite numbers'),
        (dict(latents_mean=MEAN, latents_std=[1, 1, 0, 1]), r'latents_std\[2\]=0 is not valid: .* each above 0'),
        (dict(latents_mean=[0, float('nan'), 0, 0], latents_std=STD), r'latents_mean\[1\]=nan is not valid'),
        (
            dict(latents_mean=MEAN, latents_std=STD, latent='pixels', vae=None),
            "pixels are not standardised; leave them out with latent='pixels'",
        ),
    ],
)
def test_statistics_that_cannot_be_used(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        spec(**{'vae': make_tiny(tmp_path), **change})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'change,message',
    [
        ({'latents_mean': MEAN, 'latents_std': [1, 1, 1]}, r"config.json of vae='.*': latents_std has 3 numbers"),
        ({'num_encoder_blocks': [1, 2]}, r'num_encoder_blocks=\[1, 2\], .* are not of an AutoencoderTiny'),
        ({'encoder_block_out_channels': None}, 'encoder_block_out_channels=None in the config of a VAE is not valid'),
        ({'_class_name': 'VQModel'}, r"holds 'VQModel'; a VAE of class AutoencoderKL or AutoencoderTiny"),
        ({'encoder_pooling_channels': {'2': 16}}, "encoder_pooling_channels names layer '2': give numbers of blocks"),
        (
            {'encoder_pooling_channels': {'1': 16}},
            r"lacks 4 of 34 tensors, the first is 'encoder.layers.1.pool.0.weight'",
        ),
    ],
)
def test_a_config_that_cannot_be_used(diffusers_folder, change, message):
    folder, _ = diffusers_folder
    path = folder / 'vae/config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_an_encoder_as_it_is_published(tmp_path):
    """As a pickle of tensors."""
    folder = make_tiny(tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = by_hand(folder / 'tiny_encoder.safetensors', images)
    torch.save(load_file(folder / 'tiny_encoder.safetensors'), folder / 'tiny_encoder.pth')
    (folder / 'tiny_encoder.safetensors').unlink()
    encoder, _ = load(folder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(InputError, match=r'holds None; .* or a TAESD folder with one'):
        spec(vae=tmp_path).load(TAPS)
    save_file({'conv.weight': torch.zeros(2, 2)}, tmp_path / 'x_encoder.safetensors')
    with pytest.raises(InputError, match=r'the tensors of x_encoder\.safetensors are not those of a TAESD encoder'):
        spec(vae=tmp_path).load(TAPS)
    make_tiny(tmp_path)
    with pytest.raises(InputError, match='holds None'):
        spec(vae=tmp_path).load(TAPS)
    with pytest.raises(InputError, match='the latent has 8 channels; DiT expects 4'):
        spec(vae=make_tiny(tmp_path / 'wide', 8)).load(TAPS)


def test_a_vae_in_the_place_of_the_models_own_is_said(model_folder, tmp_path, caplog):
    folder = make_tiny(tmp_path, TINY['DiT']['in_channels'])
    own = DiffusionSpec('DiT', pretrained=str(model_folder('DiT')))
    assert not caplog.records
    tiny = DiffusionSpec('DiT', pretrained=str(model_folder('DiT')), vae=str(folder))
    (record,) = caplog.records
    assert record.getMessage() == f'vae={str(folder)!r} takes the place of the VAE that the model has: features differ'
    assert tiny.load(TAPS).identity != own.load(TAPS).identity
    # A model without one has nothing to take the place of.
    spec(vae=folder)
    assert len(caplog.records) == 1
