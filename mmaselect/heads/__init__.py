"""Heads that the toolboxes do not have."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.heads.aggregation import AggregationHead
from mmaselect.heads.pixel_ensemble import PixelEnsembleHead

__all__ = ['AggregationHead', 'PixelEnsembleHead']
