"""The early-exit forward pass against hooks on diffusers' own full forward pass."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, family_of, make_transformer

from mmaselect.diffusion.families import FAMILIES
from mmaselect.diffusion.taps import COMPONENTS, Tap, make_taps
from mmaselect.errors import InputError

VARIANTS = ('SD3', 'SD3.5-medium', 'SD3.5-large', 'DiT', 'SiT')
KNOWN = [Tap(block, component) for block in range(4) for component in COMPONENTS]
PROMPT = dict(prompt_embeds=torch.randn(1, 5, 32), pooled_prompt_embeds=torch.randn(1, 24))


class Stop(Exception):
    """Ends diffusers' forward pass before DiT's unpatchify, which only knows squares."""


def diffusers_maps(variant, latent, timestep, block, normalised=False):
    """Every component of a block, from hooks on the untouched diffusers model."""
    model = make_transformer(variant)
    module = model.transformer_blocks[block]
    attention = module.attn if family_of(variant) == 'SD3' else module.attn1
    rows, columns = (side // model.config.patch_size for side in latent.shape[-2:])
    seen = {}

    def keep(name, pick=lambda output: output):
        def hook(_, __, output):
            seen[name] = pick(output)

        return hook

    module.norm1.register_forward_hook(keep('modulated', lambda output: output[0]))
    for name, layer, norm in (
        ('query', attention.to_q, attention.norm_q),
        ('key', attention.to_k, attention.norm_k),
        ('value', attention.to_v, None),
    ):
        if normalised and norm is not None:
            norm.register_forward_hook(keep(name, lambda output: output.transpose(1, 2).flatten(2)))
        else:
            layer.register_forward_hook(keep(name))
    attention.register_forward_hook(
        keep('attention', lambda output: output[0] if isinstance(output, tuple) else output)
    )

    def stop(_, __, output):
        seen['output'] = output[1] if isinstance(output, tuple) else output
        raise Stop

    module.register_forward_hook(stop)
    batch = len(latent)
    if family_of(variant) == 'SD3':
        condition = dict(
            encoder_hidden_states=PROMPT['prompt_embeds'].expand(batch, -1, -1),
            pooled_projections=PROMPT['pooled_prompt_embeds'].expand(batch, -1),
        )
    else:
        condition = dict(class_labels=torch.full((batch,), model.config.num_embeds_ada_norm))
    time = 1 - timestep / 1000 if variant == 'SiT' else timestep
    with torch.no_grad(), pytest.raises(Stop):
        model(latent, timestep=torch.full((batch,), float(time)), **condition)
    return {name: value.transpose(1, 2).unflatten(2, (rows, columns)) for name, value in seen.items()}


def make_family(variant, taps, normalised=False, transformer=None):
    family = FAMILIES[family_of(variant)]
    transformer = make_transformer(variant) if transformer is None else transformer
    return family(transformer, taps, family.make_process({}, 1.0), normalised, PROMPT).eval()


def our_maps(variant, latent, timestep, taps, normalised=False):
    with torch.no_grad():
        return make_family(variant, taps, normalised)(latent, timestep)


def make_latent(variant, height=8, width=8, batch=2):
    return torch.randn(batch, TINY[variant]['in_channels'], height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('block', (0, 2, 3))
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_component_equals_a_hook_on_the_full_forward_pass(variant, block):
    latent = make_latent(variant)
    expected = diffusers_maps(variant, latent, 250, block)
    for component in COMPONENTS:
        tap = Tap(block, component)
        actual = our_maps(variant, latent, 250, (tap,))
        assert list(actual) == [tap]
        torch.testing.assert_close(actual[tap], expected[component], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_many_taps_in_one_pass_equal_single_ones(variant):
    latent = make_latent(variant)
    taps = make_taps([1, 3], ['query', 'output'], KNOWN)
    together = our_maps(variant, latent, 700, taps)
    assert set(together) == set(taps)
    for block in (1, 3):
        expected = diffusers_maps(variant, latent, 700, block)
        for component in ('query', 'output'):
            torch.testing.assert_close(together[Tap(block, component)], expected[component], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_images_need_not_be_square(variant):
    latent = make_latent(variant, height=6, width=14)
    tap = Tap(2, 'query')
    actual = our_maps(variant, latent, 400, (tap,))[tap]
    assert actual.shape == (2, 64, 3, 7)
    torch.testing.assert_close(actual, diffusers_maps(variant, latent, 400, 2)['query'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('component', ('query', 'key', 'value'))
def test_query_and_key_after_normalisation(component):
    latent = make_latent('SD3.5-medium')
    tap = Tap(3, component)
    actual = our_maps('SD3.5-medium', latent, 250, (tap,), normalised=True)[tap]
    expected = diffusers_maps('SD3.5-medium', latent, 250, 3, normalised=True)[component]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if component != 'value':
        before = diffusers_maps('SD3.5-medium', latent, 250, 3)[component]
        assert not torch.allclose(actual, before, atol=0.1)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('component', COMPONENTS)
def test_what_is_kept_is_what_is_needed(variant, component):
    """Everything else may be NaN."""
    latent, taps = make_latent(variant), (Tap(2, component),)
    expected = our_maps(variant, latent, 100, taps)[taps[0]]
    transformer = make_transformer(variant)
    used = FAMILIES[family_of(variant)].plan(transformer.config, taps).parameters
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name not in used:
                parameter.fill_(float('nan'))
    model = make_family(variant, taps, transformer=transformer)
    assert {name for name, _ in transformer.named_parameters()} == used
    with torch.no_grad():
        assert torch.equal(model(latent, 100)[taps[0]], expected)
    attention = 'attn' if family_of(variant) == 'SD3' else 'attn1'
    block = {name.removeprefix('transformer_blocks.2.') for name in used}
    assert not any('transformer_blocks.3' in name for name in used)
    assert any(name.startswith('ff.') for name in block) == (component == 'output')
    assert (f'{attention}.to_out.0.weight' in block) == (component in ('attention', 'output'))
    assert (f'{attention}.to_k.weight' in block) == (component in ('key', 'value', 'attention', 'output'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_dry_run_knows_sizes_and_order(variant):
    taps = make_taps([2, 0], ['output', 'query', 'attention'], KNOWN)
    plan = FAMILIES[family_of(variant)].plan(TINY[variant], taps)
    assert list(plan.shapes) == [Tap(block, name) for block in (0, 2) for name in ('query', 'attention', 'output')]
    assert set(plan.shapes.values()) == {(64, 2)}
    maps = our_maps(variant, make_latent(variant), 100, taps)
    assert list(maps) == list(plan.shapes)


def test_latents_that_do_not_fit_are_named():
    with pytest.raises(InputError, match='latent of 1x8 is smaller than one cell of 2x2'):
        our_maps('DiT', make_latent('DiT', height=1), 0, (Tap(0, 'query'),))
    with pytest.raises(InputError, match='latent of 7x8 is not a multiple of 2'):
        our_maps('DiT', make_latent('DiT', height=7), 0, (Tap(0, 'query'),))
    with pytest.raises(InputError, match='latent has 16 channels; DiT expects 4'):
        our_maps('DiT', make_latent('SD3'), 0, (Tap(0, 'query'),))


def test_taps_are_checked():
    with pytest.raises(InputError, match='block=4 is out of range: the model has 4 blocks, 0 to 3'):
        make_taps(4, 'query', KNOWN)
    with pytest.raises(InputError, match=r"component='queries' is not known; choose from: modulated, query, key"):
        make_taps(0, 'queries', KNOWN)


@pytest.mark.parametrize(
    'name,blocks,channels',
    [
        ('sd3-medium', 24, 1536),
        ('sd3.5-medium', 24, 1536),
        ('sd3.5-large', 38, 2432),
    ],
)
def test_the_real_sd3_architectures(name, blocks, channels):
    """Numbers of the published models; their sizes (position table included) are checked on the meta device."""
    config = FAMILIES['SD3'].architectures[name]
    with torch.device('meta'):
        model = FAMILIES['SD3'].build(FAMILIES['SD3'].complete(config))
    taps = [Tap(block, name) for block in range(blocks) for name in ('query', 'output')]
    plan = FAMILIES['SD3'].plan(FAMILIES['SD3'].complete(config), taps)
    assert (len(model.transformer_blocks), set(plan.shapes.values())) == (blocks, {(channels, 2)})
    dual = [block.attn2 is not None for block in model.transformer_blocks]
    assert dual == [name == 'sd3.5-medium' and index < 13 for index in range(blocks)]
    # arXiv 2403.03206 and the model cards: 2.0, 2.5 and 8.1 billion parameters.
    published = {'sd3-medium': 2.0e9, 'sd3.5-medium': 2.5e9, 'sd3.5-large': 8.1e9}[name]
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    'name,millions', [('dit-s/2-256', 33), ('dit-b/2-256', 130), ('dit-l/2-256', 458), ('dit-xl/2-512', 675)]
)
def test_the_real_dit_architectures(name, millions):
    """arXiv 2212.09748, table 1. Diffusers has embeddings of timestep and class in every block, the paper one."""
    config = FAMILIES['DiT'].architectures[name]
    model = FAMILIES['DiT']._network(FAMILIES['DiT'].complete(config))
    embedding = sum(parameter.numel() for parameter in model.transformer_blocks[0].norm1.emb.parameters())
    count = sum(parameter.numel() for parameter in model.parameters()) - (config['num_layers'] - 1) * embedding
    assert count / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_quick_dry_run_finds_what_torchs_own_operators_do(variant, monkeypatch):
    from mmaselect.diffusion import family, network

    taps = [Tap(1, 'query'), Tap(3, 'output')]
    config, kind = make_transformer(variant).config, FAMILIES[family_of(variant)]
    quick = kind.plan(config, taps)
    monkeypatch.setattr(network, 'QUICK', {})
    monkeypatch.setattr(family, '_plan', family._plan.__wrapped__)
    assert kind.plan(config, taps) == quick
