"""ADM and DDPM without conditions (arXiv 2105.05233, 2006.11239). On diffusers' ``UNet2DModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmaselect.diffusion.family import DiffusersModule
from mmaselect.diffusion.network import Site
from mmaselect.diffusion.unets import UNetFamily
from mmaselect.errors import InputError

# Levels with attention are those of 32, 16 and 8 pixels.
ADM256 = dict(
    sample_size=256, in_channels=3, out_channels=6, block_out_channels=[256, 256, 512, 512, 1024, 1024],
    attention_head_dim=64, resnet_time_scale_shift='scale_shift', downsample_type='resnet', upsample_type='resnet',
    down_block_types=['ResnetDownsampleBlock2D'] * 3 + ['AttnDownBlock2D'] * 3,
    up_block_types=['AttnUpBlock2D'] * 3 + ['ResnetUpsampleBlock2D'] * 3,
)  # fmt: skip
DDPM = dict(
    in_channels=3, out_channels=3, attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    downsample_padding=0,
)  # fmt: skip
CIFAR = dict(
    DDPM, sample_size=32, block_out_channels=[128, 256, 256, 256],
    down_block_types=['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
    up_block_types=['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
)  # fmt: skip
DDPM256 = dict(
    DDPM, sample_size=256, block_out_channels=[128, 128, 256, 256, 512, 512],
    down_block_types=[*['DownBlock2D'] * 4, 'AttnDownBlock2D', 'DownBlock2D'],
    up_block_types=['UpBlock2D', 'AttnUpBlock2D', *['UpBlock2D'] * 4],
)  # fmt: skip


class ADM(UNetFamily):
    """A U-Net without conditions, of pixels (``latent='pixels'``) or latents.

    Taps are named as those of ``UNet``; ``up-level1-repeat1-attn-out`` is the attention behind a residual unit. Block b
    of the original code, as DifFeed counts (arXiv 2311.17921), is the b-th from 1 of: ``unet-after-conv-in``; each unit
    and downsampler on the way down; the last unit of the middle; each unit on the way up. A unit ends with its
    attention, if it has one, and the last of a level on the way up with the upsampler.
    """

    name = 'ADM'
    class_names = ('UNet2DModel',)
    architectures = {'adm-256': ADM256, 'ddpm-256': DDPM256, 'ddpm-cifar10': CIFAR}
    tap_sets = {'diffeed': ('mid-repeat1-res-out', 'up-level1-repeat1-attn-out', 'up-level3-repeat1-res-out')}

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the model of a ``config.json``.

        Raises:
            InputError: If it is class-conditional: such a model has no null class.
        """
        for field in ('class_embed_type', 'num_class_embeds'):
            if config.get(field) is not None:
                raise InputError(f'{field}={config[field]!r}: {cls.name} is unconditional, this model needs a class')
        return super().build(config)

    @classmethod
    def attention_sites(cls, path: str, attention: DiffusersModule) -> dict[str, Site]:
        """Its attention is one layer."""
        sites = {f'self-{name}': Site(f'{path}.to_{name}') for name in 'qkv'}
        return {**sites, 'attn-out': Site(path)}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """None."""
        return {}
