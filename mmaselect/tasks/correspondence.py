"""Semantic correspondence: a point of one image is found in another by the features of its cell.

A point is (x, y) in pixels, where an image spans from 0 to its width and height: the middle of the first pixel is
(0.5, 0.5). So a resize by ``s`` takes a point to ``s`` times the point, whatever the size of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.apis.inference import Model, _to_dict, load
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import NOISES, policy_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError, check_choice, check_count, check_number, check_timesteps, naming
from mmaselect.images import Images, read_picture
from mmaselect.progress import PATIENCE, progress_bar
from mmaselect.selection.report import Selection

#: Places of a target that are compared at once: memory is their number times the channels of all maps.
PLACES = 16384
#: Ways of averaging PCK.
AVERAGES = ('point', 'image', 'category')


class Matches(NamedTuple):
    """Where points were found.

    Attributes:
        points: (N, 2), in pixels of the target.
        similarity: Cosine of the features, (N,).
        discarded: Numbers of the massive channels that were left out, by map.
    """

    points: Tensor
    similarity: Tensor
    discarded: list[list[int]]


class Frame(NamedTuple):
    """An image, and where it lies in what the model saw of it.

    Attributes:
        size: Width and height, in its own pixels.
        matrix: (2, 3), takes (x, y, 1) in its own pixels to shares of the width and height of what the model saw.
    """

    size: tuple[float, float]
    matrix: Tensor

    @classmethod
    def stretched(cls, size: tuple[float, float]) -> Frame:
        """The frame of an image that was stretched to what the model saw, and fills it."""
        width, height = size
        return cls(size, torch.tensor([[1 / width, 0, 0], [0, 1 / height, 0]], dtype=torch.float64))

    def places(self, points: Tensor) -> Tensor:
        """Points (N, 2) in the image's own pixels as shares of what the model saw."""
        matrix = self.matrix.to(points.device)
        return (points.double() @ matrix[:, :2].T + matrix[:, 2]).float()

    def grid(self, cells: tuple[int, int]) -> Tensor:
        """Middles of a grid over the image, in its own pixels.

        Args:
            cells: Rows and columns of a map of all that the model saw.

        Returns:
            (rows * columns, 2): as many as the image has cells of the map, row by row.
        """
        spans = self.matrix[:, :2] * torch.tensor(self.size) * torch.tensor(cells[::-1])[:, None]
        columns, rows = (max(1, round(length)) for length in spans.norm(dim=0).tolist())
        return grid_of(self.size, rows, columns)


def grid_of(size: tuple[float, float], rows: int, columns: int) -> Tensor:
    """Middles of ``rows`` times ``columns`` equal cells of an image of ``size`` (width, height), (N, 2)."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing='ij')
    return torch.stack([x.flatten() * size[0], y.flatten() * size[1]], 1)


def read_maps(
    model: FrozenDiffusion,
    images: Tensor,
    timesteps: Sequence[float],
    taps: Sequence[Tap],
    noise: str = 'fixed',
    seed: int = 0,
    ensemble: int = 1,
) -> list[Tensor]:
    """Reads maps, averaged over noises.

    Args:
        model: The frozen model.
        images: (B, 3, H, W) in [-1, 1].
        timesteps: Each in [0, 1000].
        taps: Of those that the model reads.
        noise: ``'fixed'`` or ``'fresh'``, as of ``ASelectDiT`` in evaluation.
        seed: Of the first noise; each further one has the next seed.
        ensemble: Noises, each a forward pass (DIFT, arXiv 2306.03881, takes 8).

    Returns:
        A map (B, C, h, w), float32, for each timestep and tap, taps innermost; its cells divide the image evenly.
    """
    total: dict[tuple[float, Tap], Tensor] = {}
    count = ensemble * len(timesteps) * len(model.family.taps)
    with progress_bar(desc='matching', total=count, unit='maps', delay=PATIENCE, leave=False) as bar:

        def add(timestep: float, tap: Tap, value: Tensor) -> None:
            total[timestep, tap] = total.get((timestep, tap), 0) + value / ensemble
            bar.update()

        model.read_images(images, timesteps, [policy_noise(noise, seed + draw) for draw in range(ensemble)], add)
    return [total[timestep, tap] for timestep in timesteps for tap in taps]


def massive_channels(maps: Sequence[Tensor], k: float) -> list[int]:
    """Channels whose mean magnitude is above ``k`` times the median over channels (DiTF, arXiv 2505.18584).

    A few channels of a diffusion transformer have the same large value everywhere: they drown what tells cells apart.

    Args:
        maps: (C, h, w), all of one tap.
        k: Above 1.

    Returns:
        Their numbers.
    """
    magnitude = torch.stack([one.abs().mean((1, 2)) for one in maps]).mean(0)
    return (magnitude > k * magnitude.median()).nonzero().flatten().tolist()


def discard_massive(images: Sequence[Sequence[Tensor]], k: float) -> tuple[list[list[Tensor]], list[list[int]]]:
    """Sets massive channels to zero, the same ones in all images.

    Args:
        images: Of each the maps (C, h, w) of the taps.
        k: See :func:`massive_channels`.

    Returns:
        New maps, and the numbers of the channels of each tap.
    """
    found = [massive_channels(maps, k) for maps in zip(*images)]
    kept = []
    for maps in images:
        new = [one.clone() for one in maps]
        for one, channels in zip(new, found):
            one[channels] = 0
        kept.append(new)
    return kept, found


def sample(maps: Sequence[Tensor], places: Tensor) -> Tensor:
    """Features of places, interpolated bilinearly, those of all maps in one vector.

    Args:
        maps: (C, h, w) of one image, of any sizes.
        places: Shares of width and height, (N, 2).

    Returns:
        (N, sum of C).
    """
    grid = (2 * places.to(maps[0]) - 1)[None, None]
    read = [F.grid_sample(one[None], grid, padding_mode='border', align_corners=False)[0, :, 0] for one in maps]
    return torch.cat(read).T


def find(
    source: Sequence[Tensor],
    source_frame: Frame,
    points: Tensor,
    target: Sequence[Tensor],
    target_frame: Frame,
    resolution: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Nearest neighbours by cosine.

    Args:
        source: Maps (C, h, w) of the source, of any sizes.
        source_frame: Where the source lies in them.
        points: (N, 2), in pixels of the source.
        target: Maps of the target, of the same taps.
        target_frame: Where the target lies in them.
        resolution: Maps of the target are interpolated to so many cells a side; None for those of the finest map.
            What was padded is never searched.

    Returns:
        Points (N, 2) in pixels of the target, and the cosine of each, both on the CPU.
    """
    finest = max(((one.shape[1], one.shape[2]) for one in target), key=math.prod)
    candidates = target_frame.grid(finest if resolution is None else (resolution, resolution))
    places = target_frame.places(candidates)
    queries = F.normalize(sample(source, source_frame.places(points)), dim=1)
    best, index = queries.new_full((len(queries),), -math.inf), torch.zeros(len(queries), dtype=torch.long)
    for start in range(0, len(places), PLACES):
        part = F.normalize(sample(target, places[start : start + PLACES]), dim=1)
        value, place = (queries @ part.T).max(1)
        index = torch.where((value > best).cpu(), start + place.cpu(), index)
        best = torch.maximum(best, value)
    return candidates[index], best.cpu()


def check_points(points: object, size: tuple[float, float], field: str = 'points') -> Tensor:
    """Validates points.

    Args:
        points: (N, 2), numbers.
        size: Width and height of their image.
        field: Their name.

    Returns:
        (N, 2), float32.

    Raises:
        InputError: If they have another shape, there are none, or one lies outside the image.
    """
    try:
        tensor = torch.as_tensor(points, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f'{field}={str(points)[:60]} is not valid: give [[x, y], ...] in pixels') from error
    if tensor.dim() != 2 or tensor.shape[1] != 2 or not len(tensor):
        raise InputError(f'{field} of shape {tuple(tensor.shape)} are not valid: give [[x, y], ...] in pixels')
    outside = outside_of(tensor, size)
    if outside.any():
        number = int(outside.nonzero()[0])
        x, y = tensor[number].tolist()
        raise InputError(f'{field}[{number}]=({x:g}, {y:g}) lies outside the image of {size[0]:g}x{size[1]:g} pixels')
    return tensor


def outside_of(points: Tensor, size: tuple[float, float]) -> Tensor:
    """Which of points (N, 2) do not lie in an image of ``size`` (width, height); those that are no numbers do not."""
    return ~((points >= 0) & (points <= points.new_tensor(size))).all(1)


@torch.no_grad()
def match(
    model: Model,
    source: Tensor | str | Path,
    points: Tensor | Sequence[Sequence[float]],
    target: Tensor | str | Path,
    timestep: float | Sequence[float] | Selection = 261,
    block: int | Sequence[int] | None = None,
    component: str | Sequence[str] = 'query',
    taps: str | Sequence[str] | None = None,
    noise: str = 'fresh',
    seed: int = 0,
    ensemble: int = 1,
    size: int | None = None,
    resolution: int | None = None,
    discard: float | None = None,
) -> Matches:
    """Finds points of one image in another, without training.

    Args:
        model: See :func:`mmaselect.load`. A loaded model is read at the taps it was loaded for.
        source: A file, or (3, H, W), uint8 in [0, 255] or floating in [0, 1].
        points: (N, 2), x and y in pixels of the source.
        target: Likewise.
        timestep: In [0, 1000], or several, whose maps are concatenated; or a selection, which brings its taps. 261 is
            DIFT's.
        block: See :func:`mmaselect.load`.
        component: Likewise.
        taps: Likewise.
        noise: ``'fresh'``: each image has its own; ``'fixed'``: both have the same, which makes cells of the same place
            alike, whatever they show.
        seed: Of the noise.
        ensemble: Features are averaged over so many noises.
        size: Both images are stretched to this many pixels a side; None for what the model was trained on.
        resolution: See :func:`find`.
        discard: Leave out massive channels: those above so many times the median magnitude. None keeps all.

    Returns:
        The matches, in pixels of the target.

    Raises:
        InputError: If an argument is out of range, a point lies outside the source, or an image cannot be read.
    """
    check_choice(noise, 'noise', NOISES)
    check_count(ensemble, 'ensemble')
    for name, value in (('size', size), ('resolution', resolution)):
        if value is not None:
            check_count(value, name)
    if discard is not None:
        check_number(discard, 'discard', 1, open_low=True)
    pictures = [_read(one) for one in (source, target)]
    frames = [Frame.stretched((one.shape[2], one.shape[1])) for one in pictures]
    checked = check_points(points, frames[0].size)
    if isinstance(timestep, Selection):
        timesteps, chosen = tuple(timestep.timesteps), tuple(timestep.taps)
        loaded = model if isinstance(model, FrozenDiffusion) else DiffusionSpec.from_dict(_to_dict(model)).load(chosen)
    else:
        timesteps, loaded = check_timesteps(timestep), load(model, block, component, taps)
        chosen = tuple(loaded.family.taps)
    side = size or loaded.image_size
    images = torch.cat([F.interpolate(one[None], (side, side), mode='bicubic', antialias=True) for one in pictures])
    images = images.clamp(-1, 1).to(loaded.device)
    with naming(str, ('source', 'target')):
        maps = read_maps(loaded, images, timesteps, chosen, noise, seed, ensemble)
    both = [[one[number] for one in maps] for number in (0, 1)]
    discarded: list[list[int]] = [[] for _ in maps]
    if discard is not None:
        both, discarded = discard_massive(both, discard)
    found, similarity = find(both[0], frames[0], checked, both[1], frames[1], resolution)
    return Matches(found, similarity, discarded)


def _read(image: Tensor | str | Path) -> Tensor:
    """An image (3, H, W) in [-1, 1]."""
    if isinstance(image, Tensor):
        return Images(image[None], 1).load(0)[0]
    return read_picture(image)


def pck(right: Sequence[Tensor], categories: Sequence[str]) -> dict[str, float]:
    """Percentage of correct keypoints, averaged in three ways.

    Args:
        right: Of each pair, which of its points are right, (N,).
        categories: Of each pair.

    Returns:
        In percent: ``'point'``: over all points; ``'image'``: the mean of each pair, then over pairs; ``'category'``:
        over the points of each category, then over categories.

    Raises:
        InputError: If there are more or fewer categories than pairs.
    """
    if len(right) != len(categories):
        raise InputError(f'{len(categories)} categories for {len(right)} pairs: give one for each pair')
    by_category: dict[str, list[Tensor]] = {}
    for one, category in zip(right, categories):
        by_category.setdefault(category, []).append(one)
    return {
        'point': 100 * mean_of([torch.cat(list(right))]),
        'image': 100 * mean_of(right),
        'category': 100 * mean_of([torch.cat(parts) for parts in by_category.values()]),
    }


def mean_of(parts: Sequence[Tensor]) -> float:
    """Mean over parts of the mean of each."""
    return sum(part.double().mean().item() for part in parts) / len(parts)
