"""Coarse-to-fine: finds the peak of a curve without evaluating all of it, and knows when it must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: A curve that varies by less than this share of its height has no peak to search for.
FLAT = 0.05
#: A second peak within this share of the curve's range is as good as the first.
NEAR = 0.1


def make_plan(num: int) -> tuple[int, int] | None:
    """Strides of the first look and of the second one, around the best of the first.

    Args:
        num: Points of the fine grid.

    Returns:
        Two strides that find a single peak to within one point in at most ``num // 3`` evaluations, which the second
        stride does if it is 1 or 2; 1 where the budget allows it, and the first look as close as it allows. None if
        there is no such plan (below about 30 points).
    """
    plans = [(first, second) for second in (1, 2) for first in range(second + 1, num)]
    return next((plan for plan in plans if cost(plan, num) <= num // 3), None)


def cost(plan: tuple[int, int], num: int) -> int:
    """Evaluations that a plan needs at most."""
    first, second = plan
    return len(grid(num, first)) + 2 * len(range(second, first, second))


def grid(num: int, stride: int) -> list[int]:
    """Every ``stride``-th of ``num`` positions, with both ends."""
    return sorted({*range(0, num, stride), num - 1})


def rival(positions: Sequence[int], values: Sequence[float], drop: float = 0.0) -> int | None:
    """Finds a second peak that may be the higher one.

    Between two evaluated points a curve can rise further. A local maximum that is not next to the best point rivals it
    if it reached the best after rising by another half of the step to its lower neighbour, or if it is so close below
    the best that other images might turn the order round.

    Args:
        positions: Of the evaluated points, ascending.
        values: At these.
        drop: Share of the curve's range by which the lower neighbour must lie below the peak: less is noise.

    Returns:
        Its position, or None.
    """
    best = max(range(len(values)), key=values.__getitem__)
    span = max(values) - min(values)
    for here, value in enumerate(values):
        if abs(here - best) < 2:
            continue
        around = [values[there] for there in (here - 1, here + 1) if 0 <= there < len(values)]
        step = value - min(around)
        if value >= max(around) and step >= drop * span and value + max(NEAR * span, step / 2) >= values[best]:
            return positions[here]
    return None


def coarse_to_fine(
    num: int, evaluate: Callable[[list[int]], dict[int, float]], names: Sequence[float] | None = None
) -> str:
    """Evaluates a coarse grid, then a fine one around its best point.

    Args:
        num: Points of the fine grid.
        evaluate: Gets positions that were not evaluated before; returns the values of all positions so far.
        names: What to call a position in the message, for instance its timestep.

    Returns:
        What was done, in one sentence; ``'sweep'`` is its first word if everything was evaluated, because the grid is
        small, or the curve flat, or with several peaks.
    """
    names = range(num) if names is None else names
    plan = make_plan(num)
    if plan is None:
        evaluate(list(range(num)))
        return f'sweep: a third of {num} timesteps is too few to find a peak among them'
    values = evaluate(grid(num, plan[0]))

    def rest(reason: str) -> str:
        evaluate([position for position in range(num) if position not in values])
        return f'sweep: {reason}'

    def second_peak(drop: float) -> str | None:
        positions = sorted(values)
        second = rival(positions, [values[position] for position in positions], drop)
        best = max(positions, key=values.__getitem__)
        return None if second is None else f'the curve has several peaks ({names[best]:g} and {names[second]:g})'

    low, high = min(values.values()), max(values.values())
    if high - low <= FLAT * max(abs(low), abs(high)):
        return rest(f'the curve is flat ({low:.4g} to {high:.4g})')
    several = second_peak(drop=0)
    if several is not None:
        return rest(several)
    best = max(sorted(values), key=values.__getitem__)
    steps = range(plan[1], plan[0], plan[1])
    around = {position for step in steps for position in (best - step, best + step) if 0 <= position < num}
    values = evaluate(sorted(around - set(values)))
    # Closer by, a peak of noise looks like any other.
    several = second_peak(drop=NEAR)
    if several is not None:
        return rest(several)
    return f'coarse-to-fine: {len(values)} of {num} timesteps'
