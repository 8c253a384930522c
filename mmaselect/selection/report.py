"""What a selection leaves behind: ``selection.json``, the curves as PNG, one printed table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmaselect.diffusion.family import Tap
from mmaselect.errors import InputError, check_timestep
from mmaselect.files import atomic_path, write_json
from mmaselect.selection.search import Sweep

#: Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')


@dataclass
class Selection:
    """A sweep, and which of its criteria decided.

    Attributes:
        sweep: The scores.
        criterion: Label of the deciding criterion.
        config: The deciding criterion and its parameters, as in the config.
    """

    sweep: Sweep
    criterion: str
    config: dict[str, Any]

    @property
    def timestep(self) -> float:
        """The chosen timestep, in [0, 1000]."""
        return self.sweep.choice(self.criterion)

    @property
    def choices(self) -> dict[str, float]:
        """What every computed criterion would have chosen."""
        return {label: self.sweep.choice(label) for label in self.sweep.scores}

    @property
    def disagreement(self) -> str | None:
        """One sentence if criteria choose timesteps that are more than one step of the sweep apart, else None."""
        steps = self.sweep.timesteps
        position = {label: steps.index(choice) for label, choice in self.choices.items()}
        if max(position.values()) - min(position.values()) <= 1:
            return None
        by_choice: dict[float, list[str]] = {}
        for label, choice in self.choices.items():
            by_choice.setdefault(choice, []).append(label)
        parts = [f'{" and ".join(labels)} -> {choice:g}' for choice, labels in sorted(by_choice.items())]
        return (
            f'The criteria DISAGREE: {"; ".join(parts)}. Used: {self.timestep:g}, by {self.criterion}. '
            'Plain HFR rises with injected noise where the network lets it through; '
            'check with a probe before you trust one of them.'
        )

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Content of ``selection.json``.

        Args:
            **extra: Further entries (seed, identity, versions).
        """
        sweep = self.sweep
        taps = list(next(iter(sweep.scores.values())))
        blocks, components = (sorted({tap[part] for tap in taps}) for part in (0, 1))
        return {
            'timestep': self.timestep,
            'block': blocks[0] if len(blocks) == 1 else blocks,
            'component': components[0] if len(components) == 1 else components,
            'criterion': self.config,
            'criterion_label': self.criterion,
            'timesteps': sweep.timesteps,
            'scores': {label: sweep.curve(label) for label in sweep.scores},
            'scores_per_tap': {
                label: {f'block {tap.block} {tap.component}': values for tap, values in by_tap.items()}
                for label, by_tap in sweep.scores.items()
            },
            'choices': self.choices,
            'disagreement': self.disagreement,
            'num_images': sweep.num_images,
            'block_evaluations': sweep.block_evaluations,
            'encoder_runs': sweep.encoder_runs,
            'seconds': sweep.seconds,
            **extra,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Selection:
        """Reads back what :meth:`to_dict` gave, as :func:`read_selection` returns it."""
        scores = {}
        for label, by_tap in content['scores_per_tap'].items():
            taps = {}
            for name, values in by_tap.items():
                _, block, component = name.split()
                taps[Tap(int(block), component)] = values
            scores[label] = taps
        fields = ('timesteps', 'num_images', 'block_evaluations', 'encoder_runs', 'seconds')
        sweep = Sweep(scores=scores, **{name: content[name] for name in fields})
        return cls(sweep, content['criterion_label'], content['criterion'])

    def save(self, folder: str | Path, **extra: Any) -> dict[str, Any]:
        """Writes ``selection.json`` and ``selection.png``, atomically, the JSON last.

        Args:
            folder: Where to.
            **extra: Further entries of the JSON.

        Returns:
            The content of the JSON.
        """
        content = self.to_dict(**extra)
        plot(self, Path(folder) / 'selection.png')
        write_json(Path(folder) / 'selection.json', content)
        return content

    def table(self) -> str:
        """The scores as a text table, the choice of each criterion marked with ``*``, and any disagreement below."""
        from rich.table import Table

        sweep = self.sweep
        table = Table(title=f'timestep selection on {sweep.num_images} images', title_justify='left')
        table.add_column('timestep', justify='right')
        for label in sweep.scores:
            table.add_column(label + (' (decides)' if label == self.criterion else ''), justify='right')
        curves = {label: sweep.curve(label) for label in sweep.scores}
        for row, timestep in enumerate(sweep.timesteps):
            cells = [
                f'{"* " if self.choices[label] == timestep else ""}{curve[row]:.4f}' for label, curve in curves.items()
            ]
            table.add_row(f'{"-> " if timestep == self.timestep else ""}{timestep:g}', *cells)
        lines = [
            render(table),
            f'selected timestep {self.timestep:g} by {self.criterion}: '
            f'{sweep.block_evaluations} block evaluations, {sweep.seconds:.1f} s',
        ]
        if self.disagreement:
            lines.append(self.disagreement)
        return '\n'.join(lines)


def render(table: Any, width: int = 120) -> str:
    """Renders a rich table as plain text, for logs that are read in files."""
    import io

    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, markup=False).print(table)
    return buffer.getvalue().rstrip()


def plot(selection: Selection, path: str | Path, accuracy: Sequence[float] | None = None) -> None:
    """Draws the curve of every criterion over timesteps, the choices marked.

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
    unbounded = [label for label in sweep.scores if max(sweep.curve(label)) > 1.5]
    for number, label in enumerate(sweep.scores):
        curve = sweep.curve(label)
        # A score without an upper bound would flatten all the others.
        scale = max(curve) if label in unbounded else 1
        name = f'{label}, divided by {scale:.3g}' if label in unbounded else label
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(sweep.timesteps, [value / scale for value in curve], color=colour, marker=marker, ms=4, label=name)
        best = sweep.timesteps.index(selection.choices[label])
        axes.plot(sweep.timesteps[best], curve[best] / scale, marker=marker, ms=11, mfc='none', mew=2, color=colour)
    axes.axvline(selection.timestep, color='0.6', ls='--', lw=1, label=f'selected: {selection.timestep:g}')
    axes.set(xlabel='timestep (0 clean, 1000 pure noise)', ylabel='score (share of energy)')
    axes.set_title(f'Timestep selection, {sweep.num_images} images (large marker: highest score)', fontsize=10)
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
        check_timestep(content['timestep'])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is not a selection.json: {error}') from error
    return content
