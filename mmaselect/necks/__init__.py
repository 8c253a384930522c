"""Necks that neither mmpretrain nor mmseg has."""

from mmaselect.necks.softmax_fusion import SoftmaxFusion

__all__ = ['SoftmaxFusion']
