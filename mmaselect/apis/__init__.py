"""Features and selection from Python, without a config and without a runner."""

from mmaselect.apis.inference import extract, load, select

__all__ = ['extract', 'load', 'select']
