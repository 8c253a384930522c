"""Numbers that hold: in half precision, and again."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch
from conftest import needs_torch
from sklearn.datasets import load_digits

import mmaselect
from mmaselect.selection.criteria import HighFrequencyRatio, InstanceInformation, NoiseConsistentHFR

MODEL = dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels')
#: Relative error of a score that docs/en/evidence.md states.
ALLOWED = {'bfloat16': 2e-2, 'float16': 2e-3}


@pytest.fixture(scope='module')
def images():
    digits = torch.from_numpy(load_digits().images[:32]).float().div(16)[:, None]
    return torch.nn.functional.interpolate(digits, size=16, mode='bicubic').clamp(0, 1).expand(-1, 3, -1, -1)


def select(images, **more):
    compare = [dict(type='HighFrequencyRatio'), dict(type='NoiseConsistentHFR')]
    options = dict(block=2, compare=compare, num_images=None, timesteps=dict(start=0, stop=1000, num=11))
    return mmaselect.select(MODEL | more.pop('model', {}), images, **{**options, **more})


@pytest.fixture(scope='module')
def exact(images):
    return select(images)


@pytest.mark.parametrize('dtype', ('bfloat16', pytest.param('float16', marks=needs_torch('2.6', 'float16 on a CPU'))))
def test_half_precision_scores_and_chooses_alike(images, exact, dtype):
    half = select(images, model=dict(dtype=dtype))
    spectral, views = (NoiseConsistentHFR().label, HighFrequencyRatio().label), InstanceInformation().label
    for label in spectral:
        assert half.choices[label] == exact.choices[label]
    # Near ties may fall otherwise: 200 and 300 differ by 0.6 %.
    assert exact.sweep.choices[views].resamples[half.choices[views]] > 0.1
    for label in (*spectral, views):
        found, expected = half.sweep.curve(label), exact.sweep.curve(label)
        scale = max(expected)
        errors = [abs(one - two) / scale for one, two in zip_longest(found, expected)]
        assert ALLOWED[dtype] / 1000 < max(errors) < ALLOWED[dtype]


def test_a_selection_can_be_repeated_to_the_last_bit(images):
    first, second, other = (select(images, timesteps=[100, 400], seed=seed).to_dict()['scores'] for seed in (0, 0, 1))
    assert first == second
    for label in first:
        assert all(one != two for one, two in zip(first[label], other[label]))


def test_features_can_be_repeated_to_the_last_bit(images):
    first, second = (mmaselect.extract(MODEL, images, 300, block=2, noise='fresh') for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, mmaselect.extract(MODEL, images, 300, block=2, noise='fresh', seed=1))
