"""Signs of life: a bar for what can be counted, the time gone for what cannot.

On a terminal a bar is redrawn in place. In a file, where every redrawing would be a line, there is a line every thirty
seconds. Only rank 0 speaks.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

#: Seconds between two lines in a file, and before the first one.
LINES = 30.0
#: Seconds after which a terminal is told of what usually takes less.
PATIENCE = 5.0
#: Seconds between two signs of life on a terminal.
TICK = 1.0
#: A line of what has an end, and of what may have none.
LINE = '{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}'
OPEN_LINE = '{desc}: {n_fmt} {unit}, {elapsed} gone{postfix}'


class Bar(tqdm):
    """A tqdm bar that moves on although nothing has been counted, and writes whole lines where it cannot be redrawn.

    Args:
        **options: Of ``tqdm``.
    """

    last_print_t: float
    start_t: float

    def __init__(self, **options: Any) -> None:
        file = options.get('file') or sys.stderr
        self._lines = not file.isatty()
        if self._lines:
            options.update(mininterval=LINES, delay=LINES, miniters=1)
        self._ended = Event()
        # A terminal that does not know its height has none for tqdm, which then shows nothing.
        super().__init__(**{'nrows': 20, **options})
        if not self.disable:
            Thread(target=self._live, args=(LINES if self._lines else TICK,), daemon=True).start()

    def _live(self, tick: float) -> None:
        while not self._ended.wait(tick):
            self.live()

    def live(self) -> None:
        """Shows the time that has gone, if nothing was shown for a while."""
        now = self._time()
        # Clocks differ by microseconds: what is due in a thousandth of a second is due.
        if now + 1e-3 >= max(self.last_print_t + self.mininterval, self.start_t + self.delay):
            self.refresh()
            self.last_print_t = now

    def status_printer(self, file: Any) -> Any:
        """Gives the function that shows a status."""
        if not self._lines:
            return super().status_printer(file)

        def write(status: str) -> None:
            if status:
                file.write(f'{status}\n')
                file.flush()

        return write

    @property
    def format_dict(self) -> dict[str, Any]:
        """What a status is made of."""
        found = super().format_dict
        if self._lines and found['bar_format'] is None:
            # The total may have been set since.
            found['bar_format'] = LINE if self.total else OPEN_LINE
        return found

    def moveto(self, n: int) -> None:
        """Moves the cursor, where there is one."""
        if not self._lines:
            super().moveto(n)

    def close(self) -> None:
        """Ends it: the last status stays on a terminal, and is the last line of a file that has seen others."""
        self._ended.set()
        if self._lines and not self.disable:
            if self.leave and self.last_print_t >= self.start_t + self.delay:
                self.display()
            # As if nothing had been shown: there is nothing to wipe out.
            self.last_print_t = self.start_t
        super().close()


def progress_bar(**options: Any) -> Bar:
    """Makes a bar.

    Args:
        **options: Of ``tqdm``. ``delay=PATIENCE`` keeps it from a terminal unless the work takes longer.

    Returns:
        The bar, a context manager. It is disabled on every rank but the first.
    """
    return Bar(**{**options, 'disable': options.get('disable') or not _speaks()})


def working(what: str) -> AbstractContextManager:
    """Gives a block whose steps nobody can count: the time gone is shown, from the fifth second on.

    Args:
        what: Goes on in it.
    """
    return progress_bar(desc=what, bar_format='{desc}: {elapsed}', delay=PATIENCE, leave=False)


def _speaks() -> bool:
    torch = sys.modules.get('torch')
    distributed = getattr(torch, 'distributed', None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_rank() == 0
