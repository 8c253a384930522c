"""Packaging, in OpenMMLab's manner: configs and tools travel inside the package, below ``mmaselect/.mim``."""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_version():
    scope = {}
    exec((ROOT / 'mmaselect' / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def read_requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


class BuildPy(build_py):
    """Puts configs and tools where ``mim`` and ``mmaselect::`` look for them: linked while developing, else copied."""

    def run(self):
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        target = package / 'mmaselect' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in ('configs', 'tools', 'model-index.yml'):
            source, place = ROOT / name, target / name
            if self.editable_mode:
                place.symlink_to(os.path.relpath(source, target), target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, place)


if __name__ == '__main__':
    setup(
        name='mmaselect',
        version=read_version(),
        description='Frozen diffusion transformers as backbones for OpenMMLab, at a timestep selected before training',
        long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.9',
        packages=find_packages(include=['mmaselect', 'mmaselect.*']),
        package_data={'mmaselect': ['py.typed', 'assets/**/*', 'pages/templates/*']},
        cmdclass={'build_py': BuildPy},
        entry_points={'console_scripts': ['mmaselect = mmaselect.__main__:main']},
        install_requires=read_requirements('runtime'),
        # mmcv and mmcv-lite provide the same module: which of them is the user's choice, never a hard dependency.
        extras_require={
            'lite': read_requirements('lite'),
            'mmpretrain': read_requirements('mmpretrain'),
            'mmseg': read_requirements('mmseg'),
            'mmdet': read_requirements('mmdet'),
            'demo': read_requirements('demo'),
            'prompt': read_requirements('prompt'),
            'tests': read_requirements('tests'),
            'docs': read_requirements('docs'),
        },
    )
