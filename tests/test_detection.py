"""mmdet's RetinaNet on COCO, with mmcv-lite: at its true size, and trained and evaluated in miniature."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from gdf_miniatures import shrink_backbone, shrink_channels
from miniatures import make
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import mmaselect  # noqa: F401
from mmaselect.errors import InputError

CONFIGS = sorted(ROOT.glob('configs/detection/*.py'))
#: Names in ``arch``.
TRUE = {'sd35-medium': 'sd3.5-medium', 'dit-xl-2': 'dit-xl/2-256', 'sd15': 'sd1.5'}
STEMS = {
    f'{model}_{"gdf-" if model == "sd15" else ""}retinanet_8xb2-12e_coco-1333x800' for model in TRUE
}  # fmt: skip
DIT = next(path for path in CONFIGS if path.stem.startswith('dit'))


@functools.cache
def read_once(path):
    return Config.fromfile(path)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    return make('CocoDataset', tmp_path_factory.mktemp('coco'))


def test_there_is_a_config_for_every_model():
    assert {path.stem for path in CONFIGS} == STEMS


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path):
    """Each level has the stride that its anchors are made for, on an image as the preprocessor pads it."""
    import mmdet.models  # noqa: F401

    config = copy.deepcopy(read_once(path))
    old = config.model.backbone.diffusion
    config.model.backbone.diffusion = dict(type=old.type, arch=TRUE[path.stem.split('_')[0]])
    with torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(config.model)).to('meta')
    backbone, divisor = model.backbone, config.model.data_preprocessor.pad_size_divisor
    # Then the backbone pads nothing, and a cell of any level is a whole one.
    assert divisor % backbone.multiple == 0
    height, width = (-(-side // divisor) * divisor for side in (800, 1333))
    maps = [
        torch.empty(2, channels, height // stride, width // stride, device='meta')
        for channels, stride in zip(backbone.out_channels, backbone.strides)
    ]
    levels = model.neck(maps)
    strides = [stride for stride, _ in model.bbox_head.prior_generator.strides]
    assert strides == [8, 16, 32, 64, 128]
    assert [tuple(level.shape[1:]) for level in levels] == [
        (256, -(-height // stride), -(-width // stride)) for stride in strides
    ]
    scores, boxes = model.bbox_head(levels)
    assert [(score.shape[1], box.shape[1]) for score, box in zip(scores, boxes)] == [(720, 36)] * 5
    preprocessor = config.model.data_preprocessor
    assert (preprocessor.bgr_to_rgb, preprocessor.mean[0], preprocessor.std[0]) == (True, 123.675, 58.395)
    assert (config.train_dataloader.batch_size, config.train_cfg.max_epochs) == (2, 12)
    assert config.optim_wrapper.optimizer.lr == 0.01
    assert config.auto_scale_lr.base_batch_size == 16
    assert not list(backbone.parameters())


def settings(path, model_folder, root):
    """What puts a miniature of model, sizes and schedule into a config, by dotted names; all else stays."""
    values = {'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 1}
    scale = (48, 32) if path.stem.startswith('sd15') else (160, 96)
    for split in ('train', 'val', 'test'):
        values |= {f'{split}_dataloader.num_workers': 0, f'{split}_dataloader.persistent_workers': False}
        values[f'{split}_dataloader.dataset.data_root'] = f'{root}/'
        resize = {'train': 2, 'val': 1, 'test': 1}[split]
        values[f'{split}_dataloader.dataset.pipeline.{resize}.scale'] = scale
    for split in ('val', 'test'):
        values[f'{split}_evaluator.ann_file'] = f'{root}/annotations/instances_val2017.json'
    # Two iterations of two images.
    values |= {'train_dataloader.dataset.indices': 4, 'val_dataloader.dataset.indices': 2}
    values |= {'train_dataloader.dataset.filter_cfg.min_size': 8, 'model.bbox_head.feat_channels': 16}
    values |= {'model.bbox_head.in_channels': 16, 'model.bbox_head.stacked_convs': 1, 'model.test_cfg.score_thr': 0.0}
    values |= {'custom_hooks.0.num_images': 4, 'custom_hooks.0.timesteps': [0, 500], 'custom_hooks.0.batch_size': 4}
    values |= {'custom_hooks.0.pipeline.1.scale': scale, 'custom_hooks.0.pipeline.2.crop_size': (64, 64)}
    values['custom_hooks.0.criterion.views'] = dict(crop=0.9)
    if not path.stem.startswith('sd15'):
        variant = 'SD3.5-medium' if path.stem.startswith('sd35') else 'DiT'
        values |= {'model.backbone.diffusion.pretrained': str(model_folder(variant)), 'model.backbone.block': 2}
        values |= {'model.neck.in_channels': 64, 'model.neck.out_channels': 16}
        values['model.neck.norm_cfg'] = dict(type='GN', num_groups=4)
    return values


def shrunk(path, model_folder, root):
    config = copy.deepcopy(read_once(path))
    config.merge_from_dict(settings(path, model_folder, root))
    if path.stem.startswith('sd15'):
        # On pixels, a cell has an eighth of its side.
        shrink_backbone(config.model.backbone, path.stem)
        config.model.data_preprocessor.pad_size_divisor = 8
        aggregation, pyramid = config.model.neck
        aggregation.update(in_channels=shrink_channels(aggregation.in_channels), strides=[4, 4, 2, 1])
        pyramid.update(in_channels=shrink_channels(pyramid.in_channels), out_channels=16)
        config.model.bbox_head.anchor_generator.strides = [1, 2, 4, 8, 16]
    return config


def run(config, work_dir):
    """Trains; gives the lines of the log."""
    from mmengine.runner import Runner

    config.work_dir, config.experiment_name, config.visualizer.name = str(work_dir), work_dir.name, work_dir.name
    Runner.from_cfg(config).train()
    return log_of(work_dir)


def log_of(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def check(lines, work_dir):
    losses = [(line['loss_cls'], line['loss_bbox']) for line in lines if 'loss' in line]
    assert len(losses) == 2
    assert all(math.isfinite(part) and part > 0 for pair in losses for part in pair)
    (precision,) = (line['coco/bbox_mAP'] for line in lines if 'coco/bbox_mAP' in line)
    assert 0 <= precision <= 1
    state = torch.load(work_dir / 'epoch_1.pth', weights_only=True)['state_dict']
    assert {key.split('.')[0] for key in state} == {'backbone', 'neck', 'bbox_head'}
    assert {key for key in state if key.startswith('backbone')} == {
        f'backbone.{name}' for name in ('timestep', 'taps', 'recipe')
    }
    return state


@pytest.mark.parametrize('path', [path for path in CONFIGS if path != DIT], ids=lambda path: path.stem)
def test_an_epoch(path, coco, model_folder, tmp_path):
    config = shrunk(path, model_folder, coco)
    state = check(run(config, tmp_path), tmp_path)
    if config.model.backbone.timestep == 'auto':
        selection = json.loads((tmp_path / 'selection.json').read_text())
        assert (selection['num_images'], selection['config']['pipeline']) == (4, 'given')
        assert state['backbone.timestep'] == selection['timestep']


def test_an_epoch_by_mmdets_own_tool(coco, model_folder, tmp_path):
    import mmdet

    tool = Path(mmdet.__file__).parent / '.mim/tools/train.py'
    config = shrunk(DIT, model_folder, coco)
    config.dump(tmp_path / 'config.py')
    done = run_script(tool, tmp_path / 'config.py', '--work-dir', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-3000:]
    check(log_of(tmp_path / 'run'), tmp_path / 'run')


def test_boxes_of_a_class_overlap_no_more_than_nms_allows(coco, model_folder):
    """By the compiled operator of the full mmcv where that is installed, else by torchvision's."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox_overlaps

    config = shrunk(DIT, model_folder, coco)
    config.model.backbone.timestep = 100
    model = MODELS.build(config.model).eval()
    size = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0), pad_shape=(64, 64))
    data = dict(
        inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=[DetDataSample(metainfo=size)]
    )

    def worst():
        with torch.no_grad():
            found = model.test_step(data)[0].pred_instances
        assert len(found) == 100
        kept = [found.bboxes[found.labels == label] for label in found.labels.unique()]
        return max((bbox_overlaps(boxes, boxes) - torch.eye(len(boxes))).max().item() for boxes in kept)

    model.bbox_head.test_cfg.nms.iou_threshold = 1.0
    assert worst() > 0.5
    model.bbox_head.test_cfg.nms.iou_threshold = 0.5
    assert worst() <= 0.5


def test_boxes_are_not_cached(coco, model_folder, tmp_path):
    config = shrunk(DIT, model_folder, coco)
    config.model.backbone.update(timestep=100, cache=dict(dir=str(tmp_path / 'features')))
    config.custom_hooks.append(dict(type='FeatureCacheHook'))
    with pytest.raises(InputError, match=r'data samples with gt_instances \(InstanceData\) are not cached'):
        run(config, tmp_path)
