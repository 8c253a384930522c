"""Pairs: SPair-71k in miniature, any list, warped photographs; and that points follow every transform."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from miniatures import COUNT, make, write_image
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS

import mmaselect  # noqa: F401
from mmaselect.datasets.pairs import move
from mmaselect.errors import InputError

LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='PackImage')


@pytest.fixture(scope='module')
def spair(tmp_path_factory):
    return make('SPair71k', tmp_path_factory.mktemp('spair'))


def build(kind, *transforms, **fields):
    return DATASETS.build(dict(type=kind, pipeline=[LOAD, *transforms, PACK], **fields))


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('split,published', [('trn', 53340), ('val', 5384), ('test', 12234)])
def test_the_official_layout(spair, split, published, log):
    data = build('SPair71k', data_root=str(spair), split=split)
    assert len(data) == COUNT
    assert f'split {split!r} of {str(spair)!r} has {COUNT} pairs, the published one {published}' in log.text
    assert '16 categories have no pair: aeroplane, bicycle' in log.text
    assert 'points outside their image, or none at all, are dropped: 000001-2008_000001-2008_000051:bus (1)' in log.text
    pair = data.get_data_info(2)
    assert pair['category'] == 'cat'
    assert pair['source'].endswith('JPEGImages/cat/2008_000002.jpg')
    # (width, height); points are the middles of their pixels.
    assert (pair['source_size'], pair['target_size']) == ((110, 90), (80, 100))
    assert pair['source_points'][1].tolist() == [10 + 5 + 2 + 0.5, 20 + 7 + 0.5]
    assert pair['target_box'] == [10, 20, 60, 70]
    assert len(data.get_data_info(1)['source_points']) == 3


def test_some_categories_and_single_images(spair):
    data = build('SPair71k', data_root=str(spair), categories=['bus'])
    assert len(data) == COUNT // 2
    images = build('SPair71k', dict(type='Resize', scale=(32, 16)), data_root=str(spair)).single_images
    assert len(images) == 2 * COUNT
    read = images[0]
    assert read['inputs'].shape == (3, 16, 32)
    labels = {images.get_data_info(number)['gt_label'] for number in range(len(images))}
    assert labels == {0, 1}
    assert read['data_samples'].gt_label == 0


TRANSFORMS = {
    'none': [],
    'stretch': [dict(type='Resize', scale=(64, 32))],
    'keep the ratio': [dict(type='Resize', scale=(64, 32), keep_ratio=True)],
    'pad': [dict(type='Resize', scale=(64, 48), keep_ratio=True), dict(type='Pad', size=(96, 80))],
    'mirror': [dict(type='RandomFlip', prob=1.0), dict(type='Resize', scale=(50, 70))],
}


@pytest.mark.parametrize('name', TRANSFORMS)
def test_points_follow_the_transforms(name, tmp_path):
    """A white dot on black: its middle is where the point comes out."""
    import cv2

    point, entries = (41.0, 27.0), []
    for side, (height, width) in (('source', (70, 90)), ('target', (60, 80))):
        y, x = np.mgrid[0:height, 0:width] + 0.5
        dot = 255 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / (2 * 5**2))
        cv2.imwrite(str(tmp_path / f'{side}.png'), np.repeat(dot[..., None], 3, 2).round().astype(np.uint8))
    entries.append(dict(source='source.png', target='target.png', source_points=[point], target_points=[point]))
    (tmp_path / 'pairs.json').write_text(json.dumps(dict(metainfo={}, data_list=entries)))
    data = build('PairDataset', *TRANSFORMS[name], data_root=str(tmp_path), ann_file='pairs.json')
    sample = data[0]
    for side in ('source', 'target'):
        image = sample['inputs'][side][0].double()
        weight = (image - 40).clamp_min(0)
        y, x = torch.meshgrid(*(torch.arange(length) + 0.5 for length in image.shape), indexing='ij')
        seen = torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
        matrix = sample['data_samples'].get(f'{side}_matrix')
        expected = matrix[:, :2] @ torch.tensor(point, dtype=torch.float64) + matrix[:, 2]
        torch.testing.assert_close(seen, expected, atol=0.25, rtol=0)
    assert sample['data_samples'].target_size == (80, 60)


def test_a_pipeline_that_clips_points_is_refused(tmp_path):
    write_image(tmp_path / 'a.png', 0)
    data = build('WarpedPairs', dict(type='CenterCrop', crop_size=(60, 50)), data_root=str(tmp_path))
    with pytest.raises(InputError, match=r'points of .*a.png by more than an affine transform: leave out crops'):
        data[0]


def test_known_warps(tmp_path):
    """What lies at a point of the photograph lies at its partner in the warped one."""
    import cv2

    y, x = np.mgrid[0:80, 0:100]
    cv2.imwrite(str(tmp_path / 'a.png'), np.stack([2 * x, 3 * y, 100 + 0 * x], -1).astype(np.uint8))
    data = build('WarpedPairs', data_root=str(tmp_path), warps=3, num_points=25)
    assert len(data) == 3
    again = build('WarpedPairs', data_root=str(tmp_path), warps=3, num_points=25, seed=1)
    for number in range(3):
        sample, pair = data[number], data.get_data_info(number)
        assert not np.allclose(pair['target_warp'], again.get_data_info(number)['target_warp'])
        source, target = (sample['data_samples'].get(f'{side}_points') for side in ('source', 'target'))
        torch.testing.assert_close(torch.from_numpy(move(pair['target_warp'], source.numpy())).float(), target)
        inner = ((target > 2) & (target < torch.tensor([98, 78]))).all(1) & (source > 2).all(1)
        assert inner.sum() > 5
        values = []
        for side, points in (('source', source), ('target', target)):
            image = sample['inputs'][side][None].float()
            grid = (2 * points / torch.tensor([100.0, 80.0]) - 1)[None, None]
            values.append(torch.nn.functional.grid_sample(image, grid, align_corners=False)[0, :, 0].T[inner])
        assert (values[0] - values[1]).abs().max() < 4
        assert sample['data_samples'].source != sample['data_samples'].target
    assert len(data.single_images) == 1


def spoil(root, tmp_path, change):
    import shutil

    shutil.copytree(root, tmp_path / 'data')
    file = next((tmp_path / 'data/PairAnnotation/test').glob('*000000-*'))
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return str(tmp_path / 'data'), file.name


def test_one_line_for_what_is_wrong(spair, tmp_path):
    def fails(message, kind='SPair71k', **fields):
        with pytest.raises(InputError, match=message) as caught:
            build(kind, **fields)
        assert '\n' not in str(caught.value)

    fails("SPair71k: data_root='/none' is not a folder; expected there: JPEGImages/, ", data_root='/none')
    fails("split='train' is not known; choose from: trn, val, test", data_root=str(spair), split='train')
    fails("categories='cats' is not known", data_root=str(spair), categories=['cats'])
    fails("split 'test': no pair has points", data_root=str(spair), categories=['sheep'])
    root, name = spoil(spair, tmp_path / 'a', lambda content: content.pop('trg_kps'))
    fails(f"{name} is not a pair of SPair-71k: 'trg_kps'", data_root=root)
    root, name = spoil(spair, tmp_path / 'b', lambda content: content['src_kps'].pop())
    fails('3 points in the source, 4 in the target', data_root=root)
    root, name = spoil(spair, tmp_path / 'c', lambda content: content.update(src_imname='gone.jpg'))
    fails('1 images are missing, the first is .*gone.jpg', data_root=root)
    layout = tmp_path / 'c/data/Layout/large/test.txt'
    layout.write_text('000000-a-b:cat\n')
    fails('000000-a-b:cat.json is missing', data_root=root)
    layout.write_text('nothing\n')
    fails("'nothing' is not NUMBER-SOURCE-TARGET:CATEGORY", data_root=root)
    fails('/none.json is missing', 'PairDataset', ann_file='/none.json')
    (tmp_path / 'bad.json').write_text('{"data_list": [{"source": "a.png"}]}')
    fails("entry 0 is not a pair: 'target'", 'PairDataset', ann_file=str(tmp_path / 'bad.json'))
    (tmp_path / 'bad.json').write_text('{')
    fails('bad.json cannot be read as JSON with data_list', 'PairDataset', ann_file=str(tmp_path / 'bad.json'))
    (tmp_path / 'empty').mkdir()
    fails('has no photographs', 'WarpedPairs', data_root=str(tmp_path / 'empty'))
    fails('scale=2 is not valid', 'WarpedPairs', data_root=str(tmp_path), scale=2)


def test_pairs_without_points_are_dropped_and_listed(spair, tmp_path, log):
    root, name = spoil(spair, tmp_path, lambda content: content.update(src_kps=[], trg_kps=[]))
    data = build('SPair71k', data_root=root)
    assert len(data) == COUNT - 1
    assert f'1 pairs without common points are dropped: {name.removesuffix(".json")}' in log.text
