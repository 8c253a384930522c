"""One broken file among a million does not end a training; where it has to end a run, it is named."""

from __future__ import annotations

import functools
import logging
import traceback
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS

from mmaselect.errors import InputError, one_line
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
            path, found = results['img_path'], self.unreadable.found
            if all(path != name for name, _ in found):
                self.unreadable.add(path, error)
                print_log(
                    f'{path} cannot be read, another image takes its place (no. {len(found)} of this process): '
                    f'{one_line(error)}',
                    logger='current',
                    level=logging.WARNING,
                )
            return None

    def __repr__(self) -> str:
        options = {'max_unreadable': self.unreadable.share, **self.options}
        return f'{type(self).__name__}({", ".join(f"{key}={value!r}" for key, value in options.items())})'


def name_broken_files() -> None:
    """Lets mmengine's data sets say which file a toolbox's transform could not read, also from a loader's worker.

    What reads label maps, and images that are empty, says only what was wrong. All else that a transform raises stays
    as it is.
    """
    from mmengine.dataset import BaseDataset

    prepare = BaseDataset.prepare_data
    if hasattr(prepare, '__wrapped__'):
        return

    @functools.wraps(prepare)
    def prepare_or_name(self: BaseDataset, idx: int) -> Any:
        try:
            return prepare(self, idx)
        except Exception as error:
            path = None if isinstance(error, InputError) else _broken_file(error)
            if path is None:
                raise
            raise InputError(f'{path} cannot be read: {one_line(error)}') from error

    BaseDataset.prepare_data = prepare_or_name


def _broken_file(error: BaseException) -> str | None:
    """Path of the file that a loading transform was reading; None where something else failed."""
    path, reading = None, 'failed to load image' in str(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file, results = Path(frame.f_code.co_filename).as_posix(), frame.f_locals.get('results')
        if file.endswith('/transforms/loading.py') and isinstance(results, dict):
            path = results.get('seg_map_path' if frame.f_code.co_name == '_load_seg_map' else 'img_path')
            # mmcv 2.0 goes on with what could not be decoded.
            reading = reading or frame.f_locals.get('img', path) is None
        elif path is not None:
            reading = reading or '/mmcv/image/' in file or '/mmengine/fileio/' in file
    return path if reading else None
