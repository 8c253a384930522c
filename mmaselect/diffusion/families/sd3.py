"""Stable Diffusion 3 and 3.5 (MM-DiT, arXiv 2403.03206). On diffusers' ``SD3Transformer2DModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmaselect.diffusion.family import Family, block_sites


def architecture(layers: int, pos_embed_max_size: int, dual: int = 0, qk_norm: str | None = None) -> dict[str, Any]:
    """Arguments of ``SD3Transformer2DModel``; MM-DiT ties its width to its depth (64 channels per layer)."""
    return dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=pos_embed_max_size,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=qk_norm,
    )


class SD3(Family):
    """SD3-medium, SD3.5-medium (dual attention in its first 13 blocks) and SD3.5-large under one constant prompt.

    In a block with dual attention, query, key, value and attention are those of the joint attention, which SD3.5-medium
    shares with its siblings.
    """

    name = 'SD3'
    class_names = ('SD3Transformer2DModel',)
    architectures = {
        'sd3-medium': architecture(24, 192),
        'sd3.5-medium': architecture(24, 384, dual=13, qk_norm='rms_norm'),
        'sd3.5-large': architecture(38, 192, qk_norm='rms_norm'),
    }
    # 77 of CLIP and 256 of T5, as diffusers' pipeline has them.
    prompt_tokens = 333
    files_hold_all = True
    sites, normalised_sites = block_sites('attn', item=1)

    @classmethod
    def latent_scale(cls, config: Any) -> tuple[float, float]:
        """Of its own VAE."""
        return 1.5305, 0.0609

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """T5's and CLIP's tokens, and CLIP's pooled embeddings."""
        return {
            'prompt_embeds': config.joint_attention_dim,
            'pooled_prompt_embeds': config.pooled_projection_dim,
        }

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The constant prompt, for every image."""
        return {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(len(latent), -1, -1),
            'pooled_projections': prompt['pooled_prompt_embeds'].expand(len(latent), -1),
        }
