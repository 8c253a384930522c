"""What all command line tools share."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT
from mmengine.config import Config

from mmaselect.cli import finish_config


@pytest.mark.parametrize('workers', (0, 2))
def test_workers_persist_where_there_are_any(workers):
    """As with ``--cfg-options train_dataloader.num_workers=0`` on a config that keeps its workers."""
    loader = dict(num_workers=4, persistent_workers=True)
    cfg = Config(dict(train_dataloader=loader, val_dataloader=dict(num_workers=1)))
    options = {'train_dataloader.num_workers': workers, 'val_dataloader.num_workers': workers}
    finish_config(cfg, Namespace(cfg_options=options, no_pin_memory=False))
    assert cfg.train_dataloader.persistent_workers == cfg.val_dataloader.persistent_workers == (workers > 0)


TABLES = """
import mmaselect
from mmaselect import cli
from mmaselect.evaluation.leaderboard import Entry, Table, to_text

def main():
    entry = Entry('sd15', None, 82.5, 0.25, source='work_dirs/' + 'langer Name ' * 30)
    print(to_text([Table('CUB', [entry])]))
    print('Vögel/鳥')

cli.run(main)
"""


@pytest.mark.parametrize('encoding', ('utf-8', 'cp1252', 'gbk', 'ascii'))
def test_tables_are_plain_where_the_terminal_takes_no_boxes(encoding):
    env = {**os.environ, 'PYTHONIOENCODING': encoding}
    done = subprocess.run([sys.executable, '-c', TABLES], capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    text = done.stdout.decode(encoding)
    boxes, sign = ('━', '82.50 ± 0.25') if encoding == 'utf-8' else ('---', '82.50+/-0.25')
    assert boxes in text
    assert sign in text
    assert text.isascii() or encoding != 'ascii'
    assert text.splitlines()[-1] == 'Vögel/鳥'.encode(encoding, 'backslashreplace').decode(encoding)


def test_every_command_is_a_tool_and_is_named_by_help(monkeypatch, capsys):
    from mmaselect.__main__ import COMMANDS, main

    for command in ('select', 'extract', 'train', 'test', 'leaderboard', 'report', 'doctor'):
        assert (ROOT / 'tools' / COMMANDS[command]).is_file()
    monkeypatch.setattr(sys, 'argv', ['mmaselect', '--help'])
    main()
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    monkeypatch.setattr(sys, 'argv', ['mmaselect', 'selct'])
    with pytest.raises(SystemExit, match='2'):
        main()
    assert 'mmaselect selct: there is no such command; choose from: select, extract' in capsys.readouterr().err
