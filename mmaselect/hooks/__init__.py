"""Hooks that a config adds to ``custom_hooks``."""

from mmaselect.hooks.last_validation import LastValidationHook
from mmaselect.hooks.timestep_selection import TimestepSelectionHook

__all__ = ['LastValidationHook', 'TimestepSelectionHook']
