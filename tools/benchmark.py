"""Times mmaselect against what one would write with diffusers alone, and prints one table.

Both sides of a ratio run in one process (of a row about memory: in one process each), interleaved, and the medians are
compared. Before anything is timed, their features are checked to be equal. Random weights of the real architectures,
scaled down to fit a CPU: nothing needs to be downloaded.
"""

import argparse
import copy
import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.diffusion.conditioning import zero_prompt
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap

#: SD3.5-medium's shape: 24 blocks, dual attention in the first 13, RMS norms; a quarter of its width.
SHAPE = dict(
    num_layers=24,
    num_attention_heads=6,
    attention_head_dim=64,
    joint_attention_dim=1024,
    caption_projection_dim=384,
    pooled_projection_dim=512,
    pos_embed_max_size=96,
    sample_size=32,
    in_channels=16,
    out_channels=16,
    dual_attention_layers=tuple(range(13)),
    qk_norm='rms_norm',
)
BLOCK = 12


@dataclass
class Row:
    """One line of the table.

    Attributes:
        work: What is done.
        against: What it is compared with.
        ours: Our number, with its unit.
        theirs: The other's.
        ratio: How many times better ours is.
        target: What the ratio must reach.
        note: What else is to be known.
    """

    work: str
    against: str
    ours: str
    theirs: str
    ratio: float
    target: float
    note: str = ''

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio >= self.target


def interleave(repeats, *works, clock=time.perf_counter):
    """Median seconds of each work, run in turns, after one run of each that does not count."""
    times = [[] for _ in works]
    for repeat in range(repeats + 1):
        for number, work in enumerate(works):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[number].append(clock() - started)
    return [statistics.median(values) for values in times]


def count_multiply_adds(work):
    """Multiply-adds of a piece of work, attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def make_prompt():
    """Zeros in the place of the constant prompt."""
    widths = {'prompt_embeds': 'joint_attention_dim', 'pooled_prompt_embeds': 'pooled_projection_dim'}
    return zero_prompt({name: SHAPE[field] for name, field in widths.items()}, 333)


def save_model(folder):
    """Writes the model as a diffusers folder: transformer with random weights, VAE with the real one's architecture."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
    from mmaselect.diffusion.latent import VAE_CONFIGS
    from mmaselect.diffusion.loading import Source, initialise

    transformer = SD3Transformer2DModel(**SHAPE)
    initialise(transformer, 0)
    # Several shards, as large models come in: those that are not needed need not be opened.
    transformer.save_pretrained(folder / 'transformer', max_shard_size='50MB')
    narrow = dict(VAE_CONFIGS[16], block_out_channels=(32, 64, 128, 128))
    AutoencoderKL(**narrow).save_pretrained(folder / 'vae')
    save_prompt(default_prompt_file(Source(folder)), make_prompt(), '', 'benchmark')
    return folder


class Baseline(nn.Module):
    """A diffusers transformer and VAE with a forward hook on the query projection of one block."""

    def __init__(self, folder, device):
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        super().__init__()
        self.transformer = SD3Transformer2DModel.from_pretrained(folder / 'transformer').to(device).eval()
        self.vae = AutoencoderKL.from_pretrained(folder / 'vae').to(device).eval()
        self.read = {}
        layer = self.transformer.transformer_blocks[BLOCK].attn.to_q
        layer.register_forward_hook(lambda module, inputs, output: self.read.update(query=output))
        self.prompt, self.pooled = (value.to(device) for value in make_prompt().values())

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to clean latents."""
        mean = self.vae.encode(images).latent_dist.mode()
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def forward(self, latent: Tensor, timestep: float) -> Tensor:
        """The query of the block as a map, from a whole forward pass."""
        batch = len(latent)
        self.transformer(
            hidden_states=latent,
            encoder_hidden_states=self.prompt.expand(batch, -1, -1),
            pooled_projections=self.pooled.expand(batch, -1),
            timestep=torch.full((batch,), float(timestep), device=latent.device),
        )
        rows, columns = (side // 2 for side in latent.shape[2:])
        return self.read.pop('query').transpose(1, 2).unflatten(2, (rows, columns))


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


#: SD1.5's shape at a quarter of its width.
UNET = dict(
    sample_size=64, block_out_channels=(80, 160, 320, 320), norm_num_groups=16, cross_attention_dim=192,
    attention_head_dim=8,
)  # fmt: skip


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


#: A miniature of each family: large enough that a pass takes more than 50 ms, small enough for two cores.
WIDE = dict(num_attention_heads=6, attention_head_dim=64)
ROPE = dict(WIDE, joint_attention_dim=256, axes_dims_rope=(16, 24, 24), in_channels=64)
MINIATURES = {
    'SD3': (dict(SHAPE, num_layers=12), None),
    'DiT': (dict(WIDE, num_layers=12, in_channels=4, out_channels=8, sample_size=32), None),
    'SiT': (dict(WIDE, num_layers=12, in_channels=4, out_channels=8, sample_size=32), None),
    'UNet': (UNET, 'gdf-sd15'),
    'ADM': (
        dict(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128, 128),
            attention_head_dim=32, norm_num_groups=16,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
            up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        ),
        ['mid-repeat1-res-out'],
    ),
    'PixArt': (
        dict(WIDE, num_layers=12, cross_attention_dim=384, caption_channels=256, sample_size=32, norm_num_groups=4,
             use_additional_conditions=False),
        None,
    ),
    'Sana': (
        dict(num_layers=12, num_attention_heads=12, attention_head_dim=32, num_cross_attention_heads=6,
             cross_attention_head_dim=64, cross_attention_dim=384, caption_channels=256, sample_size=32),
        None,
    ),
    'HunyuanDiT': (
        dict(WIDE, num_layers=12, hidden_size=384, in_channels=4, patch_size=2, sample_size=32,
             cross_attention_dim=256, cross_attention_dim_t5=256, pooled_projection_dim=64),
        None,
    ),
    'Flux': (dict(ROPE, num_layers=4, num_single_layers=8, pooled_projection_dim=64, guidance_embeds=True), None),
    'Flux2': (dict(ROPE, num_layers=3, num_single_layers=9, axes_dims_rope=(16, 16, 16, 16)), None),
    'QwenImage': (dict(ROPE, num_layers=8, out_channels=16), None),
    'ZImage': (
        dict(n_layers=10, n_refiner_layers=2, dim=384, n_heads=6, n_kv_heads=6, cap_feat_dim=256, in_channels=16,
             axes_dims=[16, 24, 24], axes_lens=[1024, 512, 512]),
        None,
    ),
    'Lumina2': (
        dict(num_layers=10, num_refiner_layers=2, hidden_size=384, num_attention_heads=6, num_kv_heads=2,
             axes_dim_rope=(16, 24, 24), axes_lens=(300, 512, 512), cap_feat_dim=256, in_channels=16, sample_size=64),
        None,
    ),
}  # fmt: skip


def bench_families(args, folder):
    """Every family in miniature: its middle block's query, or a set of a U-Net's, against hooks on the full pass."""
    for name, miniature in MINIATURES.items():
        yield bench_family(args, name, *miniature)


def bench_family(args, name, arch, named):
    from mmaselect.diffusion.loading import initialise
    from mmaselect.diffusion.network import to_map

    spec, read = DiffusionSpec(type=name, arch=arch), {}
    (taps,) = spec.alternatives(None, 'query', named)
    full = spec.family.build(spec.config).eval()
    initialise(full, spec.seed)
    # The network alone, with the same weights: the VAE is not timed, and some of these latents have no known one.
    prompt = zero_prompt(spec.family.prompt_widths(full.config), spec.family.prompt_tokens)
    process = spec.family.make_process({}, spec.shift, spec.config)
    model = spec.family(copy.deepcopy(full), taps, process, prompt=prompt or None).to(args.device)
    full.to(args.device)
    for tap, site in spec.family.find(full, taps, False).items():
        layer = full.get_submodule(site.module)
        layer.register_forward_hook(
            lambda module, inputs, output, tap=tap, site=site: read.update({tap: site.pick(output)})
        )
    size = (args.size // 8, args.size // 8)
    latent = torch.randn(args.batch_size, spec.family.latent_channels(spec.config), *size, device=args.device)
    prompt = {one: getattr(model, one) for one in spec.family.prompt_widths(full.config)}
    steps = torch.full((len(latent),), float(model.time(300.0)), device=args.device)

    @torch.no_grad()
    def ours():
        return model(latent, 300.0)

    @torch.no_grad()
    def theirs():
        full(**spec.family.arguments(full.config, latent, steps, prompt), return_dict=False)
        return {tap: to_map(value, size, model.shapes[tap][1], model.image_first) for tap, value in read.items()}

    expected = theirs()
    difference = max(((one - expected[tap]).norm() / expected[tap].norm()).item() for tap, one in ours().items())
    if difference > 1e-4:
        raise cli.InputError(f'the features of {name} differ by {difference:.2g}: nothing was timed')
    possible = count_multiply_adds(theirs) / count_multiply_adds(ours)
    # On a CPU by its time: other processes of the machine do not count.
    clock = time.process_time if args.device == 'cpu' else time.perf_counter
    mine, other = interleave(args.repeats, ours, theirs, clock=clock)
    return Row(
        f'features of {name}, {", ".join(tap.component for tap in taps)} at block {model.last_block}',
        "diffusers' full forward with a hook", f'{1e3 * mine:.0f} ms', f'{1e3 * other:.0f} ms', other / mine,
        (0.95 if other < 0.05 else 0.97) * possible,
        f'{possible:.2f}x fewer multiply-adds; relative difference {difference:.1g}',
    )  # fmt: skip


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


def bench_racing(args, folder):
    """Block evaluations, counted: a race against the sweep, by two criteria, on the demo's DiT and data."""
    from sklearn.datasets import load_digits

    from mmaselect.apis.inference import select

    digits = torch.from_numpy(load_digits().images[:256]).float().div(16)[:, None]
    images = nn.functional.interpolate(digits, size=(16, 16), mode='bicubic').clamp(0, 1).expand(-1, 3, -1, -1)
    model = dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels', device=args.device)
    rows = []
    for criterion, noise in (
        ('InstanceInformation', 'fixed'),
        ('InstanceInformation', 'fresh'),
        ('HighFrequencyRatio', 'fresh'),
    ):
        whole, raced = (
            select(model, images, block='auto', component='query', criterion=dict(type=criterion), compare=[],
                   num_images=256, search=search, noise=noise, batch_size=64)
            for search in ('sweep', 'racing')
        )  # fmt: skip
        chosen = [f'{one.timestep:g}, block {one.block}' for one in (raced, whole)]
        same = 'the same choice' if chosen[0] == chosen[1] else f'NOT the same choice ({chosen[1]})'
        ours, theirs = (one.sweep.block_evaluations for one in (raced, whole))
        rows.append(
            Row(
                f'racing, 21 timesteps x 256 images, {criterion}, {noise} noise', 'sweep', f'{ours} blocks',
                f'{theirs} blocks', theirs / ours, 3.0,
                f'{same} ({chosen[0]}); {len(raced.sweep.timesteps)} timesteps on all images',
            )
        )  # fmt: skip
    return rows


def bench_joint(args, folder):
    """A sweep over all taps of SD1.5's shape against one pass to its last tap."""
    from mmaselect.images import Batch
    from mmaselect.selection.criteria import HighFrequencyRatio
    from mmaselect.selection.instance import InstanceInformation
    from mmaselect.selection.search import Search, run

    # Of three channels in place of a latent's four, so that a selection reads images as they are, without a VAE.
    arch = dict(UNET, in_channels=3)
    spec = DiffusionSpec(type='UNet', arch=arch, prompt='zeros', latent='pixels', device=args.device)
    taps = [tap for tap in spec.family.known_taps(spec.config) if not tap.component.endswith('-map')]
    model = spec.load(taps)
    images = torch.randn(4, 3, args.size // 8, args.size // 8).to(args.device)
    rows = []
    for criterion in (HighFrequencyRatio(sigma=0.25), InstanceInformation()):
        views = getattr(criterion, 'num_views', 1)

        def search(criterion=criterion):
            return run(Search(model, [300.0], [criterion]), [[Batch(images, range(4))]])

        def passes(views=views):
            latent = images.repeat(views, 1, 1, 1)
            model.read(latent, torch.zeros_like(latent), 300.0, lambda tap, value: None)

        mine, other = interleave(args.repeats, search, passes)
        rows.append(
            Row(
                f'selection over {len(taps)} taps of SD1.5 in one pass, {criterion.label}', 'the pass alone',
                f'{mine:.2f} s', f'{other:.2f} s', other / mine, 1 / 1.3, 'a quarter of its width; 4 images',
            )
        )  # fmt: skip
    return rows


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


def matrix_rate(device, dtype):
    """Multiply-adds per second of large matrix products: what the device can do at best."""
    side = 8192 if device.type == 'cuda' else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = interleave(5, lambda: one @ other)
    return side**3 / seconds


def peak_memory(device, work):
    """Bytes that a piece of work takes at its peak, weights and all on an accelerator."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')
    work()
    return read_status('VmHWM')


#: Kernels, and compiled or not, of the row ``accelerator``.
HOW = (('auto', False), ('flash', False), ('auto', True), ('flash', True))


def bench_accelerator(args, folder):
    """SD3.5-medium's true shape in bfloat16, compiled and not, by torch's choice of kernel and by flash.

    Against a loop that encodes, noises and runs the whole network with a hook. On a CPU a quarter of the width stands
    in: the same lines run, and the numbers say nothing.
    """
    device, tap = torch.device(args.device), Tap(BLOCK, 'query')
    arch, size = ('sd3.5-medium', 512) if device.type == 'cuda' else (SHAPE, args.size)
    spec = DiffusionSpec(type='SD3', arch=arch, prompt='zeros', dtype='bfloat16', device=args.device)
    model = spec.load((tap,))
    with torch.device('meta'):
        full = spec.family.build(spec.config)
    for parameter in full.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    full = full.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    used = {**dict(model.family.transformer.named_parameters()), **dict(model.family.transformer.named_buffers())}
    for name, value in [*full.named_parameters(), *full.named_buffers()]:
        # Behind the last tap any numbers do.
        value.data.copy_(used[name]) if name in used else value.data.normal_(0, 0.02, generator=generator)
    read = {}
    layer = full.transformer_blocks[BLOCK].attn.to_q
    layer.register_forward_hook(lambda module, inputs, output: read.update(query=output))
    prompt = {name: getattr(model.family, name) for name in spec.family.prompt_widths(full.config)}
    images = torch.rand(args.batch_size, 3, size, size, device=device) * 2 - 1
    noise = torch.randn(16, size // 8, size // 8, device=device)

    def ours():
        return model(model.encode(images), noise, 300.0)[tap]

    @torch.no_grad()
    def theirs():
        noisy = model.family.process.add_noise(model.encode(images).float(), noise, 300.0).bfloat16()
        time = torch.full((len(noisy),), 300.0, device=device)
        full(**spec.family.arguments(full.config, noisy, time, prompt), return_dict=False)
        return read.pop('query').transpose(1, 2).unflatten(2, (size // 16, size // 16))

    expected = theirs().float()
    adds, all_adds = count_multiply_adds(ours), count_multiply_adds(theirs)
    rate, naive = matrix_rate(device, torch.bfloat16), peak_memory(device, theirs)
    rows = []
    for attention, compiled in HOW:
        name = f'attention={attention!r}, {"compiled" if compiled else "eager"}'
        model.family.accelerate(attention, compiled)
        try:
            found = ours().float()
        except cli.InputError as error:
            print(f'{name}: {error}')
            continue
        difference = ((found - expected).norm() / expected.norm()).item()
        if difference > 2e-2:
            raise cli.InputError(f'with {name} the features differ by {difference:.2g}: nothing was timed')
        mine, other = interleave(args.repeats, ours, theirs)
        peak = peak_memory(device, ours)
        rows.append(
            Row(
                f'{arch if isinstance(arch, str) else "SD3 in miniature"}, {size} pixels, bfloat16, {name}',
                "encode, noise, diffusers' full forward with a hook", f'{args.batch_size / mine:.2f} images/s',
                f'{args.batch_size / other:.2f} images/s', other / mine, 0.95 * all_adds / adds,
                f'{100 * adds / mine / rate:.0f} % of the {rate / 1e12:.2f} T multiply-adds/s of matrix products; peak '
                f'{peak / 1e9:.1f} GB, the loop {naive / 1e9:.1f} GB; relative difference {difference:.1g}',
            )
        )  # fmt: skip
    return rows


def read_status(field):
    """A field of /proc/self/status, in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise cli.InputError(f'/proc/self/status has no {field}: memory can be measured on Linux only')


def load_child(side, folder, size):
    """Loads, reads one feature, and prints what that took: the body of a process of its own."""
    # What both import is no part of the comparison.
    from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: F401
    from safetensors import safe_open  # noqa: F401

    from mmaselect.diffusion import loading

    read, get = [0], loading.Tensors.get

    def counted(self, name):
        value = get(self, name)
        read[0] += value.nbytes
        return value

    loading.Tensors.get = counted
    images = torch.rand(1, 3, size, size) * 2 - 1
    if side in ('cold', 'floor'):
        print(
            json.dumps({'seconds': first_feature(folder, images) if side == 'cold' else read_and_pass(folder, images)})
        )
        return
    Path('/proc/self/clear_refs').write_text('5')
    before, started, work = read_status('VmRSS'), time.perf_counter(), time.process_time()
    if side == 'ours':
        model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(BLOCK, 'query'),))
        latent = model.encode(images)
        model(latent, torch.zeros_like(latent), 0.0)
    else:
        model = Baseline(folder, torch.device('cpu'))
        model(model.encode(images), 0.0)
        read[0] = sum(file.stat().st_size for file in folder.rglob('*.safetensors'))
    seconds, work = time.perf_counter() - started, time.process_time() - work
    used = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    peak = read_status('VmHWM') - before
    print(json.dumps({'peak': peak, 'seconds': seconds, 'work': work, 'read': read[0], 'used': used}))


def forget(folder):
    """Takes the files of a folder out of the system's memory, so that the next read is one of the disk."""
    for file in folder.rglob('*.safetensors'):
        with open(file, 'rb') as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_feature(folder, images):
    """Seconds from the disk to the first feature."""
    forget(folder)
    started = time.perf_counter()
    model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(BLOCK, 'query'),))
    latent = model.encode(images)
    model(latent, torch.zeros_like(latent), 0.0)
    return time.perf_counter() - started


def read_and_pass(folder, images):
    """Seconds that no program can do without: the bytes in use are read from the disk, and one pass is run."""
    model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(BLOCK, 'query'),))

    def run():
        # As the first one: what is computed once per timestep is computed.
        model.family._constants.clear()
        latent = model.encode(images)
        model(latent, torch.zeros_like(latent), 0.0)

    (seconds,) = interleave(3, run)
    used = {part: set(module.state_dict()) for part, module in (('transformer', model.family.transformer),
                                                                ('vae', model.encoder))}  # fmt: skip
    places = [
        place
        for part, names in used.items()
        for file in sorted((folder / part).glob('*.safetensors'))
        for place in find_tensors(file, names)
    ]
    forget(folder)
    started = time.perf_counter()
    for file, begin, length in places:
        with open(file, 'rb') as opened:
            opened.seek(begin)
            opened.read(length)
    return seconds + time.perf_counter() - started


def find_tensors(file, names):
    """File, first byte and length of those of its tensors that have these names."""
    with open(file, 'rb') as opened:
        size = int.from_bytes(opened.read(8), 'little')
        header = json.loads(opened.read(size))
    offsets = sorted(value['data_offsets'] for name, value in header.items() if name in names)
    return [(file, 8 + size + begin, end - begin) for begin, end in offsets]


def run_load(side, folder):
    """What a process of its own says that loading took."""
    command = [sys.executable, __file__, '--load-child', side, '--folder', str(folder), '--size', '128']
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def bench_load(args, folder):
    """Memory, seconds and bytes from nothing to the first feature; each side in a process of its own, in turns."""
    sides = ('ours', 'theirs', 'cold', 'floor')
    runs = [{side: run_load(side, folder) for side in sides} for _ in range(args.repeats)]
    ours, theirs, cold, floor = (
        {key: statistics.median(run[side][key] for run in runs) for key in runs[0][side]} for side in sides
    )
    mega = 1e6
    share = ours['used'] / theirs['used']
    return [
        Row(
            'load to first feature: peak memory', 'from_pretrained of transformer and VAE',
            f'{ours["peak"] / mega:.0f} MB', f'{theirs["peak"] / mega:.0f} MB', theirs['peak'] / ours['peak'],
            theirs['peak'] / (1.2 * ours['used']),
            f'{ours["peak"] / ours["used"]:.2f}x the tensors in use ({ours["used"] / mega:.0f} MB); target 1.2x',
        ),
        Row(
            'load to first feature: bytes read', 'the files', f'{ours["read"] / mega:.0f} MB',
            f'{theirs["read"] / mega:.0f} MB', theirs['read'] / ours['read'], 0.98 / share,
            f'{100 * share:.0f} % of the tensors are in use',
        ),
        Row(
            'load to first feature: seconds', 'from_pretrained of transformer and VAE', f'{ours["seconds"]:.2f} s',
            f'{theirs["seconds"]:.2f} s', theirs['seconds'] / ours['seconds'], 1.0,
            f'{ours["work"]:.2f} s of a core against {theirs["work"]:.2f} s, one pass among them',
        ),
        Row(
            'load to first feature, files not in memory: seconds', 'the bytes in use are read, and one pass is run',
            f'{cold["seconds"]:.2f} s', f'{floor["seconds"]:.2f} s', floor['seconds'] / cold['seconds'], 1 / 1.1,
        ),
    ]  # fmt: skip


def bench_sweep(args, folder):
    """A sweep against encoding, noising, the whole model, a hook and an FFT for every timestep."""
    from mmaselect.diffusion.noise import seeded_noise
    from mmaselect.images import Batch
    from mmaselect.selection.criteria import HighFrequencyRatio
    from mmaselect.selection.search import Search, run

    device = torch.device(args.device)
    baseline = Baseline(folder, device)
    model = DiffusionSpec(type='SD3', pretrained=str(folder), device=args.device).load((Tap(BLOCK, 'query'),))
    timesteps = torch.linspace(0, 1000, args.timesteps, dtype=torch.float64).tolist()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.images, 3, args.size, args.size, generator=generator) * 2 - 1
    numbers = list(range(args.images))
    scoring = [0.0]

    class Timed(Search):
        def _reduce(self, *arguments):
            started = time.perf_counter()
            super()._reduce(*arguments)
            scoring[0] += time.perf_counter() - started

    def batches():
        for start in range(0, args.images, args.batch_size):
            indices = numbers[start : start + args.batch_size]
            yield Batch(images[indices].to(device), indices)

    def ours():
        return run(Timed(model, timesteps, [HighFrequencyRatio(sigma=0.25)], seed=0), [batches()])

    def theirs():
        frequencies = torch.fft.fftfreq(args.size // 16, device=device)
        radius = frequencies[:, None] ** 2 + frequencies[None] ** 2
        gain = 1 - torch.exp(-radius / (2 * 0.25**2))
        curve = []
        for timestep in timesteps:
            ratios = []
            for batch in batches():
                latent = baseline.encode(batch.images)
                shape = tuple(latent.shape[1:])
                noise = seeded_noise(shape, 0).to(device)
                share = timestep / 1000
                query = baseline((1 - share) * latent + share * noise, timestep)
                power = torch.fft.fft2(query).abs() ** 2
                ratios.append((gain**2 * power).sum((1, 2, 3)) / power.sum((1, 2, 3)))
            curve.append(torch.cat(ratios).mean().item())
        return curve

    sweep, expected = ours(), theirs()
    curve = sweep.curve('HFR (sigma 0.25)')
    difference = max(abs(a - b) for a, b in zip(curve, expected))
    chosen = timesteps[expected.index(max(expected))]
    if difference > 1e-4 or sweep.choice('HFR (sigma 0.25)') != chosen:
        raise cli.InputError(f'the scores differ by {difference:.2g}: nothing was timed')
    scoring[0] = 0.0
    mine, other = interleave(args.repeats, ours, theirs)
    share = scoring[0] / (args.repeats + 1) / mine
    return [
        Row(
            f'selection sweep, {len(timesteps)} timesteps x {args.images} images', 'the naive loop', f'{mine:.2f} s',
            f'{other:.2f} s', other / mine, 2.0,
            f'same choice ({chosen:g}); VAE runs {sweep.encoder_runs} against {args.images * len(timesteps)}; scoring '
            f'{100 * share:.1f} % of the time',
        )
    ]  # fmt: skip


def bench_coarse(args, folder):
    """Block evaluations, counted: the joint coarse-to-fine search against a head for each combination."""
    from sklearn.datasets import load_digits

    from mmaselect.apis.inference import select

    grid, epochs, train, test = 101, 20, 1200, 597
    digits = torch.from_numpy(load_digits().images[:64]).float().div(16)[:, None]
    images = nn.functional.interpolate(digits, size=(16, 16), mode='bicubic').clamp(0, 1).expand(-1, 3, -1, -1)
    selection = select(
        dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels', device=args.device),
        images, block='auto', component='auto', timesteps=dict(start=0, stop=1000, num=grid), num_images=64,
        search='coarse-to-fine', batch_size=64,
    )  # fmt: skip
    sweep = selection.sweep
    taps = list(sweep.scores[selection.criterion])
    blocks = max(tap.block for tap in taps) + 1
    heads = sum((epochs * train + test) * (tap.block + 1) for tap in taps) * grid
    once = grid * (train + test) * blocks
    chosen = f'{selection.timestep:g}, block {selection.block} {selection.component}'
    return [
        Row(
            f'coarse-to-fine, {grid} timesteps x {len(taps)} blocks and components',
            f'a head for each of them, {epochs} epochs on the demo', f'{sweep.block_evaluations} blocks',
            f'{heads} blocks', heads / sweep.block_evaluations, 100.0,
            f'chose {chosen}; {len(sweep.timesteps)} timesteps tried on {sweep.num_images} images; with features that '
            f'are read once per timestep {once / sweep.block_evaluations:.0f}x',
        )
    ]  # fmt: skip


def fit_exponent(sizes, values):
    """Slope of log value over log size, by least squares."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def bench_growth(args, folder):
    """Seconds and memory of a sweep over a decade of images, timesteps and blocks."""
    from mmaselect.images import Batch
    from mmaselect.selection.criteria import HighFrequencyRatio
    from mmaselect.selection.search import Search, run

    # Pixels in place of a VAE, whose cost grows with the images alone.
    arch = dict(SHAPE, num_attention_heads=2, caption_projection_dim=128, joint_attention_dim=128)
    arch.update(in_channels=3, out_channels=3)

    def sweep(images, timesteps, blocks):
        spec = DiffusionSpec(type='SD3', arch=arch, device=args.device, latent='pixels')
        model = spec.load((Tap(blocks - 1, 'output'),))

        def batches():
            for start in range(0, images, 4):
                size = min(4, images - start)
                yield Batch(torch.rand(size, 3, 16, 16, device=args.device) * 2 - 1, range(start, start + size))

        grid = torch.linspace(0, 1000, timesteps, dtype=torch.float64).tolist()
        search = Search(model, grid, [HighFrequencyRatio(sigma=0.25)], seed=0)
        gc.collect()
        # Memory that was freed before, but not given back, would hide what is taken now.
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
        before, started = read_status('VmRSS'), time.perf_counter()
        run(search, [batches()])
        return time.perf_counter() - started, read_status('VmHWM') - before

    base = dict(images=4, timesteps=4, blocks=8)
    decades = dict(images=(4, 8, 20, 40), timesteps=(4, 8, 20, 40), blocks=(2, 5, 10, 20))
    sweep(**base)
    rows = []
    for name, sizes in decades.items():
        measured = [
            [statistics.median(values) for values in zip(*(sweep(**{**base, name: size}) for _ in range(3)))]
            for size in sizes
        ]
        seconds, memory = zip(*measured)
        exponent = fit_exponent(sizes, seconds)
        rows.append(
            Row(
                f'growth of a sweep over {sizes[0]} to {sizes[-1]} {name}',
                'linear time',
                f'exponent {exponent:.2f}',
                'exponent 1',
                1 / max(exponent, 1e-9),
                0.9,
                f'{seconds[0]:.2f} to {seconds[-1]:.2f} s; memory {memory[0] / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB',
            )
        )  # fmt: skip
    return rows


def demo_runners(folder, caches):
    """Runners of the demo's config, ready to train: their epochs are then run one by one.

    Args:
        folder: For data and what is written.
        caches: Settings of the cache by name of the runner; None for one without.
    """
    from mmengine.config import Config
    from mmengine.registry import LOOPS
    from mmengine.runner import EpochBasedTrainLoop

    from mmaselect.cache.hook import FeatureCacheHook

    class Steps(EpochBasedTrainLoop):
        """Prepares a training, whose epochs are then run one by one."""

        def run(self):
            self.runner.call_hook('before_train')
            for hook in self.runner.hooks:
                # The epochs are yet to come: what the cache has replaced is not put back.
                if isinstance(hook, FeatureCacheHook):
                    hook._replaced.pop_all()

    LOOPS.register_module(module=Steps, force=True)
    data = folder / 'digits'
    tool = Path(__file__).parent / 'dataset_converters' / 'prepare_digits.py'
    subprocess.run([sys.executable, str(tool), str(data)], check=True, stdout=subprocess.DEVNULL)
    config = Path(__file__).parents[1] / 'configs/demo/dit-nano_linear_bs64-20e_digits-16px.py'
    runners = []
    for name, cache in caches.items():
        cfg = Config.fromfile(config)
        cfg.work_dir = str(folder / name)
        cfg.experiment_name = cfg.visualizer.name = f'benchmark {folder} {name}'
        cfg.model.backbone.update(timestep=0, cache=cache)
        cfg.custom_hooks = [dict(type='FeatureCacheHook')] if cache else []
        cfg.train_cfg = dict(type='Steps', max_epochs=10**6)
        cfg.param_scheduler, cfg.log_level = [], 'WARNING'
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = str(data)
        cfg.default_hooks.logger.interval = 10**6
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=10**6)
        cfg = cli.finish_config(cfg, argparse.Namespace(cfg_options=None, no_pin_memory=False))
        runners.append(cli.build_runner(cfg))
        runners[-1].train()
    return runners


def size_of(folder):
    """Bytes of the shards below a folder."""
    return sum(path.stat().st_size for path in folder.rglob('*.safetensors'))


def bench_cache(args, folder):
    """Epochs of the demo's head, with and without the cache, through mmengine's own loop."""
    from mmaselect.hooks.images import find_backbone, unwrap

    cache = dict(dir=str(folder / 'features'), pool=False)
    runners = demo_runners(folder, dict(cached=cache, plain=None))
    cached, plain = runners
    backbone, preprocessor = find_backbone(plain), unwrap(plain).data_preprocessor
    images = plain.train_dataloader.dataset
    sample = plain.train_dataloader.collate_fn([images[index] for index in range(64)])
    (expected,) = backbone(preprocessor(sample, True)['inputs'])
    features = cached.train_dataloader.dataset
    found = torch.stack([features[index]['maps.0'] for index in range(64)]).to(expected)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference > 2**-8:
        raise cli.InputError(f'cached features differ by {difference:.2g} of the largest: nothing was timed')
    mine, other = interleave(args.repeats, cached.train_loop.run_epoch, plain.train_loop.run_epoch)
    size = size_of(folder / 'features')
    return [
        Row(
            "an epoch of the demo's head from the cache", 'the same epoch, features computed', f'{1e3 * mine:.0f} ms',
            f'{1e3 * other:.0f} ms', other / mine, 20.0,
            f'{len(images)} images, {size / 1e6:.0f} MB of bfloat16; largest relative difference {difference:.1g}',
        )
    ]  # fmt: skip


def bench_pooled(args, folder):
    """Epochs of the demo's head from vectors, and from the maps that they are pooled of."""
    names = ('vectors', 'maps')
    caches = {name: dict(dir=str(folder / name / 'cache'), dtype='float32', pool=name == 'vectors') for name in names}
    vectors, maps = demo_runners(folder, caches)
    # Epochs of milliseconds: by CPU time, so that other processes of the machine do not count.
    epochs = [runner.train_loop.run_epoch for runner in (vectors, maps)]
    mine, other = interleave(args.repeats, *epochs, clock=time.process_time)
    heads = [runner.model.head.state_dict() for runner in (vectors, maps)]
    found = [runner.val_loop.run()['accuracy/top1'] for runner in (vectors, maps)]
    if found[0] != found[1] or not all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0]):
        raise cli.InputError(f'from vectors the accuracy is {found[0]}, from maps {found[1]}')
    small, large = (size_of(folder / name) for name in names)
    return [
        Row(
            'cache of vectors, demo: bytes', 'cache of maps', f'{small / 1e6:.2f} MB', f'{large / 1e6:.2f} MB',
            large / small, 50.0, f'float32, labels and keys included; of bfloat16 maps {large / small / 2:.0f}x',
        ),
        Row(
            "an epoch of the demo's head from vectors", 'from maps', f'{1e3 * mine:.0f} ms', f'{1e3 * other:.0f} ms',
            other / mine, 5.0,
            f'CPU time; after {args.repeats + 1} epochs the heads are equal to the bit, with {found[0]:.2f} % accuracy',
        ),
    ]  # fmt: skip


#: Images of ImageNet, and the width of a vector of SD3.5-medium.
MILLIONS, WIDTH = 1.28e6, 1536


@functools.lru_cache
def measure_cache(folder):
    """The cache's own part over a decade of images, of which no model sees one.

    Returns:
        Sizes, and by name a value of each: CPU seconds, bytes, and bytes of memory per image of an open cache.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from mmaselect.cache.build import keys_of_views
    from mmaselect.cache.contents import BLOCK, read_block, stamp_of
    from mmaselect.cache.dataset import CachedFeatures
    from mmaselect.cache.store import SHARD_BYTES, FeatureStore

    images = [folder / f'image{number}' for number in range(1000)]
    for image in images:
        image.write_bytes(b'')
    # Younger files are not believed.
    time.sleep(2.5)
    vectors = torch.rand(4096, WIDTH, 1, 1)
    per_shard = SHARD_BYTES // (4 * WIDTH + 40)

    class Said:
        """What a data set of so many images says of them, in mmengine's form."""

        def __init__(self, count):
            self.data_bytes = np.arange(100 * count, dtype=np.uint8)
            self.data_address = np.arange(100, 100 * count + 1, 100)

        def __len__(self):
            return len(self.data_address)

    def digest(number):
        return number.to_bytes(16, 'big') * 2

    def build(place, count):
        digests = np.frombuffer(b''.join(map(digest, range(count))), np.uint8).reshape(count, 32)
        keys = keys_of_views(digests, 1, 0)[:, 0].astype(str).tolist()
        store = FeatureStore(place)
        for start in range(0, count, per_shard):
            rows = {}
            for number in range(start, min(start + per_shard, count)):
                label = torch.tensor([number])
                rows[keys[number]] = {'maps.0': vectors[number % 4096], 'gt_label': label, 'meta.img_shape': label}
            store.write(rows)

    def open_cache(place, count):
        """As a training does it: files of images, checksums, keys."""
        store, said = FeatureStore(place), Said(count)
        moment = store.clock()
        store.verify(store.shards(), since=store.verified_until())
        store.set_verified(moment)

        def read(index):
            files = [str(images[index % 1000])]
            return digest(index), files, stamp_of(files)

        blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
        with ThreadPoolExecutor(8) as pool:
            samples = [read_block(place / 'contents', said, block, read, pool)[0] for block in blocks]
        keys = keys_of_views(np.concatenate(samples), 1, 0)
        store.refresh()
        if (store.find(np.unique(keys)) < 0).any():
            raise cli.InputError('rows of the cache are not found: nothing was timed')
        return CachedFeatures(store, keys, {})

    def read_epoch(features):
        generator = torch.Generator().manual_seed(0)
        for batch in torch.randint(len(features), (50, 64), generator=generator).tolist():
            features.__getitems__(batch)

    def measure(work, *arguments):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
        before, all_before, started = read_status('RssAnon'), read_status('VmRSS'), time.process_time()
        result = work(*arguments)
        used, peak = time.process_time() - started, read_status('VmHWM') - all_before
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return result, used, read_status('RssAnon') - before, peak

    # From one shard on: less is written faster.
    sizes, found = tuple(per_shard * count for count in (1, 3, 10)), []
    for count in sizes:
        place = folder / f'cache{count}'
        _, built, _, peak = measure(build, place, count)
        _, first, _, _ = measure(open_cache, place, count)
        features, again, memory, _ = measure(open_cache, place, count)
        _, read, _, _ = measure(read_epoch, features)
        found.append((built, first, again, read / 50, memory, peak, size_of(place)))
    names = ('build', 'first', 'again', 'read', 'memory', 'peak', 'bytes')
    return sizes, dict(zip(names, zip(*found)))


def extrapolate(sizes, values, size):
    """What a power law through some values gives for a larger size, and its exponent."""
    exponent = fit_exponent(sizes, values)
    return values[-1] * (size / sizes[-1]) ** exponent, exponent


def bench_millions(args, folder):
    """The cache's own part of a million images, extrapolated from a decade."""
    sizes, found = measure_cache(folder)

    def row(work, name, limit=None):
        value, exponent = extrapolate(sizes, found[name], MILLIONS)
        return Row(
            f'cache of 1.28 million images: {work}', 'linear time' if limit is None else f'{limit} s', f'{value:.3g} s',
            f'exponent {exponent:.2f}', 1 / max(exponent, 1e-9) if limit is None else limit / value,
            0.9 if limit is None else 1.0,
            f'{", ".join(f"{one:.3g}" for one in found[name])} s of CPU time at {", ".join(map(str, sizes))} images',
        )  # fmt: skip

    size, exponent = extrapolate(sizes, found['bytes'], MILLIONS)
    memory = (found['memory'][-1] - found['memory'][0]) / (sizes[-1] - sizes[0])
    return [
        row('writing vectors', 'build'),
        row('opening the first time, every byte hashed', 'first'),
        row('opening again', 'again', limit=10),
        Row(
            'cache of 1.28 million images: bytes', 'linear', f'{size / 1e9:.2f} GB', f'exponent {exponent:.3f}',
            1 / exponent, 0.9,
            f'{found["bytes"][-1] / sizes[-1]:.0f} bytes an image, {4 * WIDTH} of them the vector; a batch of 64 is '
            f'read in {", ".join(f"{1e3 * one:.2g}" for one in found["read"])} ms; memory while writing '
            f'{", ".join(f"{one / 1e6:.0f}" for one in found["peak"])} MB, open {memory:.0f} bytes an image',
        ),
    ]  # fmt: skip


#: Images of data sets that are extracted on a cluster, and what a GPU is assumed to do.
CLUSTER = {'ImageNet-21k': 14.2e6, 'LAION-400M': 400e6}
GPUS, RATE = 64, 200e12


def bench_scale(args, folder):
    """An extraction on a cluster, on paper: SD3.5-medium at 512 pixels, one process per GPU."""
    work = sum(count_at_512()[:2])
    sizes, found = measure_cache(folder)
    memory = (found['memory'][-1] - found['memory'][0]) / (sizes[-1] - sizes[0])
    rows = []
    for name, count in CLUSTER.items():
        seconds = 2 * work * count / RATE / GPUS
        written, opened = (extrapolate(sizes, found[value], count)[0] for value in ('build', 'again'))
        vectors, maps = count * found['bytes'][-1] / sizes[-1], count * WIDTH * 32 * 32 * 2
        rows.append(
            Row(
                f'{name}, {count / 1e6:.3g} million images, on {GPUS} GPUs', 'the cache: writing, 64 processes',
                f'{seconds / 3600:.3g} h', f'{written / GPUS / 3600:.2g} h', seconds * GPUS / written, 20.0,
                f'{work / 1e12:.2f}e12 multiply-adds an image at {RATE / 1e12:.0f}e12 operations a second: '
                f'{2 * work * 1e6 / RATE / 3600:.2g} GPU hours a million; {vectors / 1e9:.3g} GB of vectors '
                f'({vectors / (64 << 20):.3g} shards), {maps / 1e12:.3g} TB of maps ({maps / (64 << 20):.2g} shards); '
                f'opened in {opened:.2g} s, with {memory * count / 1e9:.2g} GB a process',
            )
        )  # fmt: skip
    return rows


def read_schedule():
    """Seconds that this thread ran, and that it could have run but waited for a core (Linux)."""
    ran, waited, _ = map(int, Path('/proc/thread-self/schedstat').read_text().split())
    return ran / 1e9, waited / 1e9


def extract_child(rank, world_size, folder, args):
    """A process of an extraction with one thread: decode, encode, run the blocks, write; it prints what it took."""
    import io

    import torch.distributed as torch_dist
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from mmaselect.cache.store import FeatureStore

    torch.set_num_threads(1)
    store = f'file://{folder}/extraction{world_size}'
    torch_dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world_size)
    model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(BLOCK, 'query'),))
    content = io.BytesIO()
    Image.effect_mandelbrot((500, 375), (-3, -2.5, 2, 2.5), 100).convert('RGB').save(content, 'jpeg')

    class Images(Dataset):
        def __len__(self):
            return args.images // world_size

        def __getitem__(self, index):
            image = Image.open(io.BytesIO(content.getvalue())).resize((args.size, args.size))
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(args.size, args.size, 3)

    def extract(images):
        rows = {}
        for number, batch in enumerate(images):
            latent = model.encode(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)
            maps = model(latent, torch.zeros_like(latent), 0.0)[Tap(BLOCK, 'query')]
            rows.update({f'{rank} {number} {place}': {'maps.0': one} for place, one in enumerate(maps)})
        FeatureStore(folder / f'extracted{world_size}').write(rows)

    with torch.no_grad():
        extract(DataLoader(Images(), batch_size=args.batch_size))
        torch_dist.barrier()
        (ran, waited), used, started = read_schedule(), time.process_time(), time.perf_counter()
        extract(DataLoader(Images(), batch_size=args.batch_size))
        seconds, used = time.perf_counter() - started, time.process_time() - used
        (ran, waited) = (after - before for after, before in zip(read_schedule(), (ran, waited)))
    print(json.dumps({'seconds': seconds, 'used': used, 'busy': (ran + waited) / seconds, 'ran': ran / seconds}))
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    cli.leave()


def bench_processes(args, folder):
    """An extraction by one, two and four processes of one thread: what each image costs, and who waits for whom."""
    images, found = max(8, args.images // 8 * 8), {}
    for world_size in (1, 2, 4):
        started = [
            subprocess.Popen(
                [sys.executable, __file__, '--extract-child', str(rank), str(world_size), '--folder', str(folder),
                 '--images', str(images), '--size', str(args.size), '--batch-size', str(args.batch_size)],
                stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise cli.InputError(f'an extraction by {world_size} processes failed')
        found[world_size] = [json.loads(output.splitlines()[-1]) for output in outputs]
    used = {count: sum(one['used'] for one in ranks) for count, ranks in found.items()}
    seconds = {count: max(one['seconds'] for one in ranks) for count, ranks in found.items()}
    busy = {count: min(one['busy'] for one in ranks) for count, ranks in found.items()}
    got = {count: sum(one['ran'] for one in ranks) for count, ranks in found.items()}
    return [
        Row(
            f'extraction of {images} images by {count} processes: CPU time', 'one process', f'{used[count]:.2f} s',
            f'{used[1]:.2f} s', used[1] / used[count], 0.9,
            f'{seconds[1] / seconds[count]:.2f}x as fast by the clock, on {got[count]:.2f} cores in place of '
            f'{got[1]:.2f}; a process runs or waits for a core {100 * busy[count]:.0f} % of the time '
            f'({100 * busy[1]:.0f} % alone)',
        )
        for count in (2, 4)
    ]  # fmt: skip


def rank_child(rank, world_size, folder, args):
    """A rank of a sweep, or all of it: the body of a process of its own, with one thread."""
    import torch.distributed as torch_dist

    from mmaselect.hooks.ranks import RunnerRanks
    from mmaselect.images import Batch
    from mmaselect.selection.criteria import HighFrequencyRatio
    from mmaselect.selection.search import Search, run

    torch.set_num_threads(1)
    store = f'file://{folder}/store{world_size}'
    torch_dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world_size)
    model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(BLOCK, 'query'),))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.images, 3, args.size, args.size, generator=generator) * 2 - 1
    timesteps = torch.linspace(0, 1000, args.timesteps, dtype=torch.float64).tolist()

    def sweep():
        groups = [range(start, start + 2) for start in range(2 * rank, args.images, 2 * world_size)]
        batches = (Batch(images[list(group)], group, groups=[group[0] // 2] * 2) for group in groups)
        return run(Search(model, timesteps, [HighFrequencyRatio(sigma=0.25)], seed=0, ranks=RunnerRanks()), [batches])

    times = []
    for _ in range(args.repeats + 1):
        torch_dist.barrier()
        started = time.perf_counter()
        result = sweep()
        times.append(time.perf_counter() - started)
    if rank == 0:
        label = 'HFR (sigma 0.25)'
        print(json.dumps({'seconds': statistics.median(times[1:]), 'curve': result.curve(label),
                          'choice': result.choice(label), 'blocks': result.block_evaluations}))  # fmt: skip
    torch_dist.barrier()
    torch_dist.destroy_process_group()
    cli.leave()


def bench_ranks(args, folder):
    """A sweep by one process of one thread, and by two of them."""
    if args.images % 4:
        raise cli.InputError(f'--images {args.images} is not valid for the row ranks: give a multiple of 4')
    found = []
    for world_size in (1, 2):
        started = [
            subprocess.Popen(
                [sys.executable, __file__, '--rank-child', str(rank), str(world_size), '--folder', str(folder),
                 '--images', str(args.images), '--timesteps', str(args.timesteps), '--size', str(args.size // 2),
                 '--repeats', str(args.repeats)],
                stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise cli.InputError(f'a sweep by {world_size} processes failed')
        found.append(json.loads(outputs[0].splitlines()[-1]))
    one, two = found
    difference = max(abs(a - b) for a, b in zip(one['curve'], two['curve']))
    if difference > 1e-5 or one['choice'] != two['choice'] or one['blocks'] != two['blocks']:
        raise cli.InputError(f'two processes score {difference:.2g} apart from one')
    return [
        Row(
            f'selection, {args.timesteps} timesteps x {args.images} images, 2 processes', 'one process, a thread each',
            f'{two["seconds"]:.2f} s', f'{one["seconds"]:.2f} s', one['seconds'] / two['seconds'], 1.8,
            f'same choice ({one["choice"]:g}), {one["blocks"]} blocks in all; largest difference {difference:.1g}',
        )
    ]  # fmt: skip


#: Prints CPU seconds of ``import mmaselect``, of torch, and of what ``load``, ``extract`` and ``select`` need besides.
IMPORT = """
import json, sys, time
times = [time.process_time()]
for work in ('import mmaselect', 'import torch', 'mmaselect.select'):
    exec(work)
    times.append(time.process_time())
assert 'mmengine' not in sys.modules
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def bench_import(args, folder):
    """What an import takes, torch counted apart; each in a process of its own."""
    runs = []
    for _ in range(args.repeats):
        done = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    package, of_torch, names = (statistics.median(values) for values in zip(*runs))
    return [
        Row(
            work, 'the target', f'{seconds:.3f} s', '0.3 s', 0.3 / seconds, 1.0,
            f'CPU time; torch itself takes {of_torch:.2f} s, mmengine is not imported',
        )
        for work, seconds in (('import mmaselect', package), ('mmaselect.select, torch in memory', names))
    ]  # fmt: skip


ROWS = {
    'import': bench_import,
    'features': bench_features,
    'words': bench_words,
    'unet': bench_unet,
    'families': bench_families,
    'settled': bench_settled,
    'racing': bench_racing,
    'joint': bench_joint,
    'accelerator': bench_accelerator,
    'encoder': bench_encoder,
    'load': bench_load,
    'sweep': bench_sweep,
    'ranks': bench_ranks,
    'coarse': bench_coarse,
    'cache': bench_cache,
    'growth': bench_growth,
    'pooled': bench_pooled,
    'millions': bench_millions,
    'scale': bench_scale,
    'processes': bench_processes,
}
NEED_MODEL = {'features', 'words', 'settled', 'load', 'sweep', 'ranks', 'processes'}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each side')
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--size', type=int, default=256, help='side of the images, in pixels')
    parser.add_argument('--images', type=int, default=4, help='images of the sweep')
    parser.add_argument('--timesteps', type=int, default=4, help='timesteps of the sweep')
    parser.add_argument('--json', help='also write the table here')
    parser.add_argument('--load-child', choices=['ours', 'theirs', 'cold', 'floor'], help=argparse.SUPPRESS)
    parser.add_argument('--rank-child', type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument('--extract-child', type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_child:
        load_child(args.load_child, args.folder, args.size)
        return
    if args.rank_child:
        rank_child(*args.rank_child, args.folder, args)
        return
    if args.extract_child:
        extract_child(*args.extract_child, args.folder, args)
        return
    for name in ('repeats', 'batch_size', 'images', 'timesteps'):
        if getattr(args, name) < 1:
            raise cli.InputError(f'--{name.replace("_", "-")} {getattr(args, name)} is not valid: give at least 1')
    from rich.table import Table

    from mmaselect.files import write_json
    from mmaselect.selection.report import render

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if set(args.rows) & NEED_MODEL:
            save_model(Path(folder))
        for name in args.rows:
            for row in ROWS[name](args, Path(folder)):
                rows.append(row)
                # The table comes last, and some rows take minutes.
                print(f'{row.work}: {row.ours}, {row.theirs}, {row.ratio:.2f}; {row.note}', file=sys.stderr, flush=True)
            gc.collect()
    table = Table(title=f'{torch.get_num_threads()} threads' if args.device == 'cpu' else torch.cuda.get_device_name(),
                  title_justify='left')  # fmt: skip
    for column in ('work', 'against', 'ours', 'theirs', 'ratio', 'target', ''):
        table.add_column(column, justify='right' if column in ('ours', 'theirs', 'ratio', 'target') else 'left')
    for row in rows:
        met = 'met' if row.met else 'MISSED'
        table.add_row(
            row.work, row.against, row.ours, row.theirs, f'{row.ratio:.2f}', f'{row.target:.2f}', f'{met}; {row.note}'
        )
    print(render(table, 180))
    if args.json:
        write_json(args.json, [asdict(row) | {'met': row.met} for row in rows])


if __name__ == '__main__':
    cli.run(main)
