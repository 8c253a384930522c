"""Files appear whole or not at all: they are written under a temporary name beside their own, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: Seconds without a write after which a temporary file counts as left behind.
ABANDONED_AFTER = 3600


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which takes the place of ``path`` if the block ends well.

    Args:
        path: Where the file shall be; its folder is created.

    Yields:
        A path in the same folder, with the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}.', suffix=f'.tmp{path.suffix}')
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; results are for everyone the umask allows.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: str | Path) -> list[Path]:
    """Removes temporary files of processes that were killed while they wrote.

    Args:
        folder: Where :func:`atomic_path` wrote; folders in it are left alone.

    Returns:
        What was removed.
    """
    removed = []
    for path in Path(folder).glob('.*.tmp*'):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink()
                removed.append(path)
    return removed


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, indented, atomically; refuses NaN and infinity, which are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + '\n', encoding='utf-8')
