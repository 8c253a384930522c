"""mmaselect: frozen diffusion transformers as backbones for the OpenMMLab toolboxes.

Importing it repairs the stack (:mod:`mmaselect.compat`) and registers what a config can name. It imports none of the
toolboxes and none of diffusers' model code.
"""

from mmengine.config.utils import MODULE2PACKAGE

from mmaselect import compat

compat.apply()

# Lets configs inherit from ours as from any OpenMMLab package: _base_ = ['mmaselect::_base_/models/sd35-medium.py'].
MODULE2PACKAGE.setdefault('mmaselect', 'mmaselect')

# The registries must not be touched before the repairs above.
from mmaselect import datasets  # noqa: E402, F401
from mmaselect.apis import extract, load, select  # noqa: E402
from mmaselect.backbones import ASelectDiT  # noqa: E402
from mmaselect.cache import FeatureCacheHook  # noqa: E402
from mmaselect.hooks import TimestepSelectionHook  # noqa: E402
from mmaselect.necks import AttentionPooling, SoftmaxFusion  # noqa: E402
from mmaselect.version import __version__  # noqa: E402

__all__ = [
    'ASelectDiT',
    'AttentionPooling',
    'FeatureCacheHook',
    'SoftmaxFusion',
    'TimestepSelectionHook',
    '__version__',
    'extract',
    'load',
    'select',
]
