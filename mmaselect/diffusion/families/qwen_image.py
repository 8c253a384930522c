"""Qwen-Image (arXiv 2508.02324, MM-DiT). On diffusers' ``QwenImageTransformer2DModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmaselect.diffusion.family import block_sites
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.packed import PackedFamily


class QwenImage(PackedFamily):
    """Qwen-Image under one constant prompt."""

    name = 'QwenImage'
    least_diffusers = '0.42'
    class_names = ('QwenImageTransformer2DModel',)
    architectures = {'qwen-image': {}}
    sites = block_sites('attn', item=1)[0]
    normalised_sites = {'query': Site('attn.norm_q', merge=(2, 3)), 'key': Site('attn.norm_k', merge=(2, 3))}
    # What the pipeline's template leaves of the empty text.
    prompt_tokens = 5

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Tokens of Qwen2.5-VL."""
        return {'prompt_embeds': config['joint_attention_dim']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, of which no token is padding, and how many cells of 2x2 latent pixels there are."""
        batch, (height, width) = len(latent), latent.shape[2:]
        return {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1),
            'img_shapes': [[(1, height // 2, width // 2)]] * batch,
        }
