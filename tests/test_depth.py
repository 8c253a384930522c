"""mmseg's depth estimator on NYU: at its true size, and trained and evaluated in miniature."""

from __future__ import annotations

import copy
import functools
import json
import math

import pytest
import torch
from conftest import ROOT
from gdf_miniatures import ARCHS
from miniatures import make
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mmaselect  # noqa: F401

CONFIGS = sorted(ROOT.glob('configs/depth/*.py'))
#: Names in ``arch``.
TRUE = {'sd35-medium': 'sd3.5-medium', 'dit-xl-2': 'dit-xl/2-256', 'sd15': 'sd1.5'}
#: Of the levels that the head reads.
STRIDES = (8, 16, 32, 64)


@functools.cache
def read_once(path):
    return Config.fromfile(path)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')
    yield
    DefaultScope._instance_dict.clear()


def test_there_is_a_config_for_every_model():
    assert {path.stem for path in CONFIGS} == {f'{model}_vpd_4xb8-25k_nyu-512x512' for model in TRUE}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path):
    import mmseg.models  # noqa: F401

    config = copy.deepcopy(read_once(path))
    config.model.backbone.diffusion = dict(
        type=config.model.backbone.diffusion.type, arch=TRUE[path.stem.split('_')[0]]
    )
    with torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(config.model)).to('meta')
    backbone, side = model.backbone, config.model.data_preprocessor.size[0]
    maps = [
        torch.empty(2, channels, side // stride, side // stride, device='meta')
        for channels, stride in zip(backbone.out_channels, backbone.strides)
    ]
    levels = model.neck(maps)
    assert [side // level.shape[2] for level in levels] == list(STRIDES)
    assert model.decode_head(levels).shape == (2, 1, side, side)
    # Windows of any other size would have other constants, or cells that are no multiple of the head's.
    assert config.model.test_cfg.crop_size == config.model.data_preprocessor.size == (side, side)
    assert side % backbone.multiple == 0
    # Of padding the depth is 0, which the loss leaves out.
    assert config.model.data_preprocessor.seg_pad_val == 0
    assert (config.train_dataloader.batch_size, config.train_cfg.max_iters) == (8, 25000)
    assert not list(backbone.parameters())


def shrink(config, path, model_folder, root):
    """Puts a miniature of the model and of the sizes into a config; all else stays."""
    model, name = config.model, path.stem.split('_')[0]
    crop, channels = 128, [16] * 4
    if name == 'sd15':
        # On pixels, a cell has an eighth of its side.
        crop, arch = 32, dict(ARCHS['sd15'], block_out_channels=(16, 16, 32, 32))
        model.backbone.diffusion = dict(type='UNet', arch=arch, latent='pixels')
        model.neck.update(in_channels=[32, 32, 16, 16], strides=[8, 4, 2, 1])
        channels = [16, 16, 32, 32]
    else:
        variant = {'sd35-medium': 'SD3.5-medium', 'dit-xl-2': 'DiT'}[name]
        model.backbone.diffusion.pretrained = str(model_folder(variant))
        model.backbone.block = 2
        model.neck.update(in_channels=64, out_channels=16, norm_cfg=dict(type='GN', num_groups=4))
    model.decode_head.update(in_channels=channels, embed_dim=8, feature_dim=64, num_deconv_filters=(8, 8, 8))
    model.data_preprocessor.size = model.test_cfg.crop_size = (crop, crop)
    model.test_cfg.stride = (crop // 2, crop // 2)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(root), indices=4 if split == 'train' else 1)
        for transform in loader.dataset.pipeline:
            if transform.get('scale'):
                transform.scale = tuple(side * crop // 512 for side in transform.scale)
            if transform.get('crop_size'):
                transform.crop_size = (crop, crop)
    config.train_dataloader.batch_size = 2
    config.custom_hooks[0].update(num_images=4, timesteps=[0, 500], batch_size=4)
    config.custom_hooks[0].criterion.views = dict(crop=0.9)
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.logger.interval = 1


def run(config, path, work_dir):
    """Trains; gives the lines of the log."""
    from mmengine.runner import Runner

    config.work_dir, config.experiment_name, config.visualizer.name = str(work_dir), work_dir.name, work_dir.name
    Runner.from_cfg(config).train()
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope='module')
def nyu(tmp_path_factory):
    return make('NYUDataset', tmp_path_factory.mktemp('nyu'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_two_iterations(path, nyu, model_folder, tmp_path):
    config = copy.deepcopy(read_once(path))
    shrink(config, path, model_folder, nyu)
    lines = run(config, path, tmp_path)
    losses = [line['decode.loss_silog'] for line in lines if 'loss' in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    (errors,) = ([line[name] for name in ('rmse', 'abs_rel', 'd1')] for line in lines if 'rmse' in line)
    # Depths are 1 to 4 metres, predictions between 0 and 10.
    assert 0 < errors[0] < 9
    assert 0 <= errors[2] <= 1
    selection = json.loads((tmp_path / 'selection.json').read_text())
    assert (selection['num_images'], selection['config']['pipeline']) == (4, 'train')
    # The best by its error; head, neck and the choice, nothing of the frozen model.
    state = torch.load(tmp_path / 'best_rmse_iter_2.pth', weights_only=True)['state_dict']
    assert state['backbone.timestep'] == selection['timestep']
    assert {key.split('.')[0] for key in state} == {'backbone', 'neck', 'decode_head'}
    assert not [key for key in state if key.startswith('backbone.') and key.count('.') > 1]


def test_the_cache_keeps_depth_maps(nyu, model_folder, tmp_path):
    """Under a fixed pipeline the losses from the cache are those without."""
    (path,) = (path for path in CONFIGS if path.stem.startswith('dit'))
    losses = []
    for name in ('images', 'cache'):
        config = copy.deepcopy(read_once(path))
        shrink(config, path, model_folder, nyu)
        config.model.backbone.timestep = 100
        pipeline = config.train_dataloader.dataset.pipeline
        resize = dict(type='Resize', scale=(171, 128), keep_ratio=False)
        config.train_dataloader.dataset.pipeline = [*pipeline[:2], resize, pipeline[-1]]
        config.model.data_preprocessor.size = (128, 192)
        if name == 'cache':
            config.model.backbone.cache = dict(dir=str(tmp_path / 'features'), dtype='float32')
            config.custom_hooks.append(dict(type='FeatureCacheHook'))
        lines = run(config, path, tmp_path / name)
        losses.append([line['loss'] for line in lines if 'loss' in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
