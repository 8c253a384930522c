"""Transformers: features against hooks on diffusers' full pass in miniature, and the published sizes on meta."""

from __future__ import annotations

import pytest
import torch

from mmaselect.diffusion.families import FAMILIES, Flux, Flux2, HunyuanDiT, Lumina2, PixArt, QwenImage, ZImage
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
HUNYUAN = dict(
    num_layers=4, num_attention_heads=4, attention_head_dim=16, hidden_size=64, in_channels=4, patch_size=2,
    sample_size=8, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=10, text_len=5,
    text_len_t5=7,
)  # fmt: skip
FLUX2 = dict(
    num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
    axes_dims_rope=(4, 4, 4, 4), in_channels=16, timestep_guidance_channels=32,
)  # fmt: skip
QWEN = dict(
    num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    in_channels=16, out_channels=4,
)  # fmt: skip
ZIMAGE = dict(
    n_layers=3, n_refiner_layers=1, dim=32, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[4, 6, 6],
    in_channels=4, axes_lens=[128, 32, 32],
)  # fmt: skip
LUMINA2 = dict(
    num_layers=3, num_refiner_layers=1, hidden_size=32, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
    axes_dim_rope=(4, 6, 6), axes_lens=(300, 32, 32), cap_feat_dim=12, in_channels=4, sample_size=8,
)  # fmt: skip
CASES = {
    'flux-dev': (Flux, dict(FLUX, guidance_embeds=True)),
    'flux-schnell': (Flux, FLUX),
    'pixart-sigma': (PixArt, PIXART),
    'pixart-alpha': (PixArt, dict(PIXART, use_additional_conditions=True)),
    'hunyuandit-v1.1': (HunyuanDiT, HUNYUAN),
    'hunyuandit-v1.2': (HunyuanDiT, dict(HUNYUAN, use_style_cond_and_image_meta_size=False)),
    'flux2-dev': (Flux2, dict(FLUX2, guidance_embeds=True)),
    'flux2-klein': (Flux2, dict(FLUX2, guidance_embeds=False)),
    'qwen-image': (QwenImage, QWEN),
    'z-image': (ZImage, ZIMAGE),
    'lumina2': (Lumina2, LUMINA2),
}
PROMPT = dict(prompt_embeds=torch.randn(1, 5, 12), pooled_prompt_embeds=torch.randn(1, 10))
PROMPTS = {HunyuanDiT: dict(PROMPT, prompt_embeds_2=torch.randn(1, 7, 16), prompt_mask=torch.ones(1, 12))}
PROMPTS[HunyuanDiT]['prompt_mask'][0, [4, 10, 11]] = 0


def make_network(family, arch):
    network = family.model_class()(**arch)
    initialise(network, 0)
    return network.eval()


def make_family(family, arch, taps, network=None, normalised=False, shift=1.0):
    process, prompt = family.make_process({}, shift), PROMPTS.get(family, PROMPT)
    return family(network or make_network(family, arch), taps, process, normalised, prompt).eval()


def make_latent(family, arch, height=8, width=8, batch=2):
    channels = family.latent_channels(family.complete(arch))
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def pixart(network, latent, timestep, tokens):
    batch, (height, width) = len(latent), latent.shape[2:]
    added = {'resolution': None, 'aspect_ratio': None}
    if network.config.use_additional_conditions:
        added['resolution'] = torch.tensor([[8.0 * height, 8.0 * width]]).expand(batch, -1)
        added['aspect_ratio'] = torch.tensor([[height / width]]).expand(batch, -1)
    network(latent, tokens, torch.full((batch,), timestep), added_cond_kwargs=added)


def flux(network, latent, timestep, tokens):
    from diffusers import FluxPipeline

    batch, channels, height, width = latent.shape
    network(
        hidden_states=FluxPipeline._pack_latents(latent, batch, channels, height, width),
        encoder_hidden_states=tokens,
        pooled_projections=PROMPT['pooled_prompt_embeds'].expand(batch, -1),
        timestep=torch.full((batch,), timestep / 1000),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(height / 2), torch.arange(width / 2)),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((batch,), 3.5) if network.config.guidance_embeds else None,
    )


def hunyuan(network, latent, timestep, tokens):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    batch, (height, width), prompt = len(latent), latent.shape[2:], PROMPTS[HunyuanDiT]
    grid = (height // 2, width // 2)
    network(
        latent,
        # The pipeline's default scheduler has an offset of one step.
        torch.tensor([timestep + 1.0] * batch),
        encoder_hidden_states=tokens,
        text_embedding_mask=prompt['prompt_mask'][:, :5].expand(batch, -1),
        encoder_hidden_states_t5=prompt['prompt_embeds_2'].repeat(batch, 1, 1),
        text_embedding_mask_t5=prompt['prompt_mask'][:, 5:].expand(batch, -1),
        image_meta_size=torch.tensor([[1024.0, 1024, 8 * height, 8 * width, 0, 0]]).repeat(batch, 1),
        style=torch.zeros(batch, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(16, get_resize_crop_region_for_grid(grid, 32), grid, output_type='pt'),
    )


def flux2(network, latent, timestep, tokens):
    from diffusers import Flux2Pipeline

    network(
        hidden_states=Flux2Pipeline._pack_latents(latent),
        encoder_hidden_states=tokens,
        timestep=torch.full((len(latent),), timestep / 1000),
        img_ids=Flux2Pipeline._prepare_latent_ids(latent),
        txt_ids=Flux2Pipeline._prepare_text_ids(tokens),
        guidance=torch.full((len(latent),), 4.0) if network.config.guidance_embeds else None,
    )


def qwen(network, latent, timestep, tokens):
    from diffusers import QwenImagePipeline

    batch, channels, height, width = latent.shape
    network(
        hidden_states=QwenImagePipeline._pack_latents(latent[:, :, None], batch, channels, height, width),
        timestep=torch.full((batch,), timestep / 1000),
        encoder_hidden_states_mask=None,
        encoder_hidden_states=tokens,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
    )


def z_image(network, latent, timestep, tokens):
    time = (1000 - torch.full((len(latent),), float(timestep))) / 1000
    network(list(latent.unsqueeze(2).unbind(0)), time, list(tokens))


def lumina2(network, latent, timestep, tokens):
    mask = torch.ones(tokens.shape[:2], dtype=torch.long)
    network(latent, 1 - torch.full((len(latent),), float(timestep)) / 1000, tokens, mask)


#: A whole pass of each family as its pipeline makes it.
CALLS = {
    PixArt: pixart,
    Flux: flux,
    HunyuanDiT: hunyuan,
    Flux2: flux2,
    QwenImage: qwen,
    ZImage: z_image,
    Lumina2: lumina2,
}


def call(family, network, latent, timestep):
    CALLS[family](network, latent, timestep, PROMPT['prompt_embeds'].expand(len(latent), -1, -1))


def full_pass(family, arch, latent, timestep):
    """Queries, keys, values, attention and outputs of all blocks, as maps, by hooks on the untouched model."""
    network, seen = make_network(family, arch), {}
    rows, columns = (side // (1 if family is Flux2 else 2) for side in latent.shape[2:])

    def listen(module, tap, pick):
        def keep(_, __, output):
            tokens = pick(output)
            tokens = tokens[:, : rows * columns] if family is ZImage else tokens[:, -rows * columns :]
            seen[tap] = tokens.transpose(1, 2).unflatten(2, (rows, columns))

        module.register_forward_hook(keep)

    for number, path in enumerate(family.blocks(network.config)):
        block = network.get_submodule(path)
        (attention,) = (getattr(block, name) for name in ('attn', 'attn1', 'attention') if hasattr(block, name))
        for place, name in enumerate(('query', 'key', 'value')):
            if hasattr(attention, 'to_q'):
                listen(getattr(attention, f'to_{name[0]}'), Tap(number, name), lambda output: output)
            else:
                part = slice(place * 32, (place + 1) * 32)
                listen(attention.to_qkv_mlp_proj, Tap(number, name), lambda output, part=part: output[..., part])
        # A double block's attention gives the image's tokens first; what a tap reads is its projection.
        if hasattr(attention, 'to_q'):
            listen(attention, Tap(number, 'attention'), lambda out: out[0] if isinstance(out, tuple) else out)
        listen(block, Tap(number, 'output'), lambda out: out[1] if isinstance(out, tuple) else out)
    with torch.no_grad():
        call(family, network, latent, timestep)
    return seen


@pytest.mark.parametrize('size', [(8, 8), (8, 12)])
@pytest.mark.parametrize('timestep', [50, 600])
@pytest.mark.parametrize('case', CASES)
def test_every_tap_equals_a_hook_on_the_full_pass(case, timestep, size):
    family, arch = CASES[case]
    latent = make_latent(family, arch, *size)
    expected = full_pass(family, arch, latent, timestep)
    taps = [tap for tap in family.known_taps(arch) if tap.component != 'modulated']
    model = make_family(family, arch, taps)
    with torch.no_grad():
        read = model(latent, timestep)
    assert set(read) == set(expected) == set(taps)
    for tap, maps in read.items():
        torch.testing.assert_close(maps, expected[tap], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        # What is kept of a timestep belongs to no batch.
        more = model(torch.cat([latent, latent[:1]]), timestep)
    for tap, maps in more.items():
        torch.testing.assert_close(maps[[2, 1]], expected[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_what_a_tap_does_not_need_may_be_anything(case):
    family, arch = CASES[case]
    network, latent, tap = make_network(family, arch), make_latent(family, arch, batch=1), Tap(2, 'query')
    used = family.plan(network.config, [tap]).parameters
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in used:
                parameter.fill_(float('nan'))
        found = make_family(family, arch, [tap], network)(latent, 300)[tap]
    assert len(used) < len(make_network(family, arch).state_dict())
    torch.testing.assert_close(found, full_pass(family, arch, latent, 300)[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('component', ['query', 'key'])
@pytest.mark.parametrize('case,block', [
    ('flux-dev', 1), ('flux-dev', 3), ('flux2-dev', 1), ('flux2-dev', 3), ('qwen-image', 1), ('z-image', 1),
    ('lumina2', 1), ('hunyuandit-v1.2', 3),
])  # fmt: skip
def test_query_and_key_after_their_norm(case, block, component):
    family, arch = CASES[case]
    network, seen, tap = make_network(family, arch), [], Tap(block, component)
    attention = family.normalised_sites[component].module.split('.')[0]
    norm = network.get_submodule(f'{family.blocks(network.config)[block]}.{attention}.norm_{component[0]}')
    # HunyuanDiT has heads before tokens.
    order = (0, 2, 1, 3) if family is HunyuanDiT else (0, 1, 2, 3)
    norm.register_forward_hook(lambda _, __, output: seen.append(output.permute(order).flatten(2)))
    latent = make_latent(family, arch, 8, 12, batch=1)
    with torch.no_grad():
        call(family, network, latent, 300)
        found = make_family(family, arch, [tap], normalised=True)(latent, 300)[tap]
    count = found[0, 0].numel()
    tokens = seen[0][:, :count] if family is ZImage else seen[0][:, -count:]
    torch.testing.assert_close(found.flatten(2), tokens.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case,told', [
    ('flux2-dev', lambda t: t / 1000), ('qwen-image', lambda t: t / 1000), ('z-image', lambda t: (1000 - t) / 1000),
    ('lumina2', lambda t: 1 - t / 1000),
])  # fmt: skip
def test_process_and_time_are_those_of_the_scheduler(case, told):
    """Their pipelines come with Euler's flow matching, and make of its timesteps what the network is told."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    family, arch = CASES[case]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    model, latent = make_family(family, arch, [Tap(0, 'query')], shift=3.0), make_latent(family, arch)
    noise = torch.randn_like(latent)
    for step in (1, 5, 9):
        sigma = scheduler.sigmas[step].item()
        # What a shift of 3 has made of it.
        timestep = 1000 * sigma / (3 - 2 * sigma)
        assert model.time(timestep) == pytest.approx(told(scheduler.timesteps[step].item()), abs=1e-5)
        expected = scheduler.scale_noise(latent, scheduler.timesteps[step : step + 1], noise)
        torch.testing.assert_close(model.process.add_noise(latent, noise, timestep), expected)


def test_hunyuandits_process_is_that_of_its_scheduler():
    from diffusers import DDPMScheduler

    config = dict(beta_start=0.00085, beta_end=0.018, beta_schedule='scaled_linear', steps_offset=1)
    scheduler = DDPMScheduler(**config, timestep_spacing='leading', prediction_type='v_prediction')
    scheduler.set_timesteps(20)
    process = HunyuanDiT.make_process({}, 1.0)
    assert process.network_timestep(50) == scheduler.timesteps[-2] == 51
    latent, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = scheduler.add_noise(latent, noise, torch.tensor([51]))
    torch.testing.assert_close(process.add_noise(latent, noise, 50), expected)


@pytest.mark.parametrize(
    'family,arch,millions,blocks,channels',
    # Model cards: 12, 0.6, 1.5 (arXiv 2405.08748), 32, 4, 9, 20 (2508.02324), 6.15 (2511.22699) and 2.6 (2503.21758)
    # billion parameters.
    [
        ('Flux', 'flux.1-dev', 11901.4, 57, 3072),
        ('Flux', 'flux.1-schnell', 11891.2, 57, 3072),
        ('PixArt', 'pixart-alpha-512', 610.9, 28, 1152),
        ('PixArt', 'pixart-alpha-1024', 611.3, 28, 1152),
        ('PixArt', 'pixart-sigma-1024', 610.9, 28, 1152),
        ('HunyuanDiT', 'hunyuandit-v1.1', 1516.5, 40, 1408),
        ('HunyuanDiT', 'hunyuandit-v1.2', 1500.0, 40, 1408),
        ('Flux2', 'flux.2-dev', 32223.3, 56, 6144),
        ('Flux2', 'flux.2-klein-4b', 3875.5, 25, 3072),
        ('Flux2', 'flux.2-klein-9b', 9078.6, 32, 4096),
        ('QwenImage', 'qwen-image', 20430.4, 60, 3072),
        ('ZImage', 'z-image', 6154.9, 30, 3840),
        ('Lumina2', 'lumina-image-2.0', 2609.8, 26, 2304),
    ],
)
def test_the_published_architectures(family, arch, millions, blocks, channels):
    spec = DiffusionSpec(family, arch=arch)
    network = FAMILIES[family]._network(spec.config)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert spec.num_blocks == blocks
    taps = [Tap(block, name) for block in (0, blocks - 1) for name in ('query', 'output')]
    assert spec.shapes(taps) == dict.fromkeys(taps, (channels, 16))


@pytest.mark.parametrize('name', CASES)
def test_the_quick_dry_run_finds_what_torchs_own_operators_do(name, monkeypatch):
    from mmaselect.diffusion import family as module
    from mmaselect.diffusion import network

    family, arch = CASES[name]
    if not family.is_available():
        pytest.skip(f'diffusers is older than {family.least_diffusers}')
    config = family.complete(arch)
    taps = family.known_taps(config)[-3:]
    quick = family.plan(config, taps)
    monkeypatch.setattr(network, 'QUICK', {})
    monkeypatch.setattr(module, '_plan', module._plan.__wrapped__)
    assert family.plan(config, taps) == quick
