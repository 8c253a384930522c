"""Cached features in place of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmaselect.cache.store import FeatureStore

#: Marks a batch that comes from the cache; what the data preprocessor of a runner is then asked to do is already done.
CACHED = 'cached'
#: The maps of a row, each (C, h, w).
MAPS = 'maps.{}'.format


class CachedFeatures(Dataset):
    """A data set as long as the one whose features it holds.

    Args:
        store: Holds all keys.
        keys: Keys of the views of each sample, (samples, views).
        metainfo: Of the data set itself.

    Attributes:
        epoch: Decides which view of a sample is read: number ``(epoch + index) % views``.
    """

    def __init__(self, store: FeatureStore, keys: np.ndarray, metainfo: dict[str, Any]) -> None:
        self.store, self.keys, self.metainfo, self.epoch = store, keys, metainfo, 0

    def __len__(self) -> int:
        return len(self.keys)

    def keys_of(self, indices: Sequence[int]) -> np.ndarray:
        """The keys of the views that samples have in this epoch."""
        rows = np.asarray(indices)
        return self.keys[rows, (self.epoch + rows) % self.keys.shape[1]]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample's features and labels."""
        return {name: value[0] for name, value in self.store.read(self.keys_of([index])).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """A batch, stacked: torch's data loader asks for whole batches where it can."""
        return {CACHED: self.store.read(self.keys_of(indices))}


def cached_loader(loader: DataLoader, features: CachedFeatures) -> DataLoader:
    """A loader that draws what ``loader`` would have drawn, from the cache.

    Args:
        loader: Of the images; its sampler is used on.
        features: Of the same samples, in the same order.

    Returns:
        The loader. It needs no workers: there is nothing to decode.
    """
    options: dict[str, Any] = {'batch_sampler': loader.batch_sampler}
    if type(loader.batch_sampler) is BatchSampler:
        options = {'batch_size': loader.batch_size, 'sampler': loader.sampler, 'drop_last': loader.drop_last}
    return DataLoader(features, collate_fn=_as_is, pin_memory=loader.pin_memory, **options)


def _as_is(batch: Any) -> Any:
    return batch
