"""Where features are read: names of places in a network, and what a config asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from mmaselect.errors import InputError, check_choice

#: What can be read from a transformer's block, in the order in which it is computed.
COMPONENTS = ('modulated', 'query', 'key', 'value', 'attention', 'output')
#: Candidates of ``component='auto'``: those that the paper compares.
AUTO_COMPONENTS = ('query', 'key', 'value', 'attention', 'output')


class Tap(NamedTuple):
    """A place to read features from.

    Attributes:
        block: Number of the block, counted from 0 in the order of the pass.
        component: What of it. Of a transformer's block ``modulated`` (its input after its AdaLN, what the attention
            reads), ``query``, ``key``, ``value`` (heads concatenated), ``attention`` (image tokens of the attention's
            output projection, before its gate and the residual), ``output`` (image tokens that leave the block).
    """

    block: int
    component: str


def make_taps(block: Any, component: Any, known: Collection[Tap]) -> tuple[Tap, ...]:
    """Builds the taps of a config: every component of every block, in the order given.

    Args:
        block: Number of a block, counted from 0, or several.
        component: One component or several.
        known: All taps of the model.

    Returns:
        ``len(blocks) * len(components)`` taps, block-major.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    blocks: list[Any] = list(block) if isinstance(block, (list, tuple)) else [block]
    components: list[Any] = list(component) if isinstance(component, (list, tuple)) else [component]
    if not blocks or not components:
        raise InputError(f'block={block!r}, component={component!r}: give at least one of each')
    count = 1 + max(tap.block for tap in known)
    names = dict.fromkeys(tap.component for tap in known)
    for index in blocks:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise InputError(f'block={index!r} is out of range: the model has {count} blocks, 0 to {count - 1}')
    for name in components:
        check_choice(name, 'component', names)
    taps = tuple(Tap(index, name) for index in blocks for name in components)
    for tap in taps:
        if tap not in known:
            there = ', '.join(other.component for other in known if other.block == tap.block)
            raise InputError(f'component={tap.component!r} is not in block {tap.block}; choose from: {there}')
    return taps


def make_alternatives(
    block: Any, component: Any, known: Collection[Tap], auto: Collection[str]
) -> list[tuple[Tap, ...]]:
    """Builds what a selection may choose from.

    Args:
        block: As of :func:`make_taps`, or ``'auto'``: one of all blocks is to be chosen.
        component: Likewise; ``'auto'`` for one of ``auto``.
        known: All taps of the model.
        auto: Candidates for the component; none for all but softmax maps, which take more memory than all others.

    Returns:
        Sets of taps, block-major; a single one where nothing is left open.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    count = 1 + max(tap.block for tap in known)
    if isinstance(block, str) and block != 'auto':
        raise InputError(f"block={block!r} is not valid: give a number from 0 to {count - 1}, or 'auto'")
    blocks: list[Any] = list(range(count)) if block == 'auto' else [block]
    every = dict.fromkeys(tap.component for tap in known if not tap.component.endswith('-map'))
    components: list[Any] = list(auto or every) if component == 'auto' else [component]
    pairs = [(one, name) for one in blocks for name in components]
    if 'auto' in (block, component):
        # Not every block of a U-Net has every component.
        pairs = [(one, name) for one, name in pairs if not _single(one, name) or Tap(one, name) in known]
    alternatives = [make_taps(one, name, known) for one, name in pairs]
    if not alternatives:
        raise InputError(f'block={block!r}, component={component!r}: the model has no such tap')
    return alternatives


def _single(block: Any, component: Any) -> bool:
    return isinstance(block, int) and isinstance(component, str)


def all_taps(alternatives: Iterable[Sequence[Tap]]) -> list[Tap]:
    """Every tap of several sets, once, in the order of their first occurrence."""
    return list(dict.fromkeys(tap for taps in alternatives for tap in taps))
