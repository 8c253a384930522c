"""NABirds: 48,562 photographs of North American birds in 555 visual categories."""

from __future__ import annotations

from typing import Any

from mmengine.fileio import list_from_file

from mmaselect.datasets.layouts import LAYOUTS
from mmaselect.datasets.published import PublishedDataset
from mmaselect.errors import InputError


class NABirds(PublishedDataset):
    """The `NABirds <https://dl.allaboutbirds.org/nabirds>`_ data set (Van Horn et al., CVPR 2015).

    After decompression: ::

        nabirds
        ├── images
        │   ├── 0295
        │   │   ├── 0a2a6f2d....jpg
        │   │   └── ...
        │   └── ...
        ├── images.txt
        ├── image_class_labels.txt
        ├── train_test_split.txt
        ├── classes.txt
        ├── hierarchy.txt
        └── ...

    Its 1,011 classes are a tree. Photographs are labelled with its 555 leaves (a species, or a species in one plumage),
    which become the labels 0 to 554 in the order of their numbers.

    Args:
        data_root: The folder above.
        split: ``'train'`` (23,929 images) or ``'test'`` (24,633). A smaller or larger one is used after a warning.
        **kwargs: As of mmpretrain's ``BaseDataset``.

    Raises:
        InputError: If the folder or a list is missing, a line of a list cannot be read, the lists do not fit each
            other, or the tree has another number of leaves.

    Examples:
        >>> from mmaselect.datasets import NABirds
        >>> NABirds(data_root='data/nabirds', split='test')
        Dataset NABirds
            Number of samples:  24633
            Number of categories:       555
            Root of dataset:    data/nabirds
    """

    METAINFO = {'dataset_name': 'NABirds', 'num_classes': LAYOUTS['NABirds'].num_classes}

    def __init__(self, data_root: str, split: str = 'train', **kwargs: Any) -> None:
        super().__init__(data_root, split, ann_file='images.txt', data_prefix='images', **kwargs)

    def read_metainfo(self, data_root: str) -> dict[str, Any]:
        """Reads the names of the leaves, and numbers them."""
        names = self._read_pairs(data_root, 'classes.txt')
        parents = set(self._read_pairs(data_root, 'hierarchy.txt').values())
        leaves = sorted((number for number in names if number not in parents), key=int)
        expected = self.METAINFO['num_classes']
        if len(leaves) != expected:
            raise InputError(
                f'NABirds: classes.txt and hierarchy.txt in {data_root!r} have {len(leaves)} classes without children, '
                f'expected {expected}'
            )
        self.labels = {number: label for label, number in enumerate(leaves)}
        return {'classes': tuple(names[number] for number in leaves)}

    def _read_pairs(self, root: str, name: str) -> dict[str, str]:
        """Reads a list whose lines are a key, a space, and the rest."""
        pairs: dict[str, str] = {}
        for number, line in enumerate(list_from_file(self.backend.join_path(root, name)), 1):
            key, _, value = line.strip().partition(' ')
            if not value or key in pairs:
                what = 'comes twice' if key in pairs else 'is not an entry and its value'
                raise InputError(f'NABirds: line {number} of {name} in {root!r}, {line[:80]!r}, {what}')
            pairs[key] = value.strip()
        return pairs

    def read_split(self) -> list[dict[str, Any]]:
        """Reads ``img_path`` and ``gt_label`` of the images of the split."""
        root = self.data_root
        images, classes, training = (
            self._read_pairs(root, f'{name}.txt') for name in ('images', 'image_class_labels', 'train_test_split')
        )
        for name, entries in (('image_class_labels.txt', classes), ('train_test_split.txt', training)):
            if entries.keys() != images.keys():
                odd = sorted(entries.keys() ^ images.keys())
                raise InputError(
                    f'NABirds: images.txt and {name} in {root!r} must list the same images; {len(odd)} differ, '
                    f'the first is {odd[0]!r}'
                )
        data = []
        for key, path in images.items():
            if training[key] not in ('0', '1') or classes[key] not in self.labels:
                raise InputError(
                    f'NABirds: image {key!r} in {root!r} has class {classes[key]!r} and is_training {training[key]!r}; '
                    'expected a class without children in hierarchy.txt, and 0 or 1'
                )
            if (training[key] == '1') == (self.split == 'train'):
                image = self.backend.join_path(self.img_prefix, path)
                data.append({'img_path': image, 'gt_label': self.labels[classes[key]]})
        return data
