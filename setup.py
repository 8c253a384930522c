"""Packaging, in OpenMMLab's manner: configs and tools travel inside the package, below ``mmaselect/.mim``."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version():
    scope = {}
    exec((ROOT / 'mmaselect' / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def read_requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def add_mim_extension():
    """Puts configs and tools where ``mim`` and ``mmaselect::`` look for them: linked while developing, else copied."""
    commands = {'develop', 'editable_wheel', 'dist_info'}
    link = bool(commands & set(sys.argv))
    if not link and not {'bdist_wheel', 'sdist', 'install', 'build', 'build_py'} & set(sys.argv):
        return
    target = ROOT / 'mmaselect' / '.mim'
    target.mkdir(exist_ok=True)
    for name in ('configs', 'tools', 'model-index.yml'):
        source, place = ROOT / name, target / name
        if not source.exists():
            # Building from an sdist, which holds the copies already.
            continue
        if place.is_symlink() or place.is_file():
            place.unlink()
        elif place.is_dir():
            shutil.rmtree(place)
        if link:
            place.symlink_to(os.path.relpath(source, target), target_is_directory=source.is_dir())
        elif source.is_file():
            shutil.copy(source, place)
        else:
            shutil.copytree(source, place, ignore=shutil.ignore_patterns('__pycache__'))


def mim_files():
    """Every file below ``.mim``, one by one: setuptools' globs pass over folders that begin with a dot."""
    package = ROOT / 'mmaselect'
    return [
        str(Path(folder, name).relative_to(package))
        for folder, _, names in os.walk(package / '.mim', followlinks=True)
        for name in names
        if '__pycache__' not in folder
    ]


if __name__ == '__main__':
    add_mim_extension()
    setup(
        name='mmaselect',
        version=read_version(),
        description='Frozen diffusion transformers as backbones for OpenMMLab, at a timestep selected before training',
        long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.11',
        packages=find_packages(include=['mmaselect', 'mmaselect.*']),
        package_data={'mmaselect': ['py.typed', 'assets/**/*', *mim_files()]},
        install_requires=read_requirements('runtime'),
        # mmcv and mmcv-lite provide the same module: which of them is the user's choice, never a hard dependency.
        extras_require={
            'lite': read_requirements('lite'),
            'mmpretrain': read_requirements('mmpretrain'),
            'mmseg': read_requirements('mmseg'),
            'demo': read_requirements('demo'),
            'prompt': read_requirements('prompt'),
            'tests': read_requirements('tests'),
        },
    )
