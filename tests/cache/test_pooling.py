"""Vectors are kept only where nothing but a pooling neck ever sees the maps."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import ImageClassifier
from torch import nn

from mmaselect.cache.pooling import pool, pooling_of


class Maps(nn.Module):
    """Stands for the backbone: what it is asked for is its channels."""

    def __init__(self, *channels):
        super().__init__()
        self.out_channels = channels


class Dropped(nn.Sequential):
    """Pools, but not the same twice."""

    def __init__(self):
        super().__init__(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, maps):
        return tuple(super(Dropped, self).forward(one) for one in maps)


class Mixing(nn.Module):
    """Pools, and centres over the batch."""

    def forward(self, maps):
        return tuple(one.mean((2, 3)) - one.mean((0, 2, 3)) for one in maps)


class Spread(nn.Module):
    """Makes a vector that it would not make of itself."""

    def forward(self, maps):
        return tuple(one.square().mean((2, 3)) for one in maps)


class Peeking(ImageClassifier):
    """Reads the maps beside its neck."""

    def extract_feat(self, inputs, stage='neck'):
        return super().extract_feat(inputs, stage) + self.backbone(inputs)


def model_of(neck, channels=(8,), kind=ImageClassifier):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        neck = neck if neck is None or isinstance(neck, nn.Module) else MODELS.build(neck)
    return kind(backbone=Maps(*channels), neck=neck)


GAP = dict(type='GlobalAveragePooling')


@pytest.mark.parametrize(
    'neck,channels',
    [
        (GAP, (8,)),
        ([GAP, dict(type='ClsBatchNormNeck', input_features=8)], (8,)),
        # Of several maps a vector each.
        (GAP, (8, 4)),
    ],
)
def test_the_first_part_that_pools_is_found(neck, channels):
    model = model_of(neck, channels)
    found = pooling_of(model, model.backbone)
    assert type(found).__name__ == 'GlobalAveragePooling'
    maps = tuple(torch.randn(3, number, 4, 6) for number in channels)
    vectors = pool(found, maps)
    assert [tuple(one.shape) for one in vectors] == [(3, number, 1, 1) for number in channels]
    model.eval()
    for kept, without in zip(model.neck(vectors), model.neck(maps)):
        assert torch.equal(kept, without)


@pytest.mark.parametrize(
    'neck,channels,kind',
    [
        (None, (8,), ImageClassifier),
        (dict(type='mmaselect.AttentionPooling', in_channels=8, embed_dims=8, num_layers=1), (8,), ImageClassifier),
        ([dict(type='SoftmaxFusion', in_channels=8, num_maps=2), GAP], (8, 8), ImageClassifier),
        (dict(type='ClsBatchNormNeck', input_features=8), (8,), ImageClassifier),
        (dict(type='GeneralizedMeanPooling'), (8,), ImageClassifier),
        (dict(type='GlobalAveragePooling', dim=3), (8,), ImageClassifier),
        (nn.Identity(), (8,), ImageClassifier),
        (Dropped(), (8,), ImageClassifier),
        (Mixing(), (8,), ImageClassifier),
        (Spread(), (8,), ImageClassifier),
        (GAP, (8,), Peeking),
    ],
    ids=str,
)  # fmt: skip
def test_everything_else_keeps_maps(neck, channels, kind):
    model = model_of(neck, channels, kind)
    assert pooling_of(model, model.backbone) is None


def test_a_backbone_inside_another_keeps_maps():
    model = model_of(GAP)
    assert pooling_of(model, Maps(8)) is None
    # mmseg's auxiliary heads read what comes before the neck, or after it: it is not asked.
    segmentor = nn.Module()
    segmentor.backbone, segmentor.neck = model.backbone, model.neck
    assert pooling_of(segmentor, segmentor.backbone) is None
