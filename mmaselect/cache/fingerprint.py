"""Fingerprints: two values with the same fingerprint are the same, whatever process or machine made them."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmaselect.errors import InputError, one_line

#: Says where a sample stands in its data set, not what it is.
POSITION = 'sample_idx'


class UnreadableFile(InputError):
    """A file that a sample names is not there, or not to be read."""


def fingerprint(value: Any, files: bool = False, backends: Mapping[str, Any] | None = None) -> bytes:
    """Hashes nested dicts, lists, numbers, texts and arrays.

    Args:
        value: What to hash. Dicts are read in the order of their keys.
        files: Read what a key ends in ``path`` names, and hash its bytes in place of its name: a file that was moved is
            the same, one that was overwritten is not.
        backends: ``backend_args`` that the file of a key is read by; others are read as their name asks for.

    Returns:
        32 bytes (SHA-256).

    Raises:
        UnreadableFile: If a file cannot be read.
        InputError: If something else is in there.
    """
    digest = hashlib.sha256()
    _add(digest, value, files, backends or {})
    return digest.digest()


def _add(digest: Any, value: Any, files: bool, backends: Mapping[str, Any]) -> None:
    if isinstance(value, Mapping):
        digest.update(b'{')
        for key in sorted(value, key=str):
            if key == POSITION and files:
                continue
            _add(digest, str(key), False, backends)
            named = files and _names_file(key, value[key])
            _add(digest, _content(str(value[key]), backends.get(key)) if named else value[key], files, backends)
        digest.update(b'}')
    elif isinstance(value, (list, tuple)):
        digest.update(b'[')
        for item in value:
            _add(digest, item, files, backends)
        digest.update(b']')
    elif value is None or isinstance(value, (bool, int, float, str, Path)):
        _add_bytes(digest, type(value).__name__, str(value).encode())
    elif isinstance(value, bytes):
        _add_bytes(digest, 'bytes', value)
    elif isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        _add_bytes(digest, f'tensor {value.dtype} {tuple(value.shape)}', raw)
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        array = np.ascontiguousarray(value)
        _add_bytes(digest, f'array {array.dtype.str} {array.shape}', array.tobytes())
    elif inspect.isclass(value) or inspect.isroutine(value):
        _add_bytes(digest, 'code', f'{value.__module__}.{value.__qualname__}'.encode())
    else:
        raise InputError(
            f'a {type(value).__name__} ({value!r:.60}) cannot be told from another: features of it are not cached'
        )


def files_of(value: Any) -> Iterator[str]:
    """Names of the files that :func:`fingerprint` reads of a sample."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if _names_file(key, value[key]):
                yield str(value[key])
            else:
                yield from files_of(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from files_of(item)


def _names_file(key: Any, value: Any) -> bool:
    return str(key).endswith('path') and isinstance(value, (str, Path)) and bool(str(value))


def _add_bytes(digest: Any, kind: str, content: bytes) -> None:
    # With the length, so that no two sequences of values run together into the same bytes.
    digest.update(f'{kind} {len(content)}:'.encode())
    digest.update(content)


def _content(path: str, backend: Any) -> bytes:
    """SHA-256 of a file, by one of mmengine's backends; None for whichever its name asks for."""
    from mmengine import fileio

    try:
        return hashlib.sha256(fileio.get(path, backend)).digest()
    except Exception as error:  # each backend has errors of its own
        raise UnreadableFile(f'{path} cannot be read: {getattr(error, "strerror", None) or one_line(error)}') from error


def source_of(*objects: Any) -> bytes:
    """Fingerprint of the code of classes, functions or packages; comments and docstrings are no part of it."""
    names = set()
    for item in objects:
        file = inspect.getsourcefile(item)
        if file is not None:
            path = Path(file)
            names |= set(path.parent.rglob('*.py')) if path.name == '__init__.py' else {path}
    return fingerprint([_code(path.read_bytes()) for path in sorted(names)])


@functools.lru_cache(maxsize=256)
def _code(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
