"""Images that cannot be read: counted, listed, and passed over while they are few."""

from __future__ import annotations

import logging

from mmaselect.errors import InputError, one_line

#: Share of unreadable images that does not end a run.
SHARE = 0.01


class Unreadable:
    """The unreadable images of one pass over a data set.

    Args:
        share: Of the images, in [0, 1], that may be unreadable; one always may, unless it is 0.
        fewest: Images that it is a share of at the least, where ``total`` grows: the first few say nothing about all.

    Attributes:
        found: Name and reason of each.
        total: Images that were to be read, readable or not.

    Raises:
        InputError: If ``share`` is out of range.
    """

    def __init__(self, share: float = SHARE, fewest: int = 0) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise InputError(f'max_unreadable={share!r} is not valid: give a share of the images, 0 to 1')
        self.share, self.fewest = share, fewest
        self.found: list[tuple[str, str]] = []
        self.total = 0

    def add(self, name: object, error: BaseException) -> None:
        """Notes one.

        Args:
            name: Of the image.
            error: What reading it raised.

        Raises:
            InputError: If there are more than may be.
        """
        self.found.append((str(name), one_line(error, f'{name} cannot be read: ')))
        allowed = max(1, int(self.share * max(self.total, self.fewest))) if self.share else 0
        if len(self.found) > allowed:
            first, why = self.found[0]
            raise InputError(
                f'{len(self.found)} of {self.total} images cannot be read, more than max_unreadable={self.share:g} '
                f'allows; the first is {first}: {why}'
            ) from error

    def report(self, logger: logging.Logger, done: str = 'they are passed over') -> None:
        """Lists them in a log, if there are any.

        Args:
            logger: Of the run.
            done: What was done about them.
        """
        if self.found:
            listed = '; '.join(f'{name} ({reason})' for name, reason in self.found)
            logger.warning(f'{len(self.found)} of {self.total} images cannot be read, {done}: {listed}')
