"""``ASelectDiT``: a frozen diffusion transformer as an OpenMMLab backbone."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.family import make_taps
from mmaselect.diffusion.model import DiffusionSpec, FrozenDiffusion
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError, check_timestep, unknown

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
#: Names of the two entries that the backbone adds to a checkpoint.
TIMESTEP, FROZEN_ID = 'timestep', 'frozen_id'


class _Frozen:
    """Keeps the frozen model, and what was chosen for it, out of sight of ``nn.Module``.

    What ``nn.Module`` does not see is in no optimizer, no checkpoint, no gradient bucket and no weight average. A copy
    of the backbone (mmengine's EMA makes one) shares it: frozen weights need no second copy, and a timestep that is
    selected after the copy was made holds for the copy too.
    """

    def __init__(self, timestep: float | None) -> None:
        self.model: FrozenDiffusion | None = None
        self.timestep = timestep

    def __deepcopy__(self, memo: dict) -> _Frozen:
        return self


@MODELS.register_module()
class ASelectDiT(BaseModule):
    """Features of a frozen diffusion transformer at one timestep (A-SelecT, arXiv 2603.25758).

    An image is mapped to [-1, 1], encoded to a latent, noised to ``timestep`` and run through the transformer up to
    the last block that is read. What is read goes to an ordinary head as maps (B, C, h, w).

    Args:
        diffusion: The frozen model: ``type`` (``'SD3'``, ``'DiT'``, ``'SiT'``), ``pretrained`` and more, see
            :class:`~mmaselect.diffusion.model.DiffusionSpec`.
        block: Block to read, counted from 0, or several.
        component: What to read of it, or several: ``'query'`` (the paper's), ``'key'``, ``'value'``,
            ``'attention'``, ``'output'``, ``'modulated'``, see :class:`~mmaselect.diffusion.family.Tap`.
        timestep: In [0, 1000] (0 clean, 1000 noise), or ``'auto'``: chosen by ``TimestepSelectionHook``.
        noise: ``'fixed'`` gives every image the same noise, in training and evaluation: to the head it is a constant,
            which costs far less accuracy than noise that varies. ``'fresh'`` draws anew in training, and in evaluation
            gives every image a noise of its own that depends on nothing but its pixels.
        noise_seed: Seed of the noise in evaluation, and of the fixed one.
        mean: Per channel, what the ``data_preprocessor`` subtracted from images in [0, 255], in RGB order.
        std: Per channel, what it divided by.
        init_cfg: As in every OpenMMLab module; the backbone has no weights to initialise.

    Attributes:
        out_channels: Channels of each map, a tuple, known before the weights are read.
        stride: Image pixels per cell of a map.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        diffusion: dict[str, Any],
        block: int | Sequence[int] = 12,
        component: str | Sequence[str] = 'query',
        timestep: float | str = 'auto',
        noise: str = 'fixed',
        noise_seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if isinstance(timestep, str) and timestep != 'auto':
            raise InputError(f"timestep={timestep!r} is not valid: give a number from 0 to 1000, or 'auto'")
        if noise not in ('fixed', 'fresh'):
            raise unknown('noise', noise, ('fixed', 'fresh'))
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise InputError(f'mean={mean!r}, std={std!r} are not valid: give three numbers each, std above 0')
        self.diffusion_config = dict(diffusion)
        self.spec = DiffusionSpec.from_dict(self.diffusion_config)
        self.block, self.component = block, component
        self.taps = make_taps(block, component, self.spec.num_blocks)
        self.configured_timestep = None if timestep == 'auto' else check_timestep(timestep)
        self.noise, self.noise_seed = noise, noise_seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.out_channels = (self.spec.channels,) * len(self.taps)
        self.stride = self.spec.stride
        self._noise_cache: dict[tuple, Tensor] = {}
        self._frozen = _Frozen(self.configured_timestep)
        # On the meta device only shapes are asked for (tests and tools build the largest models there).
        if torch.empty(()).device.type != 'meta':
            self._frozen.model = self.spec.load(self.taps)
        self.register_state_dict_post_hook(_save_choice)

    # --- the frozen model and the chosen timestep --------------------------------------------------------------------

    @property
    def diffusion(self) -> FrozenDiffusion:
        """The frozen model.

        Raises:
            InputError: If the backbone was built on the meta device.
        """
        if self._frozen.model is None:
            raise InputError('ASelectDiT was built on the meta device and has no weights')
        return self._frozen.model

    @property
    def timestep(self) -> float | None:
        """The timestep in use, in [0, 1000]; None while ``'auto'`` has not been decided."""
        return self._frozen.timestep

    def set_timestep(self, timestep: float) -> None:
        """Sets the timestep, for this backbone and every copy of it.

        Args:
            timestep: In [0, 1000].

        Raises:
            InputError: If it is out of range.
        """
        self._frozen.timestep = check_timestep(timestep)

    @property
    def identity(self) -> bytes:
        """32 bytes that name the frozen weights, see :class:`~mmaselect.diffusion.loading.Identity`."""
        return self.diffusion.identity

    def _apply(self, fn: Any, recurse: bool = True) -> ASelectDiT:
        """Moves the frozen model along with ``to()`` and ``cuda()``, which it would otherwise not hear of."""
        super()._apply(fn, recurse)
        if self._frozen.model is not None:
            self._frozen.model._apply(fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the timestep over from a checkpoint, after a check that it belongs to these frozen weights."""
        frozen_id, timestep = (state_dict.get(prefix + key) for key in (FROZEN_ID, TIMESTEP))
        if frozen_id is not None and self._frozen.model is not None:
            stored = bytes(frozen_id.cpu().tolist())
            if stored != self.identity:
                raise InputError(
                    f'the checkpoint was trained on frozen weights {stored.hex()[:12]}, but {self.identity.hex()[:12]} '
                    'are in memory: diffusion, block, component and prompt must be those of its training'
                )
        if timestep is not None and not math.isnan(timestep.item()):
            value = timestep.item()
            if self.configured_timestep is not None and value != self.configured_timestep:
                raise InputError(
                    f'timestep={self.configured_timestep:g} in the config, but the checkpoint was trained at '
                    f"{value:g}: set timestep={value:g} or 'auto'"
                )
            self.set_timestep(value)
        own = (prefix + FROZEN_ID, prefix + TIMESTEP)
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(others, prefix, *args)

    # --- the forward pass --------------------------------------------------------------------------------------------

    def to_unit_range(self, images: Tensor) -> Tensor:
        """Undoes the toolbox's normalisation and pads to whole cells.

        Args:
            images: (B, 3, H, W), RGB, normalised by ``mean`` and ``std``.

        Returns:
            (B, 3, H', W') in [-1, 1], H' and W' the next multiples of ``stride``; the border is repeated.

        Raises:
            InputError: If an image is smaller than one patch.
        """
        height, width = images.shape[-2:]
        if height < self.stride or width < self.stride:
            raise InputError(
                f'an image of {height}x{width} is smaller than one patch: this model needs at least '
                f'{self.stride}x{self.stride} pixels'
            )
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        unit = (images * std + mean) / 127.5 - 1
        bottom, right = -height % self.stride, -width % self.stride
        if bottom or right:
            unit = F.pad(unit, (0, right, 0, bottom), mode='replicate')
        return unit

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Reads the features.

        Args:
            images: (B, 3, H, W), RGB, as the toolbox's ``data_preprocessor`` delivers them.

        Returns:
            One float32 map (B, C, ceil(H / stride), ceil(W / stride)) per block and component, block-major. Its cells
            divide the image evenly, as every head assumes, also where the image was padded.

        Raises:
            InputError: If no timestep has been chosen yet, or an image is smaller than one patch.
        """
        if self.timestep is None:
            raise InputError(
                "timestep='auto', but nothing has chosen one: add dict(type='TimestepSelectionHook') to custom_hooks, "
                'load a checkpoint that holds the choice, or set a number from 0 to 1000'
            )
        model = self.diffusion
        # In its own half precision the model is told what to compute in; only in float32 does --amp decide.
        with torch.autocast(images.device.type, enabled=self._amp_applies(images)):
            unit = self.to_unit_range(images.float())
            latent = model.encode(unit)
            maps = model(latent, self._make_noise(latent, unit), self.timestep)
        return tuple(align(maps[tap].float(), images.shape[-2:], self.stride) for tap in self.taps)

    def _amp_applies(self, images: Tensor) -> bool:
        return self.spec.dtype == torch.float32 and torch.is_autocast_enabled(images.device.type)

    def _make_noise(self, latent: Tensor, images: Tensor) -> Tensor:
        shape = tuple(latent.shape[1:])
        if self.noise == 'fixed':
            key = (shape, latent.device)
            if key not in self._noise_cache:
                self._noise_cache[key] = seeded_noise(shape, self.noise_seed).to(latent.device)
            return self._noise_cache[key]
        if self.training:
            return torch.randn(latent.shape, device=latent.device)
        # Keyed by the pixels, so that neither batch nor rank nor order can change an image's features.
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in pixels]
        noises = [seeded_noise(shape, self.noise_seed, int.from_bytes(key, 'big')) for key in keys]
        return torch.stack(noises).to(latent.device)

    def extra_repr(self) -> str:
        """The choices, for ``print(model)``."""
        chosen = 'auto (not chosen yet)' if self.timestep is None else f'{self.timestep:g}'
        return (
            f'{self.spec.family.name}, block={self.block}, component={self.component!r}, timestep={chosen}, '
            f'out_channels={self.out_channels}, frozen'
        )

    def init_weights(self) -> None:
        """Does nothing but say so: the frozen weights were read when the backbone was built."""
        if self._frozen.model is not None:
            count = sum(parameter.numel() for parameter in self.diffusion.parameters())
            print_log(
                f'ASelectDiT: {self.spec.family.name}, {count / 1e6:.1f} M frozen parameters of '
                f'{self.diffusion.num_blocks} of {self.spec.num_blocks} blocks, identity {self.identity.hex()[:12]}',
                logger='current',
                level=logging.INFO,
            )
        super().init_weights()


def align(maps: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Crops the padding out of a map, to a fraction of a cell, and keeps its number of cells.

    A head takes the cells of a map to divide the image evenly. Of a padded image they reach beyond it, and by up to
    ``stride - 1`` pixels the prediction at the far border would come from the wrong place.

    Args:
        maps: (B, C, h, w), cells of ``stride`` pixels.
        size: Height and width of the image without padding.
        stride: Pixels per cell.

    Returns:
        (B, C, h, w), cells of ``size / (h, w)`` pixels, interpolated bilinearly; ``maps`` itself where nothing was
        padded.
    """
    cells = maps.shape[-2:]
    used = [length / (number * stride) for length, number in zip(size, cells, strict=True)]
    if used == [1, 1]:
        return maps
    # In grid_sample's coordinates the map spans [-1, 1]; the image is the part of it that begins at -1.
    row, column = (maps.new_tensor([share, share - 1]) for share in used)
    zero = maps.new_zeros(())
    theta = torch.stack([torch.stack([column[0], zero, column[1]]), torch.stack([zero, row[0], row[1]])])
    grid = F.affine_grid(theta.expand(len(maps), -1, -1), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode='bilinear', padding_mode='border', align_corners=False)


def _save_choice(backbone: ASelectDiT, state_dict: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Adds timestep and identity to a checkpoint: as tensors, because mmengine moves every entry to the CPU."""
    if backbone._frozen.model is None:
        return
    timestep = math.nan if backbone.timestep is None else backbone.timestep
    state_dict[prefix + TIMESTEP] = torch.tensor(timestep, dtype=torch.float64)
    state_dict[prefix + FROZEN_ID] = torch.tensor(list(backbone.identity), dtype=torch.uint8)
