"""FLUX and PixArt: features against hooks on diffusers' full pass in miniature, and the published sizes on meta."""

from __future__ import annotations

import pytest
import torch

from mmaselect.diffusion.families import FAMILIES, Flux, PixArt
from mmaselect.diffusion.loading import initialise
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap

FLUX = dict(
    num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
    pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), in_channels=16,
)  # fmt: skip
PIXART = dict(
    num_layers=3, attention_head_dim=12, num_attention_heads=4, cross_attention_dim=48, sample_size=8,
    caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
)  # fmt: skip
CASES = {
    'flux-dev': (Flux, dict(FLUX, guidance_embeds=True)),
    'flux-schnell': (Flux, FLUX),
    'pixart-sigma': (PixArt, PIXART),
    'pixart-alpha': (PixArt, dict(PIXART, use_additional_conditions=True)),
}
PROMPT = dict(prompt_embeds=torch.randn(1, 5, 12), pooled_prompt_embeds=torch.randn(1, 10))


def make_network(family, arch):
    network = family.model_class()(**arch)
    initialise(network, 0)
    return network.eval()


def call(family, arch, network, latent, timestep):
    """A whole pass as diffusers' pipelines make it."""
    batch, (height, width) = len(latent), latent.shape[2:]
    tokens = PROMPT['prompt_embeds'].expand(batch, -1, -1)
    if family is PixArt:
        added = {'resolution': None, 'aspect_ratio': None}
        if arch['use_additional_conditions']:
            added['resolution'] = torch.tensor([[8.0 * height, 8.0 * width]]).expand(batch, -1)
            added['aspect_ratio'] = torch.tensor([[height / width]]).expand(batch, -1)
        network(latent, tokens, torch.full((batch,), timestep), added_cond_kwargs=added)
        return
    from diffusers import FluxPipeline

    packed = FluxPipeline._pack_latents(latent, batch, latent.shape[1], height, width)
    network(
        hidden_states=packed,
        encoder_hidden_states=tokens,
        pooled_projections=PROMPT['pooled_prompt_embeds'].expand(batch, -1),
        timestep=torch.full((batch,), timestep / 1000),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latent.device, latent.dtype),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((batch,), 3.5) if network.config.guidance_embeds else None,
    )


def full_pass(family, arch, latent, timestep):
    """Queries, keys, values, attention and outputs of all blocks, as maps, by hooks on the untouched model."""
    network, seen = make_network(family, arch), {}
    rows, columns = (side // 2 for side in latent.shape[2:])
    for number, path in enumerate(family.blocks(network.config)):
        block = network.get_submodule(path)
        attention = block.attn1 if family is PixArt else block.attn
        modules = dict(
            query=attention.to_q, key=attention.to_k, value=attention.to_v, attention=attention, output=block
        )
        for name, module in modules.items():

            def keep(_, __, output, number=number, name=name):
                if isinstance(output, tuple):
                    output = output[0 if name == 'attention' else 1]
                seen[Tap(number, name)] = output[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))

            module.register_forward_hook(keep)
    if family is Flux:
        # A double block's attention gives the image's tokens first; what a tap reads is its projection.
        assert family.catalogue(network)[Tap(0, 'attention')].module == 'transformer_blocks.0.attn.to_out.0'
    with torch.no_grad():
        call(family, arch, network, latent, timestep)
    return seen


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
@pytest.mark.parametrize('timestep', [50, 600])
@pytest.mark.parametrize('case', CASES)
def test_every_tap_equals_a_hook_on_the_full_pass(case, timestep, size):
    family, arch = CASES[case]
    network = make_network(family, arch)
    latent = torch.randn(2, family.latent_channels(network.config), *size, generator=torch.Generator().manual_seed(1))
    expected = full_pass(family, arch, latent, timestep)
    taps = [tap for tap in family.catalogue(network) if tap.component != 'modulated']
    model = family(network, taps, family.make_process({}, 1.0), prompt=PROMPT).eval()
    with torch.no_grad():
        read = model(latent, timestep)
    assert set(read) == set(expected) == set(taps)
    for tap, maps in read.items():
        torch.testing.assert_close(maps, expected[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_what_a_tap_does_not_need_may_be_anything(case):
    family, arch = CASES[case]
    network = make_network(family, arch)
    latent = torch.randn(1, family.latent_channels(network.config), 8, 8, generator=torch.Generator().manual_seed(1))
    tap = Tap(2, 'query')
    used = family.plan(network.config, [tap]).parameters
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in used:
                parameter.fill_(float('nan'))
        found = family(network, [tap], family.make_process({}, 1.0), prompt=PROMPT).eval()(latent, 300)[tap]
    torch.testing.assert_close(found, full_pass(family, arch, latent, 300)[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('component', ['query', 'key'])
@pytest.mark.parametrize('block', [1, 3])
def test_query_and_key_of_flux_after_their_norm(block, component):
    family, arch = CASES['flux-dev']
    network, seen, tap = make_network(family, arch), [], Tap(block, component)
    norm = network.get_submodule(family.blocks(network.config)[block]).attn.get_submodule(f'norm_{component[0]}')
    norm.register_forward_hook(lambda _, __, output: seen.append(output.flatten(2)))
    latent = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        call(family, arch, network, latent, 300)
        model = family(make_network(family, arch), [tap], family.make_process({}, 1.0), True, PROMPT).eval()
        found = model(latent, 300)[tap]
    torch.testing.assert_close(found, seen[0][:, -24:].transpose(1, 2).unflatten(2, (4, 6)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'family,arch,millions,blocks,channels',
    # Model cards: 12 and 0.6 billion parameters.
    [
        ('Flux', 'flux.1-dev', 11901.4, 57, 3072),
        ('Flux', 'flux.1-schnell', 11891.2, 57, 3072),
        ('PixArt', 'pixart-alpha-512', 610.9, 28, 1152),
        ('PixArt', 'pixart-alpha-1024', 611.3, 28, 1152),
        ('PixArt', 'pixart-sigma-1024', 610.9, 28, 1152),
    ],
)
def test_the_published_architectures(family, arch, millions, blocks, channels):
    spec = DiffusionSpec(family, arch=arch)
    network = FAMILIES[family]._network(spec.config)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert spec.num_blocks == blocks
    taps = [Tap(block, name) for block in (0, blocks - 1) for name in ('query', 'output')]
    assert spec.shapes(taps) == dict.fromkeys(taps, (channels, 16))
