"""Stable Diffusion 1.5, 2.1 and XL (arXiv 2112.10752, 2307.01952). On diffusers' ``UNet2DConditionModel``.

Taps have the names of GDF (arXiv 2410.03558): ``up-level1-repeat1-vit-block0-cross-q`` is the query of the
cross-attention of the first block of the transformer behind the second residual unit of the second upward level.
Softmax maps are averaged over heads; each key, of which ``self-map`` has as many as cells and ``cross-map`` as tokens
of the prompt, is a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.unets import UNetFamily

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


class UNet(UNetFamily):
    """A text-conditional U-Net under one constant prompt."""

    name = 'UNet'
    class_names = ('UNet2DConditionModel',)
    betas = BETAS
    architectures = {'sd1.5': SD15, 'sd2.1': SD21, 'sdxl': XL}
    prompt_tokens = dry_tokens = 77
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
