"""Backbones that the toolboxes see."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.backbones.aselect import ASelectDiT

__all__ = ['ASelectDiT']
