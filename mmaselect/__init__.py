"""mmaselect: frozen diffusion transformers as backbones for the OpenMMLab toolboxes.

Importing it repairs the stack (:mod:`mmaselect.compat`) and registers what a config can name. It imports none of the
toolboxes and none of diffusers' model code.
"""

from mmaselect import compat
from mmaselect.version import __version__

compat.apply()

__all__ = ['__version__']
