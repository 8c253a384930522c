"""``AggregationHead``: many maps become one that is trained to tell points apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from mmaselect.errors import check_count, check_number
from mmaselect.heads.maps import check_channels, check_maps
from mmaselect.tasks.correspondence import sample


@MODELS.register_module()
class AggregationHead(BaseModule):
    """One 3x3 convolution over all maps, trained by a symmetric contrastive loss (GDF, arXiv 2410.03558).

    Maps are interpolated to one size and concatenated. With ``a_i`` the feature of a point in the source, ``b_j`` that
    of cell j of the target and ``j*`` the cell of the point's partner, the loss of the point is the cross-entropy

        ``-log softmax_j(cos(a_i, b_j) / temperature)[j*]``,

    averaged over points, and over both directions.

    Args:
        in_channels: Of each map.
        out_channels: Of the one; None for as many as come in. GDF halves them where maps of several models meet.
        size: Cells a side.
        temperature: Of the softmax.
        init_cfg: As in every OpenMMLab module.

    Raises:
        InputError: If an argument is out of range; when called, if other maps come in.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int | None = None,
        size: int = 128,
        temperature: float = 0.07,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.in_channels = check_channels(in_channels)
        check_count(size, 'size')
        check_number(temperature, 'temperature', 0, open_low=True)
        self.size, self.temperature = size, temperature
        whole = sum(in_channels)
        out = whole if out_channels is None else check_count(out_channels, 'out_channels')
        self.conv = nn.Conv2d(whole, out, 3, padding=1, bias=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) of any sizes become one (B, out_channels, size, size)."""
        check_maps(maps, self.in_channels)
        size = (self.size, self.size)
        return self.conv(torch.cat([F.interpolate(one, size, mode='bilinear') for one in maps], 1))

    def loss(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], places: Sequence[Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """The contrastive loss.

        Args:
            sources: Maps (B, C, h, w) of the sources.
            targets: Of the targets.
            places: Of each pair the points of source and target, as shares of what the model saw, (N, 2).

        Returns:
            ``loss_contrastive``.
        """
        both = self(sources), self(targets)
        losses = []
        for number, points in enumerate(places):
            first, second = both[0][number], both[1][number]
            losses += [self._one_way(first, points[0], second, points[1])]
            losses += [self._one_way(second, points[1], first, points[0])]
        return {'loss_contrastive': torch.stack(losses).mean()}

    def _one_way(self, source: Tensor, points: Tensor, target: Tensor, partners: Tensor) -> Tensor:
        queries = F.normalize(sample([source], points), dim=1)
        similarity = queries @ F.normalize(target.flatten(1), dim=0)
        column, row = (partners * self.size).long().clamp(0, self.size - 1).unbind(1)
        return F.cross_entropy(similarity / self.temperature, row * self.size + column)
