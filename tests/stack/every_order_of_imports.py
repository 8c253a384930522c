"""Packages may be imported in any order: one process a prefix, so that 120 orders take 325 imports and not 600.

It takes minutes, so pytest does not collect it by itself: ``pytest tests/stack/every_order_of_imports.py``.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

PACKAGES = ('mmaselect', 'torchvision', 'diffusers', 'mmpretrain', 'mmseg')

#: Imports every order of the packages after the first ones, in forks; prints an order when all of it was imported.
SCRIPT = """
import importlib, os, sys

def go(done, left):
    if not left:
        import torch
        assert torch.ops.torchvision.nms.default._schema.name == 'torchvision::nms'
        print(*done, flush=True)
    for name in left:
        child = os.fork()
        if child == 0:
            importlib.import_module(name)
            go([*done, name], [one for one in left if one != name])
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.stderr.write(f'failed: {[*done, name]}\\n')
            os._exit(1)

first = sys.argv[1]
importlib.import_module(first)
go([first], [name for name in sys.argv[2:] if name != first])
"""


@pytest.mark.parametrize('first', PACKAGES)
def test_every_order_of_imports(first):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', SCRIPT, first, *PACKAGES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    orders = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert orders == {order for order in itertools.permutations(PACKAGES) if order[0] == first}
