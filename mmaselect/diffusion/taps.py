"""Where features are read: names of places in a network, and what a config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mmaselect.errors import InputError, check_choice

#: What can be read from a block, in the order in which a block computes it. Checkpoints hold positions in this list:
#: append to it, never reorder it.
COMPONENTS = ('modulated', 'query', 'key', 'value', 'attention', 'output')
#: Candidates of ``component='auto'``: those that the paper compares.
AUTO_COMPONENTS = ('query', 'key', 'value', 'attention', 'output')


class Tap(NamedTuple):
    """A place to read features from.

    Attributes:
        block: Index of the block, counted from 0.
        component: One of ``COMPONENTS``: ``modulated`` (the block input after its AdaLN, what the attention reads),
            ``query``, ``key``, ``value`` (heads concatenated), ``attention`` (image tokens of the attention's output
            projection, before its gate and the residual), ``output`` (image tokens that leave the block).
    """

    block: int
    component: str


def make_taps(block: int | Sequence[int], component: str | Sequence[str], num_blocks: int) -> tuple[Tap, ...]:
    """Builds the taps of a config: every component of every block, in the order given.

    Args:
        block: One block index or several, each in [0, num_blocks).
        component: One component or several.
        num_blocks: Number of blocks of the model.

    Returns:
        ``len(blocks) * len(components)`` taps, block-major.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    blocks: list[Any] = list(block) if isinstance(block, (list, tuple)) else [block]
    components: list[Any] = list(component) if isinstance(component, (list, tuple)) else [component]
    if not blocks or not components:
        raise InputError(f'block={block!r}, component={component!r}: give at least one of each')
    for index in blocks:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_blocks:
            raise InputError(
                f'block={index!r} is out of range: the model has {num_blocks} blocks, 0 to {num_blocks - 1}'
            )
    for name in components:
        check_choice(name, 'component', COMPONENTS)
    return tuple(Tap(index, name) for index in blocks for name in components)


def make_alternatives(
    block: int | Sequence[int] | str, component: str | Sequence[str], num_blocks: int
) -> list[tuple[Tap, ...]]:
    """Builds what a selection may choose from.

    Args:
        block: As of :func:`make_taps`, or ``'auto'``: one of all blocks is to be chosen.
        component: Likewise; ``'auto'`` for one of ``AUTO_COMPONENTS``.
        num_blocks: Number of blocks of the model.

    Returns:
        Sets of taps, block-major; a single one where nothing is left open.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    if isinstance(block, str) and block != 'auto':
        raise InputError(f"block={block!r} is not valid: give a number from 0 to {num_blocks - 1}, or 'auto'")
    blocks: list[Any] = list(range(num_blocks)) if block == 'auto' else [block]
    components: list[Any] = list(AUTO_COMPONENTS) if component == 'auto' else [component]
    return [make_taps(one, name, num_blocks) for one in blocks for name in components]


def all_taps(alternatives: Iterable[Sequence[Tap]]) -> list[Tap]:
    """Every tap of several sets, once, in the order of their first occurrence."""
    return list(dict.fromkeys(tap for taps in alternatives for tap in taps))
