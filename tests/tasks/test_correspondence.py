"""Points found in warped pictures, and what PCK, ensembles and massive channels are, against what is known exactly."""

from __future__ import annotations

import io
from itertools import zip_longest

import cv2
import numpy as np
import pytest
import torch
from conftest import SHARED_DATA

import mmaselect
from mmaselect.datasets.pairs import _warp, draw_warp, move
from mmaselect.diffusion.noise import pixel_noise
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.images import read_picture
from mmaselect.progress import progress_bar
from mmaselect.tasks.correspondence import (
    Frame,
    discard_massive,
    find,
    grid_of,
    match,
    outside_of,
    pck,
    read_maps,
    sample,
)

#: Three levels of a U-Net with random weights, on pixels: cells of 4 and of 8 pixels.
UNET = dict(
    sample_size=64, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64, 64, 64),
    down_block_types=('DownBlock2D', 'DownBlock2D', 'DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D', 'UpBlock2D', 'UpBlock2D'), norm_num_groups=8,
    attention_head_dim=8, cross_attention_dim=16,
)  # fmt: skip
SPEC = dict(type='UNet', arch=UNET, latent='pixels', prompt='zeros')
INCREMENTS = ['down-level2-repeat0-res-increment', 'down-level3-repeat0-res-increment']
CELL, SIDE = 8, 128


@pytest.fixture(scope='module')
def network():
    return mmaselect.load(SPEC, taps=INCREMENTS)


def colours(height, width):
    """A picture in which every place has a colour of its own: red grows to the right, green downwards, all is blue.

    As vectors from -1 to 1, no two have the same direction, and grey, which a warp leaves behind, has none of theirs.
    """
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full((height, width), 255)], -1)
    return image.round().astype(np.uint8)


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def errors(network, image, warp, side=SIDE, **settings):
    """Distances, in cells of 8 pixels of what the model sees, between where points are and where they are found."""
    size = (image.shape[1], image.shape[0])
    points = grid_of(size, 6, 6)
    there = torch.from_numpy(move(warp, points.numpy())).float()
    inside = ~outside_of(there, size)
    found = match(network, tensor(image), points[inside], tensor(_warp(image, warp)), 0, size=side, **settings)
    cell = torch.tensor(size) / (side / CELL)
    return ((found.points - there[inside]).abs() / cell).amax(1)


#: By hand: a shift by whole pixels, a turn by a right angle, a stretch, and a homography.
WARPS = {
    'shift': [[1, 0, 9], [0, 1, -14], [0, 0, 1]],
    'stretch': [[0.8, 0, 5], [0, 1.2, -12], [0, 0, 1]],
    'turn': [[0.96, -0.28, 12], [0.28, 0.96, -9], [0, 0, 1]],
    'homography': [[0.9, 0.1, 3], [-0.05, 1.1, 2], [0.001, -0.0008, 1]],
}


@pytest.mark.parametrize('warp', WARPS)
@pytest.mark.parametrize('size', [(96, 96), (70, 130), (151, 84)])
def test_colours_are_found_where_they_went(network, monkeypatch, warp, size):
    """By the pixels themselves, so that any error is one of geometry: at most a fifth of a cell."""
    monkeypatch.setattr('mmaselect.tasks.correspondence.read_maps', lambda model, images, *_: [images])
    found = errors(network, colours(*size), np.array(WARPS[warp], float), resolution=SIDE)
    assert len(found) > 15
    assert found.max() < 0.2, found


def warped(network, files):
    found = []
    for number, file in enumerate(files):
        image = ((read_picture(file) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        size = (image.shape[1], image.shape[0])
        for perspective in (0, 0.05):
            warp = draw_warp(np.random.default_rng(number), size, 10, (0.9, 1.1), 0.1, perspective)
            found.append(errors(network, image, warp, resolution=64))
    return torch.cat(found)


def test_a_generated_picture_under_affine_maps_and_homographies(network, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    blurred = cv2.GaussianBlur(noise, (0, 0), 8)
    cv2.imwrite(str(tmp_path / 'picture.png'), cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX))
    found = warped(network, [tmp_path / 'picture.png'])
    assert (found <= 1).float().mean() > 0.9
    assert found.median() < 0.5


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason='needs ../shared/data')
@pytest.mark.parametrize(
    'pattern,least', [('CUB_200_2011_subset/images/*/*.jpg', 0.9), ('camvid/img_dir/val/*.png', 0.8)]
)
def test_photographs_under_affine_maps_and_homographies(network, pattern, least):
    """Of a cell's reach 16 x 16 cells have few: guessing would be right for one point in thirty."""
    files = sorted(SHARED_DATA.glob(pattern))
    found = warped(network, files[:: len(files) // 5])
    assert len(found) > 200
    assert (found <= 1).float().mean() > least
    assert found.median() < 0.4


def test_padding_is_never_found_and_moves_nothing(network):
    """The same maps, of which the image is a part: in the middle, at the right, mirrored."""
    # Smooth, so that between its cells a map has what lies between them.
    coarse = torch.randn(1, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.interpolate(coarse, (12, 16), mode='bicubic')[0]
    size, points = (60.0, 40.0), torch.tensor([[5.0, 5.0], [31.0, 22.0], [57.0, 36.0]])
    for left, top, width, height in ((2, 3, 8, 6), (8, 0, 8, 12), (0, 6, 16, 6)):
        matrix = torch.tensor([[width / 16 / 60, 0, left / 16], [0, height / 12 / 40, top / 12]], dtype=torch.float64)
        frame = Frame(size, matrix)
        part = maps[:, top : top + height, left : left + width]
        cells = frame.grid((12, 16))
        assert len(cells) == width * height
        torch.testing.assert_close(sample([maps], frame.places(cells)).T.reshape(part.shape), part)
        found, similarity = find([maps], frame, cells, [maps], frame)
        torch.testing.assert_close(found, cells)
        torch.testing.assert_close(similarity, torch.ones(len(cells)))
        found, _ = find([maps], frame, points, [maps], frame)
        assert ((found - points).abs() <= torch.tensor([60 / width, 40 / height])).all()
    mirrored = Frame(size, torch.tensor([[-1 / 60, 0, 1], [0, 1 / 40, 0]], dtype=torch.float64))
    cells = mirrored.grid((12, 16))
    found, _ = find([maps], Frame.stretched(size), cells, [maps.flip(2)], mirrored)
    torch.testing.assert_close(found, cells)


def test_nearest_neighbours_by_hand(monkeypatch):
    """All cosines at once, of two maps of unlike sizes, and in parts."""
    generator = torch.Generator().manual_seed(0)
    source, target = ([torch.randn(5, 6, 8, generator=generator), torch.randn(3, 12, 16, generator=generator)]
                      for _ in range(2))  # fmt: skip
    frame = Frame.stretched((32.0, 24.0))
    points = torch.rand(7, 2, generator=generator) * torch.tensor([32.0, 24.0])

    def whole(maps):
        up = torch.nn.functional.interpolate(maps[0][None], (12, 16), mode='bilinear')[0]
        return torch.cat([up, maps[1]]).flatten(1).T

    queries = sample(source, frame.places(points))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], whole(target)[None], dim=2)
    value, index = cosines.max(1)
    for places in (16384, 11):
        monkeypatch.setattr('mmaselect.tasks.correspondence.PLACES', places)
        found, similarity = find(source, frame, points, target, frame)
        torch.testing.assert_close(found, grid_of((32.0, 24.0), 12, 16)[index])
        torch.testing.assert_close(similarity, value)


def test_an_ensemble_is_the_mean_over_noises(network):
    images = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0)) * 2 - 1
    taps = network.family.taps
    singles = [read_maps(network, images, [300], taps, 'fresh', seed) for seed in (5, 6, 7)]
    together = read_maps(network, images, [300], taps, 'fresh', 5, ensemble=3)
    for number, one in enumerate(together):
        torch.testing.assert_close(one, torch.stack([maps[number] for maps in singles]).mean(0))
    # One noise, no padding: what the model itself gives.
    whole = images[..., :48]
    noise = pixel_noise(whole, (3, 40, 48), 5)
    expected = network(whole, noise, 300)
    read = read_maps(network, whole, [300], taps, 'fresh', 5)
    assert all(torch.equal(one, expected[tap]) for one, tap in zip_longest(read, taps))


def test_massive_channels_are_found_and_drown_no_more():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 16, 8, 8, generator=generator)
    target = source.roll(2, 2) + 0.01 * target
    frame, points = Frame.stretched((8.0, 8.0)), torch.tensor([[1.5, 1.5], [3.5, 6.5]])
    massive = []
    for one in (source, target):
        # Large everywhere, with a wobble that has nothing to do with what is there.
        spoilt = one.clone()
        spoilt[[3, 7]] = 300 + 100 * torch.randn(2, 8, 8, generator=generator)
        massive.append([spoilt])
    found, _ = find(massive[0], frame, points, massive[1], frame)
    assert (found != points + torch.tensor([2.0, 0])).any()
    (one, other), channels = discard_massive(massive, 10)
    assert channels == [[3, 7]]
    found, _ = find(one, frame, points, other, frame)
    torch.testing.assert_close(found, points + torch.tensor([2.0, 0]))
    # What came in is as it was.
    assert massive[0][0][3].abs().min() > 0


def test_match_lists_the_channels_it_left_out(network):
    image = tensor(colours(64, 64))
    match_all, match_some = (match(network, image, [[20, 30]], image, 0, size=64, discard=k) for k in (1000.0, 1.5))
    assert match_all.discarded == [[], []]
    maps = read_maps(network, image[None] / 127.5 - 1, [0], network.family.taps, 'fresh')
    for channels, one in zip_longest(match_some.discarded, maps):
        magnitude = one.abs().mean((0, 2, 3))
        assert channels == (magnitude > 1.5 * magnitude.median()).nonzero().flatten().tolist()
        assert channels


def test_every_map_of_a_match_moves_the_bar(network, monkeypatch):
    bars = []

    def record(**options):
        bars.append(progress_bar(**{**options, 'delay': 0, 'file': io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr('mmaselect.tasks.correspondence.progress_bar', record)
    image = tensor(colours(64, 64))
    match(network, image, [[20, 30]], image, [0, 100], size=64, ensemble=3)
    (bar,) = bars
    assert bar.n == bar.total == 3 * 2 * len(network.family.taps)


def test_match_by_taps_block_and_selection(network):
    image = tensor(colours(64, 48))
    points = [[12.0, 33.0], [40.0, 8.0]]
    first = match(SPEC, image, points, image, 20, taps=INCREMENTS, size=64)
    again = match(network, image, points, image, 20, size=64)
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.similarity, again.similarity)
    # The same image under the same noise: every point finds its own cell.
    assert ((first.points - torch.tensor(points)).abs() <= torch.tensor([48, 64]) / 64 * 4).all()
    # Of noise alone a crop is another image.
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 64, 48)
    selection = mmaselect.select(network, images, timesteps=[0, 100])
    assert [Tap(*tap) for tap in selection.taps] == list(network.family.taps)
    chosen = match(network, image, points, image, selection, size=64)
    assert torch.equal(chosen.points, match(network, image, points, image, selection.timestep, size=64).points)


def test_pck_by_hand():
    right = [torch.tensor([True, False]), torch.tensor([True]), torch.tensor([False, False, False, True])]
    found = pck(right, ['cat', 'dog', 'cat'])
    assert found['point'] == pytest.approx(100 * 3 / 7)
    assert found['image'] == pytest.approx(100 * (1 / 2 + 1 + 1 / 4) / 3)
    assert found['category'] == pytest.approx(100 * (2 / 6 + 1) / 2)
    with pytest.raises(InputError, match='2 categories for 3 pairs'):
        pck(right, ['cat', 'dog'])


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(points=[[5, 5], [65, 30]]), r'points\[1\]=\(65, 30\) lies outside the image of 64x48 pixels'),
        (dict(points=[[5, float('nan')]]), r'points\[0\]=\(5, nan\) lies outside'),
        (dict(points=[]), r'points of shape \(0,\) are not valid: give \[\[x, y\], ...\] in pixels'),
        (dict(points=[[1, 2, 3]]), r'points of shape \(1, 3\) are not valid'),
        (dict(points='here'), 'points=here is not valid'),
        (dict(target='/none.png'), '/none.png cannot be read as an image'),
        (dict(timestep=1001), 'timestep=1001 is not a timestep'),
        (dict(ensemble=0), 'ensemble=0 is not valid'),
        (dict(discard=1), 'discard=1 is not valid: give a number above 1'),
        (dict(noise='loud'), "noise='loud' is not known"),
        (dict(resolution=0), 'resolution=0 is not valid'),
    ],
)
def test_one_line_for_what_is_wrong(network, fields, message):
    image = tensor(colours(48, 64))
    arguments = dict(source=image, points=[[1, 1]], target=image, timestep=0, size=64)
    with pytest.raises(InputError, match=message) as caught:
        match(network, **{**arguments, **fields})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('place,name', enumerate(('source', 'target')))
def test_a_picture_that_is_not_finite_is_named(network, monkeypatch, place, name):
    encode = type(network).encode

    def broken(self, images):
        return encode(self, images).index_fill(0, torch.tensor([place]), torch.nan)

    monkeypatch.setattr(type(network), 'encode', broken)
    picture = torch.zeros(3, SIDE, SIDE)
    with pytest.raises(InputError, match=f'^{name}: features are not finite at timestep 261'):
        match(network, picture, [[3, 3]], picture, size=SIDE)
