"""A leaderboard of runs beside published results: who may be compared with whom, and the table of it."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmaselect.datasets.layouts import LAYOUTS
from mmaselect.errors import InputError
from mmaselect.evaluation.runs import METRICS, Incomplete, Run, Task, find_runs, read_run
from mmaselect.selection.report import render

#: Columns of every table, and the fields of an :class:`Entry` behind them.
COLUMNS = {
    'entry': 'name',
    'result': 'result',
    'seeds': 'seeds',
    'timestep': 'timestep',
    'block': 'taps',
    'selected by': 'criterion',
    'cost': 'cost',
    'recipe': 'recipe',
    'source': 'source',
}


@dataclass
class Evidence:
    """Where a number is from.

    Attributes:
        label: Which of an entry's numbers: ``'seed 0'``, or a publication.
        value: The metric.
        log: File or address that says it.
        choice: File that says what was read, by which recipe, and what choosing it cost: ``report.html``,
            ``selection.json``, or the config where nothing was selected. Empty for publications.
    """

    label: str
    value: float
    log: str
    choice: str = ''


@dataclass
class Entry:
    """One line of a leaderboard: the seeds of one of our configs, a published result, or a run without one.

    Attributes:
        name: Config or method.
        task: What was measured, a :class:`Task`; None for a run that is incomplete.
        mean: Mean of the metric over seeds, a number; None for a run that is incomplete.
        deviation: Standard deviation over seeds (n - 1); None for a single one.
        seeds: The seeds, as text.
        timestep: Selected.
        taps: Block and component.
        criterion: What selected.
        cost: Block evaluations and seconds of the selection, seconds of the training.
        recipe: 12 digits of its digest.
        source: Where the numbers are from: work directories, or a citation.
        note: What a reader must know.
        family: Of the diffusion model, as configs name it; empty for other backbones.
        evidence: Of every number behind ``mean``, an :class:`Evidence` each; empty for a run that is incomplete.
    """

    name: str
    task: Any
    mean: Any = None
    deviation: float | None = None
    seeds: str = ''
    timestep: str = ''
    taps: str = ''
    criterion: str = ''
    cost: str = ''
    recipe: str = ''
    source: str = ''
    note: str = ''
    family: str = ''
    evidence: list[Evidence] = field(default_factory=list)

    @property
    def result(self) -> str:
        """``'82.5 ± 0.3'``, ``'82.5'`` or ``'incomplete'``."""
        if self.mean is None:
            return 'incomplete'
        return f'{self.mean:.2f}' if self.deviation is None else f'{self.mean:.2f} ± {self.deviation:.2f}'

    def cells(self, columns: Iterable[str] = COLUMNS) -> list[str]:
        """The texts of some of :data:`COLUMNS`."""
        return [getattr(self, COLUMNS[column]) for column in columns]


@dataclass
class Table:
    """Entries that may be compared with each other.

    Attributes:
        title: What they share.
        entries: The best first.
        apart: Why other tables of the same data set are not part of this one.
    """

    title: str
    entries: list[Entry]
    apart: str = ''


def make_leaderboard(folders: Sequence[str | Path], published: str | Path | None = None) -> list[Table]:
    """Reads runs and published results, and sorts them into tables.

    Two results stand in one table if data set, split, number of images, image size, metric and protocol agree and are
    known.

    Args:
        folders: Work directories, or folders that hold some.
        published: A YAML file of published results, see :func:`read_published`; None for none.

    Returns:
        The tables, those with runs first; the last one holds what is incomplete, if anything is.

    Raises:
        InputError: If a folder holds no run, or the file cannot be read.
    """
    runs, incomplete = [], []
    for folder in find_runs(list(folders)):
        try:
            runs.append(read_run(folder))
        except Incomplete as reason:
            incomplete.append(Entry(folder.name, None, source=str(folder), note=str(reason)))
    own = summarise(runs)
    # Results of others on data sets that no run here has used are of no interest.
    used = {entry.task.dataset for entry in own}
    others = [entry for entry in read_published(published) if entry.task.dataset in used] if published else []
    tables = _sort(own, others)
    if incomplete:
        tables.append(Table('incomplete: no result', incomplete))
    return tables


def summarise(runs: Sequence[Run]) -> list[Entry]:
    """Makes one entry of all seeds of a config with the same recipe.

    Args:
        runs: Finished runs.

    Returns:
        The entries.
    """
    groups: dict[tuple[str, Task, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.task, run.variant), []).append(run)
    entries = []
    for (name, task, _), members in groups.items():
        siblings = [other[0] for key, other in groups.items() if key[:2] == (name, task) and other is not members]
        entries.append(_summarise(members, siblings))
    return entries


def _summarise(members: list[Run], siblings: list[Run]) -> Entry:
    notes = []
    by_seed: dict[int | None, Run] = {}
    for run in sorted(members, key=lambda run: (run.finished, str(run.folder))):
        if run.seed in by_seed:
            notes.append(f'seed {run.seed} was run more than once: {run.folder} counts')
        by_seed[run.seed] = run
    chosen = sorted(by_seed.values(), key=lambda run: (run.seed is None, run.seed or 0))
    first, values = chosen[0], [run.value for run in chosen]
    differing = [_difference(first.settings, other.settings) for other in siblings]
    what = ', '.join(dict.fromkeys(item for items in differing for item in items))
    published = next((layout for layout in LAYOUTS.values() if layout.title == first.task.dataset), None)
    expected = published and (published.images.get(first.task.split) or published.images.get('validation'))
    if expected and first.task.images not in (None, expected):
        notes.append(f'{first.task.images} test images, the published split has {expected}')
    if None in by_seed:
        notes.append('no seed was set')
    return Entry(
        name=first.name + (f' ({what})' if what else ''),
        task=first.task,
        mean=statistics.mean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        seeds=', '.join(str(run.seed) for run in chosen if run.seed is not None),
        timestep=_join(', '.join(f'{value:g}' for value in run.timesteps) for run in chosen),
        taps=_join(run.taps for run in chosen),
        criterion=_join(run.criterion or 'config' for run in chosen),
        cost=_cost(chosen),
        recipe=first.recipe[:12],
        source=f'ours, {max(run.finished for run in chosen)}: ' + ', '.join(str(run.folder) for run in chosen),
        note='; '.join(notes),
        family=next((str(item) for key, item in first.settings.items() if key.endswith('.diffusion.type')), ''),
        evidence=[_evidence(run) for run in chosen],
    )


def _evidence(run: Run) -> Evidence:
    names = ('report.html', 'selection.json') if run.criterion else ()
    found = (run.folder / name for name in names if (run.folder / name).is_file())
    choice = next(found, run.log.with_name('config.py') if run.log.parent != run.folder else run.log)
    label = 'no seed' if run.seed is None else f'seed {run.seed}'
    return Evidence(label, run.value, str(run.log), str(choice))


def _join(values: Any) -> str:
    return ' | '.join(dict.fromkeys(values))


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Up to three settings that tell a run from another of the same config; other weights differ in none."""
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return [f'{name}={ours.get(name)!r}' for name in names[:3]]


def _cost(runs: list[Run]) -> str:
    training = statistics.mean(run.training_seconds for run in runs)
    parts = []
    if runs[0].block_evaluations is not None:
        selection = statistics.mean(run.selection_seconds or 0 for run in runs)
        parts.append(f'selection {runs[0].block_evaluations} blocks, {selection:.0f} s')
    if training:
        parts.append(f'training {training:.0f} s')
    return '; '.join(parts)


def read_published(path: str | Path) -> list[Entry]:
    """Reads published results.

    Args:
        path: YAML: ``sources`` (by key: ``title`` and ``url``), and ``results``, each with ``method``, ``dataset``,
            ``split``, ``images``, ``image_size`` (``'512x512'``, or null if the publication was not seen to say),
            ``metric``, ``value``, ``source`` (a key), and optionally ``backbone``, ``family`` (as configs name it),
            ``note``, and ``protocol``: what keeps a number apart from one evaluation of the last checkpoint.

    Returns:
        One entry each.

    Raises:
        InputError: If a field is missing or of the wrong kind.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        sources, results = content['sources'], content['results']
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'published={str(path)!r} is not a YAML file with sources and results: {reason}') from error
    entries = []
    for number, row in enumerate(results, 1):
        try:
            source = sources[row['source']]
            task = Task(row['dataset'], row['split'], row['images'], row['image_size'], row['metric'],
                        row.get('protocol', ''))  # fmt: skip
            if task.metric not in METRICS.values() or not 0 <= row['value'] <= 100:
                raise ValueError(f'metric {task.metric!r} with value {row["value"]!r}')
            backbone = f' ({row["backbone"]})' if row.get('backbone') else ''
            cited = f'published: {source["title"]}, {source["url"]}'
            value = float(row['value'])
            entries.append(
                Entry(
                    row['method'] + backbone, task, value, source=cited, note=row.get('note', ''),
                    family=row.get('family', ''), evidence=[Evidence(source['title'], value, source['url'])],
                )
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f'published={str(path)!r}: result {number} is not valid: {error!r}') from error
    return entries


def _sort(own: list[Entry], others: list[Entry]) -> list[Table]:
    ours = list(dict.fromkeys(entry.task for entry in own))
    out = []
    for dataset in sorted({task.dataset for task in ours}):
        tasks = [task for task in ours if task.dataset == dataset]
        apart = []
        for task in tasks:
            members = [entry for entry in own if entry.task == task]
            if not _unknown(task):
                members += [entry for entry in others if entry.task == task]
            reasons = [_reason(task, other) for other in tasks if other != task]
            if _unknown(task):
                reasons.append(f'kept apart from everything else: {" and ".join(_unknown(task))} not known')
            members.sort(key=lambda entry: -entry.mean)
            out.append(Table(name_task(task), members, '; '.join(dict.fromkeys(reasons))))
        for entry in others:
            if entry.task.dataset == dataset and (_unknown(entry.task) or entry.task not in tasks):
                reasons = [_reason(entry.task, task) for task in tasks if task != entry.task]
                if _unknown(entry.task):
                    reasons = [f'kept apart: {" and ".join(_unknown(entry.task))} not known']
                entry.note = '; '.join(dict.fromkeys([*filter(None, [entry.note]), *reasons]))
                apart.append(entry)
        if apart:
            out.append(Table(f'{dataset}: published, not comparable with the above', apart))
    return out


#: The protocol that goes without saying.
USUAL = 'the last checkpoint, once'
#: Fields of a :class:`Task` in words.
WORDS = {'images': 'number of test images', 'image_size': 'image size'}


def _unknown(task: Task) -> list[str]:
    return [WORDS[name] for name in ('images', 'image_size') if getattr(task, name) is None]


def _reason(task: Task, other: Task) -> str:
    """Why two tasks on one data set are not comparable."""

    def blank(name: str) -> str:
        return USUAL if name == 'protocol' else 'not known'

    differing = [
        f'{WORDS.get(name, name)} ({value or blank(name)} here, {asdict(other)[name] or blank(name)} there)'
        for name, value in asdict(task).items()
        if value != asdict(other)[name]
    ]
    return f'kept apart for another {" and ".join(differing)}'


def name_task(task: Task) -> str:
    """A task in words."""
    images = f'{task.images} images' if task.images is not None else 'number of images not known'
    size = task.image_size or 'image size not known'
    protocol = f', {task.protocol}' if task.protocol else ''
    return f'{task.dataset}, {task.split} ({images}), {size}, {task.metric}{protocol}'


def to_text(tables: Sequence[Table]) -> str:
    """The tables for a terminal."""
    import shutil

    from rich.table import Table as Grid

    parts = []
    for table in tables:
        grid = Grid(title=table.title, title_justify='left')
        used = used_columns(table)
        for column in used:
            grid.add_column(column, justify='right' if column == 'result' else 'left', overflow='fold')
        for entry in table.entries:
            grid.add_row(*entry.cells(used))
        width = max(120, shutil.get_terminal_size((160, 24)).columns)
        parts.append('\n'.join([render(grid, width), *_remarks(table)]))
    return '\n\n'.join(parts)


def to_markdown(tables: Sequence[Table]) -> str:
    """The tables in Markdown."""
    parts = []
    for table in tables:
        used = used_columns(table)
        lines = [f'**{table.title}**', '', f'| {" | ".join(used)} |', f'|{"---|" * len(used)}']
        for entry in table.entries:
            lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in entry.cells(used)) + ' |')
        parts.append('\n'.join([*lines, '', *(f'{remark}  ' for remark in _remarks(table))]).rstrip())
    return '\n\n'.join(parts) + '\n'


def to_csv(tables: Sequence[Table]) -> str:
    """One line per entry; entries that may be compared have the same ``table``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow(['table', 'mean', 'deviation', *COLUMNS, 'note'])
    for table in tables:
        for entry in table.entries:
            numbers = ['' if value is None else f'{value:.4f}' for value in (entry.mean, entry.deviation)]
            writer.writerow([table.title, *numbers, *entry.cells(), entry.note])
    return buffer.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Everything, with nothing rounded."""
    return json.dumps([asdict(table) for table in tables], indent=2, allow_nan=False) + '\n'


FORMATS = {'table': to_text, 'markdown': to_markdown, 'csv': to_csv, 'json': to_json}


def used_columns(table: Table) -> list[str]:
    """The columns that are not empty throughout."""
    return [column for column, field in COLUMNS.items() if any(getattr(entry, field) for entry in table.entries)]


def _remarks(table: Table) -> list[str]:
    return [f'{entry.name}: {entry.note}' for entry in table.entries if entry.note] + (
        [table.apart] if table.apart else []
    )
