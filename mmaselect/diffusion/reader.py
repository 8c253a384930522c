"""The whole frozen path of an image: image, latent, noisy latent, maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaselect.diffusion.family import Family, all_maps
from mmaselect.diffusion.latent import LatentEncoder
from mmaselect.diffusion.loading import Identity
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError, NotFinite

#: Gives the noise for images (B, 3, H, W) in [-1, 1] and the shape of one latent: (*shape), or (B, *shape).
Noise = Callable[[Tensor, tuple[int, ...]], Tensor]


class FrozenDiffusion(nn.Module):
    """A frozen diffusion model that reads features at one timestep.

    Args:
        encoder: Image to latent.
        family: Noisy latent to maps.
        identity: Of the frozen weights.
    """

    def __init__(self, encoder: LatentEncoder, family: Family, identity: Identity) -> None:
        super().__init__()
        self.encoder = encoder
        self.family = family
        self._identity = identity
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenDiffusion:
        """Frozen is frozen: stays in evaluation mode whatever ``mode`` says."""
        return super().train(False)

    @property
    def identity(self) -> bytes:
        """32 bytes that name the frozen weights, see :class:`~mmaselect.diffusion.loading.Identity`."""
        return self._identity.digest()

    def narrow(self, taps: Sequence[Tap]) -> None:
        """Reads fewer taps from now on; the model and its identity become those of one that was loaded for them.

        Args:
            taps: Some of those it was loaded for.

        Raises:
            InputError: If one of them was not.
        """
        self.family.narrow(taps)
        self._identity.keep('transformer', self.family.transformer.state_dict())

    def settle_on(self, timesteps: Sequence[float]) -> None:
        """Says at which timesteps images will be read, see :meth:`Family.settle_on`; features stay the same."""
        self.family.settle_on(timesteps)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    @property
    def multiple(self) -> int:
        """Height and width of an image must be multiples of it, in pixels."""
        return self.encoder.factor * self.family.multiple(self.family.transformer.config)

    @property
    def strides(self) -> dict[Tap, int]:
        """Image pixels per cell of each tap's map."""
        return {tap: self.encoder.factor * stride for tap, (_, stride) in self.family.shapes.items()}

    @property
    def image_size(self) -> int:
        """Side of the images that the model was trained on, in pixels."""
        return self.encoder.factor * self.family.side(self.family.transformer.config)

    @property
    def num_blocks(self) -> int:
        """Blocks that one pass runs."""
        return self.family.last_block + 1

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to clean latents.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of :attr:`multiple`.

        Returns:
            ``z_0``, (B, C, H / factor, W / factor).
        """
        return self.encoder(images)

    @torch.no_grad()
    def read_images(
        self,
        images: Tensor,
        timesteps: Sequence[float],
        noise: Noise | Sequence[Noise],
        visit: Callable[[float, Tap, Tensor], object],
    ) -> None:
        """Images to maps: encodes, noises, runs and aligns.

        Args:
            images: (B, 3, H, W) in [-1, 1], of any size; encoded once.
            timesteps: Each in [0, 1000].
            noise: Gives the noise, which all timesteps share; or several, each of which is run at every timestep.
            visit: Called with timestep, tap and map (B, D, h, w), float32, as soon as the pass is there. The cells of a
                map divide the image evenly, also where it is padded to whole cells for the pass.

        Raises:
            InputError: If an image is smaller than one patch.
        """
        padded = pad_to_cells(images, self.multiple)
        latent, strides = self.encode(padded), self.strides
        for one in [noise] if callable(noise) else noise:
            drawn = one(padded, tuple(latent.shape[1:]))
            for timestep in timesteps:

                def take(tap: Tap, value: Tensor, timestep: float = timestep) -> None:
                    visit(timestep, tap, align(value.float(), (images.shape[2], images.shape[3]), strides[tap]))

                self.read(latent, drawn, timestep, take)

    def maps_of(
        self, images: Tensor, timesteps: Sequence[float], noise: Noise, device: torch.device | str | None = None
    ) -> dict[tuple[float, Tap], Tensor]:
        """All maps of :meth:`read_images` at once.

        Args:
            images: See :meth:`read_images`.
            timesteps: Likewise.
            noise: Gives the noise.
            device: Where each map is put as soon as it is there; None leaves it where it is.

        Returns:
            Maps (B, D, h, w) by timestep and tap, float32.
        """
        maps: dict[tuple[float, Tap], Tensor] = {}

        def take(timestep: float, tap: Tap, value: Tensor) -> None:
            maps[timestep, tap] = value if device is None else value.to(device)

        self.read_images(images, timesteps, noise, take)
        return maps

    @torch.no_grad()
    def read(self, latent: Tensor, noise: Tensor, timestep: float, visit: Callable[[Tap, Tensor], object]) -> None:
        """Clean latents to maps, one after the other, so that memory does not grow with the number of taps.

        Args:
            latent: ``z_0``, (B, C, H, W).
            noise: Standard normal, broadcastable to ``latent``.
            timestep: In [0, 1000].
            visit: Called with each tap, block by block, and its map (B, D, h, w).

        Raises:
            NotFinite: If a map holds NaN or infinity: every use of features comes by here.
        """

        def check(tap: Tap, value: Tensor) -> None:
            check_finite(value, tap, timestep, latent)
            visit(tap, value)

        # Noising in float32: a bfloat16 latent keeps 8 bits, fewer than the image's own.
        noisy = self.family.process.add_noise(latent.float(), noise.to(latent.device).float(), timestep)
        self.family.read(noisy.to(self.family.dtype), timestep, check)

    def forward(self, latent: Tensor, noise: Tensor, timestep: float) -> dict[Tap, Tensor]:
        """All taps of :meth:`read` at once."""
        return all_maps(self.read, latent, noise, timestep)


#: Before torch 2.3 nothing says so, and a graph breaks there.
_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)


def check_finite(maps: Tensor, tap: Tap, timestep: float, latent: Tensor) -> None:
    """Checks a map, in one reduction; what is traced or exported has no values to look at.

    Args:
        maps: (B, D, h, w).
        tap: Of the map.
        timestep: In [0, 1000].
        latent: What it was computed from, (B, C, H, W).

    Raises:
        NotFinite: If it holds NaN or infinity.
    """
    if maps.is_meta or torch.jit.is_tracing() or _is_compiling():
        return
    if torch.stack(torch.aminmax(maps.detach())).isfinite().all():
        return
    broken = [not one.isfinite().all() for one in maps]
    # Of a batch that is broken as a whole, no image is to blame.
    images = [place for place, found in enumerate(broken) if found] if len(broken) == 1 or not all(broken) else []
    why = f'the weights or the images hold NaN or infinity, or {maps.dtype} overflows'
    if not latent.isfinite().all():
        cause = f'the images hold NaN or infinity, or the encoder overflows in {latent.dtype}'
        why = f'the latent is not finite either: {cause}'
    where = f'timestep {timestep:g}, block {tap.block}, {tap.component}'
    raise NotFinite(f'features are not finite at {where}: {why}', images)


def pad_to_cells(images: Tensor, multiple: int) -> Tensor:
    """Repeats the right and lower border until an image has whole cells.

    Args:
        images: (B, C, H, W).
        multiple: Of pixels.

    Returns:
        (B, C, H', W'), H' and W' the next multiples.

    Raises:
        InputError: If an image is smaller than one cell.
    """
    height, width = images.shape[-2:]
    if height < multiple or width < multiple:
        raise InputError(
            f'an image of {height}x{width} is smaller than one patch: this model needs at least '
            f'{multiple}x{multiple} pixels'
        )
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode='replicate') if bottom or right else images


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
    used = [length / (number * stride) for length, number in zip(size, cells)]
    if used == [1, 1]:
        return maps
    # In grid_sample's coordinates the map spans [-1, 1]; the image is the part of it that begins at -1.
    row, column = (maps.new_tensor([share, share - 1]) for share in used)
    zero = maps.new_zeros(())
    theta = torch.stack([torch.stack([column[0], zero, column[1]]), torch.stack([zero, row[0], row[1]])])
    grid = F.affine_grid(theta.expand(len(maps), -1, -1), list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode='bilinear', padding_mode='border', align_corners=False)
