"""Signs of life, with a clock that is turned by hand and streams that are terminals or not."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest

from mmaselect import progress
from mmaselect.progress import PATIENCE, progress_bar, working


class Clock:
    """Seconds since the start of the test."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr('tqdm.std.time', clock)
    # Threads would look at the clock whenever they like.
    monkeypatch.setattr(progress.Bar, '_live', lambda self, tick: None)
    return clock


def test_a_file_gets_a_line_every_thirty_seconds(clock):
    file = io.StringIO()
    with progress_bar(total=100, desc='cache', unit='images', file=file) as bar:
        for _ in range(100):
            clock.now += 1
            bar.update()
    lines = file.getvalue().splitlines()
    assert lines == [
        'cache: 30 %, 30 of 100 images, 00:30 gone, 01:10 left',
        'cache: 60 %, 60 of 100 images, 01:00 gone, 00:40 left',
        'cache: 90 %, 90 of 100 images, 01:30 gone, 00:10 left',
        'cache: 100 %, 100 of 100 images, 01:40 gone, 00:00 left',
    ]
    assert '\r' not in file.getvalue()


def test_a_file_gets_its_lines_where_nothing_is_counted_either(clock):
    file = io.StringIO()
    with progress_bar(total=2, desc='cache', unit='shards', file=file) as bar:
        for _ in range(60):
            clock.now += 1
            bar.live()
        bar.update()
    lines = file.getvalue().splitlines()
    assert [line.split(',')[0] for line in lines] == ['cache: 0 %'] * 2 + ['cache: 50 %']


def test_a_line_has_what_is_left_as_soon_as_that_is_known(clock):
    file = io.StringIO()
    with progress_bar(desc='selection', unit='pass', file=file) as bar:
        clock.now += 31
        bar.update(10)
        bar.total = 40
        bar.set_postfix_str('7 MB', refresh=False)
        clock.now += 31
        bar.update(10)
    first, second, _ = file.getvalue().splitlines()
    assert first == 'selection: 10 pass, 00:31 gone'
    assert second == 'selection: 50 %, 20 of 40 pass, 01:02 gone, 01:01 left, 7 MB'


def test_what_is_done_soon_is_not_mentioned_in_a_file(clock):
    file = io.StringIO()
    for _ in progress_bar(iterable=range(29), desc='cache', file=file):
        clock.now += 1
    assert file.getvalue() == ''


@pytest.mark.parametrize('seconds, shown', ((4, False), (6, True)))
def test_a_terminal_is_told_of_what_takes_more_than_five_seconds(clock, seconds, shown):
    file = Terminal()
    with progress_bar(total=seconds, desc='weights', delay=PATIENCE, file=file) as bar:
        for _ in range(seconds):
            clock.now += 1
            bar.update()
    assert ('weights: 100%' in file.getvalue()) == shown
    assert bool(file.getvalue()) == shown


def test_work_without_steps_shows_the_time_gone_and_then_vanishes(monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr', file := Terminal())
    monkeypatch.setattr(progress, 'PATIENCE', 0.01)
    monkeypatch.setattr(progress, 'TICK', 0.01)
    with working('compiling'):
        end = time.monotonic() + 20
        while 'compiling: 00:0' not in file.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    shown = file.getvalue().split('\r')
    assert 'compiling: 00:0' in file.getvalue()
    assert not shown[-1].strip()
    assert not shown[-2].strip()
    assert '\n' not in file.getvalue()


def test_other_ranks_are_silent(clock, monkeypatch):
    for rank, lines in ((0, 1), (1, 0)):
        distributed = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda r=rank: r)
        monkeypatch.setitem(progress.sys.modules, 'torch', SimpleNamespace(distributed=distributed))
        file = io.StringIO()
        with progress_bar(total=2, desc='cache', file=file) as bar:
            clock.now += 31
            bar.update()
        assert len(file.getvalue().splitlines()) == 2 * lines
