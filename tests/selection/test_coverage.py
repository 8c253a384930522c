"""Choosing several timesteps: what two of them share is measured, and discounted."""

from __future__ import annotations

import pytest
import torch

from mmaselect.selection.coverage import greedy, overlap, sketch
from mmaselect.selection.features import Features


def with_own(shared, noise=0.0):
    """Adds the timesteps' own energies: what they share with themselves, and noise."""
    return torch.cat([shared, (shared.diagonal() + noise)[None]])


def test_a_copy_adds_nothing_and_something_new_does():
    # Timesteps 0 and 1 show the same, 2 is unrelated, 3 is half of each.
    shared = torch.tensor(
        [[4.0, 4.0, 0.0, 2.0], [4.0, 4.0, 0.0, 2.0], [0.0, 0.0, 9.0, 3.0], [2.0, 2.0, 3.0, 4.0]], dtype=torch.float64
    )
    assert greedy([1.0, 0.99, 0.1, 0.2], with_own(shared), 0, 2) == [0, 3]
    assert greedy([1.0, 0.99, 0.9, 0.2], with_own(shared), 0, 3) == [0, 2, 3]
    assert greedy([1.0, 0.99, 0.9, 0.2], with_own(shared), 2, 1) == [2]
    # What is new of a noisy timestep is worth less.
    noise = torch.tensor([0.0, 0.0, 91.0, 0.0], dtype=torch.float64)
    assert greedy([1.0, 0.99, 0.9, 0.2], with_own(shared, noise), 0, 3) == [0, 3, 2]


def test_what_is_explained_is_that_of_a_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    x[3] = 0.6 * x[0] + 0.5 * x[1] + 0.3 * x[2]
    shared = with_own(x @ x.T)
    coefficients = torch.linalg.lstsq(x[:2].T, x[2:].T).solution
    left = (x[2:] - coefficients.T @ x[:2]).square().sum(1) / x[2:].square().sum(1)
    # The first is given, the second forced by its score; then the smallest change of two equal gains decides.
    for factor, expected in ((1.001, 2), (0.999, 3)):
        scores = [1.0, 1e9, factor / left[0].item(), 1 / left[1].item()]
        assert greedy(scores, shared, 0, 3) == [0, 1, expected]


def test_overlap_counts_the_image_and_not_the_noise():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4096, 8, 4, 4, generator=generator)
    groups = torch.arange(4096) // 4
    shown = [images, 2 * images, torch.randn(4096, 8, 4, 4, generator=generator)]
    sketches = []
    for values in shown:
        maps = [values + 7 + 3 * torch.randn(values.shape, generator=generator) for _ in range(2)]
        sketches.append(sketch(Features(maps, groups)))
    shared = overlap(sketches)
    shared, own = shared[:-1], shared[-1]
    torch.testing.assert_close(shared, shared.T)
    # 4,096 images, 8 channels, 4 pooled cells, each the mean of 4 standard normals.
    energy = 4096 * 8 * 4 / 4
    expected = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64) * energy
    assert ((shared - expected).abs() < 0.15 * energy).all(), shared / energy
    # Noise of variance 9 comes on top.
    torch.testing.assert_close(own / energy, torch.tensor([10.0, 13.0, 10.0]).double(), rtol=0.03, atol=0)


def test_more_than_there_are_is_refused_by_the_search():
    shared = with_own(torch.eye(3, dtype=torch.float64))
    assert sorted(greedy([0.1, 0.2, 0.3], shared, 2, 3)) == [0, 1, 2]
    with pytest.raises(IndexError):
        greedy([0.1, 0.2, 0.3], shared, 3, 2)
