"""Rows on a million images and more: the cache's own part, extractions by several processes, and on paper."""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.cache import size_of
from benchmarks.common import BLOCK, Row, fit_exponent, measure_memory, run_processes
from benchmarks.features import count_at_512
from mmaselect import cli
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap

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
        started = time.process_time()
        (result, used), peak, kept = measure_memory(lambda: (work(*arguments), time.process_time() - started))
        return result, used, kept, peak

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
    cli.leave()


def bench_processes(args, folder):
    """An extraction by one, two and four processes of one thread: what each image costs, and who waits for whom."""
    images, found = max(8, args.images // 8 * 8), {}
    for world_size in (1, 2, 4):
        given = json.dumps(dict(vars(args), images=images))
        found[world_size] = run_processes('scale', world_size, folder, given)
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


if __name__ == '__main__':
    number, count, place, given = sys.argv[1:]
    extract_child(int(number), int(count), Path(place), argparse.Namespace(**json.loads(given)))
