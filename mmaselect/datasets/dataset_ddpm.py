"""``DatasetDDPM``: the label-scarce data sets of DDPM-Segmentation, for mmseg."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from mmseg.datasets import BaseSegDataset

from mmaselect.errors import InputError, check_choice, check_count

#: Classes of horse_21, in the order of its labels.
HORSE = ('background', 'person', 'back', 'barrel', 'bridle', 'chest', 'ear', 'eye', 'forelock', 'head', 'hoof', 'leg',
         'mane', 'muzzle', 'neck', 'nostril', 'tail', 'thigh', 'saddle', 'shoulder', 'leg protection')  # fmt: skip
SPLITS = ('train', 'test')


class DatasetDDPM(BaseSegDataset):
    """horse_21, cat_15, bedroom_28, ffhq_34 and ade_bedroom_30 of
    `DDPM-Segmentation <https://github.com/yandex-research/ddpm-segmentation>`_ (arXiv 2112.03126): ::

        horse_21
        └── real
            ├── train
            │   ├── 0.png
            │   ├── 0.npy    label map, 255 belongs to no class
            │   └── ...
            └── test

    The number of classes is that in the name of the folder.

    Args:
        data_root: The folder above.
        split: ``'train'`` or ``'test'``.
        shuffle: Mix both splits by this seed, and take as many images of each; None for the published splits. GDF
            reports the mean of five such mixtures.
        **kwargs: As of mmseg's ``BaseSegDataset``.

    Raises:
        InputError: If the folder, its images or a label map are missing.
    """

    def __init__(self, data_root: str, split: str = 'train', shuffle: int | None = None, **kwargs: Any) -> None:
        check_choice(split, 'split', SPLITS)
        if shuffle is not None:
            check_count(shuffle, 'shuffle', 0)
        found = re.search(r'_(\d+)/*$', str(data_root))
        if 'metainfo' not in kwargs:
            if found is None:
                raise InputError(
                    f'DatasetDDPM: data_root={data_root!r} does not end in the number of classes, as horse_21'
                )
            count = int(found[1])
            names = HORSE if Path(data_root).name == 'horse_21' else tuple(f'class {number}' for number in range(count))
            kwargs['metainfo'] = dict(classes=names)
        self.split, self.shuffle = split, shuffle
        super().__init__(
            data_root=str(data_root), img_suffix='.png', seg_map_suffix='.npy',
            data_prefix=dict(img_path='real', seg_map_path='real'), **kwargs,
        )  # fmt: skip

    def load_data_list(self) -> list[dict[str, Any]]:
        """Lists the images of the split and their label maps."""
        root, files = Path(self.data_root), {}
        for split in SPLITS:
            folder = root / 'real' / split
            files[split] = sorted(folder.glob('*.png'), key=lambda path: (len(path.stem), path.stem))
            if not files[split]:
                raise InputError(
                    f'DatasetDDPM: {str(folder)!r} has no *.png; expected: real/train/*.png, *.npy, and real/test (see '
                    'docs/en/datasets.md)'
                )
        if self.shuffle is not None:
            every = [*files['train'], *files['test']]
            order = np.random.default_rng(self.shuffle).permutation(len(every))
            mixed, count = [every[place] for place in order], len(files['train'])
            files = {'train': mixed[:count], 'test': mixed[count:]}
        chosen = files[self.split]
        missing = [path for path in chosen if not path.with_suffix('.npy').is_file()]
        if missing:
            raise InputError(f'DatasetDDPM: {len(missing)} images have no label map, the first is {missing[0]}')
        shared = dict(label_map=self.label_map, reduce_zero_label=self.reduce_zero_label)
        return [
            dict(img_path=str(path), seg_map_path=str(path.with_suffix('.npy')), seg_fields=[], **shared)
            for path in chosen
        ]
