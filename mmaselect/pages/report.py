"""``report.html``: what ``selection.json`` says, to be looked at in a browser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.files import atomic_path
from mmaselect.pages.page import render
from mmaselect.pages.pictures import read_pictures
from mmaselect.selection.report import COLOURS, TRUST, Selection, name_taps, read_selection

#: Perceptually uniform, and the same to colour-blind eyes, as in evaluation/figures.py.
COLOUR_MAP = 'cividis'
#: Entries of ``selection.json`` that the page shows in other places, or that only a program needs.
SHOWN_ELSEWHERE = (
    'timestep', 'block', 'component', 'criterion_label', 'timesteps', 'scores', 'scores_per_tap', 'intervals_per_tap',
    'agreement', 'choices', 'decisions', 'disagreement', 'request', 'recipe', 'command', 'unreadable',
)  # fmt: skip


def write_report(selection: str | Path) -> Path:
    """Writes ``report.html`` beside a ``selection.json``.

    Args:
        selection: The file, or the work directory that holds it.

    Returns:
        The path of the page.

    Raises:
        InputError: If there is no such file, or it is not a selection of this revision.
    """
    path = Path(selection)
    path = path / 'selection.json' if path.is_dir() else path
    content = read_selection(path)
    if content is None:
        raise InputError(f'selection={str(path)!r} is not there: give a selection.json, or a folder that holds one')
    try:
        page = make_report(content, read_pictures(path.parent, content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f'{path} is not a selection.json of this revision: {error!r}') from error
    target = path.with_name('report.html')
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding='utf-8')
    return target


def make_report(content: dict[str, Any], pictures: dict[str, Any] | None = None) -> str:
    """Renders the page.

    Args:
        content: Of ``selection.json``.
        pictures: See :func:`~mmaselect.pages.pictures.decompose_images`; None for none.

    Returns:
        HTML.
    """
    selection = Selection.from_dict(content)
    sweep = selection.sweep
    labels = sorted(sweep.scores, key=lambda label: (label != selection.criterion, _trust(label)[0]))
    places = _scale(sweep.timesteps)
    return render(
        'report',
        selection=selection,
        taps=name_taps(selection.taps),
        content=content,
        decisions=[_decision(selection, label) for label in sorted(labels, key=lambda label: _trust(label)[0])],
        trusted=min(labels, key=lambda label: _trust(label)[0]),
        charts=[_chart(selection, label, COLOURS[list(sweep.scores).index(label) % 6], places) for label in labels],
        rows=[_row(selection, labels, position, place) for position, place in enumerate(places)],
        ticks=[(f'{value:g}', place) for value, place in _ticks(sweep.timesteps, 5)],
        maps=[_map(selection, label) for label in labels],
        pictures=pictures,
        recipe=_flatten(content.get('recipe') or {}),
        settings=_flatten({name: value for name, value in content.items() if name not in SHOWN_ELSEWHERE}),
    )


def _trust(label: str) -> tuple[int, str]:
    """Rank of a criterion, the most trustworthy first, and the reason."""
    found = (place for place, (name, _) in enumerate(TRUST) if label.startswith(name))
    place = next(found, len(TRUST))
    return place, TRUST[place][1] if place < len(TRUST) else ''


def _decision(selection: Selection, label: str) -> dict[str, Any]:
    """A line of the table of what each criterion chose."""
    sweep, choice = selection.sweep, selection.sweep.choices[label]
    position = sweep.timesteps.index(choice.timesteps[0])
    bounds = sweep.intervals.get(label, {}).get(choice.taps[0]) if len(set(choice.taps)) == 1 else None
    return {
        'label': label,
        'decides': label == selection.criterion,
        'timesteps': choice.timesteps,
        'taps': name_taps(choice.taps),
        'agreement': choice.agreement,
        'resamples': sorted(choice.resamples.items(), key=lambda item: -item[1]),
        'score': sweep.curve(label)[position],
        'bounds': bounds[position] if bounds else None,
        'why': _trust(label)[1],
    }


def _row(selection: Selection, labels: Sequence[str], position: int, place: float) -> dict[str, Any]:
    """A timestep in the table of scores, from which the page's script reads what it shows under the pointer."""
    timestep = selection.sweep.timesteps[position]
    cells = []
    for label in labels:
        bounds = selection.bounds(label)
        cells.append(
            {
                'score': selection.curve(label)[position],
                'bounds': bounds[position] if bounds else None,
                'chosen': timestep in selection.sweep.choices[label].timesteps,
            }
        )
    return {'timestep': timestep, 'place': place, 'chosen': timestep in selection.timesteps, 'cells': cells}


def _chart(selection: Selection, label: str, colour: str, places: Sequence[float]) -> dict[str, Any]:
    """A curve in percent of its panel, from the left and from the top."""
    curve, bounds = selection.curve(label), selection.bounds(label) or []
    values = [*curve, *(value for pair in bounds for value in pair)]
    ticks = _ticks(values, 3, whole=True)
    low, high = ticks[0][0], ticks[-1][0]

    def tops(values: Sequence[float]) -> list[str]:
        return [f'{100 - height:.2f}' for height in _scale(values, low, high)]

    def points(values: Sequence[float]) -> list[str]:
        return [f'{places[at]:.2f},{top}' for at, top in enumerate(tops(values))]

    band = points([pair[0] for pair in bounds]) + points([pair[1] for pair in bounds])[::-1]
    choice = selection.sweep.choices[label]
    chosen = [selection.sweep.timesteps.index(timestep) for timestep in choice.timesteps]
    return {
        'label': label,
        'decides': label == selection.criterion,
        'colour': colour,
        'tops': tops(curve),
        'points': points(curve),
        'band': band,
        # What a criterion chooses at other taps is no point of this curve.
        'chosen': [points(curve)[position] for position in chosen] if choice.taps == selection.taps else [],
        'ticks': [(f'{value:g}', 100 - place) for value, place in ticks],
    }


def _scale(values: Sequence[float], low: float | None = None, high: float | None = None) -> list[float]:
    """Values in percent of the way from the lowest to the highest; all alike lie in the middle."""
    low, high = min(values) if low is None else low, max(values) if high is None else high
    return [100 * (value - low) / (high - low) if high > low else 50 for value in values]


def _ticks(values: Sequence[float], number: int, whole: bool = False) -> list[tuple[float, float]]:
    """Round numbers and their places in percent: those that values reach, or ``whole``, those around them all."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    ticks = [round(float(tick), 12) for tick in MaxNLocator(number).tick_values(low, high)]
    if whole:
        low, high = ticks[0], ticks[-1]
    return [(tick, _scale([tick], low, high)[0]) for tick in ticks if low <= tick <= high]


def _map(selection: Selection, label: str) -> dict[str, Any]:
    """The best score over timesteps of every block and component."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    by_tap = selection.sweep.scores[label]
    best = {tap: max(range(len(curve)), key=curve.__getitem__) for tap, curve in by_tap.items()}
    scores = {tap: by_tap[tap][position] for tap, position in best.items()}
    low, high = min(scores.values()), max(scores.values())

    def cell(tap: Tap) -> dict[str, Any] | None:
        if tap not in by_tap:
            return None
        colour = colormaps[COLOUR_MAP](_scale([scores[tap]], low, high)[0] / 100)
        return {
            'score': scores[tap],
            'timestep': selection.sweep.timesteps[best[tap]],
            'colour': to_hex(colour),
            'ink': '#000' if _luminance(colour[:3]) > 0.18 else '#fff',
            'chosen': tap in selection.taps,
            'highest': scores[tap] == high,
        }

    blocks = sorted({tap.block for tap in by_tap})
    components = list(dict.fromkeys(tap.component for tap in by_tap))
    rows = [(component, [cell(Tap(block, component)) for block in blocks]) for component in components]
    return {'label': label, 'blocks': blocks, 'rows': rows, 'decides': label == selection.criterion}


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of a colour (WCAG): above 0.18 black is the more legible ink, below it white."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _flatten(value: dict[str, Any], name: str = '') -> list[tuple[str, str]]:
    """Nested names and values as dotted names and texts."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += _flatten(item, f'{name}{key}.')
        else:
            lines.append((f'{name}{key}', _text(item)))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.6g}'
    if isinstance(value, list):
        return ', '.join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)
