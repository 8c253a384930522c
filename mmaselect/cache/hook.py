"""``FeatureCacheHook``: trains a head on features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.loops import IterBasedTrainLoop, _InfiniteDataloaderIterator

from mmaselect.cache.build import FeatureCache
from mmaselect.cache.dataset import CACHED, MAPS, CachedFeatures, cached_loader
from mmaselect.cache.pooling import pooling_of
from mmaselect.cache.samples import SampleForm
from mmaselect.cache.settings import CacheSettings
from mmaselect.datasets.readable import name_broken_files
from mmaselect.errors import InputError
from mmaselect.hooks.images import find_backbone, has_backbone, unwrap


@HOOKS.register_module()
class FeatureCacheHook(Hook):
    """Computes the features of the training images before training, and trains on them.

    Settings are those of the backbone, ``cache=dict(dir=..., dtype='bfloat16', views=1, max_gb=None)``, see
    :class:`~mmaselect.cache.settings.CacheSettings`. Validation reads images as ever. The next run with the same
    backbone, timestep, images and pipeline finds what is cached, see :class:`~mmaselect.cache.build.FeatureCache`; one
    that was killed goes on where it was.

    Raises:
        InputError: If the backbone has no cache, or the data cannot be cached.
    """

    # After TimestepSelectionHook: the timestep must be known.
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._features: CachedFeatures | None = None
        self._replaced = ExitStack()

    def before_run(self, runner: Runner) -> None:
        """Checks the settings, before anything is computed, and sees to it that all is put back in the end."""
        name_broken_files()
        self.active = has_backbone(runner, self)
        if not self.active:
            return
        self.settings = read_settings(find_backbone(runner).cache)
        loop = runner._train_loop
        if not isinstance(loop, BaseLoop):
            return
        run = loop.run

        def run_and_put_back() -> Any:
            # No hook is called after an exception, or after Ctrl-C.
            with self._replaced:
                loop.__dict__.pop('run', None)
                return run()

        loop.run = run_and_put_back  # type: ignore[method-assign]

    def before_train(self, runner: Runner) -> None:
        """Puts features in the place of images."""
        if not self.active:
            return
        # Data loaders draw random numbers; without a cache, dropout and the like would have drawn these.
        with torch.random.fork_rng(devices=[]):
            cache = make_cache(runner, self.settings)
            self._features = cache.build()
            loop, loader = runner.train_loop, cached_loader(runner.train_loop.dataloader, self._features)
            self._replace(loop, 'dataloader', loader)
            if isinstance(loop, IterBasedTrainLoop):
                self._replace(loop, 'dataloader_iterator', _InfiniteDataloaderIterator(loader))
        self._replaced.callback(accept_features(unwrap(runner).data_preprocessor, cache.form))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute until the end of the training."""
        self._replaced.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def before_train_epoch(self, runner: Runner) -> None:
        """Turns to the next view of each image."""
        if self._features is not None:
            self._features.epoch = runner.epoch

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """The same for schedules that count iterations."""
        if self._features is not None and isinstance(runner.train_loop, IterBasedTrainLoop):
            self._features.epoch = runner.iter // len(runner.train_loop.dataloader)


def read_settings(cache: dict[str, Any] | None) -> CacheSettings:
    """Reads what a backbone's config says of its cache.

    Raises:
        InputError: If it says nothing, or something that is not valid.
    """
    if cache is None:
        raise InputError("FeatureCacheHook needs model.backbone.cache=dict(dir='...')")
    return CacheSettings.from_dict(cache)


def make_cache(runner: Runner, settings: CacheSettings) -> FeatureCache:
    """The cache of a runner's training data.

    Raises:
        InputError: If timestep, block or component are still open, or the data cannot be cached.
    """
    backbone = find_backbone(runner)
    if not backbone.decided:
        raise InputError(
            "a cache needs a timestep: add dict(type='TimestepSelectionHook') to custom_hooks, or set "
            'model.backbone.timestep'
        )
    loader = runner.train_loop.dataloader
    config: Any = runner.cfg.get('train_dataloader')
    if not isinstance(config, dict) or not isinstance(config.get('dataset'), dict):
        raise InputError('a cache needs train_dataloader.dataset as a config: it says how images are augmented')
    preprocessors = list(_preprocessors(runner.cfg.model)) or [runner.cfg.get('data_preprocessor') or {}]
    preprocessor = preprocessors[0] if len(preprocessors) == 1 else dict(nested=preprocessors)
    model = unwrap(runner)
    pooling = pooling_of(model, backbone)
    data = model.data_preprocessor, loader, config['dataset'], preprocessor
    return FeatureCache(backbone, *data, settings, pooling)


def _preprocessors(config: Any) -> Iterator[Any]:
    """Every ``data_preprocessor`` of a model's config, at any depth: a wrapper holds the model that owns it."""
    if isinstance(config, dict):
        if config.get('data_preprocessor'):
            yield config['data_preprocessor']
        for key, value in config.items():
            if key != 'data_preprocessor':
                yield from _preprocessors(value)


def accept_features(preprocessor: Any, form: SampleForm) -> Callable[[], None]:
    """Lets a data preprocessor pass on batches from the cache, which need nothing but to be moved to the device.

    Args:
        preprocessor: Its ``forward`` is wrapped; other batches go through it as before.
        form: Of the data samples.

    Returns:
        A function that takes this back.
    """
    inner = preprocessor.forward

    def forward(data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        if CACHED not in data:
            return inner(data, training)
        tensors = preprocessor.cast_data(data[CACHED])
        maps = [tensors.pop(MAPS(number)) for number in range(sum(name.startswith(MAPS('')) for name in tensors))]
        return {'inputs': maps, 'data_samples': form.unpack(tensors)}

    preprocessor.forward = forward
    return lambda: preprocessor.__dict__.pop('forward', None)
