"""The page that ``TimestepSelectionHook`` writes beside its ``selection.json``."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from mmaselect.hooks import TimestepSelectionHook


class NoImages:
    backbone, group = SimpleNamespace(diffusion=None), 4

    def __len__(self):
        return 8

    def batches(self, indices):
        raise RuntimeError('out of memory')


def test_pictures_that_fail_cost_no_selection(tmp_path, caplog):
    runner = SimpleNamespace(work_dir=str(tmp_path), logger=logging.getLogger('page'))
    TimestepSelectionHook()._write_pictures(runner, SimpleNamespace(taps=[None]), NoImages(), {})
    assert caplog.messages == ["report.html has no pictures: RuntimeError('out of memory')"]
