"""Images and labels of a runner's data set."""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.structures import PixelData
from mmseg.models import FCNHead
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils.data import DataLoader

from mmaselect import ASelectDiT, TimestepSelectionHook
from mmaselect.cache import FeatureCacheHook
from mmaselect.errors import InputError
from mmaselect.hooks.images import (
    check_channel_order,
    check_last_batch,
    check_seeded,
    find_backbone,
    ignored_label,
    labels_of,
    read_seeded,
    unwrap,
)
from mmaselect.images import IGNORED

ARCH = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)


def test_what_the_head_ignores_is_no_class():
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.tensor([[[0, 1, 11], [255, 11, 2]]])))
    model = nn.ModuleDict(
        dict(
            backbone=nn.Conv2d(3, 4, 1),
            decode_head=FCNHead(
                in_channels=4, channels=4, num_classes=11, num_convs=0, concat_input=False, ignore_index=11
            ),
        )
    )  # fmt: skip
    assert ignored_label(model) == 11
    assert labels_of(sample, ignored_label(model)).tolist() == [[0, 1, IGNORED], [IGNORED, IGNORED, 2]]
    # A classifier ignores nothing.
    assert ignored_label(nn.Linear(2, 2)) == IGNORED
    assert labels_of(sample).tolist() == [[0, 1, 11], [IGNORED, 11, 2]]


def preprocessor(toolbox, swap):
    if toolbox == 'mmpretrain':
        from mmpretrain.models import ClsDataPreprocessor

        return ClsDataPreprocessor(to_rgb=swap)
    if toolbox == 'mmseg':
        from mmseg.models import SegDataPreProcessor

        return SegDataPreProcessor(bgr_to_rgb=swap)
    from mmengine.model import ImgDataPreprocessor

    return ImgDataPreprocessor(bgr_to_rgb=swap)


LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='PackInputs')


@pytest.mark.parametrize('toolbox', ('mmpretrain', 'mmseg', 'mmengine'))
@pytest.mark.parametrize(
    'steps,swaps',
    [
        ([LOAD, PACK], 0),
        ([dict(type='mmaselect.LoadReadableImage'), PACK], 0),
        ([LOAD, dict(type='NumpyToPIL', to_rgb=True), PACK], 1),
        ([LOAD, dict(type='NumpyToPIL', to_rgb=True), dict(type='PILToNumpy', to_bgr=True), PACK], 2),
        ([LOAD, dict(type='NumpyToPIL'), PACK], 0),
    ],
)
def test_images_arrive_as_rgb(toolbox, steps, swaps):
    """OpenCV reads BGR: turned once, or three times, it is RGB."""
    dataset = dict(type='RepeatDataset', dataset=dict(type='CustomDataset', pipeline=steps))
    cfg = Config(dict(val_dataloader=dict(dataset=dataset)))
    field = 'to_rgb' if toolbox == 'mmpretrain' else 'bgr_to_rgb'
    right, wrong = (True, False) if swaps % 2 == 0 else (False, True)
    check_channel_order(cfg, preprocessor(toolbox, right))
    said = (
        f'val_dataloader are read as BGR and .* to RGB, which the VAE expects: set data_preprocessor.{field}={right}$'
    )
    with pytest.raises(InputError, match=said):
        check_channel_order(cfg, preprocessor(toolbox, wrong))


def test_what_is_read_in_another_way_is_left_alone():
    """mmpretrain's CIFAR is RGB as it comes."""
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='CIFAR10', pipeline=[PACK]))))
    for swap in (True, False):
        check_channel_order(cfg, preprocessor('mmpretrain', swap))


def test_a_seed_decides_what_a_pipeline_gives():
    own = random.Random(0)

    def by_the_seed(index):
        return {'inputs': torch.full((3,), index + random.random()) + torch.rand(3)}

    def by_its_own(index):
        return {'inputs': torch.full((3,), own.random())}

    check_seeded(by_the_seed, range(8))
    first, again = (read_seeded(by_the_seed, 3, 5)['inputs'] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, read_seeded(by_the_seed, 3, 6)['inputs'])
    with pytest.raises(InputError, match='the pipeline gives two images under one seed'):
        check_seeded(by_its_own, range(8))


def test_a_seeded_read_leaves_all_random_states(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    read_seeded(lambda index: {'drawn': (random.random(), np.random.rand(), torch.rand(1))}, 0, 7)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not seeded, 'nothing would put them back'


class Owner(BaseModel):
    """A model with one backbone, whose preprocessor subtracts 100."""

    def __init__(self, **fields):
        super().__init__(dict(type='ImgDataPreprocessor', mean=[100.0] * 3, std=[50.0] * 3))
        self.backbone = ASelectDiT(dict(type='SiT', arch=ARCH, latent='pixels'), block=1, **fields)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.backbone(inputs)


class Bare(BaseModel):
    """A model that holds what it is given."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        raise NotImplementedError


class Tta(BaseTTAModel):
    """Test-time augmentation, with a data preprocessor of its own that does nothing."""

    def merge_preds(self, data_samples_list):
        raise NotImplementedError


class Engine:
    """Like mmengine's wrapper of a DeepSpeed engine: no module itself, it passes on what it is asked for."""

    def __init__(self, model):
        self.engine = nn.Module()
        self.engine.module = model

    def __getattr__(self, name):
        return getattr(self.engine, name)


class Strategy:
    """Like mmengine's: the runner's model is a config until the strategy has prepared it."""

    def prepare(self, model):
        self.model = Engine(Owner(**model))


def runner_of(model, **more):
    return SimpleNamespace(model=model, cfg=Config(), logger=logging.getLogger('test'), **more)


@pytest.mark.parametrize('wrap', (lambda owner: owner, Tta, Engine, lambda owner: Engine(Tta(owner))))
def test_wrappers_do_not_hide_who_owns_the_backbone(wrap):
    owner = Owner()
    runner = runner_of(wrap(owner))
    assert unwrap(runner) is owner
    assert find_backbone(runner) is owner.backbone
    assert (owner.backbone.mean, owner.backbone.std) == ((100.0,) * 3, (50.0,) * 3)


def test_a_teacher_beside_the_owner_is_not_asked():
    model = Bare()
    model.student, model.teacher = Owner(), Bare(dict(type='ImgDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3))
    assert unwrap(runner_of(model)) is model.student
    assert find_backbone(runner_of(model)).mean == (100.0,) * 3


def test_a_model_that_is_a_config_is_built_by_its_strategy():
    runner = runner_of(dict(timestep=300), strategy=Strategy())
    assert find_backbone(runner).timestep == 300
    assert runner.model is runner.strategy.model


def test_the_frozen_model_goes_where_a_strategy_put_the_data_preprocessor():
    """FSDP moves the preprocessor, shards the rest, and calls ``to()`` on neither."""
    owner = Owner()
    assert owner.backbone.diffusion.device.type == 'cpu'
    owner.data_preprocessor._device = torch.device('meta')
    assert find_backbone(runner_of(owner)).diffusion.device.type == 'meta'


@pytest.mark.parametrize('hook', (TimestepSelectionHook, FeatureCacheHook))
def test_the_dummy_model_of_a_tool_is_left_alone(hook, caplog):
    runner, hook = runner_of(Bare(), _load_from=None), hook()
    with caplog.at_level('WARNING'):
        hook.before_run(runner)
        hook.before_train(runner)
        hook.before_test(runner)
    assert f'the model has no ASelectDiT backbone: {type(hook).__name__} does nothing' in caplog.text
    with pytest.raises(InputError, match='needs a model with one ASelectDiT backbone; this one has 0'):
        find_backbone(runner)


class Pooled(Owner):
    """Its pyramid pooling normalises one value per channel."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))


class Plain(Owner):
    """Its batch norm sees a whole map of every image."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16)


@pytest.mark.parametrize(
    'model,images,settings,refused',
    [
        (
            Pooled,
            9,
            dict(batch_size=4),
            'the last batch of 9 images has one image, but the batch norm in pool needs two',
        ),
        (Pooled, 9, dict(batch_size=4, drop_last=True), None),
        (Pooled, 8, dict(batch_size=4), None),
        (Pooled, 9, dict(batch_size=4, sampler=True), None),
        (
            Pooled,
            9,
            dict(batch_size=1, sampler=True),
            'train_dataloader.batch_size=1, but the batch norm in pool needs',
        ),
        (Plain, 9, dict(batch_size=4), None),
    ],
)
def test_a_batch_of_one_image_is_refused_where_a_norm_needs_two(model, images, settings, refused):
    if settings.pop('sampler', None):
        settings['sampler'] = InfiniteSampler(range(images))
    runner = runner_of(model(), train_dataloader=DataLoader(range(images), **settings))
    with pytest.raises(InputError, match=refused) if refused else nullcontext():
        check_last_batch(runner)
