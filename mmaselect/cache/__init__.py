"""Features of a frozen backbone, computed once and read back memory-mapped."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.cache.hook import FeatureCacheHook

__all__ = ['FeatureCacheHook']
