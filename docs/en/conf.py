"""Sphinx' settings. ``make docs`` builds ``docs/_build/html``; model zoo and list of errors are made while it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import yaml
from sphinx.application import Sphinx

import mmaselect

ROOT = Path(__file__).resolve().parents[2]

project = 'mmaselect'
author = copyright = 'the mmaselect authors'
release = version = mmaselect.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_heading_anchors = 3
highlight_language = 'none'
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
autodoc_type_aliases = {}
python_use_unqualified_type_names = True
napoleon_use_rtype = False

html_theme = 'furo'
html_title = f'mmaselect {release}'
html_show_sphinx = False


def model_zoo() -> str:
    """The configs of ``model-index.yml``, a table for each task, as their metafiles describe them."""
    tables: dict[str, list[str]] = {}
    for file in yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))['Import']:
        for model in yaml.safe_load((ROOT / file).read_text(encoding='utf-8'))['Models']:
            for result in model.get('Results') or [{'Task': 'Pretraining', 'Dataset': '', 'Metrics': {}}]:
                about = model['Metadata']
                numbers = ', '.join(f'{name} {value}' for name, value in result['Metrics'].items())
                row = [f'`{model["Config"]}`', result['Dataset'], numbers, about['Status']]
                tables.setdefault(result['Task'], []).append(f'| {" | ".join(row)} |')
    head = '| config | data | result | status |\n|---|---|---|---|\n'
    return '\n'.join(f'## {task}\n\n{head}{chr(10).join(rows)}\n' for task, rows in tables.items())


def error_lines() -> Iterator[tuple[str, str]]:
    """File and text of every ``InputError`` in the code; what a run fills in is in capitals."""
    for path in sorted([*ROOT.glob('mmaselect/[!.]*/**/*.py'), *ROOT.glob('mmaselect/*.py')]):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'InputError' and node.args:
                yield str(path.relative_to(ROOT)), ast.unparse(node.args[0])


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts what is generated in place of ``<!-- NAME -->``."""
    if page == 'model_zoo':
        source[0] = source[0].replace('<!-- models -->', model_zoo())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect('source-read', fill_in)
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!mmaselect\.).*')]
