"""The aggregation neck, and GDF's configs for UPerNet: at their true size, and for two iterations in miniature."""

from __future__ import annotations

import copy
import functools
import json
import math
from itertools import zip_longest

import pytest
import torch
from conftest import ROOT
from gdf_miniatures import shrink_backbone, shrink_channels
from miniatures import make
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mmaselect  # noqa: F401
from mmaselect.errors import InputError

CONFIGS = sorted(ROOT.glob('configs/segmentation/*_gdf-*.py'))


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


def neck(**fields):
    return MODELS.build(
        dict(type='ActivationAggregation', **{'in_channels': [6, 4, 3, 2], 'strides': [32, 8, 32, 16], **fields})
    )


def maps(batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 2, 3), (4, 8, 12), (3, 2, 3), (2, 4, 6)]
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def test_it_begins_as_a_sorted_concatenation():
    model, given = neck(), maps()
    assert model.out_channels == (4, 2, 9)
    levels = model(given)
    for level, expected in zip_longest(levels, (given[1], given[3], torch.cat([given[0], given[2]], 1))):
        assert torch.equal(level, expected)


def test_every_block_learns_from_the_first_step_on():
    model, given = neck().train(), maps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = sum((level - 1).square().mean() for level in model(given))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The last norm learns first; what is before it, in the second step.
    untouched = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert untouched == []
    assert sum((level - 1).square().mean() for level in model(given)) < loss


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(in_channels=4), "in_channels=4 is not valid: give a number for each of the backbone's maps"),
        (dict(strides=[8, 8]), r'in_channels=\[6, 4, 3, 2\], strides=\[8, 8\]: give as many of both'),
        (dict(strides=[8, 8, 0, 8]), 'strides=0 is not valid'),
        (dict(strides=[32, 32, 32, 16]), r"strides of the neck are not the backbone's: maps \[0, 1, 2\] have sizes"),
        (dict(in_channels=[6, 4, 3, 1]), r'in_channels=\(6, 4, 3, 1\) of the neck, but maps of \(6, 4, 3, 2\)'),
    ],
)
def test_one_line_for_what_is_wrong(fields, message):
    with pytest.raises(InputError, match=message):
        neck(**fields)(maps())


def test_there_is_a_config_for_every_model_and_data_set():
    assert [path.stem for path in CONFIGS] == [
        f'{model}_gdf-upernet_1xb2-80k_{data}'
        for model in ('sd15', 'sdxl')
        for data in ('ade20k-512x512', 'cityscapes-1024x1024')
    ]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path):
    import mmseg.models  # noqa: F401

    config, name = read(path), path.stem.split('_')[0]
    config.model.backbone.diffusion = dict(type='UNet', arch={'sd15': 'sd1.5', 'sdxl': 'sdxl'}[name])
    with torch.device('meta'):
        model = MODELS.build(config.model)
    backbone = model.backbone
    assert (model.neck.in_channels, tuple(config.model.neck.strides)) == (backbone.out_channels, backbone.strides)
    assert model.neck.out_channels == tuple(config.model.decode_head.in_channels)
    side = config.model.data_preprocessor.size[0]
    assert config.model.test_cfg.crop_size == config.model.test_cfg.stride == (side, side)
    given = [
        torch.empty(2, channels, side // stride, side // stride, device='meta')
        for channels, stride in zip(backbone.out_channels, backbone.strides)
    ]
    model = revert_sync_batchnorm(model.to('meta'))
    levels = model.neck(given)
    # The finest first: UPerNet pools the last.
    finest = min(backbone.strides)
    assert [level.shape[2] for level in levels] == [side // stride for stride in sorted(set(backbone.strides))]
    classes = {'ade20k': 150, 'cityscapes': 19}[path.stem.split('_')[-1].split('-')[0]]
    assert model.decode_head(levels).shape == (2, classes, side // finest, side // finest)
    assert model.auxiliary_head(levels).shape[1] == classes
    # Padding belongs to no class, and the losses are told so.
    assert config.model.data_preprocessor.seg_pad_val == model.decode_head.ignore_index == 255
    assert [loss.loss_name for loss in model.decode_head.loss_decode] == ['loss_ce', 'loss_lovasz']
    assert config.train_dataloader.batch_size == 2
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=1.6e-4, weight_decay=1e-3)
    assert (config.train_cfg.max_iters, config.param_scheduler[0].eta_min) == (80000, 1e-4)
    assert not list(backbone.parameters())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_two_iterations(path, tmp_path):
    from mmengine.runner import Runner

    config = read(path)
    root = make(config.train_dataloader.dataset.type, tmp_path / 'data')
    model = config.model
    shrink_backbone(model.backbone, path.stem)
    model.neck.in_channels = shrink_channels(model.neck.in_channels)
    # On pixels, a cell has an eighth of its side.
    model.neck.strides = [stride // 8 for stride in model.neck.strides]
    model.decode_head.update(in_channels=shrink_channels(model.decode_head.in_channels), channels=8)
    model.auxiliary_head.update(in_channels=shrink_channels([model.auxiliary_head.in_channels])[0], channels=8)
    model.data_preprocessor.size = (32, 32)
    model.test_cfg.update(crop_size=(32, 32), stride=(32, 32))
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(root), indices=2)
        for transform in loader.dataset.pipeline:
            if transform.get('scale'):
                transform.scale = (64, 32)
            if transform.get('crop_size'):
                transform.crop_size = (32, 32)
    config.custom_hooks[0].update(num_images=2, timesteps=[0, 500], batch_size=2)
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.logger.interval = 1
    config.work_dir, config.experiment_name = str(tmp_path / 'run'), path.stem
    config.visualizer.name = path.stem
    Runner.from_cfg(config).train()
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line for line in lines if 'loss' in line]
    assert len(losses) == 2
    for line in losses:
        parts = [line[name] for name in ('decode.loss_ce', 'decode.loss_lovasz', 'aux.loss_ce')]
        assert all(math.isfinite(part) and part > 0 for part in parts)
        assert line['loss'] == pytest.approx(sum(parts), rel=1e-4)
    assert [0 <= line['mIoU'] <= 100 for line in lines if 'mIoU' in line] == [True]
