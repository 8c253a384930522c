"""``mmaselect doctor``: what is said of this machine, and of machines that lack something."""

from __future__ import annotations

import importlib.metadata

import diffusers
import pytest
import torch
from conftest import run_tool, set_hub

from mmaselect import doctor
from mmaselect.diffusion.families import FAMILIES, QwenImage


@pytest.fixture
def installed(monkeypatch):
    """Versions of packages, those given in place of the real ones; None for one that is not there."""
    changed = {}
    real = importlib.metadata.version

    def version(name):
        found = changed[name] if name in changed else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, 'version', version)
    return changed


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_the_tool_finds_all_well_here():
    done = run_tool('doctor.py')
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[4:22].strip(): line for line in done.stdout.splitlines()}
    assert len(lines) < 40
    assert lines['torch'] == f'ok  {"torch":<18} {torch.__version__.split("+")[0]}'
    assert diffusers.__version__ in lines['diffusers']
    assert all(name in lines['families'] for name in FAMILIES)
    assert 'bfloat16' in lines['cpu']
    assert 'math' in lines['cpu'].partition('attention')[2]
    assert lines['mmpretrain'].startswith('ok')
    assert 'NO' not in {line[:2] for line in done.stdout.splitlines()}


def test_it_names_what_mends_an_old_package(installed):
    installed.update({'diffusers': '0.30.0', 'scikit-learn': None})
    found = by_topic(doctor.check_packages())
    assert found['diffusers'].state == 'broken'
    assert found['diffusers'].text == 'diffusers 0.30.0, diffusers>=0.31 is needed'
    assert found['diffusers'].fix == "pip install 'diffusers>=0.31'"
    assert found['scikit-learn'].state == 'absent'
    assert found['scikit-learn'].fix == "pip install 'mmaselect[demo]'"


@pytest.mark.parametrize(
    'full, lite, state, said',
    (
        (None, None, 'absent', "pip install 'mmaselect[lite]'"),
        ('2.1.0', '2.1.0', 'broken', 'overwrite each other'),
        ('2.2.0', None, 'broken', "'mmcv>=2.0.0,<2.2.0'"),
        (None, '2.1.0', 'good', 'no compiled ops'),
        ('2.1.0', None, 'good', 'full, 2.1.0'),
    ),
)
def test_it_says_which_mmcv_there_is(installed, full, lite, state, said):
    installed.update({'mmcv': full, 'mmcv-lite': lite, 'mmdet': None})
    found = by_topic(doctor.check_toolboxes())
    assert found['mmcv'].state == state
    assert said in str(found['mmcv'])
    assert found['mmdet'].fix == 'pip install mmdet'


def test_it_names_the_diffusers_that_a_family_needs(monkeypatch):
    monkeypatch.setattr(diffusers, '__version__', '0.37.0')
    found = doctor.check_families()
    assert found.state == 'absent'
    assert QwenImage.name in found.text.partition('; not ')[2]
    assert 'SD3' in found.text.partition('; not ')[0]
    assert found.fix == "pip install 'diffusers>=0.42'"


def test_idle_cores_are_named(monkeypatch):
    monkeypatch.setattr(doctor.os, 'sched_getaffinity', lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert doctor.check_threads().fix == 'OMP_NUM_THREADS=1 keeps cores idle: unset it'
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    assert not doctor.check_threads().fix


def test_cached_weights_are_listed(monkeypatch, tmp_path):
    set_hub(monkeypatch, HF_HUB_CACHE=str(tmp_path))
    assert doctor.check_weights().state == 'absent'
    folder = tmp_path / 'models--owner--name'
    (folder / 'blobs').mkdir(parents=True)
    (folder / 'blobs' / 'abc').write_bytes(bytes(300_000_000))
    (folder / 'snapshots' / 'main' / 'transformer').mkdir(parents=True)
    (folder / 'snapshots' / 'main' / 'transformer' / 'weights.safetensors').symlink_to(folder / 'blobs' / 'abc')
    # A config alone is no model.
    (tmp_path / 'models--owner--other' / 'snapshots' / 'main').mkdir(parents=True)
    (tmp_path / 'models--owner--other' / 'snapshots' / 'main' / 'config.json').write_text('{}')
    found = doctor.check_weights()
    assert found.state == 'good'
    assert found.text.startswith('owner/name (0.3 GB), in ')
