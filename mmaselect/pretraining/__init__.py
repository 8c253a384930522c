"""Training of small diffusion transformers from scratch, for demos, tests and studies of the method."""

from mmaselect.pretraining.epsilon import EpsilonPrediction
from mmaselect.pretraining.flow_matching import FlowMatching
from mmaselect.pretraining.latents import LatentDataset
from mmaselect.pretraining.objective import Objective

__all__ = ['EpsilonPrediction', 'FlowMatching', 'LatentDataset', 'Objective']
