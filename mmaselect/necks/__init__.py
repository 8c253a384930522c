"""Necks that neither mmpretrain nor mmseg has."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.necks.activation_aggregation import ActivationAggregation
from mmaselect.necks.attention_pooling import AttentionPooling
from mmaselect.necks.simple_pyramid import SimplePyramid
from mmaselect.necks.softmax_fusion import SoftmaxFusion

__all__ = ['ActivationAggregation', 'AttentionPooling', 'SimplePyramid', 'SoftmaxFusion']
