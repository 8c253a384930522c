"""Fingerprints of samples, remembered for as long as their files do not change: a million images are not read again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Any, Union
from zipfile import BadZipFile

import numpy as np

from mmaselect.files import atomic_path

#: Samples whose fingerprints are one file.
BLOCK = 2048
#: Nanoseconds for which a file that was changed is not believed: it may be changed again under the same time stamp.
YOUNG = 2 * 10**9
#: What is found of a sample: its fingerprint, or why there is none; its files; their stamp from before they were read.
Found = tuple[Union[bytes, Exception], Sequence[str], int]


def stamp_of(files: Sequence[str]) -> int:
    """A number that is another once one of the files is changed or replaced; 0 for what cannot be told.

    It is made of inodes, sizes and times. Among them is the time of the last change of the inode, which no program sets
    back.
    """
    try:
        found = [os.stat(file) for file in files]
    except (OSError, ValueError):
        return 0
    if not found or max(max(one.st_mtime_ns, one.st_ctime_ns) for one in found) > time.time_ns() - YOUNG:
        return 0
    return hash(tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found))


def read_block(
    folder: Path | None, dataset: Any, indices: range, read: Callable[[int], Found], pool: Executor
) -> tuple[np.ndarray, dict[int, Exception]]:
    """Finds the fingerprints of some samples: of files that have not changed they are those of the last time.

    Args:
        folder: Where they are remembered; None to read every file.
        dataset: Of the samples. Only of a data set that mmengine has serialised it is known what it says of them.
        indices: Of the samples.
        read: Reads one.
        pool: Reads several at once.

    Returns:
        Fingerprints, (samples, 32) bytes, zeros where there is none; and why there is none, by index.
    """
    said = _what_is_said(dataset, indices)
    path = None if folder is None or said is None else folder / f'{hashlib.sha256(said).hexdigest()[:32]}.npz'
    digests, stamps = np.zeros((len(indices), 32), np.uint8), np.zeros(len(indices), np.int64)
    files: list[Sequence[str]] = [()] * len(indices)
    if path is not None:
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(path, allow_pickle=False) as stored:
            names = stored['files'].tobytes().decode('utf-8', 'surrogateescape').split('\0\0')
            digests, stamps, files = stored['digests'], stored['stamps'], [own.split('\0') for own in names]
    now = [0] * len(indices)
    if stamps.any():
        parts = [files[start : start + 256] for start in range(0, len(files), 256)]
        now = [stamp for part in pool.map(lambda part: [stamp_of(own) for own in part], parts) for stamp in part]
    changed = np.flatnonzero((stamps == 0) | (stamps != np.array(now)))
    errors = {}
    for place, (result, own, stamp) in zip(changed, pool.map(read, [indices[place] for place in changed])):
        files[place] = own
        if isinstance(result, Exception):
            digests[place], stamps[place], errors[indices[place]] = 0, 0, result
        else:
            digests[place], stamps[place] = np.frombuffer(result, np.uint8), stamp
    if path is not None and stamps[changed].any():
        content = '\0\0'.join('\0'.join(own) for own in files).encode('utf-8', 'surrogateescape')
        with atomic_path(path) as temporary:
            np.savez(temporary, digests=digests, stamps=stamps, files=np.frombuffer(content, np.uint8))
    return digests, errors


def _what_is_said(dataset: Any, indices: range) -> bytes | None:
    """All that a data set says of some samples, as it holds it; None where it holds no such thing."""
    content, ends = getattr(dataset, 'data_bytes', None), getattr(dataset, 'data_address', None)
    if content is None or not isinstance(ends, np.ndarray) or len(ends) != len(dataset):
        return None
    start = int(ends[indices[0] - 1]) if indices[0] else 0
    own = ends[indices[0] : indices[-1] + 1]
    return bytes(np.asarray(content[start : int(own[-1])])) + (own - start).tobytes()
