"""Segmentation from thirty images: the head in mmseg, its configs, at their true size and in miniature."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from conftest import ROOT
from gdf_miniatures import shrink_backbone, shrink_channels
from miniatures import COUNT, make
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import PixelData

import mmaselect  # noqa: F401
from mmaselect.errors import InputError
from mmaselect.tasks.label_scarce import vote

CONFIGS = sorted(ROOT.glob('configs/label_scarce/*.py'))
GDF = [path for path in CONFIGS if path.stem.startswith('sd')]


@functools.cache
def read_once(path):
    return Config.fromfile(path)


def read(path):
    return copy.deepcopy(read_once(path))


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')
    yield
    DefaultScope._instance_dict.clear()


@pytest.mark.parametrize('path', GDF, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path):
    import mmseg.models  # noqa: F401

    config = read(path)
    arch = {'sd15': 'sd1.5', 'sdxl': 'sdxl'}[path.stem.split('_')[0]]
    config.model.backbone.diffusion = dict(type='UNet', arch=arch)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    head = model.decode_head
    assert head.in_channels == model.backbone.out_channels
    assert (head.num_classes, len(head.ensemble.members), model.backbone.configured_timesteps) == (21, 10, (50.0,))
    scale = config.test_dataloader.dataset.pipeline[1].scale
    assert scale == {'sd15': (512, 512), 'sdxl': (1024, 1024)}[path.stem.split('_')[0]]
    # GDF predicts at 256x256.
    assert scale[0] // head.stride == 256
    assert config.test_dataloader.dataset.split == 'test'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_miniature(path, tmp_path):
    """Three iterations from the cache, and a validation."""
    from mmengine.runner import Runner

    config = read(path)
    kind = config.train_dataloader.dataset.type
    root = make(kind, tmp_path / ('horse_21' if kind == 'DatasetDDPM' else 'camvid'))
    model = config.model
    shrink_backbone(model.backbone, path.stem)
    model.backbone.cache.dir = str(tmp_path / 'features')
    model.decode_head.update(in_channels=shrink_channels(model.decode_head.in_channels), members=2, pixels=64)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(batch_size=2 if split == 'train' else 1)
        loader.dataset.update(data_root=str(root), indices=4)
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (32, 32)
    config.custom_hooks[0].update(num_images=4, timesteps=[0, 500], batch_size=4)
    config.train_cfg.update(max_iters=3, val_interval=3)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.interval = 3
    config.work_dir, config.experiment_name = str(tmp_path / 'run'), path.stem
    config.visualizer.name = path.stem
    Runner.from_cfg(config).train()
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line['decode.loss_ce'] > 0 for line in lines if 'decode.loss_ce' in line] == [True] * 3
    assert [0 <= line['mIoU'] <= 100 for line in lines if 'mIoU' in line] == [True]
    assert list((tmp_path / 'features').rglob('*.safetensors'))
    state = torch.load(tmp_path / 'run/iter_3.pth', weights_only=True)['state_dict']
    assert {key.split('.')[0] for key in state} == {'backbone', 'decode_head'}


def head(**fields):
    return MODELS.build(dict(type='PixelEnsembleHead', **{'in_channels': [4, 3], 'num_classes': 3, **fields}))


def samples(labels):
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in labels]


def test_the_head_learns_what_the_maps_hold():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 8, 8), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    maps = [torch.randn(4, 4, 4, 4, generator=generator), one_hot]
    labels[0, :4] = 255
    # No label is left of an image: nothing of it is learned.
    labels[3] = 255
    torch.manual_seed(0)
    model = head(members=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        found = model.loss(maps, samples(labels))
        optimizer.zero_grad()
        found['loss_ce'].backward()
        optimizer.step()
    assert found['acc_seg'] > 95
    model.eval()
    metas = [dict(img_shape=(16, 16), pad_shape=(16, 16))] * 4
    with torch.no_grad():
        logits = model.predict(maps, metas)
    assert logits.shape == (4, 3, 16, 16)
    assert logits.sum(1).unique().tolist() == [2]
    assert torch.equal(logits, vote(model.ensemble, maps, (16, 16)))
    # Every second pixel is classified, and repeated.
    coarse = head(stride=2, members=2).eval()
    coarse.load_state_dict(model.state_dict())
    with torch.no_grad():
        small = coarse.predict(maps, metas)
    expected = vote(model.ensemble, maps, (8, 8)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(small, expected)
    assert (small.argmax(1)[:, ::2, ::2] == one_hot.argmax(1)).float().mean() > 0.9
    loss = model.loss(maps, samples(torch.full((4, 8, 8), 255)))['loss_ce']
    loss.backward()
    assert loss == 0


def test_members_draw_pixels_of_their_own():
    torch.manual_seed(0)
    model, maps = head(members=2, pixels=8), [torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8, 8)]
    model.ensemble.members[1].load_state_dict(model.ensemble.members[0].state_dict())
    model.loss(maps, samples(torch.randint(0, 3, (2, 8, 8))))['loss_ce'].backward()
    first, second = (member[0].weight.grad for member in model.ensemble.members)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(in_channels=4), 'in_channels=4 is not valid: give the channels of each map'),
        (dict(num_classes=0), 'num_classes=0 is not valid'),
        (dict(pixels=1), 'pixels=1 is not valid'),
        (dict(stride=0), 'stride=0 is not valid'),
    ],
)
def test_one_line_for_what_is_wrong(fields, message):
    with pytest.raises(InputError, match=message):
        head(**fields)
    with pytest.raises(InputError, match=r'in_channels=\(4, 3\) of the head, but maps of \(4,\) channels came in'):
        head()([torch.zeros(1, 4, 2, 2)])
    assert COUNT
