"""Rows on one pass of one model: what is computed, how fast, and what stays in memory."""

import time
from pathlib import Path

import torch

from benchmarks.common import BLOCK, UNET, Baseline, Row, count_multiply_adds, interleave
from mmaselect import cli
from mmaselect.diffusion.conditioning import zero_prompt
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap


def bench_features(args, folder):
    device = torch.device(args.device)
    baseline = Baseline(folder, device)
    tap = Tap(BLOCK, 'query')
    model = DiffusionSpec(type='SD3', pretrained=str(folder), device=args.device).load((tap,))
    latent = torch.randn(args.batch_size, 16, args.size // 8, args.size // 8, device=device)
    noise = torch.zeros_like(latent)

    def ours():
        return model(latent, noise, 0.0)[tap]

    def theirs():
        return baseline(latent, 0.0)

    difference = (ours() - theirs()).abs().max().item()
    if difference > 1e-4:
        raise cli.InputError(f'the features differ by {difference:.2g}: nothing was timed')
    possible = count_multiply_adds(theirs) / count_multiply_adds(ours)
    mine, other = interleave(args.repeats, ours, theirs)
    return [
        Row(
            f'features of block {BLOCK} of 24, query', "diffusers' full forward with a hook", f'{mine:.3f} s',
            f'{other:.3f} s', other / mine, max(1.7, 0.95 * possible),
            f'{possible:.2f}x fewer multiply-adds; largest difference {difference:.1g}',
        )
    ]  # fmt: skip


def bench_unet(args, folder):
    """GDF's set of SD1.5: what GDF runs is the whole network with hooks."""
    from diffusers import UNet2DConditionModel

    from mmaselect.diffusion.loading import initialise

    device = torch.device(args.device)
    spec = DiffusionSpec(type='UNet', arch=UNET, prompt='zeros', device=args.device)
    (taps,) = spec.alternatives(None, None, 'gdf-sd15')
    model, full, read = spec.load(taps), UNet2DConditionModel(**UNET).eval(), {}
    initialise(full, spec.seed)
    full.to(device)
    for tap, site in spec.family.find(full, taps, False).items():
        layer = full.get_submodule(site.module)
        layer.register_forward_hook(lambda module, inputs, output, tap=tap: read.update({tap: output}))
    prompt = zero_prompt({'prompt_embeds': UNET['cross_attention_dim']}, 77)['prompt_embeds'].to(device)
    latent = torch.randn(args.batch_size, 4, args.size // 8, args.size // 8, device=device)
    noise, step = torch.zeros_like(latent), model.family.process.network_timestep(0)
    noisy = model.family.process.add_noise(latent, noise, 0)

    def ours():
        return model(latent, noise, 0.0)

    @torch.no_grad()
    def theirs():
        full(noisy, step, prompt.expand(len(noisy), -1, -1))
        return read

    for tap, found in ours().items():
        expected = theirs()[tap]
        tokens = expected.flatten(2) if expected.dim() == 4 else expected.transpose(1, 2)
        difference = ((found.flatten(2) - tokens).norm() / tokens.norm()).item()
        if difference > 1e-4:
            raise cli.InputError(f'the features of {tap} differ by {difference:.2g}: nothing was timed')
    possible = count_multiply_adds(theirs) / count_multiply_adds(ours)
    mine, other = interleave(args.repeats, ours, theirs)
    return [
        Row(
            "GDF's set of SD1.5, four activations", "diffusers' full forward with hooks, as GDF runs it",
            f'{mine:.3f} s', f'{other:.3f} s', other / mine, 0.95 * possible, f'{possible:.2f}x fewer multiply-adds',
        )
    ]  # fmt: skip


def count_at_512():
    """Multiply-adds of SD3.5-medium for 512 pixels: its blocks up to ``BLOCK``, its encoder, the tiny one."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    from mmaselect.diffusion.families import SD3
    from mmaselect.diffusion.latent import VAE_CONFIGS

    config = SD3.complete(SD3.architectures['sd3.5-medium'])
    with torch.device('meta'), torch.no_grad():
        widths = SD3.prompt_widths(type('Config', (), config))
        prompt = {name: value.to('meta') for name, value in zero_prompt(widths, SD3.prompt_tokens).items()}
        family = SD3(SD3.build(config), [Tap(BLOCK, 'query')], SD3.make_process({}, 1.0), prompt=prompt)
        blocks = count_multiply_adds(lambda: family.read(torch.empty(1, 16, 64, 64), 0, lambda tap, value: None))
        images = torch.empty(1, 3, 512, 512)
        encoders = (AutoencoderKL(**VAE_CONFIGS[16]), AutoencoderTiny(latent_channels=16))
        return blocks, *(count_multiply_adds(lambda vae=vae: vae.encode(images)) for vae in encoders)


def bench_encoder(args, folder):
    """The encoder's share of a pass of SD3.5-medium at 512 pixels: multiply-adds, counted on the meta device."""
    blocks, *encoders = count_at_512()
    full, tiny = (100 * encoder / (encoder + blocks) for encoder in encoders)
    return [
        Row(
            'share of the tiny encoder in a pass at 512 pixels', 'share of the full encoder', f'{tiny:.1f} %',
            f'{full:.1f} %', full / tiny, full / 3, f'of multiply-adds up to block {BLOCK}, query; the target is 3 %',
        )
    ]  # fmt: skip


def bench_settled(args, folder):
    """Weights in memory before and after the timestep is chosen, what is kept in their place counted."""
    from torch.utils._pytree import tree_leaves

    tap, device = Tap(BLOCK, 'query'), torch.device(args.device)
    model = DiffusionSpec(type='SD3', pretrained=str(folder), device=args.device).load((tap,))
    latent = torch.randn(args.batch_size, 16, args.size // 8, args.size // 8, device=device)

    def used():
        kept = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for outputs in model.family._constants._known.values()
            for value in tree_leaves(list(outputs.values()))
        }
        return sum(one.nbytes for one in model.family.transformer.parameters()) + sum(kept.values())

    before = used()
    expected = model(latent, torch.zeros_like(latent), 500.0)[tap]
    model.settle_on([500.0])
    for _ in range(2):
        if not torch.equal(model(latent, torch.zeros_like(latent), 500.0)[tap], expected):
            raise cli.InputError('features differ once the weights behind constants are dropped')
    after = used()
    return [
        Row(
            f'weights up to block {BLOCK} in memory, timestep chosen', 'the same before', f'{after / 1e6:.0f} MB',
            f'{before / 1e6:.0f} MB', before / after, 1.4, 'constants kept instead counted; features equal to the bit',
        )
    ]  # fmt: skip


#: What a config can ask for, and how far from eager float32 it may be: largest relative error of a map.
WORDS = {'compile=True': (dict(compile=True), 1e-5), "dtype='bfloat16'": (dict(dtype='bfloat16'), 2e-2)}


def processor(device):
    """What a CPU has for bfloat16, in words."""
    if device != 'cpu':
        return ''
    cpuinfo = Path('/proc/cpuinfo')
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    has = [name for name in ('amx_bf16', 'avx512_bf16') if name in flags]
    return f'; this processor has {" and ".join(has) or "no instruction for it: torch converts to float32 and back"}'


def bench_words(args, folder):
    """The same features, compiled and in half precision."""
    tap, device = Tap(BLOCK, 'query'), torch.device(args.device)

    def load(**options):
        spec = DiffusionSpec(type='SD3', pretrained=str(folder), device=args.device, **options)
        return spec.load((tap,))

    eager = load()
    latent = torch.randn(args.batch_size, 16, args.size // 8, args.size // 8, device=device)
    noise = torch.zeros_like(latent)
    expected = eager(latent, noise, 0.0)[tap]
    rows = []
    for name, (options, allowed) in WORDS.items():
        model = load(**options)
        started = time.perf_counter()
        found = model(latent, noise, 0.0)[tap].float()
        first = time.perf_counter() - started
        difference = ((found - expected).norm() / expected.norm()).item()
        if difference > allowed:
            raise cli.InputError(f'with {name} the features differ by {difference:.2g}: nothing was timed')
        works = [lambda model=model: model(latent, noise, 0.0) for model in (model, eager)]
        mine, other = interleave(args.repeats, *works)
        rows.append(
            Row(
                f'features of block {BLOCK}, {name}', 'eager, float32', f'{mine:.3f} s', f'{other:.3f} s', other / mine,
                1.0,
                f'relative error {difference:.1g}; the first pass takes {first:.1f} s'
                f'{processor(args.device) if "bfloat16" in name else ""}',
            )
        )  # fmt: skip
    return rows
