"""Label maps for segmentation from a few images."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from mmaselect.errors import InputError, check_count


@TRANSFORMS.register_module()
class LoadLabelMap:
    """Reads a label map from a ``.npy`` file, for :class:`~mmaselect.datasets.dataset_ddpm.DatasetDDPM`.

    Args:
        num_classes: Labels are below it, or ``ignored``.
        ignored: Label of pixels that belong to no class.

    Raises:
        InputError: When called, if the file is no label map, or not one of its image.
    """

    def __init__(self, num_classes: int, ignored: int = 255) -> None:
        self.num_classes, self.ignored = check_count(num_classes, 'num_classes'), ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds ``gt_seg_map``, (H, W) uint8."""
        path = results['seg_map_path']
        try:
            labels = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f'{path} cannot be read as a label map: {error}') from error
        # In evaluation, labels are read after the image was resized, and stay as they are.
        size = tuple(results.get('ori_shape', labels.shape)[:2])
        if labels.shape != size:
            raise InputError(f'{path} is a label map of {labels.shape}, its image has {size}')
        odd = np.unique(labels[(labels != self.ignored) & ~np.isin(labels, np.arange(self.num_classes))])
        if len(odd):
            raise InputError(f'{path} has label {odd[0]:g}; expected 0 to {self.num_classes - 1}, or {self.ignored}')
        results['gt_seg_map'] = labels.astype(np.uint8)
        results['seg_fields'].append('gt_seg_map')
        return results


@TRANSFORMS.register_module()
class IgnoreRareClasses:
    """Ignores a class in an image where it has only a few pixels: for training.

    Args:
        least: Pixels.
        ignored: Label of pixels that belong to no class.
    """

    def __init__(self, least: int = 20, ignored: int = 255) -> None:
        self.least, self.ignored = check_count(least, 'least'), ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Changes ``gt_seg_map``."""
        values, counts = np.unique(results['gt_seg_map'], return_counts=True)
        rare = np.isin(results['gt_seg_map'], values[counts < self.least])
        results['gt_seg_map'] = np.where(rare, np.uint8(self.ignored), results['gt_seg_map'])
        return results
