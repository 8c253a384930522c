"""Computes what a cache lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mmaselect.diffusion
from mmaselect.backbones import aselect as backbone_module
from mmaselect.backbones.aselect import ASelectDiT
from mmaselect.cache.contents import BLOCK, Found, read_block, stamp_of
from mmaselect.cache.dataset import MAPS, CachedFeatures
from mmaselect.cache.fingerprint import UnreadableFile, files_of, fingerprint, source_of
from mmaselect.cache.pooling import pool
from mmaselect.cache.samples import META, SampleForm
from mmaselect.cache.settings import CacheSettings
from mmaselect.cache.store import SHARD_BYTES, FeatureStore
from mmaselect.diffusion.loading import parse_dtype
from mmaselect.diffusion.memory import Halving, halve_images, join_maps
from mmaselect.errors import InputError, NotFinite, naming
from mmaselect.files import write_json
from mmaselect.hooks.images import backends_of, check_seeded, name_of, pipelines_of, read_seeded, transforms_of
from mmaselect.hooks.ranks import all_ranks
from mmaselect.progress import PATIENCE, progress_bar, working
from mmaselect.unreadable import Unreadable

#: Another version of one of these may make other pixels or other features of the same image.
PACKAGES = (
    'mmaselect', 'diffusers', 'mmcv', 'mmcv-lite', 'mmengine', 'mmpretrain', 'mmsegmentation', 'numpy',
    'opencv-python', 'pillow', 'torch', 'torchvision',
)  # fmt: skip
#: Samples, and draws of each, from which it is told whether a pipeline is random: a flip goes unnoticed in 1 of 2**24.
PROBES = (8, 4)


class FeatureCache:
    """The frozen part of every training sample, computed once.

    A row is keyed by the content of its image and annotation and by its view. The folder it lies in is keyed by
    everything else: frozen weights and architecture, block, component, timestep, noise and its seed, the transforms and
    their source code, the data preprocessor, the dtypes, and the versions of the packages involved. Nothing is ever
    looked up under a key that does not hold all of it, so nothing stale can be found.

    Args:
        backbone: Decided; it is run as in evaluation.
        preprocessor: The model's data preprocessor.
        loader: Of the training images.
        config: Config of that loader's data set.
        preprocessor_config: Config of the preprocessor.
        settings: See :class:`~mmaselect.cache.settings.CacheSettings`.
        pooling: Module that makes vectors of the maps before they are stored; None stores maps.

    Raises:
        InputError: If the data cannot be cached.
    """

    def __init__(
        self,
        backbone: ASelectDiT,
        preprocessor: Any,
        loader: Any,
        config: dict[str, Any],
        preprocessor_config: dict[str, Any],
        settings: CacheSettings,
        pooling: nn.Module | None = None,
    ) -> None:
        if getattr(preprocessor, 'batch_augments', None) is not None:
            raise InputError(
                'data_preprocessor.batch_augments mixes images of a batch: their features cannot be cached one by one; '
                'remove it, or cache'
            )
        if not hasattr(loader.dataset, 'get_data_info'):
            raise InputError(
                f'{type(loader.dataset).__name__} has no get_data_info, so its samples cannot be told apart: derive it '
                "from mmengine's BaseDataset, or remove cache"
            )
        mixing = next((step for step in transforms_of(loader.dataset) if hasattr(step, 'get_indices')), None)
        if mixing is not None:
            raise InputError(
                f'{type(mixing).__name__} mixes several images in a sample: features cannot be cached image by image; '
                'remove it, or cache'
            )
        self.backbone, self.preprocessor, self.loader, self.settings = backbone, preprocessor, loader, settings
        self.dataset: Any = loader.dataset
        if not len(self.dataset):
            raise InputError('the training data set is empty: there is nothing to cache')
        self.logger = MMLogger.get_current_instance()
        self.pooling = pooling if settings.pool else None
        self.dtype = settings.dtype or ('bfloat16' if self.pooling is None else 'float32')
        self.description = self._describe(config, preprocessor_config)
        name = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()
        self.store = FeatureStore(f'{settings.dir}/{name[:16]}')
        self.unreadable = Unreadable(settings.max_unreadable)
        self._backends = backends_of(self.dataset)
        self._broken: set[str] = set()
        self._run = Halving(self._features, halve_images)

    def _describe(self, config: dict[str, Any], preprocessor_config: dict[str, Any]) -> dict[str, Any]:
        backbone = self.backbone
        pipelines, types = _plain(pipelines_of(config)), _types(config)
        return {
            'recipe': backbone.recipe,
            'taps': [list(tap) for tap in backbone.taps or ()],
            'timesteps': list(backbone.timesteps or ()),
            'dtype': self.dtype,
            'pooling': None if self.pooling is None else [repr(self.pooling), source_of(type(self.pooling)).hex()],
            'data_preprocessor': fingerprint(_plain(preprocessor_config)).hex(),
            'pipelines': json.loads(json.dumps(pipelines, default=str)),
            'pipeline_fingerprint': fingerprint(pipelines).hex(),
            'sources': source_of(mmaselect.diffusion, backbone_module, type(self.dataset), *types).hex(),
            'versions': {name: _version(name) for name in PACKAGES},
        }  # fmt: skip

    def build(self, verify_all: bool = False) -> CachedFeatures:
        """Finds what is there, verifies it, and computes what is missing; every rank takes its share.

        Args:
            verify_all: Read also what was verified before and has not changed since.

        Returns:
            The data set of features, the same on every rank.

        Raises:
            InputError: On all ranks, if one of them meets bad data or cannot write.
        """
        rank, world_size = dist.get_dist_info()
        with all_ranks():
            if rank == 0:
                write_json(self.store.folder / 'description.json', self.description)
            # In this order: what another process writes meanwhile is not believed.
            moment, shards = self.store.clock(), self.store.shards()
        with all_ranks(), working('verifying the feature cache'):
            self.store.verify(shards[rank::world_size], since=0 if verify_all else self.store.verified_until())
        samples = self._fingerprints()
        readable = samples.any(1)
        with all_ranks():
            self.store.refresh()
            probes = self._readable(PROBES[0])
            views = self._views(probes)
            if rank == 0:
                self.store.set_verified(moment)
            keys = keys_of_views(samples, views, self.settings.seed)
            # An image that a data set repeats is computed once.
            wanted, places = np.unique(keys[readable], return_index=True)
            indices = np.flatnonzero(readable)[places // views]
            missing = np.flatnonzero(self.store.find(wanted) < 0)
            # In the order of the data set.
            missing = missing[np.argsort(places[missing])]
            self.logger.info(
                f'feature cache {self.store.folder}: {len(wanted) - len(missing)} of {len(wanted)} views are there'
                f'{"" if views == 1 else f" ({views} of each image)"}'
            )
            if self.pooling is not None:
                self.logger.info(
                    f'feature cache: vectors are kept, as {type(self.pooling).__name__} makes them of the maps, in '
                    f'{self.dtype}; cache.pool=False keeps maps'
                )
            self._prepare(len(missing), probes[0])
        with all_ranks():
            mine = missing[rank::world_size]
            self._compute([(wanted[place].decode(), int(indices[place])) for place in mine], rank == 0)
        broken = np.array([key for keys in dist.all_gather_object(sorted(self._broken)) for key in keys], 'S32')
        with all_ranks():
            self.store.refresh()
            absent = int(((self.store.find(wanted) < 0) & ~np.isin(wanted, broken)).sum())
            if absent:
                raise InputError(
                    f'rank {rank} does not find {absent} of {len(wanted)} views in {self.store.folder}: '
                    'cache.dir must be a folder that all ranks share'
                )
            self.unreadable.report(self.logger, 'the next readable one takes their place')
            usable = np.logical_and(readable, ~np.isin(keys, broken).any(1))
        return CachedFeatures(self.store, keys[_following(usable)], getattr(self.dataset, 'metainfo', {}))

    def _fingerprints(self) -> np.ndarray:
        """Of the content of every sample, before any transform, (samples, 32); zeros for what cannot be read."""
        rank, world_size = dist.get_dist_info()
        dataset = self.dataset
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        blocks = [range(start, min(start + BLOCK, len(dataset))) for start in range(0, len(dataset), BLOCK)]
        mine = blocks[rank::world_size]
        self.unreadable.total = max(sum(map(len, mine)), -(-len(dataset) // world_size))
        # Of other backends no file system says whether what they read has changed.
        local = all(one in (None, {'backend': 'local'}) for one in self._backends.values())
        folder = self.store.folder / 'contents' if local else None

        bar = progress_bar(
            total=self.unreadable.total, desc='hashing images', unit='images', delay=PATIENCE, leave=False
        )

        def read(index: int) -> Found:
            info = dataset.get_data_info(index)
            files = list(files_of(info))
            stamp = stamp_of(files)
            bar.update()
            labels = np.size(info.get('gt_label', 0))
            if labels != 1:
                raise InputError(
                    f'{name_of(dataset, index)} has {labels} labels: what is cached has one class, or a label map; '
                    'remove cache'
                )
            try:
                return fingerprint(info, files=True, backends=self._backends), files, stamp
            except UnreadableFile as error:
                return error, files, stamp

        found, done = [], 0
        with all_ranks(), bar, ThreadPoolExecutor(8) as threads:
            for indices in mine:
                digests, errors = read_block(folder, dataset, indices, read, threads)
                found.append(digests)
                # Files that have not changed are not read.
                done += len(indices)
                bar.update(done - bar.n)
                for index, error in errors.items():
                    self.unreadable.add(name_of(self.dataset, index), error)
        parts = dist.all_gather_object(found)
        return np.concatenate([parts[number % world_size][number // world_size] for number in range(len(blocks))])

    def _views(self, probes: Sequence[int]) -> int:
        """As many as are asked for; one, if the pipeline is not random."""
        random = False
        check_seeded(self.dataset.__getitem__, probes, PROBES[1])
        for index in probes:
            first, *others = (read_seeded(self.dataset.__getitem__, index, seed)['inputs'] for seed in range(PROBES[1]))
            random = random or any(other.shape != first.shape or not torch.equal(other, first) for other in others)
        if random and self.settings.views == 1:
            self.logger.warning(
                'the training pipeline is random, but one view of each image is cached: every epoch will see the same; '
                'set cache.views'
            )
        if not random and self.settings.views > 1:
            self.logger.info(f'the training pipeline is not random: of {self.settings.views} views one is cached')
        return self.settings.views if random else 1

    def _readable(self, count: int) -> list[int]:
        """The first samples that can be read."""
        found, error = [], None
        for index in range(len(self.dataset)):
            try:
                read_seeded(self.dataset.__getitem__, index, 0)
                found.append(index)
            except Exception as caught:
                error = caught
            if len(found) == count:
                break
        if not found:
            raise InputError(f'none of {len(self.dataset)} training images can be read: {error}') from error
        return found

    def _prepare(self, missing: int, index: int) -> None:
        """Learns the form of the samples, and refuses what would be too large."""
        batch = self.loader.collate_fn([read_seeded(self.dataset.__getitem__, index, 0)])
        if not batch.get('data_samples'):
            raise InputError('the training pipeline gives no data_samples: there is nothing to train a head on')
        data = self.preprocessor(batch, True)
        sample = data['data_samples'][0]
        # A vector has no place in an image: its head reads no sizes.
        form = self.form = SampleForm(sample, META if self.pooling is None else ())
        numbers = 0
        for channels, stride in zip(self.backbone.out_channels, self.backbone.strides):
            sides = (1, 1) if self.pooling is not None else data['inputs'].shape[-2:]
            rows, columns = (-(-side // stride) for side in sides)
            numbers += channels * rows * columns
        labels = sum(value.nbytes for value in form.pack(sample).values())
        size = numbers * parse_dtype(self.dtype).itemsize + labels
        self.store.require(missing * size, self.settings.max_gb)

    def _compute(self, work: Sequence[tuple[str, int]], show: bool) -> None:
        rows: dict[str, dict[str, Tensor]] = {}
        size, places = 0, dict(work)
        taken = 0
        with progress_bar(total=len(work), desc='feature cache', unit='images', disable=not show) as bar:
            for keys, batch in self._batches(work):
                with naming(lambda key: name_of(self.dataset, places[key]), keys):
                    read = self._read(batch)
                for key, row in zip(keys, read):
                    rows[key] = row
                    size += sum(value.nbytes for value in row.values())
                bar.set_postfix_str(f'{(taken + size) / 1e6:.0f} MB', refresh=False)
                bar.update(len(keys))
                if size >= SHARD_BYTES:
                    self.store.write(rows)
                    rows, taken, size = {}, taken + size, 0
            if rows:
                self.store.write(rows)

    def _batches(self, work: Sequence[tuple[str, int]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        batch_size = self.settings.batch_size or self.loader.batch_size or 16
        source = self.loader
        views, collate = _Views(self.dataset, work), _Collate(source.collate_fn)
        loader = DataLoader(views, batch_size, num_workers=source.num_workers, collate_fn=collate)
        for start, (batch, errors) in zip(range(0, len(work), batch_size), loader):
            keys = []
            for place, (key, index) in enumerate(work[start : start + batch_size]):
                if place in errors:
                    self._broken.add(key)
                    self.unreadable.add(name_of(self.dataset, index), ValueError(errors[place]))
                else:
                    keys.append(key)
            if keys:
                yield keys, batch

    def _features(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        if self.pooling is not None:
            # Of maps that were rounded the vector would be another than without a cache.
            maps = pool(self.pooling, maps)
        return [one.to(parse_dtype(self.dtype)).cpu() for one in maps]

    @torch.no_grad()
    def _read(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        sizes = {tuple(image.shape[-2:]) for image in batch['inputs']}
        if len(sizes) > 1 and getattr(self.preprocessor, 'size', None) is None:
            found = ' and '.join(map(str, sorted(sizes)[:2]))
            raise InputError(f'images of {found} cannot be cached together: the pipeline must give one size')
        data = self.preprocessor(batch, True)
        training = self.backbone.training
        # As in evaluation: noise='fresh' then gives each view a noise of its own that depends on nothing but it.
        self.backbone.eval()
        try:
            maps = join_maps(self._run(data['inputs']))
        finally:
            self.backbone.train(training)
        for place in range(len(maps[0])):
            if not all(one[place].isfinite().all() for one in maps):
                raise NotFinite(f"cache.dtype={self.dtype!r} overflows: bfloat16 has float32's range", images=[place])
        samples = [self.form.pack(sample) for sample in data['data_samples']]
        rows = zip(*maps)
        named = [{MAPS(number): one for number, one in enumerate(row)} for row in rows]
        return [{**row, **sample} for row, sample in zip(named, samples)]


class _Views(Dataset):
    """Augmented samples; which augmentation depends on nothing but the key of the view."""

    def __init__(self, dataset: Any, work: Sequence[tuple[str, int]]) -> None:
        self.dataset, self.work = dataset, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, position: int) -> dict[str, Any] | str:
        key, index = self.work[position]
        try:
            return read_seeded(self.dataset.__getitem__, index, int(key[:12], 16))
        except Exception as error:
            # Not the error itself: what a worker raises ends the loader.
            return f'{error}' or type(error).__name__


class _Collate:
    """Collates the samples that could be read, and says of the others why not, by their place."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, samples: list[dict[str, Any] | str]) -> tuple[Any, dict[int, str]]:
        errors = {place: sample for place, sample in enumerate(samples) if isinstance(sample, str)}
        readable = [sample for sample in samples if not isinstance(sample, str)]
        return (self.inner(readable) if readable else None), errors


def _following(usable: np.ndarray) -> np.ndarray:
    """The number of each sample, or of the next usable one; behind the last comes the first."""
    numbers = np.where(usable, np.arange(len(usable)), len(usable))
    following = np.minimum.accumulate(numbers[::-1])[::-1]
    return np.where(following < len(usable), following, following[0])


def keys_of_views(samples: np.ndarray, views: int, seed: int) -> np.ndarray:
    """Keys of rows: 32 hexadecimal digits, of the content of a sample and the number of a view.

    Args:
        samples: Fingerprints, (samples, 32) bytes.
        views: Of each sample.
        seed: Of the augmentation.

    Returns:
        Keys, (samples, views).
    """
    masks = [hashlib.sha256(f'{view} {seed}'.encode()).digest()[:16] for view in range(views)]
    mixed = samples[:, None, :16] ^ np.frombuffer(b''.join(masks), np.uint8).reshape(views, 16)
    return np.frombuffer(mixed.tobytes().hex().encode(), 'S32').reshape(len(samples), views)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _types(config: Any) -> list[type]:
    """Classes of the transforms that a data set's config names, at any depth."""
    from mmengine.registry import TRANSFORMS

    found: list[type] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            kind = value.get('type')
            kind = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
            if isinstance(kind, type):
                found.append(kind)
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(pipelines_of(config))
    return found
