"""Image to latent: the encoder half of a VAE, or the pixels themselves."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmaselect.diffusion.loading import Identity, Source, add_random, load_into
from mmaselect.errors import InputError

#: Configs of the VAEs that SD3.5 (16 latent channels), and DiT and SiT (4) were trained with.
VAE_CONFIGS: dict[int, dict[str, Any]] = {
    4: dict(latent_channels=4, scaling_factor=0.18215),
    16: dict(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
for _config in VAE_CONFIGS.values():
    _config.update(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )


class LatentEncoder(Protocol):
    """What turns images into latents.

    Attributes:
        factor: Image pixels per latent pixel, along one side.
        channels: Channels of the latent.
    """

    factor: int
    channels: int

    def __call__(self, images: Tensor) -> Tensor:
        """Encodes images in [-1, 1]."""
        ...


class PixelEncoder(nn.Module):
    """The identity: a model that diffuses pixels.

    Args:
        channels: 3 for colour; 1 averages the colours, for a model of grey images.

    Raises:
        InputError: If ``channels`` is neither.
    """

    factor = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise InputError(f"latent='pixels' needs a model of 1 or 3 channels; this one has {channels}")
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, channels, H, W) in [-1, 1]."""
        return images if self.channels == 3 else images.mean(1, keepdim=True)


class VAEEncoder(nn.Module):
    """The encoder of diffusers' ``AutoencoderKL``; its decoder is never built.

    Args:
        config: The VAE's ``config.json``.

    Attributes:
        factor: Image pixels per latent pixel.
        channels: Channels of the latent.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        import inspect

        from diffusers import AutoencoderKL

        known = inspect.signature(AutoencoderKL.__init__).parameters
        vae: Any = AutoencoderKL(**{key: value for key, value in config.items() if key in known})
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.scaling_factor = vae.config.scaling_factor
        self.shift_factor = vae.config.shift_factor or 0.0
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = vae.config.latent_channels

    def forward(self, images: Tensor) -> Tensor:
        """Encodes to the mean of the posterior, so that an image has one latent.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of ``factor``.

        Returns:
            ``(mean - shift_factor) * scaling_factor``, (B, channels, H / factor, W / factor).
        """
        dtype = next(self.encoder.parameters()).dtype
        moments = self.encoder(images.to(dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, _ = moments.chunk(2, dim=1)
        return (mean - self.shift_factor) * self.scaling_factor


def rename_attention(name: str) -> str:
    """Maps the attention layers of VAE files from before diffusers 0.15 to their present names."""
    for old, new in (('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'), ('proj_attn', 'to_out.0')):
        for end in ('weight', 'bias'):
            name = name.replace(f'.{old}.{end}', f'.{new}.{end}') if '.attentions.' in name else name
    return name


def load_vae(source: Source, subfolder: str, identity: Identity, dtype: torch.dtype, variant: str | None) -> VAEEncoder:
    """Reads the encoder of a VAE.

    Args:
        source: A pipeline folder, or the folder of a VAE alone.
        subfolder: ``'vae'``, or ``''`` for the folder of a VAE alone.
        identity: Gets every tensor that is read.
        dtype: What to load it in. A VAE whose config says ``force_upcast`` overflows in float16 and stays float32.
        variant: As diffusers' argument.

    Raises:
        InputError: If the folder holds no such VAE.
    """
    prefix = f'{subfolder}/' if subfolder else ''
    config = source.read_json(f'{prefix}config.json')
    if config is None or config.get('_class_name') != 'AutoencoderKL':
        found = None if config is None else config.get('_class_name')
        raise InputError(f'{source.field}={source.name!r} holds {found!r}; a VAE of class AutoencoderKL is expected')
    with torch.device('meta'):
        encoder = VAEEncoder(config)
    if dtype == torch.float16 and config.get('force_upcast', True):
        dtype = torch.float32
    load_into(encoder, source.tensors(subfolder, variant), identity, 'vae', dtype, rename_attention)
    return encoder


def random_vae(channels: int, identity: Identity, seed: int, dtype: torch.dtype) -> VAEEncoder:
    """Builds the real encoder architecture for a latent of 4 or 16 channels, with random weights."""
    if channels not in VAE_CONFIGS:
        raise InputError(f"latent='vae' has no known VAE of {channels} channels; known: {sorted(VAE_CONFIGS)}")
    with torch.device('meta'):
        encoder = VAEEncoder(VAE_CONFIGS[channels])
    return add_random(encoder, identity, 'vae', seed, dtype)
