"""mmaselect: frozen diffusion models as backbones for the OpenMMLab toolboxes.

Importing it repairs the stack (:mod:`mmaselect.compat`) and registers what a config can name as soon as mmengine is
imported, before or after. It imports neither torch nor mmengine, and ``load``, ``extract`` and ``select`` need no
mmengine at all.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmaselect import compat
from mmaselect.version import __version__

if TYPE_CHECKING:
    from mmaselect.apis import extract, load, select

#: Where each name comes from: it is imported when it is asked for.
_NAMES = dict.fromkeys(('extract', 'load', 'select'), 'mmaselect.apis')
_REGISTERED = {
    'ASelectDiT': 'mmaselect.backbones',
    'ActivationAggregation': 'mmaselect.necks',
    'AggregationHead': 'mmaselect.heads',
    'AttentionPooling': 'mmaselect.necks',
    'FeatureCacheHook': 'mmaselect.cache',
    'FeatureMatcher': 'mmaselect.matchers',
    'PCK': 'mmaselect.evaluation.pck',
    'PixelEnsembleHead': 'mmaselect.heads',
    'SimplePyramid': 'mmaselect.necks',
    'SoftmaxFusion': 'mmaselect.necks',
    'TimestepSelectionHook': 'mmaselect.hooks',
}
if find_spec('mmengine') is not None:
    _NAMES.update(_REGISTERED)

__all__ = ['__version__', 'extract', 'load', 'select']
__all__ += [name for name in _NAMES if name not in __all__]


def __getattr__(name: str) -> Any:
    """A name of this package, imported on first use."""
    if name not in _NAMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_NAMES[name]), name)


def _register() -> None:
    """Registers what a config can name, and where configs are that others inherit from.

    A package of ours that needs mmengine imports it before anything else, and modules import names from modules, not
    from packages. So whichever is imported first, those that this asks for are whole, or are the one being imported.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    # Lets configs inherit from ours as from any OpenMMLab package: _base_ = ['mmaselect::_base_/models/dit-nano.py'].
    MODULE2PACKAGE.setdefault('mmaselect', 'mmaselect')
    for module in ('mmaselect.datasets', *sorted(set(_REGISTERED.values()))):
        import_module(module)


compat.apply(_register)
