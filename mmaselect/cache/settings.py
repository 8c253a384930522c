"""The ``cache=dict(...)`` entry of a backbone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmaselect.diffusion.loading import parse_dtype
from mmaselect.errors import InputError, check_count, check_fields, check_flag, check_number
from mmaselect.unreadable import SHARE, Unreadable


@dataclass(frozen=True)
class CacheSettings:
    """How the features of the training images are kept.

    Attributes:
        dir: Folder of all caches; each setting has a folder of its own in it. All ranks must see the same.
        dtype: What features are stored in: ``'bfloat16'`` (3 significant digits), ``'float16'`` or ``'float32'``; None
            for bfloat16, where vectors are stored for float32.
        pool: Store vectors where all that the neck does to the maps first is to pool them, see
            :func:`~mmaselect.cache.pooling.pooling_of`. False stores maps, for other necks to train on.
        views: Augmented views of each image, where the training pipeline is random; epochs take turns with them.
        max_gb: Refuse to write more than this many GB (1e9 bytes); None for what the disk has free.
        batch_size: Images per forward pass; None for that of the training data loader.
        seed: Of the augmentation.
        max_unreadable: Share of the images that may be unreadable; the next readable one takes their place.

    Raises:
        InputError: If a value is out of range.
    """

    dir: str
    dtype: str | None = None
    pool: bool = True
    views: int = 1
    max_gb: float | None = None
    batch_size: int | None = None
    seed: int = 0
    max_unreadable: float = SHARE

    def __post_init__(self) -> None:
        if not isinstance(self.dir, (str, Path)) or not str(self.dir):
            raise InputError(f'cache.dir={self.dir!r} is not valid: give a folder')
        parse_dtype(self.dtype or 'float32')
        check_flag(self.pool, 'cache.pool')
        for name, least in (('views', 1), ('batch_size', 1), ('seed', 0)):
            value = getattr(self, name)
            if name == 'batch_size' and value is None:
                continue
            check_count(value, f'cache.{name}', least)
        Unreadable(self.max_unreadable)
        if self.max_gb is not None:
            check_number(self.max_gb, 'cache.max_gb', 0, open_low=True)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> CacheSettings:
        """Reads a config entry; a field that does not exist is named, with those that do."""
        check_fields(settings, 'cache', [field.name for field in fields(cls)], "dict(dir='FOLDER')")
        if 'dir' not in settings:
            raise InputError('cache.dir is not set: give a folder')
        return cls(**settings)
