"""FLUX.2 dev and klein (rectified flow, double and single blocks). On diffusers' ``Flux2Transformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.families.flux import Flux
from mmaselect.diffusion.family import DiffusersModule
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.taps import Tap

#: Guidance that ``dev`` is told, as diffusers' pipeline tells it.
GUIDANCE = 4.0


class Flux2(Flux):
    """FLUX.2 under one constant prompt; double blocks come first. Its latent pixels are 16 image pixels wide.

    A single block has no ``attention`` of its own: one layer projects it together with the feed-forward part.
    """

    name = 'Flux2'
    class_names = ('Flux2Transformer2DModel',)
    architectures = {
        'flux.2-dev': dict(guidance_embeds=True),
        'flux.2-klein-4b': dict(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        'flux.2-klein-9b': dict(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        ),
    }

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """A single block makes query, key and value in one layer."""
        found = {}
        width = network.config['num_attention_heads'] * network.config['attention_head_dim']
        for number, path in enumerate(cls.blocks(network.config)):
            sites, layer = cls.sites, 'attn.to_qkv_mlp_proj'
            if path.startswith('single'):
                sites = {'modulated': Site(layer, reads_input=True)}
                for place, name in enumerate(('query', 'key', 'value')):
                    sites[name] = Site(layer, part=(place * width, (place + 1) * width))
                sites['output'] = Site('')
            for name, site in sites.items():
                found[Tap(number, name)] = site._replace(module=f'{path}.{site.module}'.rstrip('.'))
        return found

    @classmethod
    def multiple(cls, config: Any) -> int:
        """A token is a latent pixel."""
        return 1

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """The autoencoder packs 2x2 cells of 32 channels."""
        return config['in_channels']

    @classmethod
    def side(cls, config: Any) -> int:
        """1024 image pixels."""
        return 64

    @classmethod
    def latent_scale(cls, config: Any) -> None:
        """Not FLUX.1's: its latents have statistics per channel."""

    @classmethod
    def pack(cls, latent: Tensor) -> Tensor:
        """(B, C, H, W) to tokens (B, H * W, C)."""
        return latent.flatten(2).transpose(1, 2)

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Tokens of a language model: three of its layers side by side."""
        return {'prompt_embeds': config['joint_attention_dim']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, where each token lies in time, row, column and text, and the guidance."""
        (batch, _, rows, columns), tokens = latent.shape, prompt['prompt_embeds'].shape[1]
        image = torch.zeros(rows, columns, 4, device=latent.device)
        image[..., 1] += torch.arange(rows, device=latent.device)[:, None]
        image[..., 2] += torch.arange(columns, device=latent.device)
        text = torch.zeros(tokens, 4, device=latent.device)
        text[:, 3] += torch.arange(tokens, device=latent.device)
        return {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1),
            'img_ids': image.flatten(0, 1),
            'txt_ids': text,
            'guidance': torch.full((batch,), GUIDANCE, device=latent.device) if config['guidance_embeds'] else None,
        }
