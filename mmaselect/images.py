"""Images by number, for whoever selects, probes or extracts: tensors and files; of a runner see hooks/images.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.memory import check_batch_size, fit_batch_size
from mmaselect.diffusion.reader import FrozenDiffusion, pad_to_cells
from mmaselect.errors import InputError
from mmaselect.progress import working
from mmaselect.unreadable import Unreadable

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')
#: Label of pixels that belong to no class, in mmseg.
IGNORED = 255
#: Images that are centred together, and that the bootstrap draws together.
GROUP = 4
#: ``num_images='auto'`` begins with the first number of images and doubles it up to the second.
AUTO_IMAGES = (64, 4096)


@dataclass
class Batch:
    """Images to read features of.

    Attributes:
        images: (B, 3, H, W) in [-1, 1].
        indices: Index of each image in its data set: it names the image's noise, whichever rank or batch it is in.
        labels: Class of each image, (B,), of each pixel, (B, H, W), or None.
        groups: Number of each image's group, counted over all ranks; a group lies in one batch. None groups every
            ``GROUP`` neighbours, which should then come in random order.
    """

    images: Tensor
    indices: Sequence[int]
    labels: Tensor | None = None
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def padded(self, multiple: int) -> Batch:
        """The batch in whole cells of so many pixels; pixels beyond the border are labelled as none."""
        images, labels = pad_to_cells(self.images, multiple), self.labels
        if labels is not None and labels.dim() == 3:
            bottom, right = (new - old for new, old in zip(images.shape[-2:], labels.shape[-2:]))
            labels = F.pad(labels, (0, right, 0, bottom), value=IGNORED)
        return replace(self, images=images, labels=labels)


class ImageSource(ABC):
    """Images by number.

    Attributes:
        batch_size: Images per batch.
        group: Images of a group; batches hold whole ones.
        unreadable: What could not be read and was passed over.
        strict: Raise what :meth:`load` raises instead.
    """

    batch_size: int = GROUP
    group: int = GROUP
    unreadable: Unreadable
    strict: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def load(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Reads one image.

        Args:
            index: Its number.

        Returns:
            (3, H, W) in [-1, 1], and its label or None, see :class:`Batch`.
        """

    def name(self, index: int) -> str:
        """What an error calls an image."""
        return f'number {index}'

    def fit(self, model: FrozenDiffusion, batch_size: int | str, group: int = GROUP, passes: int = 1) -> None:
        """Sets the sizes of batches and groups.

        Args:
            model: On its device.
            batch_size: Images per batch; ``'auto'`` measures how many fit memory.
            group: Images that must stay together, so that the number of ranks cannot change which are.
            passes: Of an image that are in memory together.

        Raises:
            InputError: If ``batch_size`` is not valid.
        """
        self.group = self.batch_size = group
        if check_batch_size(batch_size) != 'auto':
            self.group = min(group, int(batch_size))
            self.batch_size = int(batch_size) // self.group * self.group
            return
        counted, self.unreadable = self.unreadable, Unreadable(1)
        first = next(iter(self.batches(range(len(self)))), None)
        self.unreadable = counted
        if first is not None:
            with working('measuring how many images fit memory'):
                self.batch_size = fit_batch_size(model, first.images[0], group, passes)

    def batches(
        self, indices: Sequence[int], first_group: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Loads images and stacks neighbours of one size.

        Args:
            indices: Of the images, over all ranks.
            first_group: Number of the first group.
            rank: This process; it gets every ``world_size``-th group.
            world_size: Number of processes.

        Yields:
            Batches.

        Raises:
            InputError: If more images are unreadable than may be.
        """
        pending: list[tuple[int, int, Tensor, Tensor | None]] = []
        for position, index in enumerate(indices):
            group = position // self.group
            if group % world_size != rank:
                continue
            self.unreadable.total += 1
            try:
                image, label = self.load(index)
            except Exception as error:
                if self.strict:
                    raise
                self.unreadable.add(self.name(index), error)
                continue
            if pending and (len(pending) == self.batch_size or pending[0][2].shape != image.shape):
                yield _stack(pending)
                pending.clear()
            pending.append((index, first_group + group, image, label))
        if pending:
            yield _stack(pending)


def _stack(pending: Sequence[tuple[int, int, Tensor, Tensor | None]]) -> Batch:
    indices, groups, images, labels = zip(*pending)
    known = [label for label in labels if label is not None]
    return Batch(torch.stack(images), indices, torch.stack(known) if len(known) == len(labels) else None, groups)


def open_picture(path: str | Path) -> Any:
    """Opens a file as an RGB picture of PIL's, the right side up.

    Raises:
        InputError: If it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == 'F':
                image = Image.fromarray(_levels(np.asarray(image)))
            elif image.mode.startswith('I'):
                # Pillow would cut 16 bits off at 255.
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f'{path} cannot be read as an image: {error}') from error


def _levels(values: np.ndarray) -> np.ndarray:
    """Floating pixels as 8 bits; Pillow would cut those of [0, 1] off to black."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 255:
        raise ValueError(f'its pixels range from {low:g} to {high:g}, expected 0 to 1, or 0 to 255')
    return np.round(values * (255 if high <= 1 else 1)).astype(np.uint8)


def read_picture(path: str | Path) -> Tensor:
    """Reads a file at its own size, (3, H, W) in [-1, 1]; see :func:`open_picture`."""
    return _to_tensor(open_picture(path))


def _to_tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


def list_images(folder: str | Path) -> list[Path]:
    """The images in a folder and the folders in it, by name."""
    return sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in EXTENSIONS)


class Images(ImageSource):
    """Images that a user has at hand: a tensor, a folder, a list of files.

    Args:
        images: (N, 3, H, W), uint8 in [0, 255] or floating in [0, 1]; or a folder, searched through with all below
            it; or files.
        size: Files are scaled until their shorter side has this many pixels, and cropped to a square in the middle.
            Tensors are taken as they are.
        labels: Class of each image, (N,).
        max_unreadable: Share of the files that may be unreadable and are passed over; None raises at the first.

    Attributes:
        files: Path of each file; empty for a tensor.

    Raises:
        InputError: If there are no images, or their type, shape or range is another.
    """

    def __init__(
        self,
        images: Tensor | str | Path | Sequence[str | Path],
        size: int,
        labels: Tensor | Sequence[int] | None = None,
        max_unreadable: float | None = None,
    ) -> None:
        self.size, self.strict, self.unreadable = size, max_unreadable is None, Unreadable(max_unreadable or 0)
        self.tensor: Tensor | None = None
        self.files: list[Path] = []
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
            self.files = list_images(folder)
        else:
            self.files = [Path(path) for path in images]
        if not len(self):
            raise InputError(f'images={str(images)[:80]!r} has none: {", ".join(EXTENSIONS)} are looked for')
        self.labels = None if labels is None else torch.as_tensor(labels)
        if self.labels is not None and self.labels.shape != (len(self),):
            raise InputError(f'labels of shape {tuple(self.labels.shape)} do not fit {len(self)} images')

    def __len__(self) -> int:
        return len(self.files) if self.tensor is None else len(self.tensor)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.files[index]) if self.files else super().name(index)

    def load(self, index: int) -> tuple[Tensor, Tensor | None]:
        """See :class:`ImageSource`."""
        label = None if self.labels is None else self.labels[index]
        if self.tensor is None:
            return self._read(self.files[index]), label
        image = self.tensor[index]
        return image / 127.5 - 1 if image.dtype == torch.uint8 else image.float() * 2 - 1, label

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        return _to_tensor(ImageOps.fit(open_picture(path), (self.size, self.size), Image.Resampling.BICUBIC))


def draw_portions(size: int, num_images: int | str | None, seed: int, first: int | None = None) -> list[list[int]]:
    """Draws the images to select on; the same on every rank.

    Args:
        size: Of the data set.
        num_images: How many, None for all, or ``'auto'`` for portions that double what has been drawn.
        seed: Of the draw.
        first: Images of the first portion, where there shall be several.

    Returns:
        Indices in random order, so that neighbours, which are centred and resampled together, are a sample of all: data
        sets are sorted by class. One portion, unless ``num_images`` is ``'auto'`` or ``first`` is given.
    """
    order = np.random.default_rng(seed).permutation(size).tolist()
    order = order[: AUTO_IMAGES[1] if num_images == 'auto' else num_images]
    if first is None and num_images != 'auto':
        return [order]
    portions, start, stop = [], 0, first or AUTO_IMAGES[0]
    while start < len(order):
        portions.append(order[start:stop])
        start, stop = stop, 2 * stop
    return portions or [[]]


def number_groups(portions: Iterable[Sequence[int]], group: int) -> Iterator[tuple[Sequence[int], int]]:
    """Each portion with the number of its first group; a portion begins a group of its own."""
    first = 0
    for indices in portions:
        yield indices, first
        first += -(-len(indices) // group)
