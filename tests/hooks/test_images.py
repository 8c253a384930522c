"""Images and labels of a runner's data set."""

from __future__ import annotations

import torch
from mmengine.structures import PixelData
from mmseg.models import FCNHead
from mmseg.structures import SegDataSample
from torch import nn

from mmaselect.hooks.images import ignored_label, labels_of
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
