"""DiT (arXiv 2212.09748): class-conditional, DDPM noise, AdaLN-Zero. On diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmaselect.diffusion.family import DiffusersModule, Family, block_sites
from mmaselect.diffusion.noise import DDPM, RectifiedFlow
from mmaselect.errors import InputError, check_choice

#: Key that ``tools/model_converters/dit_to_diffusers.py`` adds to ``config.json``; see ``DiT.build``.
FREQUENCY_SHIFT = 'timestep_freq_shift'


def architecture(layers: int, heads: int, head_dim: int, sample_size: int, patch_size: int = 2) -> dict[str, Any]:
    """Arguments of ``DiTTransformer2DModel`` for one row of the paper's table 1."""
    return dict(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8,
        sample_size=sample_size, patch_size=patch_size, num_embeds_ada_norm=1000,
    )  # fmt: skip


class DiT(Family):
    """DiT under the null class."""

    name = 'DiT'
    process_class: ClassVar[type[RectifiedFlow] | type[DDPM]] = DDPM
    class_names: ClassVar[tuple[str, ...]] = ('DiTTransformer2DModel', 'Transformer2DModel')
    architectures = {
        'dit-s/2-256': architecture(12, 6, 64, 32),
        'dit-b/2-256': architecture(12, 12, 64, 32),
        'dit-l/2-256': architecture(24, 16, 64, 32),
        'dit-xl/2-256': architecture(28, 16, 72, 32),
        'dit-xl/2-512': architecture(28, 16, 72, 64),
    }
    sites, normalised_sites = block_sites('attn1')
    own_fields: ClassVar[tuple[str, ...]] = (FREQUENCY_SHIFT,)

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the model of a ``config.json``.

        Args:
            config: Arguments of ``DiTTransformer2DModel``, and optionally ``timestep_freq_shift``: diffusers spaces
                the 128 frequencies of the timestep embedding over 127 steps (1, the default), the original DiT and
                SiT code over 128 (0). A folder converted from an original checkpoint says 0, since that is what its
                weights were trained with.

        Returns:
            The diffusers model.

        Raises:
            InputError: If the config is of another kind of model.
        """
        if config.get('norm_type', 'ada_norm_zero') != 'ada_norm_zero':
            raise InputError(f'norm_type={config["norm_type"]!r} is not a {cls.name}: expected ada_norm_zero')
        model = super().build(config)
        shift = check_choice(config.get(FREQUENCY_SHIFT, 1), FREQUENCY_SHIFT, (0, 1))
        if shift != 1:
            # So that it is part of the recipe.
            model.register_to_config(**{FREQUENCY_SHIFT: shift})
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
        return model

    @classmethod
    def latent_scale(cls, config: Any) -> tuple[float, float]:
        """Of Stable Diffusion's VAE."""
        return 0.18215, 0.0

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The null class."""
        return {'class_labels': torch.full((len(latent),), config.num_embeds_ada_norm, device=latent.device)}
