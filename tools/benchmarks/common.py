"""What the rows share: the models that are timed, the clock, memory, and processes of their own."""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmaselect import cli
from mmaselect.diffusion.conditioning import zero_prompt

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

#: SD1.5's shape at a quarter of its width.
UNET = dict(
    sample_size=64, block_out_channels=(80, 160, 320, 320), norm_num_groups=16, cross_attention_dim=192,
    attention_head_dim=8,
)  # fmt: skip


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


def fit_exponent(sizes, values):
    """Slope of log value over log size, by least squares."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def read_status(field):
    """A field of /proc/self/status, in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    raise cli.InputError(f'/proc/self/status has no {field}: memory can be measured on Linux only')


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


def measure_memory(work):
    """What a piece of work gives back, and the bytes that it takes at its peak and keeps."""
    gc.collect()
    # Memory that was freed before, but not given back, would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    anonymous, resident = read_status('RssAnon'), read_status('VmRSS')
    result = work()
    peak = read_status('VmHWM') - resident
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return result, peak, read_status('RssAnon') - anonymous


def run_processes(module, count, *arguments):
    """Runs a module of this package in several processes at once; each gets its number, the count and the arguments.

    Returns:
        What each printed in its last line, read as JSON.

    Raises:
        InputError: If one of them failed.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH')]))
    started = [
        subprocess.Popen(
            [sys.executable, '-m', f'benchmarks.{module}', str(number), str(count), *map(str, arguments)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': path},
        )
        for number in range(count)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise cli.InputError(f'benchmarks.{module} failed in one of {count} processes')
    return [json.loads(one.splitlines()[-1]) for one in printed]
