"""Flow matching of a SiT, as a model that an ordinary mmengine runner trains."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor

from mmaselect.diffusion.families import SiT
from mmaselect.pretraining.objective import Objective


@MODELS.register_module()
class FlowMatching(Objective):
    """Trains a class-free SiT by flow matching (arXiv 2210.02747, the linear path of arXiv 2401.08740).

    With data ``x``, noise ``e`` and SiT's time ``u`` (1 at the data), the network sees ``u x + (1 - u) e`` and learns
    the velocity ``x - e``. ``u`` is the logistic of a standard normal, which spends its steps where the task is neither
    trivial nor hopeless (arXiv 2403.03206, section 3.1).
    """

    family = SiT

    def noised(self, data: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The straight path, and its velocity."""
        time = torch.randn(len(data), generator=generator).sigmoid().to(data.device)
        mix = time.view(-1, 1, 1, 1)
        return mix * data + (1 - mix) * noise, time, data - noise
