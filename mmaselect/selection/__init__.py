"""Timestep selection: what a timestep is scored by, the sweep, the report. No OpenMMLab, no diffusers."""
