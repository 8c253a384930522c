"""A leaderboard as one page: sorted and filtered in the browser, every number linked to its evidence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmaselect.evaluation.leaderboard import USUAL, Entry, Table, name_task, used_columns
from mmaselect.pages.page import render


def to_html(tables: Sequence[Table], folder: str | Path = '.') -> str:
    """The tables as a page.

    Args:
        tables: Of :func:`~mmaselect.evaluation.leaderboard.make_leaderboard`.
        folder: Where the page will be: links to work directories begin there.

    Returns:
        HTML.
    """
    shown = [_table(table, folder) for table in tables]
    rows = [row for table in shown for row in table['rows']]
    filters = {name: sorted({row['keys'][name] for row in rows} - {''}) for name in ('data set', 'family', 'protocol')}
    return render('leaderboard', tables=shown, filters=filters)


def _table(table: Table, folder: str | Path) -> dict[str, Any]:
    # What is in `source` is in the links.
    columns = [column for column in used_columns(table) if column not in ('entry', 'result', 'source')]
    tasks = {entry.task for entry in table.entries}
    means = [-1 if entry.mean is None else entry.mean for entry in table.entries]
    return {
        'title': table.title,
        'apart': table.apart,
        'descending': means == sorted(means, reverse=True),
        'columns': columns,
        'rows': [_row(entry, columns, len(tasks) > 1, folder) for entry in table.entries],
    }


def _row(entry: Entry, columns: Sequence[str], mixed: bool, folder: str | Path) -> dict[str, Any]:
    links = [
        {'label': one.label, 'value': one.value, 'log': _link(one.log, folder), 'choice': _link(one.choice, folder)}
        for one in entry.evidence
    ]
    first = links[0] if links else {'log': '', 'choice': ''}
    cells = []
    for text in entry.cells(columns):
        # Selection and training have their cost from different files.
        parts = [part for part in text.split('; ') if part]
        cells.append([(part, first['log' if part.startswith('training') else 'choice']) for part in parts])
    keys = {'data set': '', 'family': entry.family, 'protocol': ''}
    if entry.task is not None:
        keys.update({'data set': entry.task.dataset, 'protocol': entry.task.protocol or USUAL})
    return {
        'name': entry.name,
        'result': entry.result,
        'mean': entry.mean,
        'task': name_task(entry.task) if mixed and entry.task is not None else '',
        'note': entry.note,
        'source': entry.source,
        'published': entry.source.startswith('published: '),
        'keys': keys,
        'links': links,
        'cells': cells,
    }


def _link(target: str, folder: str | Path) -> str:
    """An address as it is; a file by its way from the page; what would run something in the browser, not at all."""
    if target.startswith(('https://', 'http://')) or not target:
        return target
    try:
        return quote(Path(os.path.relpath(target, folder)).as_posix())
    except ValueError:
        # On another drive of Windows.
        return Path(target).resolve().as_uri()
