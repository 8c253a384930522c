"""Heads that the toolboxes do not have."""

from mmaselect.heads.aggregation import AggregationHead
from mmaselect.heads.pixel_ensemble import PixelEnsembleHead

__all__ = ['AggregationHead', 'PixelEnsembleHead']
