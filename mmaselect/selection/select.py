"""The one way to select, for the hook and for Python."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.images import ImageSource, draw_portions, number_groups
from mmaselect.progress import progress_bar
from mmaselect.selection.criterion import Criterion
from mmaselect.selection.racing import FIRST_IMAGES
from mmaselect.selection.report import Selection
from mmaselect.selection.search import OneProcess, Ranks, Search, run


def check_group(criteria: Iterable[Criterion], batch_size: int | str) -> None:
    """Raises :class:`InputError` if a criterion centres images and only one of them is read at once."""
    centred = [criterion.label for criterion in criteria if getattr(criterion, 'centred', False)]
    if centred and batch_size == 1:
        raise InputError(f'batch_size={batch_size} is too small: {centred[0]} needs at least 2 images at once')


def select_on(
    model: FrozenDiffusion,
    source: ImageSource,
    criteria: dict[str, Criterion],
    config: dict[str, Any],
    timesteps: Sequence[float],
    alternatives: Sequence[Sequence[Tap]],
    num_timesteps: int = 1,
    num_images: int | str | None = 256,
    search: str = 'sweep',
    stability: float = 0.95,
    noise: str = 'fixed',
    noise_seed: int = 0,
    seed: int = 0,
    ranks: Ranks | None = None,
    progress: bool = True,
    logger: logging.Logger | None = None,
) -> Selection:
    """Scores timesteps and taps on images, and chooses.

    Args:
        model: Loaded for all taps of ``alternatives``.
        source: The images, with their batch size set.
        criteria: By label; the first one decides.
        config: Of the first one, for the report.
        timesteps: Candidates, ascending, each in [0, 1000].
        alternatives: Sets of taps of which one is to be chosen.
        num_timesteps: How many timesteps to choose.
        num_images: How many images to draw, None for all, ``'auto'`` for as many as ``stability`` needs.
        search: ``'sweep'``, ``'coarse-to-fine'`` or ``'racing'``, see :func:`~mmaselect.selection.search.run`.
        stability: Share of bootstrap resamples that must agree, for ``num_images='auto'``.
        noise: Policy of the noise, see :class:`~mmaselect.selection.search.Search`.
        noise_seed: Of the fixed noise.
        seed: Draws images, views and fresh noises.
        ranks: The process group; each rank reads its share of the images.
        progress: Show a progress bar.
        logger: Gets the list of unreadable images.

    Returns:
        The selection, the same on every rank. It may be doubtful: see :meth:`Selection.check`.

    Raises:
        InputError: If there are no images, or features are not finite; on all ranks, if on one.
    """
    ranks = ranks or OneProcess()
    check_group(criteria.values(), source.batch_size)
    portions = draw_portions(len(source), num_images, seed, FIRST_IMAGES if search == 'racing' else None)
    with progress_bar(desc='timestep selection', unit='pass', disable=not progress or ranks.rank != 0) as bar:
        finder = Search(
            model,
            timesteps,
            list(criteria.values()),
            alternatives,
            num_timesteps,
            seed,
            bar.update,
            keep=search == 'coarse-to-fine',
            ranks=ranks,
            noise=noise,
            noise_seed=noise_seed,
            name=source.name,
        )
        if search == 'sweep' and num_images != 'auto':
            mine = sum(number // source.group % ranks.world_size == ranks.rank for number in range(len(portions[0])))
            bar.total = -(-mine // source.batch_size) * len(timesteps) * finder.passes
        batches = (
            source.batches(indices, first, ranks.rank, ranks.world_size)
            for indices, first in number_groups(portions, source.group)
        )
        sweep = run(finder, batches, search, stability if num_images == 'auto' else None)
    # Each rank knows its own.
    source.unreadable.found = ranks.collect(source.unreadable.found)
    source.unreadable.total = sum(map(len, portions))
    if ranks.rank == 0:
        source.unreadable.report(logger or logging.getLogger('mmaselect'))
    return Selection(sweep, next(iter(criteria)), config)
