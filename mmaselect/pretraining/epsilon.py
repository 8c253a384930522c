"""Noise prediction under DDPM, as a model that an ordinary mmengine runner trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from mmaselect.diffusion.families import DiT
from mmaselect.diffusion.latent import Autoencoder
from mmaselect.files import write_json
from mmaselect.pretraining.objective import Objective


@MODELS.register_module()
class EpsilonPrediction(Objective):
    """Trains a class-free DiT to predict the noise (arXiv 2006.11239, the simple loss).

    Its ``out_channels`` are its ``in_channels``: it learns no variances.

    Args:
        scheduler: Arguments of diffusers' ``DDPMScheduler``; by default DiT's, a linear schedule of 1,000 steps.
        **options: Of :class:`~mmaselect.pretraining.objective.Objective`.
    """

    family = DiT

    def __init__(self, scheduler: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        from diffusers import DDPMScheduler

        self.scheduler: Any = DDPMScheduler(**(scheduler or {}))

    def noised(self, data: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Every step of the schedule is as likely as any other."""
        time = torch.randint(len(self.scheduler.alphas_cumprod), (len(data),), generator=generator).to(data.device)
        return self.scheduler.add_noise(data, noise, time), time, noise

    def export(self, folder: str | Path, encoder: Autoencoder | None = None) -> Path:
        """And ``scheduler/``, which says what the timesteps mean."""
        write_json(Path(folder) / 'scheduler/scheduler_config.json', json.loads(self.scheduler.to_json_string()))
        return super().export(folder, encoder)
