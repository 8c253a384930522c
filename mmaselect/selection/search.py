"""The sweep: every timestep scored on the same images under the same noises, each image encoded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmaselect.diffusion.family import Tap
from mmaselect.diffusion.model import FrozenDiffusion
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError, check_timestep
from mmaselect.selection.criteria import Criterion, Sums, add_sums


@dataclass
class Batch:
    """Images to select on.

    Attributes:
        images: (B, 3, H, W) in [-1, 1], H and W multiples of the model's stride.
        indices: Index of each image in its data set: it names the image's noise, whichever rank or batch it is in.
        labels: Class of each image, (B,), of each cell of a map, (B, h, w), or None.
    """

    images: Tensor
    indices: Sequence[int]
    labels: Tensor | None = None


@dataclass
class Sweep:
    """Result of :func:`sweep`.

    Attributes:
        timesteps: What was tried, ascending.
        scores: Score of each criterion (by its label) at each tap and timestep.
        num_images: Images over all ranks.
        block_evaluations: Images x timesteps x noises x blocks, over all ranks.
        encoder_runs: Images that went through the latent encoder, over all ranks.
        seconds: Wall time of this rank.
    """

    timesteps: list[float]
    scores: dict[str, dict[Tap, list[float]]] = field(default_factory=dict)
    num_images: int = 0
    block_evaluations: int = 0
    encoder_runs: int = 0
    seconds: float = 0.0

    def curve(self, label: str) -> list[float]:
        """Score of a criterion over timesteps, averaged over taps: one timestep feeds them all."""
        return torch.tensor(list(self.scores[label].values()), dtype=torch.float64).mean(0).tolist()

    def choice(self, label: str) -> float:
        """The timestep with the highest score; of equal ones the least noisy."""
        curve = self.curve(label)
        return self.timesteps[curve.index(max(curve))]


def make_timesteps(timesteps: dict | Sequence[float]) -> list[float]:
    """Reads the ``timesteps`` of a config.

    Args:
        timesteps: ``dict(start=0, stop=1000, num=21)``, both ends included, or a list of numbers.

    Returns:
        Ascending timesteps in [0, 1000], each once.

    Raises:
        InputError: If there are none, or one lies outside 0-1000.
    """
    if isinstance(timesteps, dict):
        extra = set(timesteps) - {'start', 'stop', 'num'}
        if extra or len(timesteps) != 3:
            raise InputError(f'timesteps={dict(timesteps)!r} is not valid: give start, stop and num, or a list')
        num = timesteps['num']
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise InputError(f'timesteps.num={num!r} is not valid: give a whole number of at least 1')
        start = check_timestep(timesteps['start'], 'timesteps.start')
        stop = check_timestep(timesteps['stop'], 'timesteps.stop')
        values = torch.linspace(start, stop, num, dtype=torch.float64).tolist()
    else:
        values = [check_timestep(value, 'timesteps') for value in timesteps]
    if not values:
        raise InputError('timesteps=[] is not valid: give at least one')
    return sorted(set(values))


@dataclass
class Partial:
    """One rank's share of a sweep, before the ranks meet.

    Attributes:
        sums: Of each criterion (by its position) at each timestep and tap.
        images: Images seen.
        seconds: Wall time.
    """

    sums: dict[tuple[float, int, Tap], Sums] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0


def num_draws(criteria: Sequence[Criterion]) -> int:
    """Noises per image that serve all criteria."""
    return max(criterion.draws for criterion in criteria)


@torch.no_grad()
def accumulate(
    model: FrozenDiffusion,
    batches: Iterable[Batch],
    timesteps: Sequence[float],
    criteria: Sequence[Criterion],
    seed: int = 0,
    on_pass: Callable[[], object] | None = None,
) -> Partial:
    """Runs one rank's share of a sweep; nothing is communicated.

    Noise is common to all timesteps, so that curves differ by the timestep alone, and independent over images and
    draws. Only one batch and the criteria's sums are in memory at a time.

    Args:
        model: The frozen model; its taps are scored.
        batches: This rank's share of the images.
        timesteps: What to try, ascending, each in [0, 1000].
        criteria: What to compute; one pass per noise serves them all.
        seed: Of the noise.
        on_pass: Called after every forward pass, for a progress bar.

    Returns:
        The sums.

    Raises:
        InputError: If a criterion needs labels that are not there, or if features are not finite.
    """
    started = time.perf_counter()
    result = Partial()
    for batch in batches:
        missing = [criterion.label for criterion in criteria if criterion.needs_labels and batch.labels is None]
        if missing:
            raise InputError(f'criterion {missing[0]!r} needs labels; these images have none')
        latent = model.encode(batch.images)
        shape = tuple(latent.shape[1:])
        noises = [
            torch.stack([seeded_noise(shape, seed, index, draw) for index in batch.indices]).to(latent.device)
            for draw in range(num_draws(criteria))
        ]
        for timestep in timesteps:
            passes = []
            for noise in noises:
                maps = model(latent, noise, timestep)
                check_finite(maps, timestep)
                passes.append(maps)
                if on_pass is not None:
                    on_pass()
            for tap in passes[0]:
                tap_maps = [maps[tap] for maps in passes]
                for number, criterion in enumerate(criteria):
                    key = (timestep, number, tap)
                    result.sums[key] = add_sums(result.sums.get(key, {}), criterion.sums(tap_maps, batch.labels))
        result.images += len(batch.indices)
    result.seconds = time.perf_counter() - started
    return result


def finish(
    partial: Partial,
    model: FrozenDiffusion,
    timesteps: Sequence[float],
    criteria: Sequence[Criterion],
    reduce: Callable[[Sums], Sums] | None = None,
) -> Sweep:
    """Brings the ranks' shares together and scores them.

    Args:
        partial: This rank's share.
        model: As given to :func:`accumulate`.
        timesteps: Likewise.
        criteria: Likewise.
        reduce: Adds the sums of all ranks; every rank must call it, in the same order. None for a single process.

    Returns:
        The scores, the same on every rank.

    Raises:
        InputError: If there are no images.
    """
    add_ranks = reduce or (lambda sums: sums)
    images = round(add_ranks({'images': torch.tensor(float(partial.images))})['images'].item())
    if not images:
        raise InputError('selection has no images: the data set is empty')
    result = Sweep(
        timesteps=list(timesteps),
        num_images=images,
        encoder_runs=images,
        block_evaluations=images * len(timesteps) * num_draws(criteria) * model.num_blocks,
        seconds=partial.seconds,
    )
    for number, criterion in enumerate(criteria):
        result.scores[criterion.label] = {
            tap: [criterion.score(add_ranks(partial.sums.get((timestep, number, tap), {}))) for timestep in timesteps]
            for tap in dict.fromkeys(model.family.taps)
        }
    return result


def sweep(
    model: FrozenDiffusion,
    batches: Iterable[Batch],
    timesteps: Sequence[float],
    criteria: Sequence[Criterion],
    seed: int = 0,
    on_pass: Callable[[], object] | None = None,
) -> Sweep:
    """Scores every timestep in one process: :func:`accumulate`, then :func:`finish`."""
    partial = accumulate(model, batches, timesteps, criteria, seed, on_pass)
    return finish(partial, model, timesteps, criteria)


def check_finite(maps: dict[Tap, Tensor], timestep: float) -> None:
    """Raises :class:`InputError`, naming timestep and tap, if a map holds NaN or infinity."""
    for tap, value in maps.items():
        if not torch.isfinite(value).all():
            raise InputError(
                f'features are not finite at timestep {timestep:g}, block {tap.block}, {tap.component}: '
                'the weights or the images hold NaN or infinity, or the dtype overflows'
            )
