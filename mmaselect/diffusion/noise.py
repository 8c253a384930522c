"""Forward processes: how a clean latent is noised to a timestep on diffusers' 0-1000 scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mmaselect.errors import check_choice, check_number, check_timestep

#: Policies: ``'fixed'``: one noise for all images; ``'fresh'``: each image has its own.
NOISES = ('fixed', 'fresh')


class ForwardProcess(Protocol):
    """What a family needs from a forward process."""

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """Noises a latent to a timestep."""
        ...

    def network_timestep(self, timestep: float) -> float:
        """Gives the timestep the network is told for a user's timestep, on the 0-1000 scale."""
        ...


class RectifiedFlow:
    """Straight path between data and noise, ``z_t = (1 - s) z_0 + s eps`` (SD3, SiT, FLUX).

    Args:
        shift: Resolution shift of arXiv 2403.03206, eq. 23: ``s = shift * u / (1 + (shift - 1) * u)`` with
            ``u = t / 1000``. 1 leaves the timestep as it is.

    Raises:
        InputError: If ``shift`` is not positive.
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = float(check_number(shift, 'shift', 0, open_low=True))

    def sigma(self, timestep: float) -> float:
        """Share of noise in the latent.

        Args:
            timestep: In [0, 1000].

        Returns:
            ``s`` in [0, 1].
        """
        u = check_timestep(timestep) / 1000
        # Rounding alone would give 1 + 2e-16 at the end, for a shift of 0.1.
        return min(1.0, self.shift * u / (1 + (self.shift - 1) * u))

    def network_timestep(self, timestep: float) -> float:
        """Timestep that the network is told: ``1000 s``, as diffusers' flow-matching schedulers do."""
        return 1000 * self.sigma(timestep)

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """Noises a latent.

        Args:
            latent: Clean latent ``z_0``, (B, C, H, W).
            noise: Standard normal noise, broadcastable to ``latent``.
            timestep: In [0, 1000].

        Returns:
            ``z_t``, (B, C, H, W).
        """
        sigma = self.sigma(timestep)
        return (1 - sigma) * latent + sigma * noise


def gvp(u: float) -> tuple[float, float]:
    """SiT's generalised variance-preserving path (REPA's ``cosine``): ``cos(pi u / 2)`` and ``sin(pi u / 2)``."""
    return math.cos(math.pi * u / 2), math.sin(math.pi * u / 2)


def vp(u: float) -> tuple[float, float]:
    """SiT's variance-preserving path, betas from 0.1 to 20: ``exp(l)``, ``sqrt(1 - exp(2 l))``, see arXiv 2401.08740.

    ``l = -u^2 (20 - 0.1) / 4 - u 0.1 / 2``; at ``u = 1`` a share of 0.0066 of the data is left.
    """
    log = -(u**2) * (20 - 0.1) / 4 - u * 0.1 / 2
    return math.exp(log), (1 - math.exp(2 * log)) ** 0.5


#: Paths of SiT beside the linear one: shares of data and noise at ``u = timestep / 1000``.
PATHS: dict[str, Callable[[float], tuple[float, float]]] = {'GVP': gvp, 'VP': vp}


class Interpolant:
    """Curved path between data and noise, ``z_t = a(u) z_0 + s(u) eps`` with ``u = t / 1000`` (SiT).

    Args:
        path: ``'GVP'`` or ``'VP'``.
    """

    def __init__(self, path: str) -> None:
        self.path = check_choice(path, 'path_type', PATHS)

    def network_timestep(self, timestep: float) -> float:
        """Timestep that the network is told: the user's."""
        return check_timestep(timestep)

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """Noises a latent, see :meth:`RectifiedFlow.add_noise`."""
        data, share = PATHS[self.path](check_timestep(timestep) / 1000)
        return data * latent + share * noise


class DDPM:
    """Variance-preserving process, ``z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps`` (DiT).

    Args:
        alphas_cumprod: ``abar`` of the scheduler the model was trained with, shape (T,), decreasing in (0, 1].
        offset: Steps that the scheduler adds to a timestep (``steps_offset``, 1 in Stable Diffusion).
    """

    def __init__(self, alphas_cumprod: Tensor, offset: int = 0) -> None:
        self.alphas_cumprod, self.offset = alphas_cumprod.detach().double().cpu(), offset

    @classmethod
    def from_scheduler_config(cls, config: dict) -> DDPM:
        """Takes the betas from a diffusers ``scheduler_config.json``, whatever sampler it was saved by.

        Args:
            config: The parsed file; an empty dict gives DiT's linear schedule (1e-4 to 0.02 over 1000 steps).

        Returns:
            The process with the scheduler's own ``abar``.
        """
        from diffusers import DDPMScheduler

        fields = ('num_train_timesteps', 'beta_start', 'beta_end', 'beta_schedule', 'trained_betas')
        scheduler: Any = DDPMScheduler(**{key: config[key] for key in fields if config.get(key) is not None})
        return cls(scheduler.alphas_cumprod, config.get('steps_offset', 0))

    def index(self, timestep: float) -> int:
        """Nearest trained step: a model of T steps knows 0 to T - 1, so 1000 means its last one."""
        steps = len(self.alphas_cumprod)
        return min(round(check_timestep(timestep) / 1000 * steps) + self.offset, steps - 1)

    def network_timestep(self, timestep: float) -> float:
        """Timestep that the network is told: the index of the trained step."""
        return float(self.index(timestep))

    def add_noise(self, latent: Tensor, noise: Tensor, timestep: float) -> Tensor:
        """Noises a latent.

        Args:
            latent: Clean latent ``z_0``, (B, C, H, W).
            noise: Standard normal noise, broadcastable to ``latent``.
            timestep: In [0, 1000]; rounded to the nearest trained step.

        Returns:
            ``z_t``, (B, C, H, W).
        """
        alpha = self.alphas_cumprod[self.index(timestep)].item()
        return alpha**0.5 * latent + (1 - alpha) ** 0.5 * noise


def seeded_generator(seed: int, *stream: int) -> torch.Generator:
    """A generator on the CPU that depends on its arguments alone.

    Args:
        seed: The user's seed.
        *stream: Further integers (image index, draw) that name an independent stream.
    """
    # SeedSequence mixes the integers: neighbouring seeds give unrelated streams, which seed + index would not promise.
    import numpy as np

    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)


def seeded_noise(shape: tuple[int, ...], seed: int, *stream: int) -> Tensor:
    """Standard normal noise that depends on its arguments alone, not on device, batch, rank or call order.

    Args:
        shape: Shape of the noise.
        seed: See :func:`seeded_generator`.
        *stream: Likewise.

    Returns:
        float32 noise on the CPU.
    """
    return torch.randn(shape, generator=seeded_generator(seed, *stream))


def pixel_noise(images: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise that depends on an image's pixels alone, so that neither batch nor rank nor order can change it.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        shape: Shape of one noise.
        seed: The user's seed.

    Returns:
        (B, *shape), float32, on the device of the images.
    """
    import hashlib

    pixels = ((images + 1) * 127.5).round().to(torch.uint8).cpu()
    keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in pixels]
    return torch.stack([seeded_noise(shape, seed, int.from_bytes(key, 'big')) for key in keys]).to(images.device)


def policy_noise(policy: str, seed: int) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Noise of a policy of ``NOISES``, as ``ASelectDiT`` gives it in evaluation.

    Args:
        policy: ``'fixed'`` or ``'fresh'``.
        seed: The user's seed.

    Returns:
        A function from images (B, 3, H, W) in [-1, 1] and the shape of one noise to the noise: (*shape) for
        ``'fixed'``, which broadcasts, (B, *shape) for ``'fresh'``; float32.

    Raises:
        InputError: If there is no such policy.
    """
    if check_choice(policy, 'noise', NOISES) == 'fixed':
        return lambda images, shape: seeded_noise(shape, seed)
    return lambda images, shape: pixel_noise(images, shape, seed)
