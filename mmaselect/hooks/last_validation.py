"""``LastValidationHook``: a run that was interrupted in its last validation makes up for it."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class LastValidationHook(Hook):
    """Validates where ``--resume`` finds nothing left to train.

    mmengine writes the last checkpoint before the last validation: what is interrupted between the two would end
    without a metric, however often it is resumed. ``tools/train.py`` registers this hook.
    """

    def __init__(self) -> None:
        self.trained = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Notes that something was left."""
        self.trained = True

    def after_train(self, runner: Runner) -> None:
        """Validates, if nothing was."""
        if runner._resume and not self.trained and runner.val_loop is not None:
            runner.logger.info('nothing is left to train: validating, in case that this was interrupted')
            runner.val_loop.run()
