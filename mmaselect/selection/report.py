"""What a selection leaves behind: ``selection.json``, the curves as PNG, one printed table."""

from __future__ import annotations

import json
import locale
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError, check_timestep
from mmaselect.files import atomic_path, write_json
from mmaselect.selection.search import Choice, SearchResult

#: Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')

#: Beginnings of labels, the most trustworthy first, with the reason (docs/en/evidence.md, "The verdict").
TRUST = (
    ('Fisher Score', 'The Fisher Score reads labels.'),
    ('instance information', 'Instance information asks what tells images apart under the noise that the head sees.'),
    ('view consistency', 'View consistency sees the strongest directions alone.'),
    ('centred noise-consistent HFR', 'Noise-consistent HFR counts detail, of use or not.'),
    ('noise-consistent HFR', 'Uncentred, it counts what all images share.'),
    ('HFR', 'Plain HFR rises with injected noise where the network lets it through.'),
    ('LiDAR', 'LiDAR counts how even directions are.'),
    ('RankMe', 'RankMe counts noise, which has full rank.'),
)


@dataclass
class Selection:
    """A search, and which of its criteria decided.

    Attributes:
        sweep: The scores.
        criterion: Label of the deciding criterion.
        config: The deciding criterion and its parameters, as in the config.
    """

    sweep: SearchResult
    criterion: str
    config: dict[str, Any]

    @property
    def choice(self) -> Choice:
        """What was chosen."""
        return self.sweep.choices[self.criterion]

    @property
    def timestep(self) -> float:
        """The chosen timestep, in [0, 1000]; of several the best."""
        return self.choice.timesteps[0]

    @property
    def timesteps(self) -> list[float]:
        """The chosen timesteps, the best first."""
        return self.choice.timesteps

    @property
    def taps(self) -> list[Tap]:
        """The chosen block and component; several where several were asked for."""
        return self.choice.taps

    @property
    def block(self) -> int | list[int]:
        """The chosen block, or the blocks."""
        return _one_or_many([tap.block for tap in self.taps])

    @property
    def component(self) -> str | list[str]:
        """The chosen component, or the components."""
        return _one_or_many([tap.component for tap in self.taps])

    @property
    def choices(self) -> dict[str, float]:
        """The timestep that each computed criterion would have chosen."""
        return {label: self.sweep.choice(label) for label in self.sweep.scores}

    def curve(self, label: str) -> list[float]:
        """Score of a criterion over timesteps at the chosen taps."""
        return self.sweep.curve(label, self.taps)

    def bounds(self, label: str) -> list[list[float]] | None:
        """95 % intervals of :meth:`curve`; None if there are none, or if the curve is an average over taps."""
        by_tap = self.sweep.intervals.get(label)
        return by_tap[self.taps[0]] if by_tap and len(set(self.taps)) == 1 else None

    def check(self) -> None:
        """Raises :class:`InputError` if the deciding criterion is 0 at every timestep."""
        if not any(self.curve(self.criterion)):
            raise InputError(
                f'{self.criterion} is 0 at every timestep: nothing in the features depends on the image '
                '(are the images all alike, or num_images too small?)'
            )

    @property
    def disagreement(self) -> str | None:
        """One sentence if a criterion chooses what the deciding one rules out, and which to trust; else None.

        Ruled out is what less than 2.5 % of the resamples choose; without a bootstrap, what lies more than one step
        away, or at other taps.
        """
        steps, used = self.sweep.timesteps, self.choice

        def differs(choice: Choice) -> bool:
            if choice.taps != used.taps or choice.timesteps[0] == used.timesteps[0]:
                return choice.taps != used.taps
            if used.agreement is not None:
                return used.resamples.get(choice.timesteps[0], 0) < 0.025
            return abs(steps.index(choice.timesteps[0]) - steps.index(self.timestep)) > 1

        others = any(choice.taps != used.taps for choice in self.sweep.choices.values())
        if not any(map(differs, self.sweep.choices.values())):
            return None
        by_choice: dict[str, list[str]] = {}
        for label, choice in sorted(self.sweep.choices.items(), key=lambda item: item[1].timesteps[0]):
            where = f'{choice.timesteps[0]:g}' + (f' ({name_taps(choice.taps)})' if others else '')
            by_choice.setdefault(where, []).append(label)
        parts = [f'{" and ".join(labels)} -> {where}' for where, labels in by_choice.items()]
        said = f'The criteria DISAGREE: {"; ".join(parts)}. Used: {self.timestep:g}, by {self.criterion}.'
        ranked = [entry for entry in TRUST if any(label.startswith(entry[0]) for label in self.sweep.choices)]
        if ranked:
            said += f' Trust {ranked[0][0]} most. {" ".join(why for _, why in ranked)}'
        return said

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Content of ``selection.json``.

        Args:
            **extra: Further entries (seed, identity, versions).
        """
        sweep = self.sweep
        return {
            'timestep': self.timestep if len(self.timesteps) == 1 else self.timesteps,
            'block': self.block,
            'component': self.component,
            'criterion': self.config,
            'criterion_label': self.criterion,
            'timesteps': sweep.timesteps,
            'scores': {label: self.curve(label) for label in sweep.scores},
            'scores_per_tap': _by_name(sweep.scores),
            'intervals_per_tap': _by_name(sweep.intervals),
            'agreement': self.choice.agreement,
            'choices': self.choices,
            'decisions': {
                label: {
                    'timesteps': choice.timesteps,
                    'taps': [_name(tap) for tap in choice.taps],
                    'agreement': choice.agreement,
                    'resamples': {f'{timestep:g}': share for timestep, share in choice.resamples.items()},
                }
                for label, choice in sweep.choices.items()
            },
            'disagreement': self.disagreement,
            'num_images': sweep.num_images,
            'block_evaluations': sweep.block_evaluations,
            'encoder_runs': sweep.encoder_runs,
            'seconds': sweep.seconds,
            'search': sweep.search,
            'noise': sweep.noise,
            'dropped': {f'{timestep:g}': images for timestep, images in sweep.dropped.items()},
            **extra,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Selection:
        """Reads back what :meth:`to_dict` gave, as :func:`read_selection` returns it."""
        choices = {
            label: Choice(
                timesteps=choice['timesteps'],
                taps=[_tap(name) for name in choice['taps']],
                agreement=choice['agreement'],
                resamples={float(timestep): share for timestep, share in choice['resamples'].items()},
            )
            for label, choice in content['decisions'].items()
        }
        scores, intervals = (
            {label: {_tap(name): values for name, values in by_tap.items()} for label, by_tap in content[key].items()}
            for key in ('scores_per_tap', 'intervals_per_tap')
        )
        fields = ('timesteps', 'num_images', 'block_evaluations', 'encoder_runs', 'seconds', 'search', 'noise')
        plain = {name: content[name] for name in fields}
        plain['dropped'] = {float(timestep): images for timestep, images in content.get('dropped', {}).items()}
        sweep = SearchResult(scores=scores, choices=choices, intervals=intervals, **plain)
        return cls(sweep, content['criterion_label'], content['criterion'])

    def save(
        self, folder: str | Path, pictures: Callable[[dict[str, Any]], None] | None = None, **extra: Any
    ) -> dict[str, Any]:
        """Writes ``selection.png``, ``selection.json`` and ``report.html``, each atomically, in this order.

        Args:
            folder: Where to.
            pictures: Called with the content of the JSON before the page is made: writes what the page shows of images.
            **extra: Further entries of the JSON.

        Returns:
            The content of the JSON.
        """
        from mmaselect.pages.report import write_report

        content = self.to_dict(**extra)
        plot(self, Path(folder) / 'selection.png')
        write_json(Path(folder) / 'selection.json', content)
        if pictures is not None:
            pictures(content)
        write_report(folder)
        return content

    def table(self) -> str:
        """The scores as a text table, the choice of each criterion marked with ``*``, and what to know of it below."""
        from rich.table import Table

        sweep = self.sweep
        table = Table(
            title=f'timestep selection on {sweep.num_images} images, {sweep.noise} noise', title_justify='left'
        )
        table.add_column('timestep', justify='right')
        for label in sweep.scores:
            table.add_column(label + (' (decides)' if label == self.criterion else ''), justify='right')
        curves = {label: self.curve(label) for label in sweep.scores}
        for row, timestep in enumerate(sweep.timesteps):
            cells = [
                f'{"* " if self.choices[label] == timestep else ""}{curve[row]:.4f}' for label, curve in curves.items()
            ]
            table.add_row(f'{"-> " if timestep in self.timesteps else ""}{timestep:g}', *cells)
        chosen = ', '.join(f'{timestep:g}' for timestep in self.timesteps)
        lines = [
            render(table),
            f'selected timestep{"s" if len(self.timesteps) > 1 else ""} {chosen}, {name_taps(self.taps)}, by '
            f'{self.criterion}: {sweep.search}, {sweep.block_evaluations} block evaluations, {sweep.seconds:.1f} s',
        ]
        if sweep.dropped:
            gone = ', '.join(f'{timestep:g} after {images}' for timestep, images in sweep.dropped.items())
            lines.append(f'timesteps that could no longer win were dropped: {gone} images')
        if self.choice.agreement is not None:
            shares = sorted(self.choice.resamples.items(), key=lambda item: -item[1])[:4]
            drawn = ', '.join(f'{timestep:g} in {100 * share:.0f} %' for timestep, share in shares)
            lines.append(
                f'{100 * self.choice.agreement:.0f} % of the bootstrap resamples agree (they choose timestep {drawn})'
            )
        if self.disagreement:
            lines.append(self.disagreement)
        return '\n'.join(lines)


def _one_or_many(values: list) -> Any:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _name(tap: Tap) -> str:
    return f'block {tap.block} {tap.component}'


def _tap(name: str) -> Tap:
    _, block, component = name.split()
    return Tap(int(block), component)


def _by_name(values: dict[str, dict[Tap, list]]) -> dict[str, dict[str, list]]:
    return {label: {_name(tap): value for tap, value in by_tap.items()} for label, by_tap in values.items()}


def name_taps(taps: Sequence[Tap]) -> str:
    """Taps in words, ``'block 12 query'``; one that is read several times is named once."""
    return ', '.join(_name(tap) for tap in dict.fromkeys(taps))


def render(table: Any, width: int = 120) -> str:
    """Renders a rich table as plain text, for logs that are read in files."""
    import io

    from rich import box
    from rich.console import Console

    if not writes_unicode():
        table.box = box.ASCII
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, markup=False).print(table)
    text = buffer.getvalue().rstrip()
    return text if writes_unicode() else text.replace(' ± ', '+/-').replace('…', '~')


def writes_unicode() -> bool:
    """Whether the terminal, and log files, which have the locale's encoding, take any character."""
    encodings = (getattr(sys.stdout, 'encoding', None), locale.getpreferredencoding(False))
    return all((encoding or 'utf').lower().startswith('utf') for encoding in encodings)


def identifier(label: str) -> str:
    """A label as the name of a metric: letters, digits, ``_``, ``.`` and ``-``, which every tracker takes."""
    return re.sub(r'[^0-9A-Za-z_.-]+', '_', label).strip('_')


def plot(selection: Selection, path: str | Path, accuracy: Sequence[float] | None = None) -> None:
    """Draws the curve of every criterion over timesteps at the chosen taps, the choices marked.

    Args:
        selection: What to draw.
        path: A PNG file, written atomically.
        accuracy: Accuracy of a probe at every timestep, in percent, drawn on an axis of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sweep = selection.sweep
    figure = Figure(figsize=(8, 4.8), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unbounded = [label for label in sweep.scores if max(selection.curve(label)) > 1.5]
    for number, label in enumerate(sweep.scores):
        curve = selection.curve(label)
        # A score without an upper bound would flatten all the others.
        scale = max(curve) if label in unbounded else 1
        name = f'{label}, divided by {scale:.3g}' if label in unbounded else label
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(sweep.timesteps, [value / scale for value in curve], color=colour, marker=marker, ms=4, label=name)
        bounds = selection.bounds(label)
        if bounds:
            low, high = ([bound[side] / scale for bound in bounds] for side in (0, 1))
            axes.fill_between(sweep.timesteps, low, high, color=colour, alpha=0.2, lw=0)
        best = sweep.timesteps.index(selection.choices[label])
        axes.plot(sweep.timesteps[best], curve[best] / scale, marker=marker, ms=11, mfc='none', mew=2, color=colour)
    for number, timestep in enumerate(selection.timesteps):
        chosen = ', '.join(f'{one:g}' for one in selection.timesteps)
        agreement = selection.choice.agreement
        sure = '' if agreement is None else f' ({100 * agreement:.0f} % of resamples)'
        shown = None if number else f'selected: {chosen}{sure}'
        axes.axvline(timestep, color='0.6', ls='--', lw=1, label=shown)
    axes.set(xlabel='timestep (0 clean, 1000 pure noise)', ylabel='score')
    axes.set_title(
        f'Timestep selection, {sweep.num_images} images, {sweep.noise} noise, {name_taps(selection.taps)}\n'
        '(large marker: choice; band: 95 % bootstrap interval)',
        fontsize=10,
    )
    handles, labels = axes.get_legend_handles_labels()
    if accuracy is not None:
        right = axes.twinx()
        right.plot(sweep.timesteps, accuracy, color='black', ls=':', marker='*', label='accuracy of a linear probe')
        right.set_ylabel('accuracy (%)')
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def read_selection(path: str | Path) -> dict[str, Any] | None:
    """Reads a ``selection.json``.

    Args:
        path: The file.

    Returns:
        Its content, or None if there is no such file.

    Raises:
        InputError: If it is not a selection.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        chosen = content['timestep']
        for timestep in chosen if isinstance(chosen, list) else [chosen]:
            check_timestep(timestep)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path} is not a selection.json: {error}') from error
    return content
