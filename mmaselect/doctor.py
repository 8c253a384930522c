"""What works on this machine, and what mends the rest."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

#: Extras whose packages an installation may well be without; of ``tests`` only a developer has any. ``lite`` is for a
#: new environment.
EXTRAS = ('mmpretrain', 'mmseg', 'demo', 'prompt')
#: The toolboxes, and what installs each.
TOOLBOXES = {
    'mmpretrain': "pip install 'mmaselect[mmpretrain]'",
    'mmsegmentation': "pip install 'mmaselect[mmseg]'",
    'mmdet': 'pip install mmdet',
}
MARKS = {'good': 'ok', 'absent': '--', 'broken': 'NO'}


@dataclass
class Finding:
    """One line of the diagnosis.

    Attributes:
        topic: What was looked at.
        state: ``'good'``; ``'absent'`` for what may be missing; ``'broken'`` for what may not.
        text: What was found.
        fix: What mends it; empty where nothing needs to be mended.
    """

    topic: str
    state: str
    text: str
    fix: str = ''

    def __str__(self) -> str:
        return f'{MARKS[self.state]}  {self.topic:<18} {self.text}{f" -> {self.fix}" if self.fix else ""}'


def examine() -> Iterator[Finding]:
    """Looks at everything, in a second or two: nothing is loaded or downloaded.

    Yields:
        What was found, topic by topic.
    """
    yield from check_packages()
    yield from check_toolboxes()
    yield check_families()
    yield from check_devices()
    yield check_threads()
    yield check_weights()


def check_packages() -> Iterator[Finding]:
    """Compares what is installed with what ``setup.py`` asks for."""
    from packaging.requirements import Requirement

    from mmaselect.version import __version__

    yield Finding('mmaselect', 'good', f'{__version__}, {Path(__file__).parent}')
    yield Finding('python', 'good', f'{platform.python_version()}, {sys.executable}')
    try:
        lines = metadata.requires('mmaselect') or []
    except metadata.PackageNotFoundError:
        yield Finding('requirements', 'broken', 'mmaselect is imported, but not installed', 'pip install -e .')
        return
    for requirement in map(Requirement, lines):
        asked = requirement.marker is None or requirement.marker.evaluate({'extra': ''})
        extra = next((name for name in EXTRAS if _belongs(requirement, name)), None)
        if not asked and extra is None:
            continue
        found = version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if requirement.name in TOOLBOXES and found is None:
            # Said with the toolboxes.
            continue
        named = f'{requirement.name} {found}' if found else f'{requirement.name} is not installed'
        if fits and requirement.name in ('torch', 'diffusers', 'mmengine'):
            yield Finding(requirement.name, 'good', found or '')
        elif not fits and (asked or found is not None):
            wanted = f'{requirement.name}{requirement.specifier}'
            yield Finding(requirement.name, 'broken', f'{named}, {wanted} is needed', f"pip install '{wanted}'")
        elif not fits:
            yield Finding(
                requirement.name, 'absent', f'{named}: of extra {extra!r}', f"pip install 'mmaselect[{extra}]'"
            )


def check_toolboxes() -> Iterator[Finding]:
    """Says which mmcv there is, and which toolboxes."""
    full, lite = version('mmcv'), version('mmcv-lite')
    if full and lite:
        fix = 'pip uninstall mmcv mmcv-lite, then install one of them'
        yield Finding('mmcv', 'broken', f'mmcv {full} and mmcv-lite {lite} overwrite each other', fix)
    elif not full and not lite:
        fix = "pip install 'mmaselect[lite]'"
        yield Finding('mmcv', 'absent', 'neither mmcv nor mmcv-lite: no config can be run', fix)
    else:
        kind = f'full, {full}' if full else f'lite, {lite}: no compiled ops'
        number = [int(part) for part in (full or lite or '').split('.')[:2]]
        late = number >= [2, 2]
        fix = f"pip install '{'mmcv' if full else 'mmcv-lite'}>=2.0.0,<2.2.0'" if late else ''
        yield Finding('mmcv', 'broken' if late else 'good', kind + ', which mmseg and mmdet refuse' * late, fix)
    for name, command in TOOLBOXES.items():
        found = version(name)
        yield Finding(name, 'good', found) if found else Finding(name, 'absent', 'not installed', command)


def check_families() -> Finding:
    """Says which families the installed diffusers can run."""
    import diffusers

    from mmaselect.diffusion.families import FAMILIES

    # What is listed is imported only when it is used.
    there = set(dir(diffusers))
    runs = {name for name, family in FAMILIES.items() if family.is_available() and family.class_names[0] in there}
    missing = [name for name in FAMILIES if name not in runs]
    text = ', '.join(name for name in FAMILIES if name in runs)
    if not missing:
        return Finding('families', 'good', text)
    least = max((FAMILIES[name].least_diffusers for name in missing), key=lambda text: [*map(int, text.split('.'))])
    fix = f"pip install 'diffusers>={least}'" if least != '0' else 'pip install -U diffusers'
    return Finding('families', 'absent', f'{text}; not {", ".join(missing)}', fix)


def check_devices() -> Iterator[Finding]:
    """Says what there is to compute on, and what each can do."""
    from mmaselect.diffusion.acceleration import ATTENTION, attention_kernel

    devices = {'cpu': f'{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}'}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices[f'cuda:{number}'] = f'{properties.name}, {properties.total_memory / 1e9:.0f} GB'
    if torch.backends.mps.is_available():
        devices['mps'] = 'Apple'
    for device, text in devices.items():
        kernels = []
        for name in ATTENTION:
            if name == 'auto':
                continue
            dtype = torch.float32 if device == 'cpu' else torch.bfloat16
            with attention_kernel(name):
                if _works(lambda dtype=dtype, device=device: _attend(device, dtype)):
                    kernels.append(name)
        half = [name for name in ('bfloat16', 'float16') if _works(lambda n=name, d=device: _multiply(d, n))]
        yield Finding(device, 'good', f'{text}; {", ".join(half) or "float32 alone"}; attention {", ".join(kernels)}')
    if list(devices) == ['cpu']:
        built = f'torch {torch.__version__} is {"built for CUDA" if torch.version.cuda else "a build for CPUs"}'
        fix = '' if torch.version.cuda else 'with a GPU, install the build of torch that pytorch.org names for it'
        yield Finding('accelerator', 'absent', f'none; {built}', fix)


def check_threads() -> Finding:
    """Says how many threads torch has, and where data loaders get theirs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f'{threads} of torch on {cores} cores; loaders take num_workers of each config'
    named = os.environ.get('OMP_NUM_THREADS')
    if named and threads < cores:
        return Finding('threads', 'absent', text, f'OMP_NUM_THREADS={named} keeps cores idle: unset it')
    return Finding('threads', 'good', text)


def check_weights() -> Finding:
    """Says which models the hub's cache holds."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    found = {}
    for folder in sorted(cache.glob('models--*')):
        files = [path for path in folder.glob('snapshots/*/**/*') if path.suffix in ('.safetensors', '.bin')]
        if files:
            size = sum(path.stat().st_size for path in {file.resolve() for file in files} if path.is_file())
            found[folder.name.removeprefix('models--').replace('--', '/')] = size
    text = ', '.join(f'{name} ({size / 1e9:.1f} GB)' for name, size in found.items())
    if found:
        return Finding('cached weights', 'good', f'{text}, in {cache}')
    return Finding('cached weights', 'absent', f'none in {cache}', 'hf download ID, or name a folder as pretrained')


def version(name: str) -> str | None:
    """Version of an installed package; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _belongs(requirement: Any, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({'extra': extra})


def _works(action: Any) -> bool:
    try:
        action()
    except (RuntimeError, TypeError):
        return False
    return True


def _multiply(device: str, dtype: str) -> None:
    one = torch.ones(8, 8, device=device, dtype=getattr(torch, dtype))
    assert (one @ one)[0, 0].item() == 8


def _attend(device: str, dtype: torch.dtype) -> None:
    import warnings

    query = torch.ones(1, 2, 16, 64, device=device, dtype=dtype)
    with warnings.catch_warnings():
        # It says why there is no kernel.
        warnings.simplefilter('ignore')
        F.scaled_dot_product_attention(query, query, query)
