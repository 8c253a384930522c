"""mmaselect: frozen diffusion models as backbones for the OpenMMLab toolboxes.

Importing it repairs the stack (:mod:`mmaselect.compat`) and registers what a config can name. It imports none of the
toolboxes and none of diffusers' model code. Without mmengine, ``load``, ``extract`` and ``select`` work all the same.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from mmaselect.version import __version__

__all__ = ['__version__', 'extract', 'load', 'select']

#: Where our own tools are.
TOOLS = (Path(__file__).parents[1] / 'tools', Path(__file__).parent / '.mim' / 'tools')

# What a tool of ours says of its arguments takes none of this, nor the seconds that it takes.
_program = Path(sys.argv[0] if sys.argv else '').absolute()
if '--help' not in sys.argv or not any(folder in _program.parents for folder in TOOLS):
    from mmaselect import compat

    # The registries must not be touched before the repairs.
    compat.apply()

    if find_spec('mmengine') is not None:
        from mmengine.config.utils import MODULE2PACKAGE

        # Lets configs inherit from ours as from any OpenMMLab package:
        # _base_ = ['mmaselect::_base_/models/dit-nano.py'].
        MODULE2PACKAGE.setdefault('mmaselect', 'mmaselect')

        from mmaselect import datasets  # noqa: F401
        from mmaselect.backbones import ASelectDiT
        from mmaselect.cache import FeatureCacheHook
        from mmaselect.evaluation.pck import PCK
        from mmaselect.heads import AggregationHead, PixelEnsembleHead
        from mmaselect.hooks import TimestepSelectionHook
        from mmaselect.matchers import FeatureMatcher
        from mmaselect.necks import ActivationAggregation, AttentionPooling, SimplePyramid, SoftmaxFusion

        __all__ += [
            'PCK', 'ASelectDiT', 'ActivationAggregation', 'AggregationHead', 'AttentionPooling', 'FeatureCacheHook',
            'FeatureMatcher', 'PixelEnsembleHead', 'SimplePyramid', 'SoftmaxFusion', 'TimestepSelectionHook',
        ]  # fmt: skip

    from mmaselect.apis import extract, load, select
