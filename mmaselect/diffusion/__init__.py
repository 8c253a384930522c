"""Frozen generative models as feature extractors. Plain torch and diffusers: no registry, no OpenMMLab."""
