"""The notebook and the page for users of scikit-learn are run; what they show is what they promise."""

from __future__ import annotations

import inspect
import json
import re
import textwrap

import matplotlib
import pytest
from conftest import ROOT

import mmaselect

PAGES = ROOT / 'docs' / 'en'


def test_the_notebook_selects_and_trains(capsys):
    matplotlib.use('Agg')
    notebook = json.loads((PAGES / 'notebooks' / 'select_and_train.ipynb').read_text())
    names: dict = {}
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            assert not cell['outputs']
            exec(''.join(cell['source']), names)
    selection, accuracy = names['selection'], names['accuracy']
    assert 300 <= selection.timestep <= 600
    assert selection.block == 3
    assert 'selected timestep' in capsys.readouterr().out
    assert accuracy[selection.timestep] > 0.94
    assert accuracy[selection.timestep] > accuracy[900]


def test_the_ten_lines_for_scikit_learn():
    """The page's example is that of the docstring, and works."""
    (example,) = re.findall(r'```python\n(.*?)```', (PAGES / 'sklearn.md').read_text(), re.DOTALL)
    docstring = inspect.getdoc(mmaselect.extract)
    assert textwrap.indent(example.partition('import mmaselect\n\n')[2], ' ' * 8) in docstring + '\n'
    names: dict = {}
    exec(example, names)
    assert names['accuracy'] == pytest.approx(0.971, abs=0.005)
    assert names['features'].shape == (1347, 128)
