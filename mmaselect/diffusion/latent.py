"""Image to latent: the encoder half of an autoencoder, or the pixels themselves."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mmaselect.diffusion.loading import Identity, Source, Tensors, add_random, load_into
from mmaselect.diffusion.single_file import convert_vae
from mmaselect.diffusion.tiny import build_encoder, find_raw, raw_config
from mmaselect.errors import InputError

#: Configs of the VAEs that SD3.5 (16 latent channels), DiT and SiT (4), Sana (32) and FLUX.2 (128) were trained with.
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
VAE_CONFIGS[128] = dict(_class_name='AutoencoderKLFlux2')
VAE_CONFIGS[32] = dict(
    _class_name='AutoencoderDC',
    encoder_block_types=('ResBlock',) * 3 + ('EfficientViTBlock',) * 3,
    decoder_block_types=('ResBlock',) * 3 + ('EfficientViTBlock',) * 3,
    downsample_block_type='conv',
    upsample_block_type='interpolate',
    scaling_factor=0.41407,
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


class Autoencoder(nn.Module, ABC):
    """The encoder half of one of diffusers' autoencoders; its decoder is never built.

    Args:
        config: The ``config.json``; what it lacks takes the defaults of the diffusers class.

    Attributes:
        kind: Name of the diffusers class.
        widths: Field of the config with one entry per resolution.
        patch: Cells of the encoder, along one side, that are packed into one latent pixel.
        config: As completed.
        factor: Image pixels per latent pixel.
        channels: Channels of the latent.
    """

    kind: ClassVar[str]
    widths: ClassVar[str]
    patch: ClassVar[int] = 1
    latents_mean: Tensor | None
    latents_std: Tensor | None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = self.complete(config)
        self.factor = downsampling(self.config)
        self.channels = self.config['latent_channels'] * self.patch**2
        self.scaling_factor = self.config['scaling_factor']
        self.shift_factor = self.config['shift_factor'] or 0.0
        # In no state_dict: checkpoints of autoencoders hold them in their config.
        self.register_buffer('latents_mean', None, persistent=False)
        self.register_buffer('latents_std', None, persistent=False)

    @classmethod
    def diffusers_class(cls) -> Any:
        """The diffusers class, imported when asked for.

        Raises:
            InputError: If the diffusers that is installed is too old for it.
        """
        import diffusers

        if not hasattr(diffusers, cls.kind):
            raise InputError(f'{cls.kind} needs a later diffusers, found {diffusers.__version__}')
        return getattr(diffusers, cls.kind)

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Adds the defaults of the diffusers class to a ``config.json``."""
        parameters = inspect.signature(cls.diffusers_class().__init__).parameters
        defaults = {key: value.default for key, value in parameters.items() if key != 'self'}
        return {**defaults, **config, '_class_name': cls.kind}

    @classmethod
    def whole(cls, config: dict[str, Any]) -> Any:
        """The diffusers model; where its weights are on the meta device, its decoder takes no memory."""
        kind = cls.diffusers_class()
        known = inspect.signature(kind.__init__).parameters
        return kind(**{key: value for key, value in config.items() if key in known})

    @abstractmethod
    def raw(self, images: Tensor) -> Tensor:
        """Encodes images in [-1, 1] of the encoder's own dtype, before any shift and scale."""

    def standardise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Shifts and scales every channel of the latent by its own numbers from now on.

        Args:
            mean: Of each channel of :meth:`raw`.
            std: Likewise.
        """
        device = next(self.parameters()).device
        self.latents_mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.latents_std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images, each to one latent.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of ``factor``.

        Returns:
            ``(raw - mean) * scaling_factor / std``, (B, channels, H / factor, W / factor), as diffusers' pipelines have
            it; without statistics the mean is ``shift_factor`` and the standard deviation 1.
        """
        raw = self.raw(images.to(next(self.parameters()).dtype))
        if self.latents_mean is None or self.latents_std is None:
            return (raw - self.shift_factor) * self.scaling_factor
        return (raw - self.latents_mean) * (self.scaling_factor / self.latents_std)


class VAEEncoder(Autoencoder):
    """The encoder of diffusers' ``AutoencoderKL``; an image is encoded to the mean of its posterior."""

    kind = 'AutoencoderKL'
    widths = 'block_out_channels'

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        vae = self.whole(config)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def raw(self, images: Tensor) -> Tensor:
        """The mean of the posterior."""
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]


class TinyEncoder(Autoencoder):
    """The encoder of diffusers' ``AutoencoderTiny``, or a raw one of the TAESD project; see ``tiny.py``."""

    kind = 'AutoencoderTiny'
    widths = 'encoder_block_out_channels'

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.encoder = build_encoder(self.config)

    def raw(self, images: Tensor) -> Tensor:
        """Diffusers' encoder maps [-1, 1] to TAESD's [0, 1] itself."""
        return self.encoder(images)


class DCEncoder(Autoencoder):
    """The encoder of diffusers' ``AutoencoderDC`` (DC-AE, arXiv 2410.10733), 32 pixels per latent pixel in Sana."""

    kind = 'AutoencoderDC'
    widths = 'encoder_block_out_channels'

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.encoder = self.whole(config).encoder

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Has no shift; Sana's documentation runs it in bfloat16 or float32, not in float16."""
        return {'shift_factor': None, 'force_upcast': True, **super().complete(config)}

    def raw(self, images: Tensor) -> Tensor:
        """The latent itself: there is no posterior."""
        return self.encoder(images)


class Flux2Encoder(VAEEncoder):
    """The encoder of diffusers' ``AutoencoderKLFlux2``: 2x2 cells in one, normalised by statistics that it stores."""

    kind = 'AutoencoderKLFlux2'
    patch = 2

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        # Of random weights it has these statistics, of a file the file's.
        self.bn = nn.BatchNorm2d(self.channels, eps=self.config['batch_norm_eps'], affine=False, device='cpu').eval()

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Has no factors."""
        return {'shift_factor': None, 'scaling_factor': 1.0, 'force_upcast': False, **super().complete(config)}

    def raw(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 128, H / 16, W / 16)."""
        return self.bn(nn.functional.pixel_unshuffle(super().raw(images), self.patch))


class QwenImageEncoder(VAEEncoder):
    """The encoder of diffusers' ``AutoencoderKLQwenImage``, which takes an image for a film of one frame."""

    kind = 'AutoencoderKLQwenImage'
    widths = 'dim_mult'

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Has statistics for each channel in place of factors."""
        config = super().complete(config)
        more = dict(shift_factor=None, scaling_factor=1.0, force_upcast=False, latent_channels=config['z_dim'])
        return {**more, **config}

    def raw(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 16, H / 8, W / 8)."""
        return super().raw(images.unsqueeze(2)).squeeze(2)


ENCODERS: dict[str, type[Autoencoder]] = {
    cls.kind: cls for cls in (VAEEncoder, TinyEncoder, DCEncoder, Flux2Encoder, QwenImageEncoder)
}


def downsampling(config: dict[str, Any]) -> int:
    """Image pixels per latent pixel of an autoencoder, from its ``config.json`` alone.

    Raises:
        InputError: If the config does not say.
    """
    cls = ENCODERS[config.get('_class_name', VAEEncoder.kind)]
    widths = cls.complete(config)[cls.widths]
    if not isinstance(widths, (list, tuple)) or not widths:
        raise InputError(f'{cls.widths}={widths!r} in the config of a VAE is not valid: give one width per resolution')
    return cls.patch * 2 ** (len(widths) - 1)


def check_statistics(mean: object, std: object, channels: int, where: str = '') -> tuple[list, list] | None:
    """Validates ``latents_mean`` and ``latents_std``.

    Args:
        mean: What was given.
        std: Likewise.
        channels: Of the latent.
        where: Where they were found, for the message.

    Returns:
        Both as lists of numbers; None where neither was given.

    Raises:
        InputError: If one is missing, or has another length, or a number that cannot be used.
    """
    if mean is None and std is None:
        return None
    valid = f'{channels} finite numbers, one per channel of the latent'
    checked = []
    for name, values, low in (('latents_mean', mean, -math.inf), ('latents_std', std, 0.0)):
        field, wanted = f'{where}{name}', f'{valid}, each above 0' if low == 0 else valid
        if not isinstance(values, (list, tuple)):
            raise InputError(
                f'{field}={values!r} is not valid: give {wanted} (latents_mean and latents_std, or neither)'
            )
        if len(values) != channels:
            raise InputError(f'{field} has {len(values)} numbers: give {wanted}')
        for index, value in enumerate(values):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= low:
                raise InputError(f'{field}[{index}]={value!r} is not valid: give {wanted}')
        checked.append(list(values))
    return checked[0], checked[1]


def rename_attention(name: str) -> str:
    """Maps the attention layers of VAE files from before diffusers 0.15 to their present names."""
    for old, new in (('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'), ('proj_attn', 'to_out.0')):
        for end in ('weight', 'bias'):
            name = name.replace(f'.{old}.{end}', f'.{new}.{end}') if '.attentions.' in name else name
    return name


def find_vae(vae: str | Path, **options: Any) -> tuple[Source, str]:
    """Where an autoencoder lies: a pipeline folder with the subfolder ``'vae'``, or its own folder, or its own file.

    Args:
        vae: Folder, file or hub id.
        **options: Of :class:`~mmaselect.diffusion.hub.Source`.
    """
    source = Source(vae, 'vae', **options)
    if source.single is None and source.find(source.join('vae/config.json')):
        return source, source.join('vae')
    return source, source.subfolder


def read_vae_config(source: Source, subfolder: str) -> dict[str, Any]:
    """Reads the ``config.json`` of an autoencoder, or makes one from the names and shapes of a raw TAESD file.

    Args:
        source: A pipeline folder, or the folder of an autoencoder alone.
        subfolder: ``'vae'``, or ``''`` for the folder of an autoencoder alone.

    Raises:
        InputError: If the folder holds no autoencoder that is known.
    """
    raw = None if subfolder else find_raw(source)
    if raw:
        return raw_config(raw)
    if source.single:
        return convert_vae(source)[0]
    config = source.read_json(f'{subfolder}/config.json' if subfolder else 'config.json')
    found = None if config is None else config.get('_class_name')
    if config is None or found not in ENCODERS:
        raise InputError(
            f'{source.field}={source.name!r} holds {found!r}; a VAE of class {" or ".join(ENCODERS)} is expected, its '
            'original file, or a TAESD folder with one *_encoder.pth or .safetensors'
        )
    return config


def load_vae(
    source: Source,
    subfolder: str,
    identity: Identity,
    dtype: torch.dtype,
    variant: str | None = None,
    statistics: tuple[list, list] | None = None,
    scale: tuple[float, float] | None = None,
) -> Autoencoder:
    """Reads the encoder of an autoencoder.

    Args:
        source: A pipeline folder, or the folder of an autoencoder alone.
        subfolder: ``'vae'``, or ``''`` for the folder of an autoencoder alone.
        identity: Gets every tensor that is read, and the statistics.
        dtype: What to load it in. A VAE whose config says ``force_upcast`` overflows in float16 and stays float32.
        variant: As diffusers' argument.
        statistics: Mean and standard deviation per channel, see :func:`check_statistics`; None for those of the
            config, if it has any.
        scale: ``scaling_factor`` and ``shift_factor`` of an original file, which does not say them.

    Raises:
        InputError: If the folder holds no such autoencoder, or its config has statistics that cannot be used.
    """
    config = read_vae_config(source, subfolder)
    if source.single and config['_class_name'] == VAEEncoder.kind:
        if scale is None:
            raise InputError(
                f'{source.field}={source.name!r} is a single file, which does not say the scale of its latents, and '
                'that of this family is not known: give the diffusers folder of the VAE'
            )
        config = {**config, 'scaling_factor': scale[0], 'shift_factor': scale[1]}
    with torch.device('meta'):
        encoder = ENCODERS[config['_class_name']](config)
    if dtype == torch.float16 and encoder.config['force_upcast']:
        dtype = torch.float32
    raw = None if subfolder else find_raw(source)
    if source.single and not raw:
        load_into(encoder, convert_vae(source)[1], identity, 'vae', dtype, rename_attention)
    else:
        rename = 'encoder.layers.{}'.format if raw else rename_attention
        tensors = raw or Tensors(source, source.weights(subfolder, variant))
        load_into(encoder, tensors, identity, 'vae', dtype, rename)
    where = f'config.json of {source.field}={source.name!r}: '
    config = encoder.config
    own = check_statistics(config.get('latents_mean'), config.get('latents_std'), encoder.channels, where)
    standardise(encoder, statistics or own, identity)
    return encoder


def standardise(encoder: Autoencoder, statistics: tuple[list, list] | None, identity: Identity) -> None:
    """Gives an encoder its statistics, and its identity too; without any, both stay what they were."""
    if statistics is not None:
        encoder.standardise(*statistics)
        for name, values in zip(('latents_mean', 'latents_std'), statistics):
            identity.add(f'vae.{name}', torch.tensor(values, dtype=torch.float64))


def random_vae(channels: int, identity: Identity, seed: int, dtype: torch.dtype) -> Autoencoder:
    """Builds the real encoder architecture for a latent of 4, 16, 32 or 128 channels, with random weights."""
    if channels not in VAE_CONFIGS:
        raise InputError(f"latent='vae' has no known VAE of {channels} channels; known: {sorted(VAE_CONFIGS)}")
    with torch.device('meta'):
        encoder = ENCODERS[VAE_CONFIGS[channels].get('_class_name', VAEEncoder.kind)](VAE_CONFIGS[channels])
    return add_random(encoder, identity, 'vae', seed, dtype)
