"""``LoadReadableImage``: one broken file among a million does not end a training."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from mmaselect.errors import one_line


@TRANSFORMS.register_module()
class LoadReadableImage:
    """mmcv's ``LoadImageFromFile``; where a file cannot be read, the data set puts another image in its place.

    That is what mmengine's data sets do in training for a transform that returns None. Each such file is listed in
    the log, with its number. For training only: a metric must count every image, so evaluation keeps
    ``LoadImageFromFile`` and ends with an error.

    Args:
        **options: Of ``LoadImageFromFile``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.unreadable: set[str] = set()
        self._load: Any = None

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Reads ``results['img_path']`` to ``results['img']``; None if that is not possible."""
        if self._load is None:
            # mmcv takes a second to import, and is needed only where a config asks for this.
            from mmcv.transforms import LoadImageFromFile

            self._load = LoadImageFromFile(**self.options)
        try:
            return self._load(results)
        except Exception as error:
            path = results['img_path']
            if path not in self.unreadable:
                self.unreadable.add(path)
                print_log(
                    f'{path} cannot be read, another image takes its place (no. {len(self.unreadable)} of this '
                    f'process): {one_line(error)}',
                    logger='current',
                    level=logging.WARNING,
                )
            return None

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{key}={value!r}" for key, value in self.options.items())})'
