"""Augmented views of images: what a feature should not depend on, for criteria that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.noise import seeded_generator
from mmaselect.errors import InputError, check_flag, check_number

#: Names a stream of random numbers of its own beside those of the noise.
STREAM = 7


@dataclass(frozen=True)
class Views:
    """Random crops, mirror images, turns and colours, drawn per image from a seed.

    The defaults are safe for any images: a crop, no mirror, no turn. Digits and text must not be mirrored; birds may
    be. Dense tasks need views in which a cell stays where it is: ``crop=1.0`` with ``colour`` and ``blur``.

    Args:
        crop: Smallest share of the area that a crop keeps, in (0, 1]; it is scaled back to the size of the image.
        mirror: Mirror half of the views.
        rotate: Largest turn, in degrees, in [0, 180].
        colour: Largest change of brightness, contrast and saturation, in [0, 1): each is multiplied by 1 - colour
            to 1 + colour.
        blur: Largest standard deviation of a Gaussian blur, in pixels, at least 0.

    Raises:
        InputError: If a field is out of range, or nothing is varied.
    """

    crop: float = 0.4
    mirror: bool = False
    rotate: float = 0.0
    colour: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.crop, 'views.crop', 0, 1, open_low=True)
        check_flag(self.mirror, 'views.mirror')
        check_number(self.rotate, 'views.rotate', 0, 180)
        check_number(self.colour, 'views.colour', 0, 1, open_high=True)
        check_number(self.blur, 'views.blur', 0)
        if self.aligned and not self.colour and not self.blur:
            raise InputError('views vary nothing: give crop below 1, mirror, rotate, colour or blur')

    @property
    def fields(self) -> dict[str, Any]:
        """As a config has them."""
        return asdict(self)

    @property
    def aligned(self) -> bool:
        """Whether every cell stays where it is."""
        return self.crop == 1 and not self.mirror and not self.rotate

    def __call__(self, images: Tensor, indices: Sequence[int], seed: int, number: int) -> Tensor:
        """Makes one view of each image.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            indices: Of the images in their data set: they name the random numbers, whatever batch or rank they are in.
            seed: Of the views.
            number: Of the view, from 1; 0 is the image itself.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        if number == 0:
            return images
        drawn = [torch.rand(9, generator=seeded_generator(seed, STREAM, index, number)) for index in indices]
        area, x, y, mirror, turn, *rest = torch.stack(drawn).to(images).unbind(1)
        out = images
        if not self.aligned:
            matrices = self._matrices(area, x, y, mirror, turn, images.shape[-1] / images.shape[-2])
            grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
            out = F.grid_sample(out, grid, padding_mode='reflection', align_corners=False)
        if self.colour:
            out = self._coloured(out, *rest[:3])
        if self.blur:
            out = _blurred(out, self.blur * rest[3], self.blur)
        return out.clamp(-1, 1)

    def _matrices(self, area: Tensor, x: Tensor, y: Tensor, mirror: Tensor, turn: Tensor, aspect: float) -> Tensor:
        """Where each pixel of a view is read, (B, 2, 3), in torch's coordinates of [-1, 1]."""
        side = (self.crop + (1 - self.crop) * area).sqrt()
        flip = torch.where(mirror < 0.5, -1.0, 1.0) if self.mirror else torch.ones_like(side)
        angle = torch.deg2rad((2 * turn - 1) * self.rotate)
        cos, sin = side * angle.cos(), side * angle.sin()
        rows = [
            torch.stack([flip * cos, -sin / aspect, (2 * x - 1) * (1 - side)], 1),
            torch.stack([flip * sin * aspect, cos, (2 * y - 1) * (1 - side)], 1),
        ]
        return torch.stack(rows, 1)

    def _coloured(self, images: Tensor, *amounts: Tensor) -> Tensor:
        brightness, contrast, saturation = (
            (1 + self.colour * (2 * amount - 1)).view(-1, 1, 1, 1) for amount in amounts
        )
        out = ((images + 1) * brightness - 1) * contrast + (1 - contrast) * images.mean((1, 2, 3), keepdim=True)
        grey = out.mean(1, keepdim=True)
        return grey + (out - grey) * saturation


def _blurred(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with a standard deviation per image, (B,), in pixels, of at most ``largest``."""
    # Not that of the batch: what else is in it must not change an image.
    radius = max(1, int(3 * largest + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.clamp_min(1e-3)[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    flat = images.flatten(0, 1)[None]
    for axis, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        weight = kernel[:, None, :, None] if axis == 2 else kernel[:, None, None, :]
        flat = F.conv2d(F.pad(flat, pad, mode='replicate'), weight, groups=flat.shape[1])
    return flat[0].unflatten(0, images.shape[:2])
