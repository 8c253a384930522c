"""``ActivationAggregation``: activations of several strides become the levels of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmaselect.errors import InputError, check_count
from mmaselect.heads.maps import check_maps


class ResidualBlock(nn.Module):
    """``x + BN(conv(relu(BN(conv(x)))))``, two 3x3 convolutions; the identity at first.

    The last norm begins with weight and bias 0 (arXiv 1706.02677): the branch adds nothing until it has learned to.

    Args:
        channels: In and out.
        norm_cfg: Of the norms, as mmcv builds them.
    """

    def __init__(self, channels: int, norm_cfg: dict[str, Any]) -> None:
        # mmcv takes a second to import.
        from mmcv.cnn import build_norm_layer

        super().__init__()
        norms = [build_norm_layer(norm_cfg, channels)[1] for _ in range(2)]
        convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        self.branch = nn.Sequential(convs[0], norms[0], nn.ReLU(inplace=True), convs[1], norms[1])
        nn.init.zeros_(norms[1].weight)
        nn.init.zeros_(norms[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        return x + self.branch(x)


@MODELS.register_module()
class ActivationAggregation(BaseModule):
    """Many activations of a frozen backbone as the levels of a pyramid, the finest first (GDF, arXiv 2410.03558).

    Each activation goes through a residual block of its own; those of one stride are concatenated, and what comes of it
    goes through another. All blocks begin as the identity.

    UPerNet pools its last level, and predicts at its first: so the coarsest is last here. (GDF's code hands them over
    the other way round, so that it pools the finest and predicts at the coarsest.)

    Args:
        in_channels: Channels of each map, the backbone's ``out_channels``.
        strides: Image pixels per cell of each map, the backbone's ``strides``: each number is a level.
        norm_cfg: Norm of the residual blocks.
        init_cfg: As in every OpenMMLab module.

    Attributes:
        out_channels: Channels of each level, the finest first.

    Raises:
        InputError: If the numbers do not fit; when called, if other maps come in.

    Examples:
        >>> ActivationAggregation([1280, 1280, 640, 320], [32, 32, 16, 8]).out_channels
        (320, 640, 2560)
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        for name, values in (('in_channels', in_channels), ('strides', strides)):
            if not isinstance(values, (list, tuple)) or not values:
                raise InputError(f"{name}={values!r} is not valid: give a number for each of the backbone's maps")
            for value in values:
                check_count(value, name)
        if len(in_channels) != len(strides):
            raise InputError(f'in_channels={in_channels!r}, strides={strides!r}: give as many of both')
        norm_cfg = norm_cfg or dict(type='BN')
        self.in_channels = tuple(in_channels)
        self.levels = [
            [number for number, stride in enumerate(strides) if stride == level] for level in sorted(set(strides))
        ]
        self.out_channels = tuple(sum(in_channels[number] for number in level) for level in self.levels)
        self.single = nn.ModuleList(ResidualBlock(channels, norm_cfg) for channels in in_channels)
        self.joint = nn.ModuleList(ResidualBlock(channels, norm_cfg) for channels in self.out_channels)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Aggregates.

        Args:
            maps: (B, C, h, w), one for each of ``in_channels``.

        Returns:
            A map for each level, the finest first.

        Raises:
            InputError: If maps have other channels, or those of one level unlike sizes.
        """
        check_maps(maps, self.in_channels, 'neck')
        for level in self.levels:
            sizes = {tuple(maps[number].shape[2:]) for number in level}
            if len(sizes) > 1:
                raise InputError(f"strides of the neck are not the backbone's: maps {level} have sizes {sorted(sizes)}")
        read = [block(one) for block, one in zip(self.single, maps)]
        return tuple(
            block(torch.cat([read[number] for number in level], 1)) for block, level in zip(self.joint, self.levels)
        )
