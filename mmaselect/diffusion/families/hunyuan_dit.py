"""Hunyuan-DiT (arXiv 2405.08748). On diffusers' ``HunyuanDiT2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.family import Family, block_sites
from mmaselect.diffusion.noise import DDPM

G2 = dict(
    in_channels=4, patch_size=2, sample_size=128, num_layers=40, hidden_size=1408, mlp_ratio=4.3637,
    text_len=77, text_len_t5=256,
)  # fmt: skip


class HunyuanDiT(Family):
    """Hunyuan-DiT under one constant prompt: BERT's tokens, T5's, and which of both are no padding.

    Padding is replaced by something that the model learned, so it is not left out. Zeros in place of a prompt are
    padding alone. Its block's query, key and value are those of the self-attention.
    """

    name = 'HunyuanDiT'
    least_diffusers = '0.42'
    class_names = ('HunyuanDiT2DModel',)
    process_class = DDPM
    # Of v1.2; up to v1.1 beta_end is 0.03. A pipeline's folder says it.
    betas = dict(beta_start=0.00085, beta_end=0.018, beta_schedule='scaled_linear', steps_offset=1)
    architectures = {
        'hunyuandit-v1.1': dict(G2, use_style_cond_and_image_meta_size=True),
        'hunyuandit-v1.2': dict(G2, use_style_cond_and_image_meta_size=False),
    }
    sites, normalised_sites = block_sites('attn1')
    prompt_tokens = dry_tokens = 256

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """All of them."""
        return [f'blocks.{number}' for number in range(config['num_layers'])]

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """BERT's and T5's tokens, and the mask of both."""
        return {
            'prompt_embeds': config['cross_attention_dim'],
            'prompt_embeds_2': config['cross_attention_dim_t5'],
            'prompt_mask': config['text_len'] + config['text_len_t5'],
        }

    @classmethod
    def arguments(cls, config: Any, latent: Tensor, time: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """Its time is of the dtype of the weights, as in diffusers' pipeline."""
        return {**super().arguments(config, latent, time, prompt), 'timestep': time.to(latent.dtype)}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, where each cell lies, and up to v1.1 the size of the image."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        batch, grid = len(latent), [side // config['patch_size'] for side in latent.shape[2:]]
        # Positions are those of 512 pixels: the longer side spans them, the other one is in their middle.
        base = 512 // 8 // config['patch_size']
        spans = [round(base / max(grid) * side) for side in grid]
        starts = [round((base - span) / 2) for span in spans]
        stops = [start + span for start, span in zip(starts, spans)]
        masks = prompt['prompt_mask'].expand(batch, -1).split([config['text_len'], config['text_len_t5']], 1)
        size = torch.tensor([1024, 1024, 8 * latent.shape[2], 8 * latent.shape[3], 0, 0], device=latent.device)
        return {
            'encoder_hidden_states': prompt['prompt_embeds'][:, : config['text_len']].expand(batch, -1, -1),
            'encoder_hidden_states_t5': prompt['prompt_embeds_2'][:, : config['text_len_t5']].repeat(batch, 1, 1),
            'text_embedding_mask': masks[0],
            'text_embedding_mask_t5': masks[1],
            'image_meta_size': size.to(prompt['prompt_embeds'].dtype).repeat(batch, 1),
            'style': torch.zeros(batch, dtype=torch.long, device=latent.device),
            'image_rotary_emb': get_2d_rotary_pos_embed(
                config['attention_head_dim'], (starts, stops), grid, device=latent.device),
        }  # fmt: skip
