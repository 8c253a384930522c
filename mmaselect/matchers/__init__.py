"""Models for semantic correspondence."""

from mmaselect.matchers.matcher import FeatureMatcher, PairDataPreprocessor

__all__ = ['FeatureMatcher', 'PairDataPreprocessor']
