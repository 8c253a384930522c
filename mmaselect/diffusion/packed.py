"""What transformers have in common whose tokens are packed before ``forward``: FLUX.1, FLUX.2 and Qwen-Image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmaselect.diffusion.family import Family


def cells(rows: int, columns: int, axes: int, device: torch.device) -> Tensor:
    """Where each of an image's tokens lies, (rows * columns, axes): row and column are the second and third axis."""
    ids = torch.zeros(rows, columns, axes, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)
    return ids.flatten(0, 1)


class PackedFamily(Family):
    """A rectified flow on tokens of ``cell`` x ``cell`` latent pixels."""

    cell: ClassVar[int] = 2

    def time(self, timestep: float) -> float:
        """What the network is told: the share of noise, in [0, 1]."""
        return self.process.network_timestep(timestep) / 1000

    @classmethod
    def multiple(cls, config: Any) -> int:
        """Latent pixels of a token, along one side."""
        return cls.cell

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """Of a latent before its pixels are packed into tokens."""
        return config['in_channels'] // cls.cell**2

    @classmethod
    def side(cls, config: Any) -> int:
        """1024 image pixels are 64 tokens."""
        return 64 * cls.cell

    @classmethod
    def pack(cls, latent: Tensor) -> Tensor:
        """(B, C, H, W) to tokens, (B, H / 2 * W / 2, 4 C) where a cell is 2 pixels wide."""
        return nn.functional.pixel_unshuffle(latent, cls.cell).flatten(2).transpose(1, 2)
