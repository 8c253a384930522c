"""Backbones that the toolboxes see."""

from mmaselect.backbones.aselect import ASelectDiT

__all__ = ['ASelectDiT']
