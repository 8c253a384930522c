"""Coarse-to-fine on synthetic and measured curves."""

from __future__ import annotations

import math

import pytest
import torch

from mmaselect.selection.coarse import coarse_to_fine, cost, grid, make_plan, rival

SIZES = (41, 51, 71, 101, 201, 1001)


def search(curve):
    """Gives what coarse-to-fine chooses, how many points it evaluated, and what it says."""
    seen = {}

    def evaluate(positions):
        assert not set(positions) & set(seen)
        seen.update((position, curve[position]) for position in positions)
        return dict(seen)

    said = coarse_to_fine(len(curve), evaluate)
    return max(sorted(seen), key=seen.get), len(seen), said


def unimodal(size):
    for peak in (0, 0.02, 0.13, 0.37, 0.5, 0.77, 0.96, 1):
        for width in (0.08, 0.2, 0.6):
            x = [(position / (size - 1) - peak) / width for position in range(size)]
            yield [math.exp(-value * value) for value in x]
            # Steep on the one side, slow on the other.
            yield [math.exp(value) if value < 0 else 1 / (1 + value) for value in x]
            yield [1 - abs(value) for value in x]


@pytest.mark.parametrize('size', SIZES)
def test_one_peak_is_found_at_a_third_of_the_cost(size):
    for curve in unimodal(size):
        chosen, evaluated, said = search(curve)
        best = curve.index(max(curve))
        assert abs(chosen - best) <= 1, (chosen, best, said)
        assert evaluated <= size // 3 or said.startswith('sweep: '), (evaluated, said)
    # On these a fallback would be an excuse.
    said = [search(curve)[2] for curve in unimodal(size)]
    assert all(one.startswith('coarse-to-fine: ') for one in said), said


@pytest.mark.parametrize('size', SIZES)
def test_little_noise_does_no_harm(size):
    generator = torch.Generator().manual_seed(size)
    for curve in unimodal(size):
        noise = 0.002 * torch.randn(size, generator=generator)
        noisy = [value + extra for value, extra in zip(curve, noise.tolist())]
        chosen, evaluated, said = search(noisy)
        if said.startswith('sweep'):
            assert evaluated == size
            assert chosen == noisy.index(max(noisy))
        else:
            assert evaluated <= size // 3
            # Where the noise moves the highest point, what counts is how high it is.
            assert abs(chosen - noisy.index(max(noisy))) <= 1 or max(noisy) - noisy[chosen] < 0.01


@pytest.mark.parametrize('size', SIZES)
def test_flat_two_peaked_and_noisy_curves_are_swept_and_it_says_so(size):
    x = [position / (size - 1) for position in range(size)]
    curves = {
        'flat': [[0.5] * size, [0.5 + 0.01 * math.sin(9 * value) for value in x], [0.5 + 0.02 * value for value in x]],
        'several peaks': [
            [math.exp(-(((value - 0.2) / 0.1) ** 2)) + 0.97 * math.exp(-(((value - 0.8) / 0.1) ** 2)) for value in x],
            [abs(value - 0.5) for value in x],
            [1 + math.cos(6 * math.pi * value) for value in x],
        ],
    }
    for reason, members in curves.items():
        for curve in members:
            chosen, evaluated, said = search(curve)
            assert said.startswith(f'sweep: the curve {"is flat" if reason == "flat" else "has several peaks"}'), said
            assert (chosen, evaluated) == (curve.index(max(curve)), size)


@pytest.mark.parametrize('size', SIZES)
def test_curves_of_pure_noise_are_swept(size):
    generator = torch.Generator().manual_seed(0)
    curves = torch.rand(200, size, generator=generator).tolist()
    # Eleven points are all that the budget allows on 41, and now and then they look like a peak.
    assert sum(search(curve)[2].startswith('sweep: ') for curve in curves) >= (170 if size == 41 else 190)


#: Measured at 21 timesteps on the 32-pixel DiT of docs/en/runs.md, 256 birds: centred noise-consistent HFR, plain HFR,
#: noise-consistent HFR.
MEASURED = (
    '.2786 .2752 .2711 .2660 .2600 .2532 .2455 .2370 .2279 .2182 .2081 .1978 .1875 .1776 .1684 .1607 .1555 .1563 '
    '.1753 0 0',
    '.0562 .0534 .0521 .0519 .0528 .0544 .0567 .0596 .0630 .0668 .0711 .0757 .0809 .0865 .0927 .0995 .1068 .1148 .1234 '
    '.1324 .1419',
    '.0561 .0527 .0495 .0466 .0439 .0415 .0393 .0373 .0354 .0337 .0321 .0306 .0292 .0279 .0267 .0257 .0247 .0240 .0234 '
    '.0230 .0228',
)


@pytest.mark.parametrize('factor', (2, 5, 10))
@pytest.mark.parametrize('curve', MEASURED)
def test_measured_curves(curve, factor):
    """Refined to finer grids by straight lines."""
    points = torch.tensor([float(value) for value in curve.split()])
    size = 20 * factor + 1
    fine = torch.nn.functional.interpolate(points[None, None], size, mode='linear', align_corners=True)[0, 0].tolist()
    chosen, evaluated, said = search(fine)
    assert said.startswith('coarse-to-fine'), said
    assert abs(chosen - fine.index(max(fine))) <= 1
    assert evaluated <= size // 3


def test_a_small_grid_is_swept():
    curve = [-abs(position - 7) for position in range(21)]
    assert search(curve) == (7, 21, 'sweep: a third of 21 timesteps is too few to find a peak among them')
    assert make_plan(21) is None
    assert all(make_plan(size) for size in range(41, 1001))


@pytest.mark.parametrize('size', SIZES)
def test_plans_keep_their_budget(size):
    plan = make_plan(size)
    assert plan[-1] in (1, 2)
    assert cost(plan, size) <= size // 3
    assert grid(size, plan[0])[-1] == size - 1


def test_a_rival_is_a_peak_that_may_rise_above_the_best():
    assert rival([0, 5, 10, 15, 20], [0.0, 1.0, 0.0, 0.9, 0.0]) == 15
    assert rival([0, 5, 10, 15, 20], [0.0, 1.0, 0.4, 0.5, 0.3]) is None
    # The end of a curve is a peak, too.
    assert rival([0, 5, 10, 15], [1.0, 0.2, 0.1, 0.9]) == 15
