"""``LoadReadableImage``: one broken file among a million does not end a training."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from mmaselect.errors import one_line
from mmaselect.unreadable import SHARE, Unreadable


@TRANSFORMS.register_module()
class LoadReadableImage:
    """mmcv's ``LoadImageFromFile``; where a file cannot be read, the data set puts another image in its place.

    That is what mmengine's data sets do in training for a transform that returns None. Each such file is listed in
    the log, with its number. For training only: a metric must count every image, so evaluation keeps
    ``LoadImageFromFile`` and ends with an error.

    Args:
        max_unreadable: Share, in [0, 1], of the images that one process (a worker of the data loader) has read, at
            least of the first 1000: more that are broken end the run. 0 ends it at the first.
        **options: Of ``LoadImageFromFile``.

    Raises:
        InputError: If ``max_unreadable`` is out of range; when called, for one broken image too many.
    """

    def __init__(self, max_unreadable: float = SHARE, **options: Any) -> None:
        self.options = options
        self.unreadable = Unreadable(max_unreadable, fewest=1000)
        self._named: set[str] = set()
        self._load: Any = None

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Reads ``results['img_path']`` to ``results['img']``; None if that is not possible."""
        if self._load is None:
            # mmcv takes a second to import, and is needed only where a config asks for this.
            from mmcv.transforms import LoadImageFromFile

            self._load = LoadImageFromFile(**self.options)
        self.unreadable.total += 1
        try:
            return self._load(results)
        except Exception as error:
            path = results['img_path']
            if path not in self._named:
                self._named.add(path)
                self.unreadable.add(path, error)
                print_log(
                    f'{path} cannot be read, another image takes its place (no. {len(self._named)} of this '
                    f'process): {one_line(error)}',
                    logger='current',
                    level=logging.WARNING,
                )
            return None

    def __repr__(self) -> str:
        options = {'max_unreadable': self.unreadable.share, **self.options}
        return f'{type(self).__name__}({", ".join(f"{key}={value!r}" for key, value in options.items())})'
