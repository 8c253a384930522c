"""What frozen features are good for, from Python and without a runner. Needs no mmengine."""

from mmaselect.tasks.correspondence import Matches, match

__all__ = ['Matches', 'match']
