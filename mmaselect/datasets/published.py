"""What our data sets have in common: two published splits, in a folder that is checked first."""

from __future__ import annotations

from typing import Any

from mmengine.fileio import get_file_backend
from mmengine.logging import MMLogger
from mmpretrain.datasets import BaseDataset

from mmaselect.datasets.layouts import check_images, check_layout
from mmaselect.errors import unknown


class PublishedDataset(BaseDataset):
    """A data set of :data:`~mmaselect.datasets.layouts.LAYOUTS` with the splits ``'train'`` and ``'test'``.

    Args:
        data_root: Its folder.
        split: The split. One of another size than the published is used after a warning.
        **kwargs: As of mmpretrain's ``BaseDataset``.

    Raises:
        InputError: If the folder or a part of it is missing.
    """

    def __init__(self, data_root: str, split: str = 'train', **kwargs: Any) -> None:
        if split not in ('train', 'test'):
            raise unknown('split', split, ('train', 'test'))
        self.split = split
        self.name = self.METAINFO['dataset_name']
        self.backend = get_file_backend(data_root, enable_singleton=True)
        check_layout(self.name, data_root, split)
        kwargs['metainfo'] = {**self.read_metainfo(data_root), **(kwargs.get('metainfo') or {})}
        kwargs.setdefault('test_mode', split == 'test')
        super().__init__(data_root=data_root, **kwargs)

    def read_metainfo(self, data_root: str) -> dict[str, Any]:
        """Reads what ``METAINFO`` leaves to the files."""
        return {}

    def read_split(self) -> list[dict[str, Any]]:
        """Reads ``img_path`` and ``gt_label`` of the images of the split."""
        raise NotImplementedError

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the images of the split and their labels, and says so if there are more or fewer than published."""
        data = self.read_split()
        warning = check_images(self.name, self.data_root, self.split, len(data))
        if warning:
            MMLogger.get_current_instance().warning(warning)
        return data

    def extra_repr(self) -> list[str]:
        """The extra lines of ``print(dataset)``."""
        return [f'Root of dataset: \t{self.data_root}']
