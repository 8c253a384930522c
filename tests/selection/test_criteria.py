"""Streaming criteria against the pure functions on all images at once."""

from __future__ import annotations

import pytest
import torch

from mmaselect.errors import InputError
from mmaselect.selection.criteria import (
    CRITERIA,
    FisherScore,
    HighFrequencyRatio,
    NoiseConsistentHFR,
    add_sums,
    build_criterion,
)
from mmaselect.selection.spectrum import fisher_score, high_frequency_ratio, noise_consistent_hfr

IMAGES = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 3
A, B = (IMAGES + 0.5 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
LABELS = torch.tensor([0, 1, 2] * 4)


def stream(criterion, sizes):
    sums, start = {}, 0
    for size in sizes:
        part = slice(start, start + size)
        sums = add_sums(sums, criterion.sums((A[part], B[part]), LABELS[part]))
        start += size
    return criterion.score(sums)


@pytest.mark.parametrize('sizes', ((12,), (5, 7), (1,) * 12, (11, 1)))
def test_batches_do_not_matter(sizes):
    assert stream(HighFrequencyRatio(0.3), sizes) == pytest.approx(high_frequency_ratio(A, 0.3).mean().item(), rel=1e-5)
    for centred in (False, True):
        expected = noise_consistent_hfr(A, B, 0.2, centred).item()
        assert stream(NoiseConsistentHFR(0.2, centred), sizes) == pytest.approx(expected, rel=1e-4)
    assert stream(FisherScore(), sizes) == pytest.approx(fisher_score(A, LABELS).item(), rel=1e-6)
    pooled = torch.nn.functional.adaptive_avg_pool2d(A, 2)
    assert stream(FisherScore(pool=2), sizes) == pytest.approx(fisher_score(pooled, LABELS).item(), rel=1e-6)


def test_pure_noise_scores_nothing():
    a, b = torch.randn(2, 64, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    for centred in (False, True):
        criterion = NoiseConsistentHFR(centred=centred)
        assert criterion.score(criterion.sums((a, b), None)) == 0
    # Without the guard the ratio of two noise sums is anything.
    assert noise_consistent_hfr(a, b).item() != 0


def test_one_image_cannot_be_centred_and_scores_nothing():
    criterion = NoiseConsistentHFR()
    assert criterion.score(criterion.sums((A[:1], B[:1]), None)) == 0


def test_fisher_score_of_cells():
    """With a label per cell the cells are the samples; those of the ignored label are left out."""
    labels = torch.randint(0, 3, (12, 8, 8), generator=torch.Generator().manual_seed(4))
    labels[:, 0] = 255
    cells = A.permute(0, 2, 3, 1).flatten(0, 2)[labels.flatten() != 255]
    expected = fisher_score(cells, labels.flatten()[labels.flatten() != 255]).item()
    criterion = FisherScore()
    parts = [criterion.sums((A[part],), labels[part]) for part in (slice(0, 5), slice(5, 12))]
    assert criterion.score(add_sums(*parts)) == pytest.approx(expected, rel=1e-5)
    everything = FisherScore(ignore_index=11)
    assert everything.score(everything.sums((A,), labels)) != pytest.approx(expected, rel=1e-3)


def test_fisher_score_needs_two_images_of_a_class():
    criterion = FisherScore()
    with pytest.raises(InputError, match=r'FisherScore needs a class with two images; all 3 classes have one'):
        criterion.score(criterion.sums((A[:3],), LABELS[:3]))


def test_maps_of_two_sizes_are_named():
    criterion = NoiseConsistentHFR()
    first = criterion.sums((A, B), None)
    second = criterion.sums((A[..., :4], B[..., :4]), None)
    with pytest.raises(InputError, match=r'maps of \(4, 8, 8\) and \(4, 8, 4\): its images must have one size'):
        add_sums(first, second)


def test_building_from_a_config():
    criterion = build_criterion(dict(type='HighFrequencyRatio', sigma=0.4))
    assert criterion.sigma == 0.4
    assert build_criterion(criterion) is criterion
    assert list(CRITERIA) == ['HighFrequencyRatio', 'NoiseConsistentHFR', 'FisherScore']
    with pytest.raises(
        InputError, match=r"criterion.type='Entropy' is not known; choose from: HighFrequencyRatio, Noise"
    ):
        build_criterion(dict(type='Entropy'))
    with pytest.raises(
        InputError, match=r"field of HighFrequencyRatio='sigmma' is not known; choose from: sigma, norm"
    ):
        build_criterion(dict(type='HighFrequencyRatio', sigmma=0.4))
    with pytest.raises(InputError, match=r'sigma=-1 is not valid'):
        build_criterion(dict(type='NoiseConsistentHFR', sigma=-1))
    with pytest.raises(InputError, match=r'min_consistency=1 is not valid'):
        build_criterion(dict(type='NoiseConsistentHFR', min_consistency=1))
    with pytest.raises(InputError, match=r'pool=0 is not valid'):
        build_criterion(dict(type='FisherScore', pool=0))
