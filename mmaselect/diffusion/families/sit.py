"""SiT (arXiv 2401.08740): DiT's network, trained by interpolants. Its time runs the other way."""

from __future__ import annotations

from typing import Any

from mmaselect.diffusion.families.dit import DiT
from mmaselect.diffusion.noise import ForwardProcess, RectifiedFlow


class SiT(DiT):
    """SiT with the linear path, under the null class.

    The original code calls data time 1 and noise time 0, ``x_t = t data + (1 - t) noise``, and tells the network
    ``t`` itself, not ``1000 t``. A user's timestep (0 clean, 1000 noise) therefore becomes ``1 - t / 1000``.
    """

    name = 'SiT'
    class_names = ('DiTTransformer2DModel',)
    architectures = {key.replace('dit', 'sit'): value for key, value in DiT.architectures.items()}

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float) -> ForwardProcess:
        """The linear interpolant is a rectified flow."""
        return RectifiedFlow(shift)

    def time(self, timestep: float) -> float:
        """What the network is told: 1 for clean data, 0 for pure noise."""
        return 1 - self.process.network_timestep(timestep) / 1000
