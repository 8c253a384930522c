"""Racing: images come in portions, and timesteps that can no longer win get no more of them (Maron and Moore, 1994)."""

from __future__ import annotations

from collections.abc import Sequence

from mmaselect.selection.bootstrap import Choice

#: Images that every timestep gets; each further portion is as large as all before it.
FIRST_IMAGES = 32
#: Share of the resamples that may choose a timestep which is hopeless all the same.
HOPELESS = 0.005


def survivors(timesteps: Sequence[float], choice: Choice) -> list[float]:
    """The timesteps that may still be chosen.

    Those that more than :data:`HOPELESS` of the bootstrap's resamples choose, at whatever taps, and their neighbours:
    curves are smooth, and a few images know the height of a peak better than its place.

    Args:
        timesteps: Those that run, ascending.
        choice: Of the deciding criterion on the images so far.

    Returns:
        Some of them, ascending; all where there is no bootstrap yet.
    """
    if choice.agreement is None:
        return list(timesteps)
    likely = {position for position, one in enumerate(timesteps) if choice.resamples.get(one, 0) > HOPELESS}
    likely.add(list(timesteps).index(choice.timesteps[0]))
    return [one for position, one in enumerate(timesteps) if {position - 1, position, position + 1} & likely]
