"""Lumina-Image 2.0 (arXiv 2503.21758). On diffusers' ``Lumina2Transformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.families.z_image import ZImage
from mmaselect.diffusion.family import Family, block_sites
from mmaselect.diffusion.network import Site


class FullMask(Tensor):
    """A mask of ones that knows its sum: diffusers asks for it as numbers, which a dry run does not have."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def sum(self, dim: int) -> Tensor:  # type: ignore[override]
        """Tokens of each prompt."""
        return torch.full((len(self),), self.shape[dim], device='cpu')


class Lumina2(Family):
    """Lumina-Image 2.0 under one constant prompt; the blocks that refine image or prompt alone are not counted."""

    name = 'Lumina2'
    least_diffusers = '0.36'
    class_names = ('Lumina2Transformer2DModel',)
    architectures = {'lumina-image-2.0': dict(cap_feat_dim=2304)}
    sites = block_sites('attn')[0]
    normalised_sites = {name: Site(f'attn.norm_{name[0]}', merge=(2, 3)) for name in ('query', 'key')}
    prompt_tokens = 256
    # Both handle images one by one, and are told the share of the image.
    dry_batch, time = ZImage.dry_batch, ZImage.time

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """Those of image and prompt together."""
        return [f'layers.{number}' for number in range(config['num_layers'])]

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Gemma's tokens."""
        return {'prompt_embeds': config['cap_feat_dim']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, of which no token is padding."""
        tokens = prompt['prompt_embeds'].expand(len(latent), -1, -1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=latent.device)
        return {'encoder_hidden_states': tokens, 'encoder_attention_mask': mask.as_subclass(FullMask)}
