"""SiT (arXiv 2401.08740): DiT's network, trained by interpolants. Its time runs the other way."""

from __future__ import annotations

from typing import Any

from mmaselect.diffusion.families.dit import DiT
from mmaselect.diffusion.family import DiffusersModule
from mmaselect.diffusion.noise import ForwardProcess, Interpolant, RectifiedFlow
from mmaselect.errors import InputError, check_choice

#: Keys of ``config.json``, ours: what the network is told at clean data, 1 or 0, and the path it was trained on.
DATA_TIME, PATH_TYPE = 'data_time', 'path_type'
#: Values of ``path_type`` in the checkpoints of SiT (``Linear``, ``GVP``, ``VP``) and of REPA (``linear``, ``cosine``).
PATH_NAMES = {'Linear': 'Linear', 'linear': 'Linear', 'GVP': 'GVP', 'cosine': 'GVP', 'VP': 'VP'}


class SiT(DiT):
    """SiT under the null class.

    The original code calls data time 1 and noise time 0, ``x_t = t data + (1 - t) noise``, and tells the network
    ``t`` itself, not ``1000 t``. A user's timestep (0 clean, 1000 noise) therefore becomes ``1 - t / 1000``. Where the
    config has ``data_time=0``, as for REPA, it becomes ``t / 1000``.
    """

    name = 'SiT'
    class_names = ('DiTTransformer2DModel',)
    # The linear interpolant is a rectified flow.
    process_class = RectifiedFlow
    architectures = {key.replace('dit', 'sit'): value for key, value in DiT.architectures.items()}
    own_fields = (*DiT.own_fields, DATA_TIME, PATH_TYPE)

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the model of a ``config.json``, see :meth:`DiT.build`.

        Args:
            config: Optionally also ``data_time``, 1 (the default) or 0, and ``path_type``: ``'Linear'`` (the default),
                ``'GVP'`` or ``'VP'``.
        """
        model = super().build(config)
        time = check_choice(config.get(DATA_TIME, 1), DATA_TIME, (0, 1))
        path = PATH_NAMES[check_choice(config.get(PATH_TYPE, 'Linear'), PATH_TYPE, PATH_NAMES)]
        for name, value, default in ((DATA_TIME, time, 1), (PATH_TYPE, path, 'Linear')):
            if value != default:
                # So that it is part of the recipe.
                model.register_to_config(**{name: value})
        return model

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float, config: Any = None) -> ForwardProcess:
        """The forward process of the path in the config."""
        path = PATH_NAMES[(config or {}).get(PATH_TYPE, 'Linear')]
        if path == 'Linear':
            return super().make_process(scheduler, shift)
        if shift != 1:
            raise InputError(f'shift={shift!r} is not valid for path_type={path!r}: only the linear path has a shift')
        return Interpolant(path)

    def time(self, timestep: float) -> float:
        """What the network is told: by default 1 for clean data, 0 for pure noise."""
        noise = self.process.network_timestep(timestep) / 1000
        return noise if self.transformer.config.get(DATA_TIME, 1) == 0 else 1 - noise
