"""ViTDet's pyramid: sizes, the way of a level, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmaselect.errors import InputError
from mmaselect.necks import SimplePyramid

NORM = dict(type='GN', num_groups=4)


def test_every_level_has_its_size_and_learns():
    neck = SimplePyramid(32, 8, scales=[4, 2, 1, 0.5, 0.25], num_outs=7, norm_cfg=NORM)
    levels = neck((torch.randn(2, 32, 5, 8),))
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, *size) for size in ((20, 32), (10, 16), (5, 8), (3, 4), (2, 2), (1, 1), (1, 1))
    ]
    sum(level.square().mean() for level in levels).backward()
    # Maps of a single cell leave the outer weights of a 3x3 kernel alone, but no parameter as a whole.
    assert all(parameter.grad.abs().max() > 0 for parameter in neck.parameters())


def test_finer_levels_halve_the_channels_and_coarser_ones_pool():
    neck = SimplePyramid(32, 8, scales=[4, 1, 0.25], norm_cfg=NORM)
    kinds = [[type(step).__name__ for step in level] for level in neck.levels]
    last = ['Conv2d', 'GroupNorm', 'Conv2d', 'GroupNorm']
    assert kinds == [
        ['ConvTranspose2d', 'GroupNorm', 'GELU', 'ConvTranspose2d', *last],
        last,
        ['MaxPool2d', *last],
    ]
    convs = [step for step in neck.levels[0] if isinstance(step, (nn.ConvTranspose2d, nn.Conv2d))]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(32, 16), (16, 8), (8, 8), (8, 8)]
    peak = torch.zeros(1, 32, 8, 8)
    peak[..., 5, 6] = 7
    assert neck.levels[2][0](peak)[0, 0].tolist() == [[0, 0], [0, 7]]


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(in_channels=0), 'in_channels=0 is not valid'),
        (dict(scales=[3, 1]), r'scales=\[3, 1\] is not valid: give powers of two'),
        (dict(scales=2), 'scales=2 is not valid'),
        (dict(scales=[]), r'scales=\[\] is not valid'),
        (dict(scales=[True]), r'scales=\[True\] is not valid'),
        (dict(num_outs=3), 'num_outs=3 is not valid'),
    ],
)
def test_one_line_for_what_is_wrong(fields, message):
    with pytest.raises(InputError, match=message):
        SimplePyramid(**{'in_channels': 32, **fields})


@pytest.mark.parametrize('maps', [[torch.zeros(1, 16, 4, 4)], [torch.zeros(1, 32, 4, 4)] * 2])
def test_other_maps_are_refused(maps):
    with pytest.raises(InputError, match=r'in_channels=\(32,\) of the neck, but maps of'):
        SimplePyramid(32, 8, norm_cfg=NORM)(maps)
