"""What heads and necks that read several maps check of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmaselect.errors import InputError, check_count


def check_channels(in_channels: Sequence[int]) -> tuple[int, ...]:
    """Validates the channels of several maps, an ``in_channels`` of a config.

    Raises:
        InputError: If it is no list of whole numbers, or empty.
    """
    if not isinstance(in_channels, (list, tuple)) or not in_channels:
        raise InputError(f'in_channels={in_channels!r} is not valid: give the channels of each map')
    return tuple(check_count(count, 'in_channels') for count in in_channels)


def check_maps(maps: Sequence[Tensor], in_channels: tuple[int, ...], owner: str = 'head') -> None:
    """Raises :class:`InputError` unless the maps (B, C, h, w) have the channels that their reader was built for."""
    found = tuple(one.shape[1] for one in maps)
    if found != in_channels:
        raise InputError(
            f'in_channels={in_channels} of the {owner}, but maps of {found} channels came in: set in_channels to theirs'
        )
