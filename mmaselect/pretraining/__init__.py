"""Training of small diffusion transformers from scratch, for demos, tests and studies of the method."""

from mmaselect.pretraining.flow_matching import FlowMatching

__all__ = ['FlowMatching']
