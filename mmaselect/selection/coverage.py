"""Several timesteps at once: which ones add something to those that are already chosen.

Two timesteps that show the same things are worth little more than one. What a timestep shows is its centred features,
pooled to a small grid; what two of them share is the inner product of the one's features under one noise with the
other's under an independent noise, so that only the image counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.selection.features import Features

#: Side of the grid that maps are pooled to.
POOL = 2


def sketch(features: Features) -> Tensor:
    """Pools maps and takes out the mean of each group of images.

    Args:
        features: Of one tap and timestep, under two noises.

    Returns:
        (2, B, C * POOL^2), scaled so that an inner product of two sketches, summed over images, is unbiased.
    """
    pooled = torch.stack([F.adaptive_avg_pool2d(maps.float(), POOL).flatten(1) for maps in features.maps[:2]])
    counts = features.counts.to(pooled.dtype)
    means = torch.stack([features.per_group(draw) / counts[:, None] for draw in pooled])
    unbiased = (counts / (counts - 1).clamp_min(1)).sqrt()[features.groups, None]
    return (pooled - means[:, features.groups]) * unbiased


def overlap(sketches: Sequence[Tensor]) -> Tensor:
    """What each pair of timesteps shares, and what each holds, image and noise together.

    Args:
        sketches: Of every timestep.

    Returns:
        (T + 1, T): shared energies, symmetric, and below them the timesteps' own energies; sums over images, and means
        over draws.
    """
    first, second = (torch.stack([one[draw].flatten() for one in sketches]).double() for draw in (0, 1))
    shared = first @ second.T
    own = (first.square().sum(1) + second.square().sum(1)) / 2
    return torch.cat([(shared + shared.T) / 2, own[None]])


def greedy(scores: Sequence[float], shared: Tensor, first: int, num: int) -> list[int]:
    """Chooses several timesteps, each for what it adds.

    The next one has the highest score times the share of its features' energy that is the image's (which two noises
    agree on) and that the chosen ones do not explain, when each of them may be scaled by a number of its own, which is
    what ``SoftmaxFusion`` can learn.

    Args:
        scores: Of every timestep, at least 0.
        shared: Of :func:`overlap`.
        first: The timestep that is best alone.
        num: How many to choose, at most ``len(scores)``.

    Returns:
        Positions, the first one first.
    """
    chosen = [first]
    alone = torch.as_tensor(scores, dtype=torch.float64)
    shared, own = shared[:-1], shared[-1]
    while len(chosen) < num:
        known = shared[chosen][:, chosen]
        # A ridge far below the data: two timesteps that show exactly the same make the matrix singular.
        known = known + 1e-9 * known.diagonal().mean() * torch.eye(len(chosen), dtype=known.dtype)
        cross = shared[chosen]
        explained = (cross * torch.linalg.solve(known, cross)).sum(0)
        gain = alone * (shared.diagonal() - explained).clamp_min(0) / own.clamp_min(1e-30)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return chosen
