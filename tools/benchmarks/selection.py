"""Rows on selection: against loops that one would write, in block evaluations, and by several processes."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import (
    BLOCK,
    SHAPE,
    UNET,
    Baseline,
    Row,
    fit_exponent,
    interleave,
    measure_memory,
    run_processes,
)
from mmaselect import cli
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap


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


def bench_scoring(args, folder):
    """Instance information of taps and its jackknife, as a search takes them, against one score after the other."""
    from mmaselect.images import GROUP
    from mmaselect.selection.bootstrap import PARTS, jackknife
    from mmaselect.selection.instance import InstanceInformation
    from mmaselect.threads import side_by_side

    criterion, groups = InstanceInformation(), torch.arange(256) // GROUP
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 1, 5, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    taps = [images + torch.randn(256, 2, 5, 256, generator=generator) for _ in range(8)]

    def ours():
        with side_by_side() as threads:
            return list(threads.map(lambda rows: jackknife(criterion.score, rows, groups, criterion.leave_out), taps))

    def theirs():
        return [jackknife(criterion.score, rows, groups) for rows in taps]

    (scores, influences), (expected, others) = (zip(*side()) for side in (ours, theirs))
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected))
    # Ours standardises features once, in place of once for each part, so that the influences are alike, not equal.
    assert torch.corrcoef(torch.stack([torch.cat(influences), torch.cat(others)]))[0, 1] > 0.8
    mine, other = interleave(args.repeats, ours, theirs)
    note = f'{mine / len(taps):.3f} s for one'
    work = f'scores of {len(taps)} taps and without each of {PARTS} parts, 256 images of 256 channels'
    return [Row(work, 'one after the other', f'{mine:.2f} s', f'{other:.2f} s', other / mine, 4, note)]


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
        result, peak, _ = measure_memory(lambda: run(search, [batches()]))
        return result.seconds, peak

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
                f'growth of a sweep over {sizes[0]} to {sizes[-1]} {name}', 'linear time', f'exponent {exponent:.2f}',
                'exponent 1', 1 / max(exponent, 1e-9), 0.9,
                f'{seconds[0]:.2f} to {seconds[-1]:.2f} s; memory {memory[0] / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB',
            )
        )  # fmt: skip
    return rows


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
    images = torch.rand(args.images, 3, args.size // 2, args.size // 2, generator=generator) * 2 - 1
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
    label = 'HFR (sigma 0.25)'
    found = {'curve': result.curve(label), 'choice': result.choice(label), 'blocks': result.block_evaluations}
    print(json.dumps({'seconds': statistics.median(times[1:]), **found}))
    torch_dist.barrier()
    cli.leave()


def bench_ranks(args, folder):
    """A sweep by one process of one thread, and by two of them."""
    if args.images % 4:
        raise cli.InputError(f'--images {args.images} is not valid for the row ranks: give a multiple of 4')
    one, two = (run_processes('selection', count, folder, json.dumps(vars(args)))[0] for count in (1, 2))
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


if __name__ == '__main__':
    number, count, place, given = sys.argv[1:]
    rank_child(int(number), int(count), Path(place), argparse.Namespace(**json.loads(given)))
