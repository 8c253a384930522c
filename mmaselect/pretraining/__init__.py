"""Training of small diffusion transformers from scratch, for demos, tests and studies of the method."""

import mmengine  # noqa: F401  (first: importing it registers our own, see mmaselect/__init__.py)

from mmaselect.pretraining.epsilon import EpsilonPrediction
from mmaselect.pretraining.flow_matching import FlowMatching
from mmaselect.pretraining.latents import LatentDataset
from mmaselect.pretraining.objective import Objective

__all__ = ['EpsilonPrediction', 'FlowMatching', 'LatentDataset', 'Objective']
