"""``SimplePyramid``: levels of several strides from one map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmaselect.errors import InputError, check_count
from mmaselect.heads.maps import check_maps


@MODELS.register_module()
class SimplePyramid(BaseModule):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527): every level comes from the same map.

    Transposed convolutions of stride 2 make a finer level, each with half of the channels; max pooling makes a coarser
    one. A 1x1 and a 3x3 convolution follow. RetinaNet's further levels come from the last one by convolutions of
    stride 2.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of each level.
        scales: Cells of each level per cell of the map, along a side: powers of two, the finest first. A map of stride
            16 gives strides 8, 16 and 32 by (2, 1, 0.5).
        num_outs: Number of levels; those beyond ``scales`` have half of the cells of the one before. None is as many as
            ``scales``.
        norm_cfg: Norm of each level, as mmcv builds it. None is a group norm of 32 groups, as detectors train with few
            images at a time.
        init_cfg: As in every OpenMMLab module.

    Raises:
        InputError: If the numbers do not fit; when called, if other maps come in.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int | None = None,
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count(in_channels, 'in_channels')
        check_count(out_channels, 'out_channels')
        powers = [_power_of_two(scale) for scale in scales] if isinstance(scales, (list, tuple)) else []
        if not powers or None in powers:
            raise InputError(f'scales={scales!r} is not valid: give powers of two, such as [4, 2, 1, 0.5]')
        further = check_count(len(scales) if num_outs is None else num_outs, 'num_outs', len(scales)) - len(scales)
        self.in_channels, self.norm_cfg = in_channels, norm_cfg or dict(type='GN', num_groups=32)
        self.levels = nn.ModuleList(self._level(power or 0, out_channels) for power in powers)
        self.further = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) for _ in range(further)
        )

    def _level(self, power: int, out_channels: int) -> nn.Sequential:
        steps: list[nn.Module] = []
        channels = self.in_channels
        for number in range(power):
            steps += [self._norm(channels), nn.GELU()] if number else []
            steps.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels //= 2
        if power < 0:
            # A cell at the border that has no neighbour is pooled by itself, so that no pixel is left out.
            steps.append(nn.MaxPool2d(2**-power, ceil_mode=True))
        for kernel in (1, 3):
            steps += [nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)]
            steps.append(self._norm(out_channels))
            channels = out_channels
        return nn.Sequential(*steps)

    def _norm(self, channels: int) -> nn.Module:
        # mmcv takes a second to import.
        from mmcv.cnn import build_norm_layer

        return build_norm_layer(self.norm_cfg, channels)[1]

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Makes the levels.

        Args:
            maps: One map (B, C, h, w).

        Returns:
            A map for each level, the finest first.

        Raises:
            InputError: If there is another number of maps, or of channels.
        """
        check_maps(maps, (self.in_channels,), 'neck')
        levels = [level(maps[0]) for level in self.levels]
        for further in self.further:
            levels.append(further(levels[-1]))
        return tuple(levels)


def _power_of_two(scale: Any) -> int | None:
    """The exponent of a power of two; None for what is none."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        return None
    mantissa, exponent = math.frexp(scale)
    return exponent - 1 if mantissa == 0.5 else None
