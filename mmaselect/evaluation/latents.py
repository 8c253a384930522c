"""Latents that are kept from one measurement to the next: encoding can cost more than the blocks that are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.files import atomic_path


class LatentMemory:
    """Encodes every image once, however often it is asked for; call it in place of ``model.encode``.

    Args:
        model: Its encoder is used.
        path: A safetensors file that keeps the latents, under the SHA-256 of the encoder's weights and the pixels; so
            models with one encoder can share it. None keeps them in memory.
    """

    def __init__(self, model: FrozenDiffusion, path: str | Path | None = None) -> None:
        self.encoder = model.encoder
        self.path = None if path is None else Path(path)
        digest = hashlib.sha256()
        weights: Any = self.encoder
        for name, value in sorted(weights.state_dict().items()):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
        for name in ('latents_mean', 'latents_std'):
            digest.update(str(getattr(self.encoder, name, None)).encode())
        self.encoder_key = digest.hexdigest()[:16]
        self.known: dict[str, Tensor] = {}
        if self.path is not None and self.path.is_file():
            from safetensors.torch import load_file

            self.known = load_file(self.path)
        self._saved = len(self.known)

    def __call__(self, images: Tensor) -> Tensor:
        """As :meth:`FrozenDiffusion.encode`."""
        keys = [
            f'{self.encoder_key}/{hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()[:24]}' for image in images
        ]
        missing = [number for number, key in enumerate(keys) if key not in self.known]
        if missing:
            with torch.no_grad():
                encoded = self.encoder(images[missing]).float().cpu()
            self.known.update(zip((keys[number] for number in missing), encoded))
        return torch.stack([self.known[key] for key in keys]).to(images.device)

    def save(self) -> None:
        """Writes the file, if there is one and something is new."""
        if self.path is None or len(self.known) == self._saved:
            return
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            save_file({key: value.contiguous() for key, value in self.known.items()}, temporary)
        self._saved = len(self.known)


def remember_latents(model: FrozenDiffusion, path: str | Path | None = None) -> LatentMemory:
    """Makes a model encode every image once, see :class:`LatentMemory`; for measurements, not for training.

    Args:
        model: Its ``encode`` is replaced.
        path: See :class:`LatentMemory`.
    """
    memory: Any = LatentMemory(model, path)
    model.encode = memory  # type: ignore[method-assign]
    return memory
