"""How sure a choice is: the bootstrap over images (Efron, 1979), and what it says of near ties.

The images come in groups, the groups in bins; a resample draws as many bins as there are, with replacement, and adds
up their sums. So it costs no forward pass and no memory that grows with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmaselect.diffusion.taps import Tap
from mmaselect.selection.criterion import SummedCriterion

#: Groups of images that are added up before the bootstrap; more groups than bins share them.
BINS = 64
RESAMPLES = 500
#: Parts of the images that are left out one at a time, for scores that are no sums over images.
PARTS = 16


@dataclass
class Choice:
    """What a criterion chooses.

    Attributes:
        timesteps: The chosen timestep, or several, the best first.
        taps: The chosen block and component, or several where several feed the head.
        agreement: Share of the bootstrap's resamples that choose the same timestep and taps; None without a bootstrap.
        resamples: Share of the resamples that choose a timestep, by timestep.
    """

    timesteps: list[float]
    taps: list[Tap]
    agreement: float | None = None
    resamples: dict[float, float] = field(default_factory=dict)


def resample(criterion: SummedCriterion, sums: Tensor, num: int = RESAMPLES, seed: int = 0) -> Tensor | None:
    """Scores resampled images.

    Args:
        criterion: One with ``fields``.
        sums: Its sums, (timesteps, taps, fields, bins); a bin that is 0 everywhere holds no images.
        num: Resamples.
        seed: Of the draws, which are the same for all timesteps and taps.

    Returns:
        (timesteps, taps, num), or None where there are fewer than two bins to draw from.
    """
    filled = sums.abs().flatten(0, 2).sum(0) > 0
    bins = int(filled.sum())
    if bins < 2:
        return None
    resampled = sums[..., filled] @ _weights(bins, num, seed).T
    return criterion.score({name: resampled[:, :, number] for number, name in enumerate(criterion.names)})


def _weights(bins: int, num: int, seed: int) -> Tensor:
    """How often each resample draws each bin, (num, bins)."""
    drawn = torch.randint(bins, (num, bins), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(num, bins).double().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def jackknife(
    score: Callable[[Tensor], float],
    rows: Tensor,
    groups: Tensor,
    leave_out: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[float, Tensor | None]:
    """Score of all images, and the influence that each of up to ``PARTS`` parts of them has on it.

    A score that is no sum over images cannot be resampled by adding up parts, and a resample with its repeated images
    has fewer directions than the images. Leaving out one part at a time has neither fault (Efron and Tibshirani, 1993,
    ch. 11).

    Args:
        score: Of rows of images.
        rows: (images, ...).
        groups: Group of each image, (images,); a group lies in one part.
        leave_out: Gives the scores without each part, (parts,), from the rows and the part of each image, faster than
            one after the other.

    Returns:
        The score, and (parts,), the influences, of mean 0; None with fewer than 2 parts of at least 2 images.
    """
    whole = score(rows)
    parts = groups.unique(return_inverse=True)[1] % PARTS
    number = int(parts.max()) + 1
    if number < 2 or len(rows) - int(torch.bincount(parts).max()) < 2:
        return whole, None
    if leave_out is not None:
        left = leave_out(rows, parts)
    else:
        left = torch.tensor([score(rows[parts != part]) for part in range(number)], dtype=torch.float64)
    return whole, (number - 1) * (left.mean() - left)


def resample_influences(scores: Tensor, influences: Tensor, num: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Resampled scores by :func:`jackknife`'s influences.

    Args:
        scores: (timesteps, taps).
        influences: (timesteps, taps, parts).
        num: Resamples.
        seed: Of the draws, which are the same for all timesteps and taps.

    Returns:
        (timesteps, taps, num), at least 0.
    """
    parts = influences.shape[-1]
    return (scores[..., None] + influences @ _weights(parts, num, seed).T / parts).clamp_min(0)


def drop_doubtful(scores: Tensor, resampled: Tensor) -> tuple[Tensor, Tensor]:
    """Takes a score for 0 where more than 2.5 % of the resamples say so.

    A criterion gives 0 where the features hold nothing to judge by (see ``NoiseConsistentHFR``). Close to that border
    its ratio is noise over noise, and the highest of many such ratios would win.

    Args:
        scores: (timesteps, taps).
        resampled: (timesteps, taps, resamples).

    Returns:
        Both, with the doubtful ones at 0.
    """
    doubtful = (resampled == 0).double().mean(-1) > 0.025
    return scores.masked_fill(doubtful, 0.0), resampled.masked_fill(doubtful[..., None], 0.0)


def interval(resampled: Tensor) -> Tensor:
    """95 % percentile interval of the last axis: (..., resamples) to (..., 2)."""
    return torch.quantile(resampled, resampled.new_tensor([0.025, 0.975]), dim=-1).movedim(0, -1)


def choose(scores: Tensor, resampled: Tensor | None, blocks: Sequence[int]) -> tuple[int, int, Tensor | None]:
    """Chooses among alternatives (block and component) and timesteps.

    The highest score wins; of equal ones the earlier alternative, then the less noisy timestep. Where alternatives
    stop at different blocks, one that stops earlier is preferred if its best score is within one standard error of the
    highest: it is faster, and the images can hardly tell the two apart. The standard error is that of the highest
    score (Breiman et al., 1984): by that of each difference, a poor but uncertain score would count as tied.

    Args:
        scores: (alternatives, timesteps).
        resampled: (alternatives, timesteps, resamples), or None: then nothing counts as tied.
        blocks: Last block of each alternative.

    Returns:
        The chosen alternative and timestep, and the choices of the resamples, (resamples, 2), by the same rule.
    """
    tolerance = 0.0
    if resampled is not None and len(set(blocks)) > 1:
        tolerance = resampled.flatten(0, 1)[int(scores.argmax())].std().item()
    # One more axis, so that the scores and all resamples are decided by the same lines.
    alternative, timestep = _decide(scores[..., None], tolerance, blocks)
    if resampled is None:
        return int(alternative), int(timestep), None
    return int(alternative), int(timestep), torch.stack(_decide(resampled, tolerance, blocks), dim=1)


def _decide(scores: Tensor, tolerance: float, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Applies the rule of :func:`choose` to every entry of the last axis of (alternatives, timesteps, num)."""
    num_timesteps = scores.shape[1]
    flat = scores.flatten(0, 1)
    tied = flat >= flat.amax(0) - tolerance
    block = torch.tensor(blocks).repeat_interleave(num_timesteps)[:, None]
    earliest = torch.where(tied, block, block.max() + 1).amin(0)
    # argmax takes the first of equals only by accident of the implementation; a stable sort promises it.
    allowed = torch.where(tied & (block == earliest), flat, -torch.inf)
    winner = allowed.sort(dim=0, descending=True, stable=True).indices[0]
    return winner // num_timesteps, winner % num_timesteps
