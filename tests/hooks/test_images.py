"""Images and labels of a runner's data set."""

from __future__ import annotations

import random

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.models import FCNHead
from mmseg.structures import SegDataSample
from torch import nn

from mmaselect.errors import InputError
from mmaselect.hooks.images import check_channel_order, check_seeded, ignored_label, labels_of, read_seeded
from mmaselect.images import IGNORED


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
