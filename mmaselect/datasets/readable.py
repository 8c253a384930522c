"""One broken file among a million does not end a training; where it has to end a run, it is named."""

from __future__ import annotations

import functools
import logging
import traceback
from pathlib import Path
from typing import Any

import torch
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
        self.options, self.backend_args = options, options.get('backend_args')
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


def check_sample(sample: Any) -> None:
    """Checks what a pipeline made of an image and its label map, while the names of the files are known.

    Args:
        sample: With ``inputs`` (C, H, W), as the data preprocessor takes them, and ``data_samples``.

    Raises:
        InputError: If the image has not one or three channels, or values that are not in [0, 255], or the label map has
            more than one channel.
    """
    if not isinstance(sample, dict):
        return
    image, found = sample.get('inputs'), sample.get('data_samples')
    path = getattr(found, 'img_path', None)
    if path is None or not isinstance(image, torch.Tensor) or image.dim() != 3:
        return
    if image.shape[0] not in (1, 3):
        raise InputError(f'{path} is read with {image.shape[0]} channels: the model sees RGB')
    if image.dtype != torch.uint8:
        values = image.double()
        low, high = values.aminmax()
        # Interpolation may overshoot; of 256 levels, those below the second are whole numbers.
        scaled = high <= 1 and not torch.equal(values, values.round())
        if not -25 <= low <= high <= 280 or scaled:
            raise InputError(f'{path} is read as {image.dtype} from {low:g} to {high:g}: expected 0 to 255')
    # mmdet's label maps have another name in there.
    labels = getattr(getattr(found, 'gt_sem_seg', None), 'data', None)
    if labels is not None and labels.shape[0] != 1:
        map_path, shape = getattr(found, 'seg_map_path', path), tuple(labels.shape)
        raise InputError(
            f'{map_path} is read as a label map of {shape}: expected one channel of class numbers, not colours'
        )


def name_broken_files() -> None:
    """Lets mmengine's data sets say which file a toolbox's transform could not read, also from a loader's worker.

    What reads label maps, and images that are empty, says only what was wrong; colours in a label map, and images of
    four channels, are read without a word. All else that a transform raises stays as it is.
    """
    from mmengine.dataset import BaseDataset

    prepare = BaseDataset.prepare_data
    if hasattr(prepare, '__wrapped__'):
        return

    @functools.wraps(prepare)
    def prepare_or_name(self: BaseDataset, idx: int) -> Any:
        try:
            sample = prepare(self, idx)
            check_sample(sample)
            return sample
        except Exception as error:
            path = None if isinstance(error, InputError) else _broken_file(error)
            if path is None:
                raise
            raise InputError(f'{path} cannot be read: {one_line(error)}') from error

    BaseDataset.prepare_data = prepare_or_name
    BaseDataset.__reduce_ex__ = _reduce


def _reduce(dataset: Any, protocol: Any) -> tuple:
    """Pickles a data set so that a worker that is spawned, not forked, names broken files too."""
    reduced: Any = object.__reduce_ex__(dataset, protocol)
    make, args, *rest = reduced
    return (_make, (make, args), *rest)


def _make(make: Any, args: tuple) -> Any:
    name_broken_files()
    return make(*args)


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
