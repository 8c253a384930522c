"""Stable Diffusion 1.5, 2.1 and XL (arXiv 2112.10752, 2307.01952). On diffusers' ``UNet2DConditionModel``.

A block is a residual unit and the transformer behind it, or what changes the size. Taps have the names of GDF
(arXiv 2410.03558): ``up-level1-repeat1-vit-block0-cross-q`` is the query of the cross-attention of the first block of
the transformer behind the second residual unit of the second upward level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.family import DiffusersModule, Family
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.noise import DDPM
from mmaselect.diffusion.taps import Tap

#: Of a transformer block. Keys and values of the cross-attention are the prompt's, not the image's.
PARTS = {
    'self-q': 'attn1.to_q', 'self-k': 'attn1.to_k', 'self-v': 'attn1.to_v', 'cross-q': 'attn2.to_q',
    'ffn-inner': 'ff.net.0', 'out': '',
}  # fmt: skip
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1)
SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
SD21 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
XL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
    block_out_channels=[320, 640, 1280], transformer_layers_per_block=[1, 2, 10], addition_embed_type='text_time',
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
    up_block_types=['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
)  # fmt: skip


class UNet(Family):
    """A text-conditional U-Net under one constant prompt."""

    name = 'UNet'
    class_names = ('UNet2DConditionModel',)
    process_class, betas = DDPM, BETAS
    architectures = {'sd1.5': SD15, 'sd2.1': SD21, 'sdxl': XL}
    sites, auto_components = {}, ()
    latent_name, folder, prompt_tokens, dry_tokens = 'sample', 'unet', 77, 77
    tap_sets = {
        'gdf-sd15': ('up-level1-repeat1-vit-block0-cross-q', 'up-level1-repeat2-res-out',
                     'up-level2-repeat1-vit-block0-cross-q', 'up-level3-repeat0-vit-block0-self-k'),
        'gdf-sdxl': ('up-level0-repeat0-vit-block7-out', 'up-level0-repeat0-vit-block5-out',
                     'up-level1-repeat0-vit-block0-cross-q', 'up-level1-repeat0-vit-block0-out'),
        'legacy-sd15': ('up-level0-upsampler-out', 'up-level1-upsampler-out', 'up-level2-upsampler-out',
                        'up-level3-repeat2-vit-out'),
        'legacy-sdxl': ('up-level0-upsampler-out', 'up-level1-upsampler-out', 'up-level2-repeat2-res-out'),
    }  # fmt: skip

    @classmethod
    def units(cls, network: DiffusersModule) -> list[tuple[str, dict[str, Site]]]:
        """The units in the order of the pass, with the sites of each by the last part of GDF's names."""
        stages = [(f'down-level{n}', f'down_blocks.{n}', block) for n, block in enumerate(network.down_blocks)]
        stages.append(('mid', 'mid_block', network.mid_block))
        stages += [(f'up-level{n}', f'up_blocks.{n}', block) for n, block in enumerate(network.up_blocks)]
        units = [('unet', {'in': Site('conv_in', reads_input=True), 'after-conv-in': Site('conv_in')})]
        for name, path, block in stages:
            attentions = list(getattr(block, 'attentions', None) or ())
            for number in range(len(block.resnets)):
                resnet = f'{path}.resnets.{number}'
                sites = {'res-increment': Site(f'{resnet}.conv2'), 'res-out': Site(resnet)}
                if number < len(attentions) and attentions[number] is not None:
                    sites.update(cls.attention_sites(f'{path}.attentions.{number}', attentions[number]))
                units.append((f'{name}-repeat{number}', sites))
            for kind in ('downsampler', 'upsampler'):
                if getattr(block, f'{kind}s', None):
                    units.append((name, {f'{kind}-out': Site(f'{path}.{kind}s.0')}))
        return [*units, ('unet', {'out': Site('conv_out')})]

    @classmethod
    def attention_sites(cls, path: str, attention: DiffusersModule) -> dict[str, Site]:
        """Those of the transformer behind a residual unit."""
        sites = {}
        for number in range(len(attention.transformer_blocks)):
            block = f'{path}.transformer_blocks.{number}'
            for part, module in PARTS.items():
                sites[f'vit-block{number}-{part}'] = Site(f'{block}.{module}' if module else block)
            for kind, name in (('self', 'attn1'), ('cross', 'attn2')):
                layer, heads = f'{block}.{name}', attention.transformer_blocks[number].get_submodule(name).heads
                sites[f'vit-block{number}-{kind}-map'] = Site(f'{layer}.to_k', query=f'{layer}.to_q', heads=heads)
        return {**sites, 'vit-out': Site(path)}

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """GDF's activations. Softmax maps are averaged over heads; each key, of which ``self-map`` has as many as cells
        and ``cross-map`` as tokens of the prompt, is a channel.
        """
        units = enumerate(cls.units(network))
        return {Tap(number, part): site for number, (_, sites) in units for part, site in sites.items()}

    @classmethod
    def tap_names(cls, config: Any) -> dict[str, Tap]:
        """GDF's names; of the middle, which has one transformer, it does not count them."""
        units = enumerate(cls.units(cls._network(config)))
        return {
            f'{"mid" if unit == "mid-repeat0" and part.startswith("vit") else unit}-{part}': Tap(number, part)
            for number, (unit, sites) in units
            for part in sites
        }

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """None that repeats, as ``compile`` would need."""
        return []

    @classmethod
    def multiple(cls, config: Any) -> int:
        """Every level but the last halves the latent."""
        return 2 ** (len(config['block_out_channels']) - 1)

    @classmethod
    def latent_scale(cls, config: Any) -> tuple[float, float]:
        """XL has a VAE of its own."""
        return (0.13025 if config.get('addition_embed_type') == 'text_time' else 0.18215), 0.0

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """CLIP's tokens; of XL the pooled embedding of its second encoder as well."""
        widths = {'prompt_embeds': config['cross_attention_dim']}
        if config.get('addition_embed_type') == 'text_time':
            pooled = config['projection_class_embeddings_input_dim'] - 6 * config['addition_time_embed_dim']
            widths['pooled_prompt_embeds'] = pooled
        return widths

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt; XL is told that the image has its own size, and was not cropped."""
        batch, (height, width) = len(latent), latent.shape[2:]
        read: dict[str, Any] = {'encoder_hidden_states': prompt['prompt_embeds'].expand(batch, -1, -1)}
        if 'pooled_prompt_embeds' in prompt:
            sizes = torch.tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width], device=latent.device)
            pooled = prompt['pooled_prompt_embeds'].expand(batch, -1)
            times = sizes.to(pooled.dtype).expand(batch, -1)
            read['added_cond_kwargs'] = {'text_embeds': pooled, 'time_ids': times}
        return read
