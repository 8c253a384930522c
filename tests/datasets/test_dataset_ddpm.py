"""horse_21 and its siblings in miniature, and the transforms of label maps."""

from __future__ import annotations

import numpy as np
import pytest
from miniatures import COUNT, make
from mmengine.registry import DATASETS, DefaultScope

import mmaselect  # noqa: F401
from mmaselect.errors import InputError

LOAD, LABELS = dict(type='LoadImageFromFile'), dict(type='LoadLabelMap', num_classes=21)


@pytest.fixture(scope='module')
def horses(tmp_path_factory):
    return make('DatasetDDPM', tmp_path_factory.mktemp('ddpm') / 'horse_21')


def build(root, *transforms, **fields):
    with DefaultScope.overwrite_default_scope('mmseg'):
        pipeline = [LOAD, LABELS, *transforms, dict(type='PackSegInputs')]
        return DATASETS.build(dict(type='DatasetDDPM', data_root=str(root), pipeline=pipeline, **fields))


def test_the_official_layout(horses):
    train, test = (build(horses, split=split, test_mode=split == 'test') for split in ('train', 'test'))
    assert len(train) == len(test) == COUNT
    assert train.metainfo['classes'][:3] == ('background', 'person', 'back')
    assert len(train.metainfo['classes']) == 21
    sample = train[2]
    labels = sample['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 64, 64)
    assert labels.unique().tolist() == [0, 3, 10, 20, 255]
    assert sample['data_samples'].img_path.endswith('real/train/2.png')


def test_rare_classes_and_sizes(horses):
    data = build(horses, dict(type='IgnoreRareClasses', least=20), dict(type='Resize', scale=(128, 128)))
    labels = data[2]['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 128, 128)
    # Ten pixels of class 20 are none; nearest neighbours keep whole numbers.
    assert labels.unique().tolist() == [0, 3, 10, 255]
    assert (labels == 10).sum() == 4 * 15 * 20
    sibling = make('DatasetDDPM', horses.parent / 'cat_15', classes=15)
    assert build(sibling).metainfo['classes'][14] == 'class 14'


def test_mixed_splits(horses):
    def names(shuffle, split):
        return [
            info['img_path'] for info in build(horses, split=split, shuffle=shuffle, serialize_data=False).data_list
        ]

    first = names(0, 'train'), names(0, 'test')
    assert len(first[0]) == len(first[1]) == COUNT
    assert not set(first[0]) & set(first[1])
    assert {name.split('/')[-2] for name in first[0]} == {'train', 'test'}
    assert names(0, 'train') == first[0] != names(1, 'train')


def test_one_line_for_what_is_wrong(horses, tmp_path):
    def fails(message, root, **fields):
        with pytest.raises(InputError, match=message) as caught:
            build(root, **fields)[0]
        assert '\n' not in str(caught.value)

    fails(r'real/train.* has no \*.png; expected: real/train/\*.png', tmp_path / 'horse_21')
    fails("split='val' is not known; choose from: train, test", horses, split='val')
    fails('does not end in the number of classes, as horse_21', tmp_path / 'horses')
    fails('shuffle=-1 is not valid', horses, shuffle=-1)
    root = make('DatasetDDPM', tmp_path / 'a' / 'horse_21')
    (root / 'real/test/3.npy').unlink()
    fails('1 images have no label map, the first is .*3.png', root, split='test')
    file = root / 'real/train/0.npy'
    for content, message in ((np.zeros((64, 60)), r'a label map of \(64, 60\), its image has \(64, 64\)'),
                             (np.full((64, 64), 21), r'0.npy has label 21; expected 0 to 20, or 255'),
                             (np.full((64, 64), 0.5), r'0.npy has label 0.5; expected 0 to 20, or 255')):  # fmt: skip
        np.save(file, content)
        fails(message, root)
    file.write_bytes(b'no array')
    fails('0.npy cannot be read as a label map', root)
    np.save(file, np.array([{'code': 1}], object), allow_pickle=True)
    fails('0.npy cannot be read as a label map', root)
