"""Sphinx' settings. Model zoo and list of errors are made while it reads the pages: they are in no file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml
from sphinx.application import Sphinx
from sphinx.util import logging

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
python_use_unqualified_type_names = True
napoleon_use_rtype = False

# Links between pages and to classes of ours must lead somewhere; those of torch and mmengine are on other sites.
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!mmaselect\.).*')]

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['site.css']
html_title = f'mmaselect {release}'
html_show_sphinx = html_show_sourcelink = False


def model_zoo() -> str:
    """The configs of ``model-index.yml``, a table for each folder, as their metafiles describe them."""
    text = ''
    for file in yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))['Import']:
        folder = Path(file).parent
        text += f'## {folder.name.replace("_", " ").capitalize()}\n\nIn `{folder}/`:\n\n'
        text += '| config | data | result | status |\n|---|---|---|---|\n'
        for model in yaml.safe_load((ROOT / file).read_text(encoding='utf-8'))['Models']:
            result = (model.get('Results') or [{'Dataset': model['Metadata']['Training Data'], 'Metrics': {}}])[0]
            numbers = ', '.join(f'{name} {value}' for name, value in result['Metrics'].items())
            text += f'| `{model["Name"]}` | {result["Dataset"]} | {numbers} | {model["Metadata"]["Status"]} |\n'
        text += '\n'
    return text


def error_lines() -> list[str]:
    """What every ``InputError`` of the package says, sorted; ``…`` is what a run fills in."""
    found = set()
    for path in (path for path in ROOT.glob('mmaselect/**/*.py') if '.mim' not in path.parts):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('InputError', 'NotFinite') and node.args:
                line = node.args[0]
                found.update(map(_text, (line.body, line.orelse) if isinstance(line, ast.IfExp) else (line,)))
    return sorted(line for line in found if line.strip(' …:'))


def _text(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in parts)
    return re.sub('…+', '…', text)


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Writes the models and the error lines into their pages; a heading that is no line of the code is a warning."""
    if page == 'model_zoo':
        source[0] = source[0].replace('<!-- models -->', model_zoo())
    if page == 'troubleshooting':
        lines = error_lines()
        for heading in re.findall('^### `+ ?(.*?) ?`+$', source[0], re.MULTILINE):
            if heading not in lines:
                logging.getLogger(__name__).warning('no error says %r', heading, location=page)
        source[0] = source[0].replace('<!-- lines -->', '\n'.join(f'- `` {line} ``' for line in lines))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect('source-read', fill_in)
