"""What a head reads of a data sample, as tensors, and a data sample made of them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmaselect.errors import InputError

#: Of a sample's meta information, what losses read: sizes.
META = ('img_shape', 'ori_shape', 'pad_shape')


class SampleForm:
    """The form of a data set's samples: mmpretrain's (``gt_label``, ``gt_score``) or mmseg's (``gt_sem_seg``).

    Args:
        sample: One of them, as the data preprocessor delivers it.
        meta: What is kept of the meta information.
    """

    def __init__(self, sample: BaseDataElement, meta: Sequence[str] = META) -> None:
        self.type, self.meta = type(sample), tuple(meta)
        self.fields = {key: None if isinstance(value, Tensor) else type(value) for key, value in sample.items()}
        self.pack(sample)

    def pack(self, sample: BaseDataElement) -> dict[str, Tensor]:
        """Takes a sample apart.

        Args:
            sample: Of this form.

        Returns:
            Its tensors, on the CPU, by name.

        Raises:
            InputError: If it holds something that is neither a tensor nor pixels.
        """
        packed = {}
        # Its keys are a set, whose order is another in each process.
        for key, value in sorted(sample.items()):
            content = getattr(value, 'data', None) if isinstance(value, BaseDataElement) else value
            if not isinstance(content, Tensor) or self.fields.get(key, ...) not in (None, type(value)):
                raise InputError(
                    f'data samples with {key} ({type(value).__name__}) are not cached: a label or a label map is'
                )
            packed[key] = content.cpu() if self.fields.get(key) is None else _narrow(content.cpu(), key)
        for key in self.meta:
            if key in sample.metainfo_keys():
                packed[f'meta.{key}'] = torch.tensor([int(side) for side in sample.metainfo[key][:2]])
        return packed

    def unpack(self, tensors: dict[str, Tensor]) -> list[Any]:
        """Puts samples together.

        Args:
            tensors: What :meth:`pack` returned, stacked.

        Returns:
            The samples.
        """
        count = len(next(iter(tensors.values())))
        samples = [self.type() for _ in range(count)]
        for key, pixels in self.fields.items():
            for sample, value in zip(samples, tensors[key].unbind()):
                sample.set_field(value if pixels is None else pixels(data=_widen(value)), key)
        for key in self.meta:
            if f'meta.{key}' in tensors:
                for sample, size in zip(samples, tensors[f'meta.{key}'].tolist()):
                    # Not set_metainfo, which makes a deep copy: of 64 samples that took longer than the head.
                    sample.set_field(tuple(size), key, field_type='metainfo')
        return samples


def _narrow(labels: Tensor, key: str) -> Tensor:
    """Label maps in 2 bytes a pixel: mmseg's 8 would be a fifth of what is stored."""
    if labels.dtype != torch.int64:
        return labels
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < 2**15:
        raise InputError(f'{key} holds labels from {int(labels.min())} to {int(labels.max())}: 0 to 32767 are cached')
    return labels.short()


def _widen(labels: Tensor) -> Tensor:
    return labels.long() if labels.dtype == torch.int16 else labels
