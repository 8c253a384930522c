"""What the bootstrap says, against what is known of the mean of normal numbers."""

from __future__ import annotations

import pytest
import torch

from mmaselect.selection.bootstrap import (
    BINS,
    PARTS,
    choose,
    drop_doubtful,
    interval,
    jackknife,
    resample,
    resample_influences,
)
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


def mean(rows):
    return rows.mean().item()


def test_the_influences_on_a_mean_are_its_standard_error():
    values = torch.randn(4 * PARTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 5
    score, influences = jackknife(mean, values, torch.arange(len(values)) // 4)
    assert score == values.mean().item()
    assert influences.shape == (PARTS,)
    # Each part's influence on a mean is how far its own mean lies off.
    torch.testing.assert_close(influences, values.view(PARTS, 4).mean(1) - values.mean())
    error = values.view(PARTS, 4).mean(1).std(correction=0).item() / PARTS**0.5
    drawn = resample_influences(torch.tensor([[score]]).double(), influences[None, None], num=20000)
    assert drawn.shape == (1, 1, 20000)
    assert drawn.mean().item() == pytest.approx(score, abs=0.005)
    assert drawn.std().item() == pytest.approx(error, rel=0.03)
    # Over many draws it is that of the mean of 64 normal numbers, but for the bias of 16 parts.
    generator, errors = torch.Generator().manual_seed(5), []
    for _ in range(400):
        values = torch.randn(64, generator=generator, dtype=torch.float64)
        errors.append(jackknife(mean, values, torch.arange(64) // 4)[1].square().mean().item() / PARTS)
    assert (sum(errors) / 400) ** 0.5 == pytest.approx((15 / 16) ** 0.5 / 64**0.5, rel=0.03)


def test_influences_of_a_mean_resample_as_its_sums_do():
    values = torch.randn(PARTS, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 5
    score, influences = jackknife(mean, values, torch.arange(PARTS))
    drawn = resample_influences(torch.tensor([[score]]).double(), influences[None, None], seed=3)
    torch.testing.assert_close(drawn, resample(HighFrequencyRatio(), ratios(values[None, None]), seed=3))


def test_the_interval_of_influences_holds_the_truth_19_times_in_20():
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(1000, 2 * PARTS, generator=generator, dtype=torch.float64) + 3
    judged = [jackknife(mean, row, torch.arange(2 * PARTS) // 2) for row in values]
    scores = torch.tensor([[score] for score, _ in judged], dtype=torch.float64)
    bounds = interval(resample_influences(scores, torch.stack([influences for _, influences in judged])[:, None]))
    covered = ((bounds[..., 0] <= 3) & (bounds[..., 1] >= 3)).double().mean().item()
    # 16 parts are few: 0.923 by the t distribution.
    assert 0.90 <= covered <= 0.95


def test_influences_of_a_score_that_is_no_mean():
    """The logarithm of a variance: its standard error is about sqrt(2 / n)."""
    generator, errors, scores = torch.Generator().manual_seed(8), [], []
    for _ in range(200):
        values = torch.randn(256, generator=generator, dtype=torch.float64)
        score, influences = jackknife(lambda rows: rows.var().log().item(), values, torch.arange(256) // 4)
        scores.append(score)
        errors.append(influences.square().mean().item() / PARTS)
    spread = torch.tensor(scores).std().item()
    assert spread == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    assert (sum(errors) / 200) ** 0.5 == pytest.approx(spread, rel=0.1)


def test_parts_are_whole_groups():
    seen = []
    groups = torch.tensor([7, 7, 7, 9, 9, 12, 12, 12])
    _, influences = jackknife(lambda rows: seen.append(rows.tolist()) or 0.0, torch.arange(8.0), groups)
    assert seen == [[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7], [0, 1, 2, 5, 6, 7], [0, 1, 2, 3, 4]]
    assert influences.tolist() == [0, 0, 0]
    # More groups than parts share them.
    seen.clear()
    _, influences = jackknife(lambda rows: seen.append(len(rows)) or 0.0, torch.zeros(80), torch.arange(80) // 4)
    assert len(influences) == PARTS
    assert seen == [80] + [72] * 4 + [76] * 12


def test_too_few_groups_have_no_influences():
    for groups in ([0, 0, 0, 0], [0, 1], [0, 0, 0, 1]):
        score, influences = jackknife(mean, torch.arange(float(len(groups))), torch.tensor(groups))
        assert score == (len(groups) - 1) / 2
        assert influences is None
    assert jackknife(mean, torch.arange(4.0), torch.tensor([0, 0, 1, 1]))[1].tolist() == [-1, 1]


def test_resampled_influences_are_common_to_all_scores_and_not_below_0():
    influences = torch.randn(1, 1, PARTS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    influences -= influences.mean()
    scores = torch.tensor([[10.0], [10.5], [0.01]], dtype=torch.float64)
    drawn = resample_influences(scores, influences.expand(3, 1, -1))
    torch.testing.assert_close(drawn[1] - drawn[0], torch.full_like(drawn[0], 0.5))
    assert drawn[2].min() == 0
    assert 0.3 < (drawn[2] == 0).double().mean() < 0.6
    kept, _ = drop_doubtful(scores, drawn)
    assert kept.flatten().tolist() == [10, 10.5, 0]


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
            zip(NoiseConsistentHFR.fields, (1, 2, 3))}  # fmt: skip
    assert NoiseConsistentHFR().score(sums).tolist() == [[0.5, 0.5], [0.0, 0.5]]
