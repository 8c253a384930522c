"""FLUX.1 dev and schnell (rectified flow, double and single blocks). On diffusers' ``FluxTransformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.family import DiffusersModule, block_sites
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.packed import PackedFamily, cells
from mmaselect.diffusion.taps import Tap

#: Guidance that ``dev`` is told, as diffusers' pipeline tells it.
GUIDANCE = 3.5


class Flux(PackedFamily):
    """FLUX.1 under one constant prompt; blocks 0 to 18 are the double ones, the single ones follow."""

    name = 'Flux'
    class_names = ('FluxTransformer2DModel',)
    architectures = {'flux.1-dev': dict(guidance_embeds=True), 'flux.1-schnell': dict(guidance_embeds=False)}
    sites = block_sites('attn', item=1)[0]
    prompt_tokens = 512
    normalised_sites = {'query': Site('attn.norm_q', merge=(2, 3)), 'key': Site('attn.norm_k', merge=(2, 3))}

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """Double blocks, then single ones."""
        double = [f'transformer_blocks.{number}' for number in range(config['num_layers'])]
        return double + [f'single_transformer_blocks.{number}' for number in range(config['num_single_layers'])]

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """Single blocks have no projection behind their attention."""
        found = super().catalogue(network)
        for number, path in enumerate(cls.blocks(network.config)):
            if path.startswith('single'):
                found[Tap(number, 'attention')] = Site(f'{path}.attn')
        return found

    @classmethod
    def latent_scale(cls, config: Any) -> tuple[float, float] | None:
        """Of its own VAE."""
        return 0.3611, 0.1159

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """T5's tokens, and CLIP's pooled embedding."""
        return {'prompt_embeds': config['joint_attention_dim'], 'pooled_prompt_embeds': config['pooled_projection_dim']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, where each token lies, and the guidance."""
        batch = len(latent)
        read = {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1),
            'pooled_projections': prompt['pooled_prompt_embeds'].expand(batch, -1),
            'img_ids': cells(latent.shape[2] // 2, latent.shape[3] // 2, 3, latent.device),
            'txt_ids': torch.zeros(prompt['prompt_embeds'].shape[1], 3, device=latent.device),
        }
        if config['guidance_embeds']:
            read['guidance'] = torch.full((batch,), GUIDANCE, device=latent.device)
        return read
