"""``SoftmaxFusion``: several maps become one, by learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from mmaselect.errors import InputError, check_count


@MODELS.register_module()
class SoftmaxFusion(BaseModule):
    """Weighted mean of the maps of several timesteps or blocks; the weights are learned, one number per map.

    Queries of different timesteps and blocks differ in scale, so each map is first normalised channel by channel by
    its running mean and variance (batch norm without parameters). Then ``sum_i softmax(w)_i x_i``.

    Args:
        in_channels: Channels of the maps, or of each of them, where outputs differ; those that are fused are equal.
        num_maps: How many maps come in.
        num_outputs: How many go out. Of the maps that come in, those at positions ``k``, ``k + num_outputs``, ... are
            fused into output ``k``: with several timesteps of several blocks, ``num_outputs`` blocks fuse the
            timesteps of each block and keep the levels apart.
        init_cfg: As in every OpenMMLab module.

    Attributes:
        logits: ``w``, (num_outputs, num_maps / num_outputs), 0 at first: a plain mean.

    Raises:
        InputError: If the numbers do not fit.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_maps: int,
        num_outputs: int = 1,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count(num_maps, 'num_maps')
        check_count(num_outputs, 'num_outputs')
        if num_maps % num_outputs:
            raise InputError(f'num_maps={num_maps} is not a multiple of num_outputs={num_outputs}')
        channels: list[Any] = list(in_channels) if isinstance(in_channels, (list, tuple)) else [in_channels] * num_maps
        for value in channels:
            check_count(value, 'in_channels')
        if len(channels) != num_maps or any(len(set(channels[n::num_outputs])) > 1 for n in range(num_outputs)):
            raise InputError(
                f'in_channels={in_channels!r} is not valid: give {num_maps} numbers, equal for those that are fused'
            )
        self.num_maps, self.num_outputs = num_maps, num_outputs
        self.norms = nn.ModuleList(nn.BatchNorm2d(value, affine=False) for value in channels)
        self.logits = nn.Parameter(torch.zeros(num_outputs, num_maps // num_outputs))

    @property
    def weights(self) -> Tensor:
        """``softmax(w)``: the share of each map, (num_outputs, num_maps / num_outputs)."""
        return self.logits.softmax(1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Fuses.

        Args:
            maps: ``num_maps`` tensors (B, C, h, w).

        Returns:
            ``num_outputs`` tensors (B, C, h, w), each of the size of the largest map in it; smaller ones are resized
            bilinearly.

        Raises:
            InputError: If there are more or fewer maps.
        """
        if len(maps) != self.num_maps:
            raise InputError(
                f'SoftmaxFusion was built for num_maps={self.num_maps}, but {len(maps)} came in: '
                f'set num_maps={len(maps)}'
            )
        normed = [norm(one) for norm, one in zip(self.norms, maps)]
        fused = []
        for output, weights in enumerate(self.weights):
            members = normed[output :: self.num_outputs]
            size = max((member.shape[2:] for member in members), key=lambda shape: shape.numel())
            resized = [one if one.shape[2:] == size else F.interpolate(one, size, mode='bilinear') for one in members]
            fused.append(sum(weight * one for weight, one in zip(weights, resized)))
        return tuple(fused)
