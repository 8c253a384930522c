"""``load``, ``extract`` and ``select``: the frozen path and the selection in a line of Python each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from mmaselect.diffusion.memory import Halving, halve_images, join_maps
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import policy_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap, all_taps
from mmaselect.errors import InputError, check_timesteps, naming
from mmaselect.images import Images
from mmaselect.progress import progress_bar
from mmaselect.selection.criteria import PAPER, RECOMMENDED, build_criteria
from mmaselect.selection.report import Selection
from mmaselect.selection.search import count_passes, make_timesteps
from mmaselect.selection.select import select_on
from mmaselect.unreadable import SHARE

Model = Union[FrozenDiffusion, dict[str, Any], str, Path]


def load(
    model: Model,
    block: int | Sequence[int] | str | None = None,
    component: str | Sequence[str] = 'query',
    taps: str | Sequence[str] | None = None,
) -> FrozenDiffusion:
    """Loads what a block and a component need of a frozen diffusion model, and nothing behind it.

    Args:
        model: ``dict(type='SD3', pretrained=..., device='cuda', dtype='bfloat16', ...)``, fields as of
            :class:`~mmaselect.diffusion.model.DiffusionSpec`; or a diffusers folder or hub id, where its
            ``config.json`` says the family (a DiT may be a SiT: name their ``type``). A model that is loaded already
            is given back.
        block: Block to read, counted from 0, or several, or ``'auto'`` for all; None for the middle one.
        component: What to read of it, or several, or ``'auto'`` for query, key, value, attention and output.
        taps: Names of what to read in place of both, or the name of a published set, such as ``'gdf-sd15'``.

    Returns:
        The model.

    Raises:
        InputError: If there is no such model, block or component.
    """
    if isinstance(model, FrozenDiffusion):
        return model
    spec = DiffusionSpec.from_dict(_to_dict(model))
    return spec.load(all_taps(spec.alternatives(block, component, taps)))


@torch.no_grad()
def extract(
    model: Model,
    images: Tensor | str | Path | Sequence[str | Path],
    timestep: float | Sequence[float] | Selection,
    block: int | Sequence[int] | None = None,
    component: str | Sequence[str] = 'query',
    taps: str | Sequence[str] | None = None,
    pool: bool = False,
    noise: str = 'fixed',
    seed: int = 0,
    size: int | None = None,
    batch_size: int | str = 'auto',
    progress: bool = False,
) -> Tensor | dict[tuple[float, int, str], Tensor]:
    """Reads features.

    Args:
        model: See :func:`load`. A loaded model is read at the taps it was loaded for.
        images: (N, 3, H, W), uint8 in [0, 255] or floating in [0, 1]; or a folder; or files.
        timestep: In [0, 1000], or several; or a selection, which brings block and component with it.
        block: See :func:`load`.
        component: See :func:`load`.
        taps: See :func:`load`.
        pool: Average each map over its cells.
        noise: ``'fixed'``: the same for all images, as ``ASelectDiT`` does by default; ``'fresh'``: each image has
            its own, which depends on nothing but its pixels.
        seed: Of the noise.
        size: Files are scaled and cropped to this many pixels a side; None for what the model was trained on.
        batch_size: Images per forward pass; ``'auto'`` measures how many fit memory. What does not fit is halved.
        progress: Show a progress bar.

    Returns:
        Features on the CPU, float32, (N, C, h, w), or (N, C) if pooled. Of several timesteps, blocks or components a
        dict of these by (timestep, block, component).

    Raises:
        InputError: If an argument is out of range.

    Example:
        What scikit-learn asks for, at a timestep that is selected without labels::

            digits = load_digits()
            images = torch.tensor(digits.images / 16)[:, None].expand(-1, 3, -1, -1).float()
            images = torch.nn.functional.interpolate(images, size=16, mode='bicubic').clamp(0, 1)
            model = dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels')
            train, test, classes, expected = train_test_split(images, digits.target, random_state=0)
            selection = mmaselect.select(model, train, block=3, component='output', num_images=64)
            features, unseen = (mmaselect.extract(model, part, selection, pool=True) for part in (train, test))
            head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(features, classes)
            accuracy = head.score(unseen, expected)  # 0.971
    """
    draw = policy_noise(noise, seed)
    if isinstance(timestep, Selection):
        chosen, timesteps = tuple(timestep.taps), tuple(timestep.timesteps)
        loaded = load_taps(model, chosen)
    else:
        timesteps, loaded = check_timesteps(timestep), load(model, block, component, taps)
        chosen = loaded.family.taps
    missing = [tap for tap in chosen if tap not in loaded.family.taps]
    if missing:
        name = f'block {missing[0].block} {missing[0].component}'
        raise InputError(
            f'{name} was selected, but the model was not loaded for it: load it with this block and component, or give '
            'its dict(type=...)'
        )
    source = Images(images, size or loaded.image_size)
    source.fit(loaded, batch_size, group=1)
    keys = [(t, *tap) for t in timesteps for tap in chosen]

    def read(part: Tensor) -> list[Tensor]:
        found = {}

        def take(t: float, tap: Tap, value: Tensor) -> None:
            key = (t, *tap)
            if key in keys:
                found[key] = (value.mean((2, 3)) if pool else value).cpu()

        loaded.read_images(part.to(loaded.device), timesteps, draw, take)
        return [found[key] for key in keys]

    halving = Halving(read, halve_images)
    batches = source.batches(range(len(source)))
    total = -(-len(source) // source.batch_size)
    parts: list[list[Tensor]] = []
    for batch in progress_bar(iterable=batches, desc='features', total=total, disable=not progress):
        with naming(source.name, batch.indices):
            parts += halving(batch.images)
    result = dict(zip(keys, join_maps(parts)))
    return next(iter(result.values())) if len(result) == 1 else result


def select(
    model: Model,
    images: Tensor | str | Path | Sequence[str | Path],
    block: int | Sequence[int] | str | None = None,
    component: str | Sequence[str] = 'query',
    timesteps: dict[str, Any] | Sequence[float] | None = None,
    criterion: dict[str, Any] | None = None,
    compare: Sequence[dict[str, Any]] | None = None,
    num_images: int | str | None = 256,
    num_timesteps: int = 1,
    search: str = 'sweep',
    stability: float = 0.95,
    labels: Tensor | Sequence[int] | None = None,
    noise: str = 'fixed',
    seed: int = 0,
    size: int | None = None,
    batch_size: int | str = 'auto',
    progress: bool = False,
    max_unreadable: float = SHARE,
) -> Selection:
    """Selects timestep, and where asked for block and component, on images; no labels are needed.

    Args:
        model: See :func:`load`. Of a loaded model the taps it was loaded for are scored: as alternatives where
            ``block`` or ``component`` is ``'auto'``.
        images: (N, 3, H, W), uint8 in [0, 255] or floating in [0, 1]; or a folder; or files.
        block: Block to read, or several that feed one head; ``'auto'`` selects one; None for the middle one.
        component: Likewise.
        timesteps: ``dict(start, stop, num)``, both ends included, or a list; None for 0, 50, ..., 1000.
        criterion: What decides; None for instance information, which docs/en/evidence.md recommends.
        compare: Computed beside it; None for the paper's HFR.
        num_images: How many to draw, None for all, ``'auto'`` for as many as ``stability`` needs.
        num_timesteps: How many timesteps to choose.
        search: ``'sweep'``, ``'coarse-to-fine'`` or ``'racing'``, see docs/en/select.md.
        stability: Share of bootstrap resamples that must agree, for ``num_images='auto'``.
        labels: Class of each image, for ``FisherScore``.
        noise: That of the features that will be used, see :func:`extract`: the best timestep depends on it.
        seed: Draws images and noises. The fixed noise is that of :func:`extract` with the same seed.
        size: See :func:`extract`.
        batch_size: Images per forward pass; ``'auto'`` measures how many fit memory. What does not fit is halved.
        progress: Show a progress bar.
        max_unreadable: Share of the files that may be unreadable: they are passed over, counted and listed in the log
            (logger ``mmaselect``). 0 raises at the first. (:func:`extract` always does: its rows are the images.)

    Returns:
        The selection: ``timestep``, ``block``, ``component``; ``table()`` and ``save(folder)`` report it.

    Raises:
        InputError: If an argument is out of range, or nothing in the features depends on the images.
    """
    config = dict(criterion or RECOMMENDED)
    others = [PAPER] if compare is None else list(compare)
    criteria = build_criteria([config, *others], ['criterion', *['compare'] * len(others)])
    if isinstance(model, FrozenDiffusion):
        loaded, auto = model, 'auto' in (block, component)
        alternatives = [(tap,) for tap in loaded.family.taps] if auto else [loaded.family.taps]
    else:
        spec = DiffusionSpec.from_dict(_to_dict(model))
        alternatives = spec.alternatives(block, component)
        loaded = spec.load(all_taps(alternatives))
    source = Images(images, size or loaded.image_size, labels, max_unreadable)
    source.fit(loaded, batch_size, passes=sum(count_passes(list(criteria.values()), num_timesteps)) - 1)
    grid = make_timesteps(timesteps or dict(start=0, stop=1000, num=21))
    selection = select_on(
        loaded, source, criteria, config, grid, alternatives, num_timesteps, num_images, search, stability, noise,
        seed, seed, progress=progress,
    )  # fmt: skip
    selection.check()
    return selection


def load_taps(model: Model, taps: Sequence[Tap]) -> FrozenDiffusion:
    """Loads what some taps need of a model, see :func:`load`."""
    return model if isinstance(model, FrozenDiffusion) else DiffusionSpec.from_dict(_to_dict(model)).load(taps)


def _to_dict(model: dict[str, Any] | str | Path) -> dict[str, Any]:
    return model if isinstance(model, dict) else dict(type='auto', pretrained=str(model))
