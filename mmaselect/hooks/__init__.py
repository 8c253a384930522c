"""Hooks that a config adds to ``custom_hooks``."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.hooks.last_validation import LastValidationHook
from mmaselect.hooks.timestep_selection import TimestepSelectionHook

__all__ = ['LastValidationHook', 'TimestepSelectionHook']
