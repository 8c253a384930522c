"""Linear probes on frozen features: how well a timestep, block or component can be read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.runner import Runner
from torch import Tensor

from mmaselect.diffusion.noise import NOISES, policy_noise
from mmaselect.diffusion.recipe import digest
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError, check_choice, naming
from mmaselect.files import write_json
from mmaselect.hooks.images import RunnerImages, find_backbone
from mmaselect.images import IGNORED
from mmaselect.progress import progress_bar
from mmaselect.selection.features import cell_labels
from mmaselect.threads import side_by_side

#: Cells per image that a probe of segmentation sees at most, drawn at random. With few, all probes overfit, and the
#: order of timesteps is that of their noise.
CELLS = 256
#: Penalties among which a probe of cells chooses, per sample.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1, 10)


@dataclass
class ProbeResult:
    """Accuracies of linear probes.

    Attributes:
        timesteps: Probed timesteps.
        accuracy: Test accuracy in percent, of images, or of cells in segmentation, for each tap and timestep.
        halves: The same on either half of the test images: how far a probe agrees with itself.
        block_evaluations: Images x timesteps x blocks, training and test.
        feature_seconds: Time in the frozen model.
        probe_seconds: Time in training the probes.
    """

    timesteps: list[float]
    accuracy: dict[Tap, list[float]] = field(default_factory=dict)
    halves: tuple[dict[Tap, list[float]], ...] = field(default_factory=lambda: ({}, {}))
    block_evaluations: int = 0
    feature_seconds: float = 0.0
    probe_seconds: float = 0.0

    def mean(self, taps: Sequence[Tap]) -> list[float]:
        """Accuracy over timesteps, averaged over taps: where several feed one head, it stands for that head."""
        return [sum(values) / len(taps) for values in zip(*(self.accuracy[tap] for tap in taps))]


class Samples(NamedTuple):
    """What a linear probe is trained or tested on.

    A sample is the mean over an image's cells; in segmentation a cell, of at most ``CELLS`` per image.

    Attributes:
        features: (samples, C) by timestep and tap.
        labels: Class of each, (samples,).
        images: Number of the image of each, (samples,).
    """

    features: dict[tuple[float, Tap], np.ndarray]
    labels: np.ndarray
    images: np.ndarray


@torch.no_grad()
def read_samples(
    images: RunnerImages,
    timesteps: Sequence[float],
    taps: Sequence[Tap],
    noise: str = 'fresh',
    seed: int = 0,
    on_batch: Callable[[], object] | None = None,
) -> Samples:
    """Reads what a linear probe is trained on.

    Args:
        images: With labels.
        timesteps: Each in [0, 1000].
        taps: Of those that the backbone's model reads.
        noise: ``'fixed'``: all images have the same, as ``ASelectDiT`` gives them by default; ``'fresh'``: each has its
            own, by its pixels.
        seed: Of the cells that are drawn. The noise has the backbone's ``noise_seed``.
        on_batch: Called after every batch.

    Returns:
        The samples, image by image.

    Raises:
        InputError: If the images have no labels.
    """
    check_choice(noise, 'noise', NOISES)
    model = images.backbone.diffusion
    features: dict[tuple[float, Tap], list[Tensor]] = {(one, tap): [] for one in timesteps for tap in taps}
    labels: list[Tensor] = []
    numbers: list[Tensor] = []
    draw = policy_noise(noise, images.backbone.noise_seed)
    for batch in images.batches(range(len(images))):
        batch, sampled = batch.padded(model.multiple), None
        if batch.labels is None:
            raise InputError('a probe needs labels; these images have none, or not one class each')
        if batch.labels.dim() == 3:
            finest = min(model.strides[tap] for tap in taps)
            dense = cell_labels(batch.labels, [side // finest for side in batch.images.shape[-2:]])
            sampled = _draw_cells(dense, batch.indices, seed)
        labels.append(batch.labels if sampled is None else sampled.labels)
        indices = torch.tensor(batch.indices)
        numbers.append(indices if sampled is None else indices[sampled.image])

        def take(one: float, tap: Tap, value: Tensor, sampled: Cells | None = sampled) -> None:
            if (one, tap) in features:
                features[one, tap].append((value.mean((2, 3)) if sampled is None else sampled.of(value)).cpu())

        with naming(images.name, batch.indices):
            model.read_images(batch.images, timesteps, draw, take)
        if on_batch is not None:
            on_batch()
    read = {key: torch.cat(parts).numpy() for key, parts in features.items()}
    return Samples(read, torch.cat(labels).numpy(), torch.cat(numbers).numpy())


class Cells(NamedTuple):
    """Cells of a batch of label maps.

    Attributes:
        image: Number of the image of each, (samples,).
        place: Middle of each cell, as a share of height and width, (samples, 2).
        labels: Class of each, (samples,).
    """

    image: Tensor
    place: Tensor
    labels: Tensor

    def of(self, maps: Tensor) -> Tensor:
        """Features of the cells of maps (B, C, h, w), of whatever size, that these lie in: (samples, C)."""
        size = torch.tensor(maps.shape[-2:])
        row, column = (self.place * size).long().to(maps.device).unbind(1)
        return maps[self.image.to(maps.device), :, row, column]


def _draw_cells(labels: Tensor, indices: Sequence[int], seed: int) -> Cells:
    """Draws cells of label maps (B, h, w)."""
    images, cells = [], []
    for position, index in enumerate(indices):
        valid = (labels[position] != IGNORED).nonzero()
        order = np.random.default_rng([seed, index]).permutation(len(valid))[:CELLS]
        cells.append(valid[torch.from_numpy(order)])
        images.append(torch.full((len(order),), position))
    image, cell = torch.cat(images), torch.cat(cells)
    return Cells(image, (cell + 0.5) / torch.tensor(labels.shape[-2:]), labels[image, cell[:, 0], cell[:, 1]])


def linear_probe(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, cells: bool = False) -> np.ndarray:
    """What a linear classifier on standardised features takes test samples for.

    It is a logistic regression (L2 penalty, C = 1); for cells, of which there are thousands, a ridge regression on the
    classes, whose penalty is chosen by leaving out one training sample at a time.

    Args:
        train: (samples, C).
        train_labels: (samples,).
        test: (test samples, C).
        cells: Whether samples are cells.

    Returns:
        Labels, (test samples,).
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = LogisticRegression(max_iter=300, tol=1e-3)
    if cells:
        found = RidgeClassifierCV(alphas=[len(train) * penalty for penalty in PENALTIES])
    return make_pipeline(StandardScaler(), found).fit(train, train_labels).predict(test)


def probe(
    runner: Runner,
    timesteps: Sequence[float],
    taps: Sequence[Tap],
    noise: str = 'fresh',
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Trains a linear probe for every timestep and tap, on the training data, and tests it on the validation data.

    Args:
        runner: Of a config with both.
        timesteps: Each in [0, 1000].
        taps: Of those that the backbone's model reads.
        noise: See :func:`read_samples`.
        seed: Likewise.
        store: JSON file that keeps the results of a request, so that figures and tables share them.
        progress: Show a progress bar.

    Returns:
        The accuracies.
    """
    from threadpoolctl import threadpool_limits

    # One block may feed several levels of a segmentation head.
    timesteps, taps = list(timesteps), list(dict.fromkeys(taps))
    backbone = find_backbone(runner)
    splits = {'train': runner.train_dataloader.dataset, 'val': runner.val_dataloader.dataset}
    request = {
        'recipe': digest({**backbone.recipe, 'noise': noise}).hex(), 'timesteps': timesteps,
        'taps': [list(tap) for tap in taps], 'noise': noise, 'seed': seed, 'cells': CELLS,
        'images': {name: len(dataset) for name, dataset in splits.items()},
    }  # fmt: skip
    known = _read_store(store)
    for entry in known:
        if entry['request'] == request:
            return _from_entry(entry)
    result, read = ProbeResult(timesteps), {}
    sources = {
        name: RunnerImages(runner, dataset, 'val', 'auto', seed, labels=True) for name, dataset in splits.items()
    }
    passes = len(timesteps) * sum(-(-len(images) // images.batch_size) for images in sources.values())
    # A probe takes about as long as a pass or two.
    total = passes + len(taps) * len(timesteps)
    with progress_bar(total=total, desc=f'linear probes, {noise} noise', unit='step', disable=not progress) as bar:
        started = time.perf_counter()
        for name, images in sources.items():
            read[name] = read_samples(images, timesteps, taps, noise, seed, lambda: bar.update(len(timesteps)))
            result.block_evaluations += len(images) * len(timesteps) * backbone.diffusion.num_blocks
        result.feature_seconds = time.perf_counter() - started
        started = time.perf_counter()
        train, test = read['train'], read['val']
        cells = len(np.unique(test.images)) < len(test.images)
        keys = [(one, tap) for tap in taps for one in timesteps]

        def fit(key: tuple[float, Tap]) -> np.ndarray:
            return linear_probe(train.features[key], train.labels, test.features[key], cells)

        # BLAS's own threads would wait for each other longer than they compute. The other way round, torch's matrix
        # products would keep one thread after it.
        with side_by_side() as threads, threadpool_limits(1):
            for (_, tap), found in zip(keys, threads.map(fit, keys)):
                right = 100 * (found == test.labels)
                result.accuracy.setdefault(tap, []).append(float(right.mean()))
                for half, accuracy in enumerate(result.halves):
                    accuracy.setdefault(tap, []).append(float(right[test.images % 2 == half].mean()))
                bar.update()
        result.probe_seconds = time.perf_counter() - started
    if store is not None:
        content = asdict(result)
        content['accuracy'], content['halves'] = _to_lists(result.accuracy), list(map(_to_lists, result.halves))
        write_json(store, [*known, {'request': request, 'result': content}])
    return result


def _read_store(store: str | Path | None) -> list[dict[str, Any]]:
    if store is None or not Path(store).is_file():
        return []
    try:
        return [entry for entry in json.loads(Path(store).read_text(encoding='utf-8')) if entry['result']]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{store} does not hold probe results, delete it: {error}') from error


def _to_lists(accuracy: dict[Tap, list[float]]) -> list[list[Any]]:
    return [[*tap, values] for tap, values in accuracy.items()]


def _to_taps(lists: list[list[Any]]) -> dict[Tap, list[float]]:
    return {Tap(block, component): values for block, component, values in lists}


def _from_entry(entry: dict[str, Any]) -> ProbeResult:
    content = dict(entry['result'])
    content['accuracy'], content['halves'] = _to_taps(content['accuracy']), tuple(map(_to_taps, content['halves']))
    return ProbeResult(**content)
