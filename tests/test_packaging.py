"""What a user gets from ``pip install``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from conftest import ROOT


def test_the_wheel_holds_configs_tools_and_the_embedded_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ('configs', 'tools'):
        expected = {
            f'mmaselect/.mim/{folder}/{path.relative_to(ROOT / folder)}'
            for path in (ROOT / folder).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts
        }
        assert len(expected) > 8
        assert expected <= names
    model = 'mmaselect/assets/dit-nano_digits/transformer'
    assert {f'{model}/config.json', f'{model}/diffusion_pytorch_model.safetensors'} <= names
    pages = {f'mmaselect/pages/templates/{path.name}' for path in (ROOT / 'mmaselect/pages/templates').iterdir()}
    assert len(pages) == 6
    assert pages <= names
    # Type checkers read annotations of packages that say they have them.
    assert 'mmaselect/py.typed' in names
    assert not [name for name in names if name.startswith('tests')]
    size = zipfile.ZipFile(wheel).getinfo(f'{model}/diffusion_pytorch_model.safetensors').file_size
    assert size < 8e6


def test_a_plain_install_finds_them(wheel, tmp_path):
    target = tmp_path / 'site'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(target), str(wheel)], check=True
    )
    (tmp_path / 'user.py').write_text("_base_ = ['mmaselect::_base_/models/sd35-medium.py']\n")
    code = f"""
import mmaselect
assert mmaselect.__file__.startswith({str(target)!r}), mmaselect.__file__
from mmengine.config import Config
from mmengine.utils import get_installed_path
print(Config.fromfile({str(tmp_path / 'user.py')!r}).model.backbone.type)
print(get_installed_path('mmaselect'))
"""
    environment = {**os.environ, 'PYTHONPATH': str(target)}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.stdout.splitlines() == ['ASelectDiT', str(target / 'mmaselect')], done.stderr


def test_no_mmcv_is_forced_on_anyone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
        lines = archive.read(name).decode().splitlines()
    required = [line for line in lines if line.startswith('Requires-Dist:') and 'extra ==' not in line]
    assert required
    assert not [line for line in required if 'mmcv' in line]
    assert not [line for line in required if 'setuptools' in line]


@pytest.mark.parametrize('wanted', ((), ('torch>=99',)), ids=('as it is', 'asking for more'))
def test_installing_it_into_a_project_changes_nothing_that_is_there(wheel, wanted):
    """pip is asked without its index: it can only keep what is installed, or give up."""
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--dry-run', '--no-index', '--quiet', '--report', '-',
         f'{wheel}[mmpretrain,mmseg,demo,prompt]', *wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) is bool(wanted), done.stderr
    if not wanted:
        report = json.loads(done.stdout)
        assert {one['metadata']['name'] for one in report['install']} <= {'mmaselect'}


#: A project of those years: the full mmcv, and a later setuptools. What its packages require is not of interest here.
PROJECT = {
    'filelock': '3.13.1', 'ftfy': '6.1.3', 'matplotlib': '3.8.2', 'mmcv': '2.1.0', 'mmengine': '0.10.1',
    'mmpretrain': '1.2.0', 'mmsegmentation': '1.2.2', 'numpy': '1.26.0', 'opencv-python': '4.8.0.76',
    'packaging': '23.2', 'pillow': '10.1.0', 'regex': '2023.12.25', 'requests': '2.31.0', 'rich': '13.4.2',
    'setuptools': '84.0.0', 'torch': '2.1.0', 'torchvision': '0.16.0', 'tqdm': '4.65.2',
}  # fmt: skip
#: What an index has besides, with what the real packages of these versions ask for.
INDEX = {
    ('diffusers', '0.31.0'): [
        'filelock', 'huggingface-hub>=0.23.2', 'numpy', 'pillow', 'regex!=2019.12.17', 'requests', 'safetensors>=0.3.1',
    ],
    ('huggingface-hub', '0.23.2'): ['filelock', 'packaging>=20.9', 'requests', 'tqdm>=4.42.1'],
    ('jinja2', '3.1.6'): ['markupsafe>=2.0'],
    ('markupsafe', '2.1.5'): [],
    ('safetensors', '0.4.3'): [],
    **{(name, '99.0'): [] for name in PROJECT if name != 'setuptools'},
    ('setuptools', '80.0.0'): [],
}  # fmt: skip


def _describe(folder, name, version, requires=()):
    """Writes a distribution's metadata, all that pip looks at."""
    place = folder / f'{name.replace("-", "_")}-{version}.dist-info'
    place.mkdir(parents=True)
    lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}']
    (place / 'METADATA').write_text('\n'.join([*lines, *(f'Requires-Dist: {one}' for one in requires), '']))
    return place


@pytest.mark.parametrize('torch,added_only', (('2.1.0', True), ('2.0.1', False)))
def test_a_project_with_the_full_mmcv_gets_additions_alone(wheel, tmp_path, torch, added_only):
    """Later versions of all that it has are to be had; with an older torch than ours, the test sees that one taken."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'project')], check=True)
    (site,) = (tmp_path / 'project').glob('lib/python*/site-packages')
    for name, version in {**PROJECT, 'torch': torch}.items():
        _describe(site, name, version)
    for (name, version), requires in INDEX.items():
        place = _describe(tmp_path / 'index', name, version, requires)
        (place / 'WHEEL').write_text('Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        with zipfile.ZipFile(tmp_path / 'index' / f'{place.stem}-py3-none-any.whl', 'w') as archive:
            for file in place.iterdir():
                archive.write(file, f'{place.name}/{file.name}')
    done = subprocess.run(
        [sys.executable, '-m', 'pip', '--python', str(tmp_path / 'project/bin/python'), 'install', '--dry-run',
         '--no-index', '--find-links', str(tmp_path / 'index'), '--quiet', '--report', '-',
         f'{wheel}[mmpretrain,mmseg]'],
        capture_output=True, text=True, check=False, env={'PATH': os.environ['PATH'], 'PIP_CONFIG_FILE': os.devnull},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = {one['metadata']['name'] for one in json.loads(done.stdout)['install']}
    added = {'mmaselect', *(name for name, _ in INDEX if name not in PROJECT)}
    assert taken == (added if added_only else {*added, 'torch'})


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges():
    pinned = dict(line.split('==') for line in _lines('lowest'))
    for file in ('runtime', 'lite', 'mmpretrain', 'mmseg'):
        for line in _lines(file):
            name, _, rest = line.partition('>=')
            if rest:
                assert pinned[name] in (rest.split(',')[0], f'{rest.split(",")[0]}.0'), name


def _lines(name):
    lines = (ROOT / f'requirements/{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def test_the_installed_versions_are_those_of_the_constraints():
    """``make`` must have installed the set that is said to work together."""
    for line in (ROOT / 'requirements/constraints.txt').read_text().splitlines():
        if line and not line.startswith('#'):
            name, version = line.split('==')
            assert metadata.version(name).split('+')[0] == version, name
