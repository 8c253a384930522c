"""SiT (arXiv 2401.08740): DiT's network, trained by interpolants. Its time runs the other way."""

from __future__ import annotations

from mmaselect.diffusion.families.dit import DiT
from mmaselect.diffusion.noise import RectifiedFlow


class SiT(DiT):
    """SiT with the linear path, under the null class.

    The original code calls data time 1 and noise time 0, ``x_t = t data + (1 - t) noise``, and tells the network
    ``t`` itself, not ``1000 t``. A user's timestep (0 clean, 1000 noise) therefore becomes ``1 - t / 1000``.
    """

    name = 'SiT'
    class_names = ('DiTTransformer2DModel',)
    # The linear interpolant is a rectified flow.
    process_class = RectifiedFlow
    architectures = {key.replace('dit', 'sit'): value for key, value in DiT.architectures.items()}

    def time(self, timestep: float) -> float:
        """What the network is told: 1 for clean data, 0 for pure noise."""
        return 1 - self.process.network_timestep(timestep) / 1000
