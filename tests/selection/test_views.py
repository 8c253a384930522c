"""Augmented views: what names them, and what each change does to an image that is known."""

from __future__ import annotations

import pytest
import torch

from mmaselect.errors import InputError
from mmaselect.selection.views import Views

IMAGES = torch.rand(6, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
ALL = dict(crop=0.4, mirror=True, rotate=30, colour=0.3, blur=1.5)


def ramps(height, width):
    """Column and row of each pixel in its first two channels, in hundredths of a pixel from the middle."""
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing='ij'
    )  # fmt: skip
    return torch.stack([x, y, torch.zeros_like(x)])[None] / 100


def slopes(images):
    """What each view reads per pixel that one goes right, and down, in the middle of ``ramps``: (B, 2, 2)."""
    height, width = images.shape[-2:]
    middle = images[:, :2, height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] * 100
    right, down = middle.diff(dim=3).mean((2, 3)), middle.diff(dim=2).mean((2, 3))
    return torch.stack([right, down], 2)


def test_number_0_is_the_image_itself():
    assert Views(**ALL)(IMAGES, range(6), 0, 0) is IMAGES


@pytest.mark.parametrize(
    'fields', [dict(), dict(crop=1.0, rotate=90), dict(crop=1.0, colour=0.5), dict(crop=1.0, blur=2), ALL]
)
def test_a_view_is_that_of_its_numbers(fields):
    views = Views(**fields)
    whole = views(IMAGES, range(6), 3, 1)
    for index in range(6):
        assert torch.equal(views(IMAGES[index : index + 1], [index], 3, 1)[0], whole[index])
    order = [4, 0, 5, 2]
    assert torch.equal(views(IMAGES[order], order, 3, 1), whole[order])
    # The same image under another index, number or seed is another view.
    same = IMAGES[:1].expand(6, -1, -1, -1)
    for other in (views(same, range(6), 3, 1)[1:], views(same, [0] * 6, 3, 2), views(same, [0] * 6, 4, 1)):
        assert all((view - whole[0]).abs().max() > 1e-3 for view in other)


@pytest.mark.parametrize('fields', [dict(), ALL, dict(crop=0.1, rotate=180, colour=0.9, blur=4)])
def test_size_and_range_stay(fields):
    view = Views(**fields)(IMAGES, range(6), 0, 1)
    assert (view.shape, view.dtype) == (IMAGES.shape, IMAGES.dtype)
    assert view.min() >= -1
    assert view.max() <= 1
    assert view.isfinite().all()


def test_a_crop_keeps_its_share_of_the_area_and_the_aspect():
    found = slopes(Views(crop=0.4)(ramps(12, 16).expand(400, -1, -1, -1), range(400), 0, 1))
    area = torch.linalg.det(found)
    assert 0.4 - 1e-4 <= area.min() < 0.42
    assert 0.98 < area.max() <= 1 + 1e-4
    # Uniform in between, and nothing is turned or stretched.
    assert area.mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(found, area.sqrt()[:, None, None] * torch.eye(2), rtol=0, atol=1e-4)


def test_crops_lie_inside_the_image_and_reach_its_edges():
    """A ramp that is read beyond the edge would come back."""
    views = Views(crop=0.4)(ramps(12, 16).expand(400, -1, -1, -1), range(400), 0, 1)
    assert (views[:, 0].diff(dim=2) > -1e-6).all()
    assert (views[:, 1].diff(dim=1) > -1e-6).all()
    middle = views[:, :2].mean((2, 3)) * 100
    for axis, size in ((0, 16), (1, 12)):
        most = size * (1 - 0.4**0.5) / 2
        assert 0.8 * most < middle[:, axis].max() <= most
        assert 0.8 * most < -middle[:, axis].min() <= most


def test_a_mirror_gives_the_image_or_exactly_its_mirror_image():
    views = Views(crop=1, mirror=True)
    images = IMAGES[:1].expand(64, -1, -1, -1)
    view = views(images, range(64), 0, 1)
    kept, mirrored = ((view - other).abs().amax((1, 2, 3)) < 1e-5 for other in (images, images.flip(3)))
    assert (kept ^ mirrored).all()
    assert 20 <= kept.sum() <= 44


def test_a_turn_is_a_turn_in_pixels():
    """Also where the image is not square; up to the largest turn, to both sides."""
    for largest in (20, 180):
        found = slopes(Views(crop=1, rotate=largest)(ramps(24, 40).expand(400, -1, -1, -1), range(400), 0, 1))
        torch.testing.assert_close(found @ found.mT, torch.eye(2).expand(400, 2, 2), rtol=0, atol=1e-3)
        assert (torch.linalg.det(found) > 0).all()
        angle = torch.rad2deg(torch.atan2(found[:, 1, 0], found[:, 0, 0]))
        assert 0.95 * largest < angle.max() <= largest + 0.1
        assert 0.95 * largest < -angle.min() <= largest + 0.1
    found = slopes(Views(crop=1, rotate=20, mirror=True)(ramps(24, 40).expand(64, -1, -1, -1), range(64), 0, 1))
    assert 20 <= (torch.linalg.det(found) < 0).sum() <= 44


def test_a_turn_leaves_a_disc_in_the_middle():
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing='ij')
    distance = (x**2 + y**2).sqrt()
    disc = (distance < 9).float().expand(20, 3, -1, -1) * 2 - 1
    view = Views(crop=1, rotate=180)(disc, range(20), 0, 1)
    torch.testing.assert_close(view[..., distance < 7], disc[..., distance < 7])
    torch.testing.assert_close(view[..., distance > 11], disc[..., distance > 11])
    # A disc beside the middle goes elsewhere.
    beside = disc.roll(6, 3)
    assert (Views(crop=1, rotate=180)(beside, range(20), 0, 1) - beside).abs().mean() > 0.2


def test_colour_keeps_grey_grey_and_black_black():
    views = Views(crop=1, colour=0.5)
    grey = IMAGES[:, :1].expand(-1, 3, -1, -1) / 4
    view = views(grey, range(6), 0, 1)
    torch.testing.assert_close(view, view.mean(1, keepdim=True).expand_as(view), rtol=0, atol=1e-6)
    assert ((view - grey).abs().mean((1, 2, 3)) > 0.01).all()
    black = torch.full_like(IMAGES, -1)
    torch.testing.assert_close(views(black, range(6), 0, 1), black)
    # Colours change as well, by at most the saturation times the contrast and the brightness.
    constant = torch.tensor([0.2, -0.1, -0.1]).view(1, 3, 1, 1).expand(200, -1, 4, 4)
    changed = views(constant, range(200), 0, 1)
    factor = (changed[:, 0] - changed[:, 1]).mean((1, 2)) / 0.3
    assert 0.5**3 <= factor.min() < 0.5
    assert 1.5 < factor.max() <= 1.5**3


def test_a_blur_spreads_a_point_by_its_standard_deviation():
    point = torch.zeros(200, 3, 33, 33)
    point[:, :, 16, 16] = 1
    view = Views(crop=1, blur=3)(point, range(200), 0, 1)
    torch.testing.assert_close(view.sum((2, 3)), torch.ones(200, 3), rtol=1e-4, atol=0)
    assert torch.equal(view, view.transpose(2, 3).contiguous())
    offsets = torch.arange(33) - 16.0
    widths = ((view[:, 0].sum(1) * offsets**2).sum(1)).sqrt()
    # A Gaussian that ends at 3 standard deviations has 0.987 of its width.
    assert 2.9 < widths.max() <= 3
    assert widths.min() < 0.1
    assert widths.mean().item() == pytest.approx(1.5, abs=0.15)


def test_a_blur_keeps_the_mean_and_lowers_the_variance():
    views = Views(crop=1, blur=2)
    constant = torch.full_like(IMAGES, 0.3)
    torch.testing.assert_close(views(constant, range(6), 0, 1), constant)
    view = views(IMAGES, range(6), 0, 1)
    before, after = IMAGES.var((1, 2, 3)), view.var((1, 2, 3))
    # Half of the six draw less than half a pixel, one of them next to nothing.
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < 0.95 * before).sum() == 5
    assert after.mean() < 0.6 * before.mean()


def test_cells_stay_where_they_are_unless_something_moves_them():
    assert Views(crop=1.0, colour=0.2).aligned
    assert Views(crop=1, blur=1).aligned
    for fields in (dict(), dict(crop=1, mirror=True), dict(crop=1, rotate=1)):
        assert not Views(**fields).aligned


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(crop=0), r'views\.crop=0 is not valid: give a number above 0 and at most 1'),
        (dict(crop=1.5), r'views\.crop=1\.5 is not valid'),
        (dict(crop='small'), r"views\.crop='small' is not valid"),
        (dict(mirror=1), r'views\.mirror=1 is not valid: give True or False'),
        (dict(rotate=200), r'views\.rotate=200 is not valid: give a number of at least 0 and at most 180'),
        (dict(rotate=-1), r'views\.rotate=-1 is not valid'),
        (dict(colour=1), r'views\.colour=1 is not valid: give a number of at least 0 and below 1'),
        (dict(blur=-1), r'views\.blur=-1 is not valid: give a number of at least 0'),
        (dict(blur=float('nan')), r'views\.blur=nan is not valid'),
        (dict(crop=1), r'views vary nothing: give crop below 1, mirror, rotate, colour or blur'),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        Views(**fields)
