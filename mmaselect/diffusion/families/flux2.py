"""FLUX.2 dev and klein (rectified flow, double and single blocks). On diffusers' ``Flux2Transformer2DModel``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.families.flux import Flux
from mmaselect.diffusion.family import DiffusersModule
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.packed import cells
from mmaselect.diffusion.taps import Tap

#: Guidance that ``dev`` is told, as diffusers' pipeline tells it.
GUIDANCE = 4.0


def klein(double: int, single: int, heads: int, width: int) -> dict[str, Any]:
    """Blocks of both kinds, heads of 128 channels, and channels of the prompt's tokens."""
    sizes = dict(num_layers=double, num_single_layers=single, num_attention_heads=heads, joint_attention_dim=width)
    return {**sizes, 'guidance_embeds': False}


class Flux2(Flux):
    """FLUX.2 under one constant prompt; double blocks come first. Its latent pixels are 16 image pixels wide.

    A single block has no ``attention`` of its own: one layer projects it together with the feed-forward part.
    """

    name = 'Flux2'
    least_diffusers = '0.42'
    class_names = ('Flux2Transformer2DModel',)
    # The autoencoder packs 2x2 of its cells.
    cell = 1
    architectures = {
        'flux.2-dev': dict(guidance_embeds=True),
        'flux.2-klein-4b': klein(5, 20, 24, 7680),
        'flux.2-klein-9b': klein(8, 24, 32, 12288),
    }

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """A single block makes query, key and value in one layer."""
        found = super().catalogue(network)
        width = network.config['num_attention_heads'] * network.config['attention_head_dim']
        for number, path in enumerate(cls.blocks(network.config)):
            if path.startswith('single'):
                layer = f'{path}.attn.to_qkv_mlp_proj'
                found[Tap(number, 'modulated')] = Site(layer, reads_input=True)
                for place, name in enumerate(('query', 'key', 'value')):
                    found[Tap(number, name)] = Site(layer, part=(place * width, (place + 1) * width))
                del found[Tap(number, 'attention')]
        return found

    @classmethod
    def latent_scale(cls, config: Any) -> None:
        """Not FLUX.1's: its latents have statistics per channel."""

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Tokens of a language model: three of its layers side by side."""
        return {'prompt_embeds': config['joint_attention_dim']}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, where each token lies in time, row, column and text, and the guidance."""
        (batch, _, rows, columns), tokens = latent.shape, prompt['prompt_embeds'].shape[1]
        text = torch.zeros(tokens, 4, device=latent.device)
        text[:, 3] += torch.arange(tokens, device=latent.device)
        return {
            'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1),
            'img_ids': cells(rows, columns, 4, latent.device),
            'txt_ids': text,
            'guidance': torch.full((batch,), GUIDANCE, device=latent.device) if config['guidance_embeds'] else None,
        }
