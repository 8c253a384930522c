"""What a criterion is worth, in four numbers: how well it follows a probe, and what its choices lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmaselect.diffusion.taps import Tap


@dataclass
class Verdict:
    """How a criterion did against the oracle, the best of all probes.

    Attributes:
        correlation: With the accuracy over timesteps, mean over taps; nan where a score does not vary.
        gap: Best accuracy over timesteps minus that at the chosen one, in points, mean over taps.
        largest: The largest of these.
        joint: Best accuracy over timesteps and taps minus that of one choice among them; nan for a rule that has no
            opinion on taps.
        picks: The chosen timestep of each tap.
    """

    correlation: float
    gap: float
    largest: float
    joint: float
    picks: list[float]


def judge(
    scores: Mapping[Tap, Sequence[float]], accuracy: Mapping[Tap, Sequence[float]], timesteps: Sequence[float]
) -> Verdict:
    """Judges scores.

    Args:
        scores: Of each tap, over timesteps; the highest is chosen, of equal ones the earliest timestep.
        accuracy: Of the probe, in percent.
        timesteps: Of both.
    """
    table = np.array([scores[tap] for tap in accuracy], dtype=float)
    truth = np.array(list(accuracy.values()), dtype=float)
    places = table.argmax(1)
    losses = truth.max(1) - truth[np.arange(len(truth)), places]
    tap, place = np.unravel_index(table.argmax(), table.shape)
    varying = [number for number in range(len(table)) if np.ptp(table[number]) and np.ptp(truth[number])]
    follows = [np.corrcoef(table[number], truth[number])[0, 1] for number in varying]
    return Verdict(
        correlation=float(np.mean(follows)) if follows else float('nan'),
        gap=float(losses.mean()),
        largest=float(losses.max()),
        joint=float(truth.max() - truth[tap, place]),
        picks=[timesteps[place] for place in places],
    )


def judge_probe(halves: Sequence[Mapping[Tap, Sequence[float]]], timesteps: Sequence[float]) -> Verdict:
    """Judges the probe by itself: what it chooses on one half of the test images is judged on the other half.

    A criterion can hardly do better: what is left is the error of the test images.

    Args:
        halves: Accuracy of the probe on either half, in percent.
        timesteps: Of both.

    Returns:
        The mean of both ways; the picks are those of the first half.
    """
    first, second = (judge(halves[one], halves[1 - one], timesteps) for one in (0, 1))
    mean = {name: (getattr(first, name) + getattr(second, name)) / 2 for name in ('correlation', 'gap', 'joint')}
    return Verdict(**mean, largest=max(first.largest, second.largest), picks=first.picks)


def judge_rule(timestep: float, accuracy: Mapping[Tap, Sequence[float]], timesteps: Sequence[float]) -> Verdict:
    """Judges a rule that always takes one timestep, see :func:`judge`."""
    nearest = min(range(len(timesteps)), key=lambda place: abs(timesteps[place] - timestep))
    scores = {tap: [float(place == nearest) for place in range(len(timesteps))] for tap in accuracy}
    found = judge(scores, accuracy, timesteps)
    found.correlation = found.joint = float('nan')
    return found
