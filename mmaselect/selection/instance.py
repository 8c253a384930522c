"""Criteria on pooled features of augmented views: what a feature tells of *which image this is*.

They need no labels, and compare unlike channels and resolutions, because features are pooled and whitened.
With ``x_iv`` the pooled feature of view ``v`` of image ``i`` under the noise that the head will see, ``q`` views and
``n`` images:

- ``S_w``: scatter of the views around the mean of their image, over ``n (q - 1)``;
- ``S_b``: scatter of the images' means, over ``n - 1``, minus ``S_w / q``, which views alone would put there.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.noise import seeded_generator
from mmaselect.errors import InputError, check_count, check_fields, check_number
from mmaselect.selection.criterion import Criterion
from mmaselect.selection.features import Features
from mmaselect.selection.views import Views

#: Added to every direction of standardised features, so that no scatter is singular.
RIDGE = 1e-6


class ViewCriterion(Criterion):
    """A criterion that reads views of images, pooled, of all images at once.

    What is kept are ``num_views * cells * min(C, max_channels)`` float32 numbers per image, timestep and tap.

    Args:
        num_views: Views per image, at least 2; the first one is the image itself.
        views: What a view may change, ``dict(crop=0.4, mirror=False, rotate=0, colour=0, blur=0)``, see
            :class:`~mmaselect.selection.views.Views`.
        pool: Average the map to ``pool`` x ``pool`` cells. Each cell is compared with the same cell of other images,
            and all cells share the scatters.
        max_channels: More channels than that are projected to so many at random: estimating a scatter takes more
            samples than channels.

    Raises:
        InputError: If an argument is out of range.
    """

    name: str

    def __init__(
        self,
        num_views: int = 2,
        views: dict[str, Any] | None = None,
        pool: int | Sequence[int] = 1,
        max_channels: int = 256,
    ) -> None:
        self.num_views = check_count(num_views, 'num_views', 2)
        self.views = Views(
            **check_fields({} if views is None else views, 'views', Views.__dataclass_fields__, 'dict(crop=0.4)')
        )
        self.scales = self._read_pool(pool)
        self.pool = self.scales[0] if len(self.scales) == 1 else list(self.scales)
        self.max_channels = check_count(max_channels, 'max_channels')
        pooled = '' if self.scales == (1,) else f', {" and ".join(f"{side}x{side}" for side in self.scales)} cells'
        self.label = f'{self.name} ({num_views} views{pooled})'

    def _read_pool(self, pool: Any) -> tuple[int, ...]:
        return (check_count(pool, 'pool'),)

    @property
    def kept(self) -> tuple[tuple[int, ...], int]:
        """What :meth:`rows` depends on: criteria that agree in it share them."""
        return self.scales, self.max_channels

    def rows(self, features: Features) -> Tensor:
        """What is kept of a batch.

        Args:
            features: With at least ``num_views`` views.

        Returns:
            (B, views, cells, channels), float32, on the CPU; of several scales the cells of one after the other.
        """
        rows = torch.stack([torch.cat([_pooled(maps, side) for side in self.scales], 1) for maps in features.views], 1)
        return _project(rows, self.max_channels).cpu()

    def score(self, rows: Tensor) -> float:
        """Scores all images.

        Args:
            rows: (images, views, cells, channels); views beyond ``num_views`` are not read.

        Returns:
            The score; 0 where the features do not depend on the image.

        Raises:
            InputError: If there are fewer than 2 images.
        """
        if len(rows) < 2:
            raise InputError(f'{self.label} needs at least 2 images; there is {len(rows)}')
        centred = self._centre(rows)
        return 0.0 if centred is None else self._score(centred)

    def leave_out(self, rows: Tensor, parts: Tensor) -> Tensor:
        """Scores without each part of the images.

        Args:
            rows: See :meth:`score`.
            parts: Number of each image's part, (images,), from 0.

        Returns:
            (parts,), float64.
        """
        return torch.tensor([self.score(rows[parts != part]) for part in range(int(parts.max()) + 1)]).double()

    def _centre(self, rows: Tensor) -> Tensor | None:
        """Takes out what all images share, position embedding above all: it tells none from the other."""
        rows = rows[:, : self.num_views].double()
        centred = rows - rows.mean((0, 1))
        # What is left is the rounding error of float32 then.
        return None if centred.square().sum() <= 1e-12 * rows.square().sum() else centred

    @abstractmethod
    def _score(self, rows: Tensor) -> float:
        """Scores centred features, (images, views, cells, channels), float64."""


def _pooled(maps: Tensor, side: int) -> Tensor:
    """Maps (B, C, h, w) in cells, (B, cells, C), float32; a mean needs no copy of half-precision maps."""
    if side == 1:
        return maps.mean((2, 3), dtype=torch.float32)[:, None]
    return F.adaptive_avg_pool2d(maps.float(), side).flatten(2).transpose(1, 2)


def _project(rows: Tensor, most: int) -> Tensor:
    """At most so many channels, (..., channels): more are projected at random, always alike."""
    channels = rows.shape[-1]
    return rows if channels <= most else rows @ _projection(channels, most, rows.device)


@functools.lru_cache(maxsize=32)
def _projection(channels: int, most: int, device: torch.device) -> Tensor:
    drawn = torch.randn(channels, most, generator=seeded_generator(0, channels))
    return (drawn / most**0.5).to(device)


def scatters(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter between images and within them, of centred features.

    Args:
        rows: (n, q, cells, C); every cell is a sample.

    Returns:
        ``S_b`` and ``S_w``, (C, C); ``S_b`` is unbiased, so that single eigenvalues may lie below 0.
    """
    n, q, cells, channels = rows.shape
    means = rows.mean(1, keepdim=True)
    within, between = (rows - means).reshape(-1, channels), means.reshape(-1, channels)
    s_w = within.T @ within / (n * (q - 1) * cells)
    return between.T @ between / ((n - 1) * cells) - s_w / q, s_w


class InstanceInformation(ViewCriterion):
    """Information, in nats, on which image it is that passes through augmentation and noise; ours.

    ``1/2 sum log(1 + lambda_i)``, with ``lambda_i`` the eigenvalues of ``S_w^-1 S_b``: the capacity of a Gaussian
    channel. It counts how many directions survive and how well, where Fisher-like ratios see the strongest alone.

    Channels are standardised first, as linear heads do, so that a few massive ones do not outweigh all others. Then
    ``S_w`` is shrunk to the mean of its diagonal: directions in which next to nothing happens count for little. The
    score is invariant under scales and shifts of single channels; only without shrinkage it is so under every
    invertible linear map, but then it loses 2 to 4 points on the data of docs/en/evidence.md.

    Of several scales the score is the geometric mean: what one scale gains has to outweigh what another one loses, each
    in proportion. With one cell alone, detail that a crop moves from place to place is no scatter within an image, and
    under one noise for all images the score peaks before the accuracy does; with four cells alone it peaks behind it.

    Args:
        num_views: See :class:`ViewCriterion`.
        views: Likewise.
        pool: Likewise, or several of them, each once.
        max_channels: Likewise.
        shrinkage: Share of the identity, in [0, 0.5]. 0 needs more images than channels.
    """

    name = 'instance information'

    def __init__(
        self,
        num_views: int = 2,
        views: dict[str, Any] | None = None,
        pool: int | Sequence[int] = (1, 2),
        max_channels: int = 256,
        shrinkage: float = 0.1,
    ) -> None:
        super().__init__(num_views, views, pool, max_channels)
        # Above 0.5 the within-scatter of two views would weigh less than what S_b is corrected by.
        self.shrinkage = check_number(shrinkage, 'shrinkage', 0, 0.5)

    def leave_out(self, rows: Tensor, parts: Tensor) -> Tensor:
        """As of every criterion, but standardised once, by all images: the products of channels are summed once."""
        centred = self._centre(rows)
        if centred is None:
            return torch.zeros(int(parts.max()) + 1).double()
        return self._mean(centred, lambda rows: self._information_without(rows, parts))

    def _read_pool(self, pool: Any) -> tuple[int, ...]:
        if not isinstance(pool, (list, tuple)):
            return super()._read_pool(pool)
        scales = tuple(check_count(side, 'pool') for side in pool)
        if not scales or len(set(scales)) < len(scales):
            raise InputError(f'pool={pool!r} is not valid: give a number, or several, each once')
        return scales

    def _score(self, rows: Tensor) -> float:
        return self._mean(rows, self._information).item()

    def _mean(self, rows: Tensor, information: Callable[[Tensor], Tensor]) -> Tensor:
        """Geometric mean over the scales of what is told under the right names beyond what wrong ones seem to tell."""
        found = []
        for scale in rows.split([side**2 for side in self.scales], 2):
            n, q, cells, channels = scale.shape
            if self.shrinkage == 0 and n * (q - 1) * cells < channels:
                raise InputError(
                    f'shrinkage=0 needs at least {channels} views beside the images for {channels} channels; there are '
                    f'{n * (q - 1) * cells}: set shrinkage=0.1, or take more images'
                )
            right, wrong = (information(one) for one in _named(_standardise(scale)))
            found.append((right - wrong).clamp_min(0))
        return torch.stack(found).prod(0) ** (1 / len(found))

    def _information(self, rows: Tensor) -> Tensor:
        """Of standardised rows; scatters stay factors, so that few images make no matrix of channels."""
        n, q, cells, channels = rows.shape
        within, between = (factor.flatten(0, 1) for factor in _factors(rows))
        level = self._level(within.square().sum() / (n * (q - 1) * cells * channels))
        within = within * ((1 - self.shrinkage) / (n * (q - 1) * cells * level)) ** 0.5
        both = torch.cat([within * self._beside_between(q) ** 0.5, between / ((n - 1) * cells * level) ** 0.5])
        return _half_logdet(both) - _half_logdet(within)

    def _information_without(self, rows: Tensor, parts: Tensor) -> Tensor:
        """:meth:`_information` without each part, (parts,), of rows that are centred as a whole.

        A scatter without a part is the whole one less what few rows add to it, so the matrix determinant lemma needs
        one decomposition of the whole.
        """
        n, q, cells, channels = rows.shape
        within, between = _factors(rows)
        products, squares = _product(within), within.square().sum((1, 2))
        of_within = torch.linalg.eigh(products)
        # By the number of images left: S_b's denominator beside S_w's depends on it.
        of_both: dict[int, tuple[Tensor, Tensor]] = {}
        found = []
        for part in range(int(parts.max()) + 1):
            chosen = parts == part
            left = n - int(chosen.sum())
            # Denominators of the two scatters.
            views, means = left * (q - 1) * cells, (left - 1) * cells
            level = self._level((squares.sum() - squares[chosen].sum()) / (views * channels))
            share = (1 - self.shrinkage) / views
            beside = share * self._beside_between(q) * means
            if left not in of_both:
                of_both[left] = torch.linalg.eigh(_product(between) + beside * products)
            # All means together are 0, so those that are left have the mean - moved / left.
            moved = between[chosen].sum(0) / left**0.5
            removed = within[chosen].flatten(0, 1), torch.cat([between[chosen].flatten(0, 1), moved])
            both = _half_logdet_less(of_both[left], torch.cat([removed[0] * beside**0.5, removed[1]]), level * means)
            found.append(
                both
                - _half_logdet_less(of_within, removed[0], level / share)
                # Of the denominators by which both were multiplied.
                - channels / 2 * math.log(share * means)
            )
        return torch.stack(found)

    def _beside_between(self, views: int) -> float:
        """Weight of ``S_w`` in ``S_b`` plus the shrunk ``S_w``, over its weight in the latter alone.

        ``S_b`` is the scatter of means less ``S_w / q``.
        """
        return (1 - self.shrinkage - 1 / views) / (1 - self.shrinkage)

    def _level(self, mean: Tensor) -> Tensor:
        """What is added to the diagonal of ``S_w``, by the mean of it."""
        return self.shrinkage * mean + RIDGE


def _factors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What views of an image have apart, (n, (q - 1) * cells, C), and its means, (n, cells, C).

    The products of all rows of the first with themselves are ``n (q - 1) cells S_w``; a row less per image, because
    deviations from a mean sum to 0.
    """
    q = rows.shape[1]
    ones = torch.cat([rows.new_ones(q, 1), torch.eye(q, dtype=rows.dtype)[:, 1:]], 1)
    apart = torch.linalg.qr(ones).Q[:, 1:]
    return torch.einsum('vk,nvsc->nksc', apart, rows).flatten(1, 2), rows.mean(1)


def _product(factor: Tensor) -> Tensor:
    """Products of channels, (C, C), summed over the rows of a factor (..., C)."""
    factor = factor.flatten(0, -2)
    return factor.T @ factor


def _half_logdet(factor: Tensor, sign: int = 1) -> Tensor:
    """Half of log det(1 + sign F^T F) of a factor (rows, C), on its shorter side."""
    gram = sign * (factor @ factor.T if len(factor) < factor.shape[1] else factor.T @ factor)
    gram.diagonal().add_(1)
    return torch.linalg.cholesky(gram).diagonal().log().sum()


def _half_logdet_less(decomposed: tuple[Tensor, Tensor], removed: Tensor, level: Tensor) -> Tensor:
    """Half of log det(M - R^T R + level) of a matrix's eigenvalues and eigenvectors, and of rows (rows, C)."""
    values = decomposed[0] + level
    return values.log().sum() / 2 + _half_logdet(removed @ decomposed[1] / values.sqrt(), -1)


def _standardise(rows: Tensor) -> Tensor:
    spread = rows.square().mean((0, 1, 2)).sqrt()
    return rows / torch.where(spread > 1e-6 * spread.max(), spread, torch.inf)


def _named(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Views under their images' names, and under wrong ones: what so few images give if there is nothing to tell."""
    return rows, torch.stack([rows[:, number].roll(number, 0) for number in range(rows.shape[1])], 1)


class ViewConsistency(ViewCriterion):
    """Cosine of two views of an image minus that of two images, mean over pairs, of centred features; in [-2, 2]."""

    name = 'view consistency'

    def _score(self, rows: Tensor) -> float:
        unit = F.normalize(rows, dim=-1)
        n, q, cells, _ = unit.shape
        images = unit.sum(1)
        own = images.square().sum()
        same = (own - n * q * cells) / (n * q * (q - 1) * cells)
        other = (images.sum(0).square().sum() - own) / (n * (n - 1) * q**2 * cells)
        return (same - other).item()


class RankMe(ViewCriterion):
    """Effective rank of the features (arXiv 2210.02885): exponential of the entropy of their singular values.

    It does not know the image from the noise, which has full rank. For comparison; it reads the images alone.
    """

    name = 'RankMe'

    def _score(self, rows: Tensor) -> float:
        return _effective_rank(torch.linalg.svdvals(rows[:, 0].flatten(0, 1)))


class LiDAR(ViewCriterion):
    """Effective rank of ``S_w^-1/2 S_b S_w^-1/2`` (arXiv 2312.04000): how even the ``lambda_i`` are, not how large.

    For comparison.
    """

    name = 'LiDAR'

    def _score(self, rows: Tensor) -> float:
        between, within = scatters(rows)
        # As in the paper: the means' scatter is not corrected, and 1e-4 is added to the diagonal.
        between = between + within / rows.shape[1]
        factor = torch.linalg.cholesky(within + 1e-4 * torch.eye(len(within), dtype=within.dtype))
        half = torch.linalg.solve_triangular(factor, between, upper=False)
        ratio = torch.linalg.solve_triangular(factor, half.T, upper=False)
        return _effective_rank(torch.linalg.eigvalsh((ratio + ratio.T) / 2).clamp_min(0))


def _effective_rank(values: Tensor) -> float:
    share = values / values.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum()).item()
