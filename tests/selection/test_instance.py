"""Criteria on views against closed forms: Gaussian features whose scatters are known."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from mmaselect.errors import InputError
from mmaselect.selection.bootstrap import drop_doubtful, jackknife, resample_influences
from mmaselect.selection.features import Features
from mmaselect.selection.instance import (
    RIDGE,
    InstanceInformation,
    LiDAR,
    RankMe,
    ViewConsistency,
    scatters,
)
from mmaselect.selection.views import Views

CHANNELS = 8
#: Rows here are of one cell, or of cells of one scale.
one_cell = functools.partial(InstanceInformation, pool=1)
ALL = (one_cell, ViewConsistency, RankMe, LiDAR)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def covariance(seed, scale=1.0):
    """A covariance with eigenvalues between about 0.3 and 3 times ``scale``."""
    turn = torch.linalg.qr(random(CHANNELS, CHANNELS, seed=seed)).Q
    return turn @ torch.diag(scale * torch.logspace(-0.5, 0.5, CHANNELS, dtype=torch.float64)) @ turn.T


def draw(between, within, images=4000, views=2, cells=1, seed=0):
    """Features of images, (images, views, cells, channels), with a mean that all share."""
    image = random(images, 1, cells, len(between), seed=seed) @ torch.linalg.cholesky(between).T
    view = random(images, views, cells, len(between), seed=seed + 1) @ torch.linalg.cholesky(within).T
    return 5 + image + view


def information(between, within, shrinkage):
    """The closed form: channels are standardised, and the scatter of views is shrunk to its mean diagonal."""
    spread = (between + within).diagonal().sqrt()
    between, within = (scatter / torch.outer(spread, spread) for scatter in (between, within))
    level = shrinkage * within.diagonal().mean() + RIDGE
    shrunk = (1 - shrinkage) * within + level * torch.eye(len(within)).double()
    return 0.5 * torch.log1p(torch.linalg.eigvals(torch.linalg.solve(shrunk, between)).real).sum().item()


def judge(criterion, rows):
    """Score and standard error of all images, in groups of four, and what a search would say."""
    score, influences = jackknife(criterion.score, rows, torch.arange(len(rows)) // 4, criterion.leave_out)
    error = influences.std(correction=0).item() / len(influences) ** 0.5
    found = torch.tensor([[score]], dtype=torch.float64)
    said, _ = drop_doubtful(found, resample_influences(found, influences[None, None]))
    return score, error, said.item()


# --- scatters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('views,cells', [(2, 1), (3, 1), (4, 1), (2, 3)])
def test_scatters_are_those_that_the_features_were_drawn_from(views, cells):
    between, within = covariance(1), covariance(2, 0.5)
    rows = draw(between, within, 20000, views, cells)
    s_b, s_w = scatters(rows - rows.mean((0, 1)))
    torch.testing.assert_close(s_b, between, rtol=0, atol=0.06)
    torch.testing.assert_close(s_w, within, rtol=0, atol=0.03)


def test_the_scatter_between_images_is_not_biased():
    """Views alone move the means of few images apart; over many draws that is taken out."""
    found = torch.stack([scatters(centred)[0] for centred in (
        rows - rows.mean((0, 1)) for rows in random(4000, 4, 2, 1, CHANNELS).unbind(0)
    )])  # fmt: skip
    torch.testing.assert_close(found.mean(0), torch.zeros(CHANNELS, CHANNELS).double(), rtol=0, atol=0.04)


# --- instance information --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('views', [2, 3, 4])
@pytest.mark.parametrize('scale', [0.3, 2.0, 20.0])
def test_the_information_of_gaussian_features(views, scale):
    between, within = covariance(1, scale), covariance(2)
    # 4,000 images are known to 2 % where there is little to know.
    rows = draw(between, within, 40000, views)
    for shrinkage in (0, 1e-3, 0.1, 0.5):
        found = one_cell(views, shrinkage=shrinkage).score(rows)
        assert found == pytest.approx(information(between, within, shrinkage), rel=0.02)
    # Next to no shrinkage leaves the capacity of the channel, more of it does not.
    ratio = torch.linalg.eigvals(torch.linalg.solve(within, between)).real
    capacity = 0.5 * torch.log1p(ratio).sum().item()
    assert one_cell(views, shrinkage=1e-3).score(rows) == pytest.approx(capacity, rel=0.03)
    assert abs(information(between, within, 0.5) - capacity) > 0.05 * capacity


def test_it_counts_directions_and_how_well_each_survives():
    """Channels that are independent: each gives its own part, those that tell nothing none."""
    for strengths in ([4.0] * 2 + [0.0] * 6, [4.0] * 4 + [0.0] * 4, [8.0] * 4 + [0.0] * 4):
        between = torch.diag(torch.tensor(strengths, dtype=torch.float64) + 1e-12)
        score = one_cell(shrinkage=0).score(draw(between, torch.eye(CHANNELS).double(), 16000))
        assert score == pytest.approx(sum(math.log1p(strength) for strength in strengths) / 2, rel=0.02)


def test_scales_and_shifts_of_channels_do_not_matter():
    rows = draw(covariance(1), covariance(2, 0.3), images=200)
    for criterion in (one_cell(), one_cell(3, shrinkage=0.5), one_cell(shrinkage=0)):
        expected = criterion.score(rows)
        assert expected > 3
        for factor in (1e-8, -1, 1e8):
            assert criterion.score(rows * factor) == pytest.approx(expected, rel=1e-6)
        scales = torch.logspace(-2, 2, CHANNELS, dtype=torch.float64)
        assert criterion.score(rows * scales) == pytest.approx(expected, rel=1e-6)
        assert criterion.score(rows + 100 * random(CHANNELS)) == pytest.approx(expected, rel=1e-6)
        assert criterion.score(rows.flip(3)) == pytest.approx(expected, rel=1e-6)


def test_without_shrinkage_no_invertible_map_of_the_channels_matters():
    rows = draw(covariance(1), covariance(2, 0.3), images=200)
    shrunk, criterion = one_cell(), one_cell(shrinkage=0)
    for seed in range(3):
        turn = torch.linalg.qr(random(CHANNELS, CHANNELS, seed=seed)).Q
        mapped = rows @ torch.diag(torch.logspace(-0.5, 0.5, CHANNELS).double()) @ turn
        assert criterion.score(mapped) == pytest.approx(criterion.score(rows), rel=1e-3)
        assert shrunk.score(mapped) != pytest.approx(shrunk.score(rows), rel=1e-3)


def test_a_channel_that_never_changes_counts_for_nothing():
    rows = draw(covariance(1), covariance(2, 0.3), images=200)
    dead = torch.cat([rows[..., :4], torch.full_like(rows[..., :4], 3.0)], -1)
    assert one_cell(shrinkage=0).score(dead) == pytest.approx(one_cell(shrinkage=0).score(rows[..., :4]), rel=1e-6)
    assert math.isfinite(one_cell().score(dead))


@pytest.mark.parametrize('views', [2, 3])
@pytest.mark.parametrize('images', [32, 256])
def test_pure_noise_tells_nothing(images, views):
    """40 draws: mostly 0 or within the score's own standard error, hardly ever anything that a search would keep."""
    criterion = one_cell(views)
    judged = [judge(criterion, random(images, views, 1, CHANNELS, seed=seed)) for seed in range(40)]
    # Of a normal variable 16 % lie above one standard error (6 of 40), 2.3 % above two (1 of 40).
    assert sum(score > error for score, error, _ in judged) <= 9
    assert all(score <= 3 * error for score, error, _ in judged)
    assert sum(said > 0 for _, _, said in judged) <= 2
    # Where half of the directions tell something, it is kept.
    strength = torch.diag(torch.tensor([8.0] * 4 + [1e-12] * 4, dtype=torch.float64))
    for seed in range(0, 20, 2):
        score, error, said = judge(criterion, draw(strength, torch.eye(CHANNELS).double(), images, views, seed=seed))
        assert score == said > 3 * error


def test_images_that_are_the_same_tell_nothing():
    rows = random(1, 1, 1, CHANNELS).expand(20, 2, 1, CHANNELS)
    for criterion in ALL:
        assert criterion().score(rows) == 0
        # What float32 rounds, as between batches of two sizes, is no difference either.
        rounded = 100 * rows.float() * (1 + 1e-7 * torch.randn(20, 2, 1, CHANNELS, generator=generator(1)))
        assert rounded.unique().numel() > CHANNELS
        assert criterion().score(rounded) == 0


@pytest.mark.parametrize('shrinkage', [0, 0.1, 0.5])
def test_views_that_are_the_same_are_finite(shrinkage):
    """What caps the score is the ridge."""
    between = covariance(1)
    rows = draw(between, 1e-30 * torch.eye(CHANNELS).double())
    spread = between.diagonal().sqrt()
    cap = 0.5 * torch.logdet(torch.eye(CHANNELS).double() + between / torch.outer(spread, spread) / RIDGE).item()
    assert one_cell(shrinkage=shrinkage).score(rows) == pytest.approx(cap, rel=0.01)


def test_more_channels_than_images():
    """Every direction tells images apart then, of noise as well."""
    criterion, channels, identity = one_cell(shrinkage=0.1), 64, torch.eye(64).double()
    judged = [judge(criterion, random(24, 2, 1, channels, seed=seed)) for seed in range(100)]
    # Six parts know their spread less well than sixteen: of a t distribution 20 % and 6 %.
    assert sum(score > error for score, error, _ in judged) <= 28
    assert sum(said > 0 for _, _, said in judged) <= 10
    expected = information(identity, 0.05 * identity, 0.1)
    for seed in range(0, 20, 2):
        score, error, said = judge(criterion, draw(identity, 0.05 * identity, 24, seed=seed))
        assert score == said > 10 * error
        # 24 images span at most 23 of the 64 directions.
        assert 0.5 * 23 / 64 < score / expected < 1


# --- what is kept of feature maps ------------------------------------------------------------------------------------


def maps(images=6, channels=5, size=4, views=3):
    made = torch.randn(views, images, channels, size, size, generator=generator(3))
    return Features([made[0]], views=list(made[1:])), made


def test_rows_are_pooled_maps():
    features, made = maps()
    rows = InstanceInformation(3, pool=1).rows(features)
    assert (rows.shape, rows.dtype) == ((6, 3, 1, 5), torch.float32)
    torch.testing.assert_close(rows[:, :, 0], made.mean((3, 4)).transpose(0, 1))
    rows = InstanceInformation(3, pool=2).rows(features)
    assert rows.shape == (6, 3, 4, 5)
    torch.testing.assert_close(rows[:, 1, 2], made[1, :, :, 2:, :2].mean((2, 3)))


def test_more_channels_than_allowed_are_projected_alike_every_time():
    features, made = maps(400, 48)
    criterion = InstanceInformation(max_channels=24, pool=1)
    rows = criterion.rows(features)
    assert rows.shape == (400, 3, 1, 24)
    assert torch.equal(InstanceInformation(max_channels=24, pool=1).rows(features), rows)
    half = Features([made[0, 200:]], views=list(made[1:, 200:]))
    torch.testing.assert_close(criterion.rows(half), rows[200:])
    # Lengths stay, on average; the projection is linear.
    whole = InstanceInformation(pool=1).rows(features)
    assert whole.shape[-1] == 48
    assert (rows.square().sum() / whole.square().sum()).item() == pytest.approx(1, abs=0.05)
    doubled = Features([2 * made[0]], views=[2 * value for value in made[1:]])
    torch.testing.assert_close(criterion.rows(doubled), 2 * rows)
    # 48 channels of equal information keep half of it in 24.
    between, within = torch.eye(48).double(), 0.5 * torch.eye(48).double()
    features = draw(between, within, 4000).squeeze(2).transpose(0, 1)[..., None, None]
    features = Features([features[0]], views=[features[1]])
    whole, half = (one.score(one.rows(features)) for one in (InstanceInformation(pool=1), criterion))
    assert half == pytest.approx(whole / 2, rel=0.05)


def test_criteria_that_pool_alike_keep_the_same():
    assert InstanceInformation(pool=2).kept == LiDAR(pool=2).kept == ViewConsistency(4, pool=2).kept
    assert len({LiDAR(pool=pool, max_channels=most).kept for pool, most in ((1, 8), (2, 8), (1, 9))}) == 3
    # Views that others asked for are not read.
    rows = random(40, 4, 1, CHANNELS)
    for criterion in ALL:
        assert criterion(2).score(rows) == criterion(2).score(rows[:, :2])


def test_each_cell_is_compared_with_the_same_cell_of_other_images():
    """What tells the cells apart tells no images apart."""
    rows = draw(covariance(1), covariance(2), images=100, cells=4)
    places = 10 * random(1, 1, 4, CHANNELS, seed=5)
    for criterion in ALL:
        one = criterion(pool=2)
        assert one.score(rows + places) == pytest.approx(one.score(rows), rel=1e-6)


def test_several_scales_give_their_geometric_mean_also_without_a_part():
    rows, parts = draw(covariance(1), covariance(2), 60, cells=1 + 4 + 9), torch.arange(60) % 5
    one, two, three = (InstanceInformation(pool=side) for side in (1, 2, 3))
    scales = rows.split([1, 4, 9], 2)
    scores = [criterion.score(scale) for criterion, scale in zip((one, two, three), scales)]
    assert min(scores) > 1
    assert InstanceInformation(pool=[1, 2, 3]).score(rows) == pytest.approx(math.prod(scores) ** (1 / 3), rel=1e-9)
    both = InstanceInformation()
    assert both.score(rows[:, :, :5]) == pytest.approx(math.sqrt(scores[0] * scores[1]), rel=1e-9)
    expected = (one.leave_out(scales[0], parts) * two.leave_out(scales[1], parts)).sqrt()
    torch.testing.assert_close(both.leave_out(rows[:, :, :5], parts), expected)
    # A scale that tells nothing counts: what is left of the other one is nothing, too.
    deaf = torch.cat([rows[:, :, :1], rows[:1, :1, 1:5].expand(60, 2, 4, CHANNELS)], 2)
    assert (one.score(deaf[:, :, :1]), both.score(deaf)) == (scores[0], 0)


def test_rows_of_several_scales_follow_each_other():
    features, _ = maps()
    rows = InstanceInformation(3, pool=(2, 1)).rows(features)
    assert rows.shape == (6, 3, 5, 5)
    assert torch.equal(rows[:, :, :4], InstanceInformation(3, pool=2).rows(features))
    assert torch.equal(rows[:, :, 4:], one_cell(3).rows(features))


# --- the others ------------------------------------------------------------------------------------------------------


def test_view_consistency_is_a_mean_over_pairs():
    rows = random(5, 3, 2, CHANNELS)
    centred = rows - rows.mean((0, 1))
    same, other = [], []
    for cell in range(2):
        samples = [(image, centred[image, view, cell]) for image in range(5) for view in range(3)]
        for first, (one, a) in enumerate(samples):
            for two, b in samples[:first]:
                (same if one == two else other).append(F.cosine_similarity(a, b, dim=0).item())
    expected = sum(same) / len(same) - sum(other) / len(other)
    assert ViewConsistency(3).score(rows) == pytest.approx(expected, rel=1e-9)


def test_view_consistency_of_equal_views_and_of_noise():
    rows = random(2000, 1, 1, CHANNELS).expand(-1, 2, -1, -1)
    assert ViewConsistency().score(rows) == pytest.approx(1, abs=1e-3)
    assert ViewConsistency().score(random(2000, 2, 1, CHANNELS)) == pytest.approx(0, abs=0.03)
    # Opposite views.
    assert ViewConsistency().score(torch.cat([rows[:, :1], -rows[:, :1]], 1)) == pytest.approx(-1, abs=1e-3)


def orthogonal(images, channels, strengths):
    """Centred features with these singular values."""
    samples = random(images, len(strengths))
    left = torch.linalg.qr(samples - samples.mean(0)).Q
    right = torch.linalg.qr(random(channels, len(strengths), seed=1)).Q
    return (left * torch.tensor(strengths, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_rankme_counts_equal_directions(rank):
    rows = orthogonal(64, 16, [2.0] * rank)[:, None, None].expand(-1, 2, -1, -1)
    assert RankMe().score(rows) == pytest.approx(rank, rel=1e-3)
    # It reads the images alone, not their views.
    noisy = torch.cat([rows[:, :1], -rows[:, :1] + rows.mean()], 1)
    assert RankMe().score(noisy) == pytest.approx(rank, rel=1e-3)


def test_rankme_of_unequal_directions_is_the_exponential_of_an_entropy():
    rows = orthogonal(64, 16, [3.0, 1.0])[:, None, None].expand(-1, 2, -1, -1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert RankMe().score(rows) == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_lidar_counts_equal_directions_however_strong(rank):
    for strength in (1e2, 1e3, 1e5):
        between = torch.diag(torch.tensor([strength] * rank + [1e-9] * (CHANNELS - rank), dtype=torch.float64))
        score = LiDAR().score(draw(between, torch.eye(CHANNELS).double()))
        # The views put half of their own scatter into every direction, which counts the less the stronger the others.
        share = torch.tensor([strength + 0.5] * rank + [0.5] * (CHANNELS - rank), dtype=torch.float64)
        share /= share.sum()
        assert score == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=0.01)
    # Eigenvalues of 4,000 images spread by some 5 %, which costs half the square of that.
    assert score == pytest.approx(rank, rel=0.005)


def test_lidar_whitens_by_the_scatter_of_views_where_rankme_does_not():
    """Every direction is 1,000 times as strong as its noise; one has far more of both."""
    within = torch.diag(torch.tensor([1e4] + [1.0] * (CHANNELS - 1), dtype=torch.float64))
    rows = draw(1e3 * within, within)
    assert LiDAR().score(rows) == pytest.approx(CHANNELS, rel=0.01)
    assert RankMe().score(rows) < 3


# --- arguments -------------------------------------------------------------------------------------------------------


def test_labels_name_what_matters():
    assert InstanceInformation(2, pool=1).label == 'instance information (2 views)'
    assert InstanceInformation(3, pool=2).label == 'instance information (3 views, 2x2 cells)'
    assert InstanceInformation().label == 'instance information (2 views, 1x1 and 2x2 cells)'
    assert [one(4, pool=1).label for one in ALL[1:]] == [
        'view consistency (4 views)',
        'RankMe (4 views)',
        'LiDAR (4 views)',
    ]
    assert one_cell(views=dict(crop=1.0, colour=0.2)).views == Views(crop=1.0, colour=0.2)
    assert one_cell().views == Views()


@pytest.mark.parametrize('criterion', ALL)
def test_one_image_cannot_be_told_from_others(criterion):
    with pytest.raises(InputError, match=r'\(2 views\) needs at least 2 images; there is 1'):
        criterion(2, pool=1).score(random(1, 2, 1, CHANNELS))
    assert math.isfinite(criterion().score(random(2, 2, 1, CHANNELS)))


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(num_views=1), 'num_views=1 is not valid: give a whole number of at least 2'),
        (dict(pool=0), 'pool=0 is not valid'),
        (dict(max_channels=0), 'max_channels=0 is not valid'),
        (dict(views=dict(foo=1)), "field of views='foo' is not known; choose from: crop, mirror, rotate, colour, blur"),
        (dict(views='x'), r"views='x' is not valid: give dict\(crop=0\.4\)"),
        (dict(views=[]), r'views=\[\] is not valid: give dict\(crop=0\.4\)'),
        (dict(views=dict(crop=2)), r'views\.crop=2 is not valid'),
    ],
)
@pytest.mark.parametrize('criterion', ALL)
def test_bad_fields_are_named(criterion, fields, message):
    with pytest.raises(InputError, match=message):
        criterion(**fields)


@pytest.mark.parametrize('pool', [[], [1, 1], [2, 0], [1, '2'], 'x', (1, True), [[1]]])
def test_bad_scales_are_named(pool):
    with pytest.raises(InputError, match=r'^pool=.* is not valid: give a '):
        InstanceInformation(pool=pool)
    with pytest.raises(InputError, match=r'^pool=.* is not valid'):
        LiDAR(pool=[1, 2])


def test_without_shrinkage_more_channels_than_views_are_refused():
    rows = torch.randn(20, 2, 1, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r'shrinkage=0 needs at least 32 views .* for 32 channels; there are 20: set'):
        one_cell(shrinkage=0).score(rows)
    assert math.isfinite(one_cell().score(rows))


@pytest.mark.parametrize('shrinkage', [-0.1, 0.6, 'x', None, True, math.nan])
def test_bad_shrinkage_is_named(shrinkage):
    message = f'shrinkage={shrinkage!r} is not valid: give a number of at least 0 and at most 0.5'
    with pytest.raises(InputError, match=message):
        one_cell(shrinkage=shrinkage)


def by_scatters(rows, shrinkage):
    """As the docstring has it, from the scatters themselves."""
    between, within = scatters(rows - rows.mean((0, 1)))
    identity = torch.eye(len(within)).double()
    within = (1 - shrinkage) * within + (shrinkage * within.diagonal().mean() + RIDGE) * identity
    return 0.5 * (torch.logdet(within + between) - torch.logdet(within))


@pytest.mark.parametrize('views,cells,shrinkage', [(2, 1, 0.1), (3, 4, 0.5), (2, 2, 0.0), (2, 1, 0.5)])
def test_the_information_is_that_of_the_scatters_also_without_a_part(views, cells, shrinkage):
    criterion = one_cell(shrinkage=shrinkage)
    rows, parts = draw(covariance(1), covariance(2), 120, views, cells), torch.arange(120) % 5
    whole = rows - rows.mean((0, 1))
    torch.testing.assert_close(criterion._information(whole), by_scatters(rows, shrinkage))
    expected = torch.stack([by_scatters(rows[parts != part], shrinkage) for part in range(5)])
    torch.testing.assert_close(criterion._information_without(whole, parts), expected)


def test_the_information_of_fewer_images_than_channels():
    rows = torch.randn(4, 2, 1, 64, generator=torch.Generator().manual_seed(0)).double()
    rows -= rows.mean((0, 1))
    torch.testing.assert_close(one_cell()._information(rows), by_scatters(rows, 0.1))


def test_the_standard_error_is_that_of_many_draws():
    criterion = one_cell()
    judged = [judge(criterion, draw(covariance(1), covariance(2), 128, seed=10 * seed)) for seed in range(60)]
    scores, errors = (torch.tensor([one[which] for one in judged]) for which in (0, 1))
    # 60 draws know a standard deviation to 9 %.
    assert errors.mean().item() == pytest.approx(scores.std().item(), rel=0.25)
