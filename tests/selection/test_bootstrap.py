"""What the bootstrap says, against what is known of the mean of normal numbers."""

from __future__ import annotations

import pytest
import torch

from mmaselect.selection.bootstrap import BINS, choose, drop_doubtful, interval, resample
from mmaselect.selection.criteria import HighFrequencyRatio, NoiseConsistentHFR


def ratios(values):
    """Sums of HFR, (timesteps, taps, fields, bins), one image per bin."""
    return torch.stack([values, torch.ones_like(values)], dim=2)


def test_the_interval_of_a_mean():
    values = torch.randn(1, 1, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    drawn = resample(HighFrequencyRatio(), ratios(values), num=20000)
    assert drawn.mean().item() == pytest.approx(values.mean().item(), abs=0.005)
    error = values.std(correction=0).item() / BINS**0.5
    assert drawn.std().item() == pytest.approx(error, rel=0.03)
    low, high = interval(drawn)[0, 0].tolist()
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_the_interval_holds_the_truth_19_times_in_20():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, 1, BINS, generator=generator, dtype=torch.float64) + 3
    bounds = interval(resample(HighFrequencyRatio(), ratios(values)))[:, 0]
    covered = ((bounds[:, 0] <= 3) & (bounds[:, 1] >= 3)).double().mean().item()
    assert 0.91 <= covered <= 0.98


def test_all_scores_are_of_the_same_resamples():
    """Otherwise the difference of two timesteps would look far less certain than it is."""
    values = torch.randn(1, 1, BINS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drawn = resample(HighFrequencyRatio(), ratios(torch.cat([values, values + 0.001])))
    torch.testing.assert_close(drawn[1] - drawn[0], torch.full_like(drawn[0], 0.001))


def test_bins_without_images_are_not_drawn():
    values = torch.zeros(1, 1, BINS, dtype=torch.float64)
    sums = ratios(values)
    sums[..., 2:] = 0
    sums[0, 0, 0, :2] = torch.tensor([1.0, 3.0])
    assert set(resample(HighFrequencyRatio(), sums).flatten().tolist()) == {1.0, 2.0, 3.0}
    sums[..., 1:] = 0
    assert resample(HighFrequencyRatio(), sums) is None


def test_the_highest_score_wins_and_ties_go_to_the_cleaner_timestep():
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.2], [0.5, 0.1, 0.1, 0.1]])
    assert choose(scores, None, [3, 3])[:2] == (0, 1)


def test_within_one_standard_error_the_earlier_block_wins():
    generator = torch.Generator().manual_seed(3)
    # Alternatives at blocks 9, 5 and 1; the standard error of the best is 0.1.
    scores = torch.tensor([[1.0, 0.2], [0.3, 0.95], [0.8, 0.1]], dtype=torch.float64)
    drawn = scores[..., None] + 0.1 * torch.randn(3, 2, 4000, generator=generator, dtype=torch.float64)
    alternative, timestep, resampled = choose(scores, drawn, [9, 5, 1])
    assert (alternative, timestep) == (1, 1)
    assert resampled.shape == (4000, 2)
    # By the same rule the resamples choose, so they agree more often than the bare maximum would.
    agree = ((resampled[:, 0] == 1) & (resampled[:, 1] == 1)).double().mean()
    bare = (drawn.flatten(0, 1).argmax(0) == 3).double().mean()
    assert bare < 0.45 < agree
    # At equal depth there is nothing to save, and the highest score wins.
    assert choose(scores, drawn, [5, 5, 5])[:2] == (0, 0)


def test_an_uncertain_low_score_is_not_a_tie():
    scores = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    drawn = torch.stack([torch.full((1, 100), 1.0), torch.linspace(-3, 4, 100)[None]]).double()
    assert choose(scores, drawn, [9, 1])[:2] == (0, 0)


def test_scores_that_may_as_well_be_nothing_are_dropped():
    scores = torch.tensor([[0.9], [0.4]])
    drawn = torch.full((2, 1, 100), 0.5)
    drawn[0, 0, :5] = 0
    drawn[1, 0, :2] = 0
    kept, drawn = drop_doubtful(scores, drawn)
    assert kept.flatten().tolist() == pytest.approx([0, 0.4])
    assert drawn[0].abs().sum() == 0
    assert drawn[1].abs().sum() > 0


def test_criteria_score_every_entry_by_itself():
    sums = {name: torch.tensor([[1.0, 2.0], [0.0, 4.0]]) * scale for name, scale in
            zip(NoiseConsistentHFR.fields, (1, 2, 3), strict=True)}  # fmt: skip
    assert NoiseConsistentHFR().score(sums).tolist() == [[0.5, 0.5], [0.0, 0.5]]
