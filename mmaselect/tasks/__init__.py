"""What frozen features are good for, from Python and without a runner. Needs no mmengine."""

from mmaselect.tasks.correspondence import Matches, match
from mmaselect.tasks.label_scarce import PixelEnsemble, fit, vote

__all__ = ['Matches', 'PixelEnsemble', 'fit', 'match', 'vote']
