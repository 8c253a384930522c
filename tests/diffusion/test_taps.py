"""Taps by the path of a module."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, make_transformer
from test_families import PROMPT, make_latent

from mmaselect.backbones import ASelectDiT
from mmaselect.diffusion.families import FAMILIES
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

PIXELS = dict(type='SiT', latent='pixels', arch=dict(TINY['DiT'], in_channels=3, out_channels=3))


@pytest.mark.parametrize(
    'variant,path,block',
    [
        ('DiT', 'transformer_blocks.2.ff.net.0', 2),
        ('DiT', 'pos_embed', 0),
        ('SD3.5-medium', 'transformer_blocks.1.ff', 1),
        ('SD3.5-medium', 'transformer_blocks.1.attn2.to_v', 1),
    ],
)
def test_any_module_of_the_network_is_a_tap(variant, path, block):
    family = FAMILIES['SD3' if 'SD3' in variant else variant]
    transformer, latent, seen = make_transformer(variant), make_latent(variant, 6, 14), []
    tap = family.tap(dict(transformer.config), path)
    assert tap == Tap(block, path)
    model = family(make_transformer(variant), (tap,), family.make_process({}, 1.0), False, PROMPT).eval()
    with torch.no_grad():
        maps = model(latent, 250)[tap]
        transformer.get_submodule(path).register_forward_hook(lambda *_: seen.append(_[-1]))
        prompt = {name: value.expand(2, *value.shape[1:]) for name, value in PROMPT.items()}
        arguments = family.condition(transformer.config, latent, prompt)
        # DiT's last layer, behind every tap, only knows squares.
        transformer.proj_out = transformer.proj_out_2 = torch.nn.Identity()
        try:
            transformer(latent, timestep=torch.full((2,), 250.0), **arguments)
        except RuntimeError:
            assert variant == 'DiT'
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), seen[0], rtol=1e-5, atol=1e-5)
    assert maps.shape[2:] == (3, 7)


def test_a_path_that_a_short_name_has_is_that_tap():
    config = DiffusionSpec(**PIXELS).config
    assert FAMILIES['SiT'].tap(config, 'transformer_blocks.1.attn1.to_q') == Tap(1, 'query')
    assert FAMILIES['SiT'].tap(config, '1-query') == Tap(1, 'query')


def test_paths_in_a_config():
    path = 'transformer_blocks.2.ff'
    backbone = ASelectDiT(PIXELS, taps=[path, '1-output'], timestep=100).eval()
    assert backbone.out_channels == (64, 64)
    assert [tuple(maps.shape) for maps in backbone(torch.rand(2, 3, 8, 8))] == [(2, 64, 4, 4)] * 2
    again = ASelectDiT(PIXELS, taps=[path, '1-output'], timestep='auto').eval()
    again.load_state_dict(backbone.state_dict())
    assert again.taps == (Tap(2, path), Tap(1, 'output'))


@pytest.mark.parametrize('path', ['transformer_blocks.9.ff', 'ff', '', 3])
def test_paths_that_are_none(path):
    with pytest.raises(
        InputError, match=r'taps=.* is not known: give the path of a module of DiTTransformer2DModel, or'
    ):
        ASelectDiT(PIXELS, taps=[path], timestep=100)


def test_modules_that_read_no_image():
    with pytest.raises(InputError, match=r'a tensor of \(64,\) per image is no map: choose another module for taps'):
        ASelectDiT(PIXELS, taps=['transformer_blocks.0.norm1.emb'], timestep=100)
