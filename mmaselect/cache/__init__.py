"""Features of a frozen backbone, computed once and read back memory-mapped."""

from mmaselect.cache.hook import FeatureCacheHook

__all__ = ['FeatureCacheHook']
