"""``PixelEnsembleHead``: an ensemble of pixel classifiers as a decode head of mmseg's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from mmaselect.errors import check_count
from mmaselect.heads.maps import check_channels, check_maps
from mmaselect.tasks.label_scarce import PixelEnsemble, pixels_of, vote


@MODELS.register_module()
class PixelEnsembleHead(BaseModule):
    """Small networks that read pixels one by one and vote, for a few labelled images (GDF, DDPM-Segmentation).

    In a training each member draws pixels of its own from the batch of images; that a member stops when it learns
    nothing more, as in the published protocol, is what :func:`mmaselect.tasks.label_scarce.fit` does, without a runner.

    Args:
        in_channels: Of each map.
        num_classes: Classes.
        members: Networks.
        pixels: That each member draws from a batch of images; each image is as likely as it has labelled pixels.
        stride: Of the prediction, in pixels of the input: one is made for so many a side.
        ignore_index: Label of pixels that belong to no class.
        init_cfg: As in every OpenMMLab module.

    Raises:
        InputError: If an argument is out of range; when called, if other maps come in.
    """

    #: What mmseg's segmentors ask of a head.
    align_corners = False

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        members: int = 10,
        pixels: int = 64,
        stride: int = 1,
        ignore_index: int = 255,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.in_channels = check_channels(in_channels)
        check_count(pixels, 'pixels', 2)
        check_count(stride, 'stride')
        self.ensemble = PixelEnsemble(sum(in_channels), num_classes, members)
        self.num_classes = self.out_channels = num_classes
        self.pixels, self.stride, self.ignore_index = pixels, stride, ignore_index

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Votes for each class, (B, num_classes, h, w), at the cells of the finest map."""
        check_maps(maps, self.in_channels)
        finest = max(maps, key=lambda one: one.shape[2] * one.shape[3])
        return vote(self.ensemble, maps, (finest.shape[2], finest.shape[3]))

    def loss(
        self, maps: Sequence[Tensor], batch_data_samples: Sequence[Any], train_cfg: Any = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of each member on pixels of its own, averaged.

        Returns:
            ``loss_ce``, and ``acc_seg``, the mean accuracy of the members in percent.
        """
        check_maps(maps, self.in_channels)
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch_data_samples]).long()
        valid = (labels != self.ignore_index).nonzero()
        if not len(valid):
            return {'loss_ce': sum(one.sum() for one in self.parameters()) * 0}
        size, losses, right = labels.new_tensor(labels.shape[:0:-1]), [], []
        for member in self.ensemble.members:
            drawn = valid[torch.randint(len(valid), (self.pixels,), device=valid.device)]
            places = (drawn[:, [2, 1]] + 0.5) / size
            scores = member(pixels_of(maps, drawn[:, 0], places))
            truth = labels[drawn[:, 0], drawn[:, 1], drawn[:, 2]]
            losses.append(F.cross_entropy(scores, truth))
            right.append((scores.argmax(1) == truth).float().mean())
        return {'loss_ce': torch.stack(losses).mean(), 'acc_seg': 100 * torch.stack(right).mean()}

    def predict(
        self, maps: Sequence[Tensor], batch_img_metas: Sequence[dict[str, Any]], test_cfg: Any = None
    ) -> Tensor:
        """Votes for each class at the size of the input, (B, num_classes, H, W)."""
        check_maps(maps, self.in_channels)
        meta = batch_img_metas[0]
        # As mmseg's heads: a window of a sliding inference says its size itself.
        window = isinstance(meta['img_shape'], torch.Size) or 'pad_shape' not in meta
        height, width = (meta['img_shape'] if window else meta['pad_shape'])[:2]
        votes = vote(self.ensemble, maps, (-(-height // self.stride), -(-width // self.stride)))
        # Half a vote is none: what is made larger is repeated.
        return F.interpolate(votes, (height, width), mode='nearest-exact')
