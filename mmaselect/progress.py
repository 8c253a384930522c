"""Progress bars that suit both eyes and log files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar; where it goes to a file, where every redrawing is a line, it moves every ten seconds.

    Args:
        **options: Of ``tqdm``.

    Returns:
        The bar, a context manager.
    """
    return tqdm(**{'mininterval': 0.1 if sys.stderr.isatty() else 10, **options})
