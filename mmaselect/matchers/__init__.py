"""Models for semantic correspondence."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.matchers.matcher import FeatureMatcher, PairDataPreprocessor

__all__ = ['FeatureMatcher', 'PairDataPreprocessor']
