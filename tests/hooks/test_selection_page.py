"""The page that ``TimestepSelectionHook`` writes beside its ``selection.json``."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import mmaselect.pages
from mmaselect.hooks import TimestepSelectionHook


class NoImages:
    backbone, group = SimpleNamespace(diffusion=None), 4

    def __len__(self):
        return 8

    def batches(self, indices):
        raise RuntimeError('out of memory')


def test_a_page_that_fails_costs_no_selection(tmp_path, monkeypatch, caplog):
    def full(folder):
        raise OSError('no space left')

    monkeypatch.setattr(mmaselect.pages, 'write_report', full)
    runner = SimpleNamespace(work_dir=str(tmp_path), logger=logging.getLogger('page'))
    TimestepSelectionHook()._write_page(runner, SimpleNamespace(taps=[None]), NoImages(), {})
    assert caplog.messages == [
        "report.html has no pictures: RuntimeError('out of memory')",
        "report.html was not written: OSError('no space left')",
    ]
