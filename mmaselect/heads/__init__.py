"""Heads that the toolboxes do not have."""

from mmaselect.heads.aggregation import AggregationHead

__all__ = ['AggregationHead']
