"""Images that a user has at hand: a tensor, a folder, a list of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.model import pad_to_cells
from mmaselect.errors import InputError
from mmaselect.selection.search import Batch
from mmaselect.unreadable import Unreadable

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')


def open_picture(path: str | Path) -> Any:
    """Opens a file as an RGB picture of PIL's, the right side up.

    Raises:
        InputError: If it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I'):
                # Pillow would cut 16 bits off at 255.
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f'{path} cannot be read as an image: {error}') from error


def read_picture(path: str | Path) -> Tensor:
    """Reads a file at its own size, (3, H, W) in [-1, 1]; see :func:`open_picture`."""
    return _to_tensor(open_picture(path))


def _to_tensor(picture: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


class Images:
    """Images by number, in [-1, 1] and in whole cells.

    Args:
        images: (N, 3, H, W), uint8 in [0, 255] or floating in [0, 1]; or a folder, searched through with all below
            it; or files.
        multiple: Images are padded to multiples of so many pixels.
        size: Files are scaled until their shorter side has this many pixels, and cropped to a square in the middle.
            Tensors are taken as they are.

    Attributes:
        names: Path of each file; empty for a tensor.

    Raises:
        InputError: If there are no images, or their type, shape or range is another.
    """

    def __init__(self, images: Tensor | str | Path | Sequence[str | Path], multiple: int, size: int) -> None:
        self.multiple, self.size = multiple, size
        self.tensor: Tensor | None = None
        self.names: list[Path] = []
        if isinstance(images, Tensor):
            self.tensor = images
            if images.dim() != 4 or images.shape[1] != 3:
                raise InputError(f'images of shape {tuple(images.shape)} are not valid: give (N, 3, H, W)')
            if images.dtype != torch.uint8:
                if not images.is_floating_point():
                    raise InputError(f'images of {images.dtype} are not valid: give uint8, or floating in [0, 1]')
                if images.numel() and not (images.min() >= 0 and images.max() <= 1):
                    raise InputError(
                        f'images range from {images.min():.3g} to {images.max():.3g}: floating ones must lie in [0, 1]'
                    )
        elif isinstance(images, (str, Path)):
            folder = Path(images)
            if not folder.is_dir():
                raise InputError(f'images={str(images)!r} is not a folder')
            self.names = sorted(path for path in folder.rglob('*') if path.suffix.lower() in EXTENSIONS)
        else:
            self.names = [Path(path) for path in images]
        if not len(self):
            raise InputError(f'images={str(images)[:80]!r} has none: {", ".join(EXTENSIONS)} are looked for')

    def __len__(self) -> int:
        return len(self.names) if self.tensor is None else len(self.tensor)

    def __getitem__(self, index: int) -> Tensor:
        """One image, (3, H, W) in [-1, 1]."""
        if self.tensor is not None:
            image = self.tensor[index]
            return image / 127.5 - 1 if image.dtype == torch.uint8 else image.float() * 2 - 1
        return self._read(self.names[index])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        return _to_tensor(ImageOps.fit(open_picture(path), (self.size, self.size), Image.Resampling.BICUBIC))

    def batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        device: torch.device,
        labels: Tensor | None = None,
        group: int = 1,
        first_group: int = 0,
        unreadable: Unreadable | None = None,
    ) -> Iterator[Batch]:
        """Stacks images.

        Args:
            indices: Of the images.
            batch_size: Images per batch.
            device: Where they go.
            labels: Of all images, (N,).
            group: Images per group.
            first_group: Number of the first group.
            unreadable: Gets what cannot be read, which is passed over; None raises instead.

        Yields:
            Batches with images (B, 3, H', W') in [-1, 1], H' and W' multiples of ``multiple``.
        """
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            read = {}
            for place, index in enumerate(part):
                if unreadable is None:
                    read[place] = self[index]
                    continue
                unreadable.total += 1
                try:
                    read[place] = self[index]
                except InputError as error:
                    unreadable.add(self.names[index], error)
            if not read:
                continue
            kept = [part[place] for place in read]
            yield Batch(
                pad_to_cells(torch.stack(list(read.values())).to(device), self.multiple),
                kept,
                None if labels is None else labels[kept],
                [first_group + (start + place) // group for place in read],
            )
