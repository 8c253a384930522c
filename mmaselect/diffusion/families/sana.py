"""Sana and Sana-1.5 (linear attention, arXiv 2410.10629, 2501.18427). On diffusers' ``SanaTransformer2DModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmaselect.diffusion.family import DiffusersModule, Family, block_sites
from mmaselect.diffusion.network import Site
from mmaselect.errors import InputError

BIG = dict(num_layers=20, num_attention_heads=70, num_cross_attention_heads=20, cross_attention_head_dim=112,
           cross_attention_dim=2240)  # fmt: skip
SMALL = dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72,
             cross_attention_dim=1152)  # fmt: skip


class Sana(Family):
    """Sana under one constant prompt. Its block's query, key and value are those of the linear self-attention.

    Its scheduler's ``flow_shift`` (3 for images of 1024 pixels) is not applied: ``shift`` is the user's.
    """

    name = 'Sana'
    least_diffusers = '0.36'
    class_names = ('SanaTransformer2DModel',)
    architectures = {
        'sana-600m-512': dict(SMALL, sample_size=16),
        'sana-600m-1024': SMALL,
        'sana-1600m-512': dict(BIG, sample_size=16),
        'sana-1600m-1024': BIG,
        'sana1.5-4800m-1024': dict(BIG, num_layers=60, qk_norm='rms_norm_across_heads'),
    }
    sites = block_sites('attn1')[0]
    # Across heads, so that they are not yet apart.
    normalised_sites = {'query': Site('attn1.norm_q'), 'key': Site('attn1.norm_k')}
    prompt_tokens = 300

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the model of a ``config.json``.

        Raises:
            InputError: If it is one of Sana-Sprint, whose time and noise are TrigFlow's.
        """
        if config.get('guidance_embeds'):
            raise InputError('guidance_embeds=True is Sana-Sprint, which is no rectified flow: choose another Sana')
        return super().build(config)

    def time(self, timestep: float) -> float:
        """What the network is told, as diffusers' pipeline scales it."""
        return self.process.network_timestep(timestep) * self.transformer.config.timestep_scale

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Gemma's tokens."""
        return {'prompt_embeds': config['caption_channels']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt."""
        return {'encoder_hidden_states': prompt['prompt_embeds'].expand(len(latent), -1, -1)}
