"""PixArt-alpha and -Sigma (arXiv 2310.00426, 2403.04692). On diffusers' ``PixArtTransformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.family import Family, block_sites
from mmaselect.diffusion.noise import DDPM

XL = dict(caption_channels=4096, attention_bias=True, norm_elementwise_affine=False)


class PixArt(Family):
    """PixArt under one constant prompt. Its block's query, key and value are those of the self-attention."""

    name = 'PixArt'
    class_names = ('PixArtTransformer2DModel',)
    process_class = DDPM
    architectures = {
        'pixart-alpha-512': dict(XL, sample_size=64),
        'pixart-alpha-1024': dict(XL, sample_size=128, use_additional_conditions=True),
        'pixart-sigma-512': dict(XL, sample_size=64, use_additional_conditions=False),
        'pixart-sigma-1024': dict(XL, sample_size=128, use_additional_conditions=False),
    }
    sites, normalised_sites = block_sites('attn1')
    prompt_tokens = 300

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """T5's tokens."""
        return {'prompt_embeds': config['caption_channels']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt; alpha at 1024 is told the size of the image as well."""
        batch, (height, width) = len(latent), latent.shape[2:]
        added: dict[str, Any] = {'resolution': None, 'aspect_ratio': None}
        told = config['use_additional_conditions']
        if told or (told is None and config['sample_size'] == 128):
            size = torch.tensor([8.0 * height, 8.0 * width], device=latent.device)
            ratio = torch.tensor([height / width], device=latent.device)
            dtype = prompt['prompt_embeds'].dtype
            added = {'resolution': size.to(dtype).expand(batch, -1), 'aspect_ratio': ratio.to(dtype).expand(batch, -1)}
        return {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1),
            'added_cond_kwargs': added,
        }
