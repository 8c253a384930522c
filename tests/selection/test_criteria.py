"""Streaming criteria against the pure functions on all images at once."""

from __future__ import annotations

import pytest
import torch

from mmaselect.errors import InputError
from mmaselect.selection.criteria import (
    CRITERIA,
    PAPER,
    RECOMMENDED,
    FisherScore,
    HighFrequencyRatio,
    NoiseConsistentHFR,
    build_criterion,
)
from mmaselect.selection.criterion import add_sums
from mmaselect.selection.features import Features
from mmaselect.selection.instance import InstanceInformation, RankMe
from mmaselect.selection.spectrum import fisher_score, high_frequency_ratio, noise_consistent_hfr, spectrum

IMAGES = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 3
A, B = (IMAGES + 0.5 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
LABELS = torch.tensor([0, 1, 2] * 4)


def whole(criterion, sums):
    """Score of all images: the sums over all groups."""
    if criterion.fields is None:
        return criterion.score(sums).item()
    return criterion.score({name: value.sum() for name, value in sums.items()}).item()


def score(criterion, maps, labels=None, groups=None):
    return whole(criterion, criterion.sums(Features(maps, groups, labels)))


def stream(criterion, sizes):
    """Sums of batches added up, each batch a group of its own."""
    sums, start = {}, 0
    for size in sizes:
        part = slice(start, start + size)
        sums = add_sums(sums, criterion.sums(Features((A[part], B[part]), None, LABELS[part])))
        start += size
    return whole(criterion, sums)


@pytest.mark.parametrize('sizes', ((12,), (5, 7), (1,) * 12, (11, 1)))
def test_batches_do_not_matter(sizes):
    assert stream(HighFrequencyRatio(0.3), sizes) == pytest.approx(high_frequency_ratio(A, 0.3).mean().item(), rel=1e-5)
    expected = high_frequency_ratio(A, 0.3, norm=1).mean().item()
    assert stream(HighFrequencyRatio(0.3, norm=1), sizes) == pytest.approx(expected, rel=1e-5)
    expected = noise_consistent_hfr(A, B, 0.2).item()
    assert stream(NoiseConsistentHFR(0.2, centred=False), sizes) == pytest.approx(expected, rel=1e-4)
    assert stream(FisherScore(), sizes) == pytest.approx(fisher_score(A, LABELS).item(), rel=1e-6)
    pooled = torch.nn.functional.adaptive_avg_pool2d(A, 2)
    assert stream(FisherScore(pool=2), sizes) == pytest.approx(fisher_score(pooled, LABELS).item(), rel=1e-6)


def test_centring_over_one_group_is_the_formula():
    expected = noise_consistent_hfr(A, B, 0.2, centred=True).item()
    assert score(NoiseConsistentHFR(0.2), (A, B)) == pytest.approx(expected, rel=1e-4)


def test_centring_group_by_group_has_the_expectation_of_centring_over_all():
    """Also where groups are small, and for each sum of the ratio alone; without ``n / (n - 1)`` it would be 0.75."""
    generator = torch.Generator().manual_seed(5)
    shared = 3 * torch.randn(1, 2, 8, 8, generator=generator)
    images = shared + torch.randn(4096, 2, 8, 8, generator=generator)
    a, b = (images + torch.randn(images.shape, generator=generator) for _ in range(2))
    groups = torch.arange(4096) // 4
    small = Features((a, b), groups)
    whole_set = Features((a, b))
    for sigma in (None, 0.25):
        for draws in ((0, 1), (0, 0)):
            expected = whole_set.energy(*draws, sigma, centred=True).sum().item()
            assert small.energy(*draws, sigma, centred=True).sum().item() == pytest.approx(expected, rel=0.02)
    assert small.energy(0, 1).sum() > 5 * small.energy(0, 1, centred=True).sum()


def test_every_group_is_summed_by_itself():
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    for criterion in (HighFrequencyRatio(), NoiseConsistentHFR(), NoiseConsistentHFR(centred=False)):
        together = criterion.sums(Features((A, B), groups))
        assert set(together) == set(criterion.fields)
        for group in range(3):
            part = groups == group
            alone = criterion.sums(Features((A[part], B[part])))
            for name in criterion.fields:
                assert together[name].shape == (3,)
                assert together[name][group].item() == pytest.approx(alone[name].item(), rel=1e-5)


def test_spectra_are_computed_once_for_all_criteria(monkeypatch):
    from mmaselect.selection import features

    calls = []
    monkeypatch.setattr(features, 'spectrum', lambda maps: calls.append(1) or spectrum(maps))
    shared = Features((A, B))
    for sigma in (0.1, 0.25, 0.4):
        for criterion in (HighFrequencyRatio(sigma), NoiseConsistentHFR(sigma), NoiseConsistentHFR(sigma, False)):
            criterion.sums(shared)
    assert len(calls) == 2


def test_pure_noise_scores_nothing():
    a, b = torch.randn(2, 64, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    for centred in (False, True):
        assert score(NoiseConsistentHFR(centred=centred), (a, b)) == 0
    # Without the guard the ratio of two noise sums is anything.
    assert noise_consistent_hfr(a, b).item() != 0


def test_one_image_cannot_be_centred_and_scores_nothing():
    assert score(NoiseConsistentHFR(), (A[:1], B[:1])) == 0


def test_fisher_score_of_cells():
    """With a label per cell the cells are the samples; those of the ignored label are left out."""
    labels = torch.randint(0, 3, (12, 8, 8), generator=torch.Generator().manual_seed(4))
    labels[:, 0] = 255
    cells = A.permute(0, 2, 3, 1).flatten(0, 2)[labels.flatten() != 255]
    expected = fisher_score(cells, labels.flatten()[labels.flatten() != 255]).item()
    criterion = FisherScore()
    parts = [criterion.sums(Features((A[part],), None, labels[part])) for part in (slice(0, 5), slice(5, 12))]
    assert criterion.score(add_sums(*parts)).item() == pytest.approx(expected, rel=1e-5)
    assert score(FisherScore(ignore_index=11), (A,), labels) != pytest.approx(expected, rel=1e-3)


def test_fisher_score_needs_two_images_of_a_class():
    with pytest.raises(InputError, match=r'FisherScore needs a class with two images; all 3 classes have one'):
        score(FisherScore(), (A[:3],), LABELS[:3])


def test_maps_of_two_sizes_are_named():
    criterion = FisherScore()
    first = criterion.sums(Features((A,), None, LABELS))
    second = criterion.sums(Features((A[..., :4],), None, LABELS))
    with pytest.raises(InputError, match=r'maps of \(4, 8, 8\) and \(4, 8, 4\): its images must have one size'):
        add_sums(first, second)
    # What keeps numbers only does not mind.
    ratio = HighFrequencyRatio()
    parts = [ratio.sums(Features((maps,))) for maps in (A, A[..., :4])]
    expected = torch.cat([high_frequency_ratio(maps) for maps in (A, A[..., :4])]).mean().item()
    assert whole(ratio, add_sums(*parts)) == pytest.approx(expected, rel=1e-5)


def test_building_from_a_config():
    criterion = build_criterion(dict(type='HighFrequencyRatio', sigma=0.4))
    assert criterion.sigma == 0.4
    assert build_criterion(criterion) is criterion
    with pytest.raises(
        InputError,
        match=r"criterion.type='Entropy' is not known; choose from: InstanceInformation, HighFrequencyRatio, Noise",
    ):
        build_criterion(dict(type='Entropy'))
    with pytest.raises(
        InputError, match=r"field of criterion HighFrequencyRatio='sigmma' is not known; choose from: sigma, norm"
    ):
        build_criterion(dict(type='HighFrequencyRatio', sigmma=0.4))
    with pytest.raises(InputError, match=r'sigma=-1 is not valid'):
        build_criterion(dict(type='NoiseConsistentHFR', sigma=-1))
    with pytest.raises(InputError, match=r'min_consistency=1 is not valid'):
        build_criterion(dict(type='NoiseConsistentHFR', min_consistency=1))
    with pytest.raises(InputError, match=r'pool=0 is not valid'):
        build_criterion(dict(type='FisherScore', pool=0))


def test_criteria_on_views_from_a_config():
    criterion = build_criterion(
        dict(type='InstanceInformation', num_views=3, views=dict(crop=0.2, mirror=True), pool=2)
    )
    assert (criterion.num_views, criterion.scales, criterion.max_channels, criterion.shrinkage) == (3, (2,), 256, 0.1)
    assert (criterion.views.crop, criterion.views.mirror, criterion.views.rotate) == (0.2, True, 0)
    assert isinstance(build_criterion(RECOMMENDED), InstanceInformation)
    assert isinstance(build_criterion(PAPER), HighFrequencyRatio)
    assert isinstance(build_criterion(dict(type='RankMe', num_views=4)), RankMe)
    assert {build_criterion(dict(type=name)).needs_labels for name in CRITERIA if name != 'FisherScore'} == {False}
    with pytest.raises(
        InputError,
        match=r"field of criterion LiDAR='shrinkage' is not known; choose from: num_views, views, pool, max_channels",
    ):
        build_criterion(dict(type='LiDAR', shrinkage=0.1))
    with pytest.raises(InputError, match=r'views.crop=0 is not valid'):
        build_criterion(dict(type='ViewConsistency', views=dict(crop=0)))


def test_the_example_of_the_docs(monkeypatch):
    """A criterion of one's own needs no change of ours."""
    from conftest import ROOT

    monkeypatch.setattr('mmaselect.selection.criteria.CRITERIA', dict(CRITERIA))
    text = (ROOT / 'docs' / 'en' / 'add_a_criterion.md').read_text(encoding='utf-8')
    exec(compile(text.split('```python\n')[1].split('```')[0], 'add_a_criterion.md', 'exec'), {})
    criterion = build_criterion(dict(type='Energy', power=0.5))
    assert criterion.parameters == {'type': 'Energy', 'power': 0.5}
    expected = A.double().square().mean().sqrt().item()
    assert score(criterion, (A,)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match='power'):
        build_criterion(dict(type='Energy', speed=1))
