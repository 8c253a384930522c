"""Racing: the choice of the full sweep for a third of the passes, on curves with noise, and on a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from test_coarse import MEASURED
from test_search import IMAGES, TIMESTEPS, make_model, together

from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.images import Batch, draw_portions, number_groups
from mmaselect.selection.bootstrap import Choice
from mmaselect.selection.criteria import FisherScore, HighFrequencyRatio
from mmaselect.selection.criterion import SummedCriterion
from mmaselect.selection.racing import FIRST_IMAGES, survivors
from mmaselect.selection.report import Selection
from mmaselect.selection.search import Search, run

SIZE, IMAGES_IN_ALL = 21, 256
GRID = [50.0 * position for position in range(SIZE)]
X = [position / (SIZE - 1) for position in range(SIZE)]
CURVES = {
    **{
        f'peak at {peak}, width {width}': [math.exp(-(((x - peak) / width) ** 2)) for x in X]
        for peak in (0, 0.13, 0.5, 0.96)
        for width in (0.08, 0.2, 0.6)
    },
    **{f'measured {number}': [float(value) for value in curve.split()] for number, curve in enumerate(MEASURED)},
    'two peaks': [math.exp(-(((x - 0.2) / 0.1) ** 2)) + 0.97 * math.exp(-(((x - 0.8) / 0.1) ** 2)) for x in X],
    'a valley': [abs(x - 0.45) for x in X],
    'three peaks': [1 + math.cos(6 * math.pi * x) - 0.1 * x for x in X],
}
#: On these there is little to drop.
HARD = ('two peaks', 'a valley', 'three peaks')


class Mean(SummedCriterion):
    """The mean of a map, averaged over images."""

    fields = ('value', 'count')
    label = 'mean'

    def sums(self, features):
        return {'value': features.per_group(features.maps[0].mean((1, 2, 3)).double()), 'count': features.counts}

    def score(self, sums):
        return sums['value'] / sums['count']


class Curve:
    """Stands in for a model: an image's map holds the value of the curve, the image's own level, and noise."""

    device, multiple, num_blocks, family = torch.device('cpu'), 1, 1, SimpleNamespace(taps=[Tap(0, 'query')])

    def __init__(self, curve, noise):
        generator, span = torch.Generator().manual_seed(0), max(curve) - min(curve)
        own = torch.randn(IMAGES_IN_ALL, 1, generator=generator)
        self.values = torch.tensor(curve) + span * (
            0.5 * own + noise * torch.randn(IMAGES_IN_ALL, SIZE, generator=generator)
        )

    def encode(self, images):
        return images

    def read(self, latent, noise, timestep, visit):
        visit(Tap(0, 'query'), self.values[latent[:, 0, 0, 0].long(), GRID.index(timestep)].view(-1, 1, 1, 1))


def search(curve, noise, kind):
    portions = draw_portions(IMAGES_IN_ALL, IMAGES_IN_ALL, 0, FIRST_IMAGES if kind == 'racing' else None)
    batches = [
        [Batch(torch.tensor(indices).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1), indices, None,
               [first + place // 4 for place in range(len(indices))])]
        for indices, first in number_groups(portions, 4)
    ]  # fmt: skip
    return run(Search(Curve(curve, noise), GRID, [Mean()]), batches, kind)


@pytest.mark.parametrize('noise', [0.02, 0.2])
def test_a_race_chooses_as_the_sweep_does(noise):
    cost = []
    for name, curve in CURVES.items():
        whole, raced = search(curve, noise, 'sweep'), search(curve, noise, 'racing')
        assert raced.choice('mean') == whole.choice('mean'), name
        assert raced.num_images == whole.num_images == IMAGES_IN_ALL
        # What was not dropped was run on all images, and is scored as ever.
        kept = dict(zip(whole.timesteps, whole.curve('mean')))
        assert raced.curve('mean') == pytest.approx([kept[timestep] for timestep in raced.timesteps], rel=1e-6)
        assert sorted([*raced.timesteps, *raced.dropped]) == GRID
        runs = IMAGES_IN_ALL * len(raced.timesteps) + sum(raced.dropped.values())
        assert raced.block_evaluations == runs
        if name not in HARD:
            cost.append(raced.block_evaluations / whole.block_evaluations)
    assert sum(cost) / len(cost) < 1 / 3


def test_pure_noise_drops_little_and_what_wins_is_what_the_sweep_chooses():
    whole, raced = search([0.0, 1e-9] * 10 + [0.0], 1e9, 'sweep'), search([0.0, 1e-9] * 10 + [0.0], 1e9, 'racing')
    assert raced.choice('mean') == whole.choice('mean')
    assert raced.block_evaluations > whole.block_evaluations / 3


def test_what_survives():
    def after(**resamples):
        choice = Choice([2.0], [Tap(0, 'query')], 0.9, {float(key[1:]): share for key, share in resamples.items()})
        return survivors([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], choice)

    assert after(t2=1.0) == [1.0, 2.0, 3.0]
    assert after(t2=0.9, t5=0.1) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert after(t2=0.998, t5=0.002) == [1.0, 2.0, 3.0]
    # Of too few images nothing is known.
    assert survivors([0.0, 1.0], Choice([1.0], [Tap(0, 'query')])) == [0.0, 1.0]


def test_ranks_race_together_and_the_report_says_who_fell_behind(monkeypatch):
    model, criteria = make_model(), [HighFrequencyRatio()]

    def portion(*groups):
        return [Batch(IMAGES[2 * group : 2 * group + 2], range(2 * group, 2 * group + 2), None, [group, group])
                for group in groups]  # fmt: skip

    grid = [50.0 * step for step in range(21)]
    alone = run(Search(model, grid, criteria), [portion(0, 1), portion(2)], 'racing')
    ranks = together(monkeypatch, model, grid, criteria, [[portion(0), portion(2)], [portion(1), []]], 'racing')
    for one in ranks:
        assert one.dropped == alone.dropped
        assert one.timesteps == alone.timesteps
        assert (one.choice(criteria[0].label), one.num_images) == (alone.choice(criteria[0].label), 6)
        assert one.block_evaluations == alone.block_evaluations
    assert set(alone.dropped.values()) == {4}
    selection = Selection(alone, criteria[0].label, {})
    assert Selection.from_dict(selection.to_dict()).sweep == alone
    first = next(iter(alone.dropped))
    assert f'were dropped: {first:g} after 4' in selection.table()
    assert alone.search == f'racing: {len(alone.timesteps)} of 21 timesteps on all images'


def test_who_cannot_race():
    model = make_model()
    with pytest.raises(InputError, match=r"search='racing' needs a criterion that can be resampled; Fisher Score"):
        run(Search(model, TIMESTEPS, [FisherScore()]), [[]], 'racing')
    with pytest.raises(InputError, match=r"search='racing' finds one timestep"):
        run(Search(model, TIMESTEPS, [HighFrequencyRatio()], num_timesteps=2), [[]], 'racing')
