"""Rows on the time before the first feature: imports, and weights from the disk."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import BLOCK, Baseline, Row, interleave, read_status, run_processes
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap


def load_child(side, folder):
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
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    if side in ('cold', 'floor'):
        seconds = first_feature(folder, images) if side == 'cold' else read_and_pass(folder, images)
        print(json.dumps({'seconds': seconds}))
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


def bench_load(args, folder):
    """Memory, seconds and bytes from nothing to the first feature; each side in a process of its own, in turns."""
    sides = ('ours', 'theirs', 'cold', 'floor')
    runs = [{side: run_processes('loading', 1, side, folder)[0] for side in sides} for _ in range(args.repeats)]
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


if __name__ == '__main__':
    load_child(sys.argv[3], Path(sys.argv[4]))
