"""Data sets that the toolboxes do not have, and what the standard ones look like on disk.

Some derive from mmpretrain's or mmseg's, which take seconds to import: these are registered by functions that import
them when a config asks for one.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import DATASETS

from mmaselect.datasets.label_maps import IgnoreRareClasses, LoadLabelMap
from mmaselect.datasets.layouts import LAYOUTS, Layout, check_layout
from mmaselect.datasets.pairs import PairDataset, SPair71k, WarpedPairs
from mmaselect.datasets.readable import LoadReadableImage

__all__ = [
    'LAYOUTS', 'DatasetDDPM', 'IgnoreRareClasses', 'Layout', 'LoadLabelMap', 'LoadReadableImage', 'NABirds',
    'PairDataset', 'SPair71k', 'StanfordDogs', 'WarpedPairs', 'check_layout',
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """``mmaselect.datasets.NABirds``, ``StanfordDogs`` and ``DatasetDDPM``, imported on first use."""
    if name == 'NABirds':
        from mmaselect.datasets.nabirds import NABirds

        return NABirds
    if name == 'StanfordDogs':
        from mmaselect.datasets.stanford_dogs import StanfordDogs

        return StanfordDogs
    if name == 'DatasetDDPM':
        from mmaselect.datasets.dataset_ddpm import DatasetDDPM

        return DatasetDDPM
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


@DATASETS.register_module(name='NABirds')
def _build_nabirds(**kwargs: Any) -> Any:
    return __getattr__('NABirds')(**kwargs)


@DATASETS.register_module(name='StanfordDogs')
def _build_stanford_dogs(**kwargs: Any) -> Any:
    return __getattr__('StanfordDogs')(**kwargs)


@DATASETS.register_module(name='DatasetDDPM')
def _build_dataset_ddpm(**kwargs: Any) -> Any:
    return __getattr__('DatasetDDPM')(**kwargs)
