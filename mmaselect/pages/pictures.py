"""Three images of a selection, and low and high frequencies of their features, as small PNGs for ``report.html``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmaselect.diffusion.noise import policy_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap
from mmaselect.evaluation.figures import decompose, principal_colours
from mmaselect.files import write_json
from mmaselect.images import ImageSource
from mmaselect.selection.report import name_taps

#: Beside ``selection.json``, so that the page can be written again without the model.
FILE = 'decomposition.json'
IMAGES = 3
#: Longest side of a picture, in pixels: three images with their maps stay below 100 kB.
SIDE = 96


def write_pictures(
    folder: str | Path,
    content: dict[str, Any],
    model: FrozenDiffusion,
    source: ImageSource,
    indices: Sequence[int],
    tap: Tap,
    sigma: float = 0.25,
) -> None:
    """Reads the first images of a selection once more, at the chosen timestep, and writes ``decomposition.json``.

    This costs one pass of one group of images, the smallest batch that a selection reads: of a sweep over 21 timesteps
    and 256 images in two views, 4 image passes of 10,752.

    Args:
        folder: Of ``selection.json``.
        content: Of it, with the fields that ``TimestepSelectionHook`` adds.
        model: Loaded for ``tap``.
        source: The images.
        indices: Those of the selection, in its order.
        tap: What to show.
        sigma: Of the Gaussian, in cycles per sample.
    """
    batch = next(source.batches(indices[: source.group]))
    chosen = content['timestep']
    timestep = chosen[0] if isinstance(chosen, list) else chosen
    maps: dict[Tap, Tensor] = {}
    noise = policy_noise(content['config']['noise'], content['config']['noise_seed'])
    model.read_images(batch.images, [timestep], noise, lambda _, found, value: maps.__setitem__(found, value))
    # The folder of an image often names its class.
    names = ['/'.join(Path(source.name(index)).parts[-2:]) for index in batch.indices[:IMAGES]]
    images = decompose_images(batch.images[:IMAGES], maps[tap][:IMAGES], names, sigma)
    found = {'selection': _digest(content), 'timestep': timestep, 'tap': name_taps([tap]), 'sigma': sigma}
    write_json(Path(folder) / FILE, {**found, 'images': images})


def read_pictures(folder: str | Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """Reads ``decomposition.json``; None if there is none, or it is of another selection than ``content``."""
    try:
        found = json.loads((Path(folder) / FILE).read_text(encoding='utf-8'))
        return found if found['selection'] == _digest(content) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def decompose_images(images: Tensor, maps: Tensor, names: Sequence[str], sigma: float = 0.25) -> list[dict[str, Any]]:
    """Splits features into low and high frequencies, as ``figures.py decomposition`` does.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        maps: (B, C, h, w).
        names: Of the images.
        sigma: Of the Gaussian, in cycles per sample.

    Returns:
        Of each image its ``name``, its ``hfr`` (the share of the energy that is in the high frequencies) and
        ``pictures``: PNGs in base64, by what they show. Colours are the first three principal components of the maps,
        or fewer where there are fewer channels.
    """
    maps = maps.float().cpu()
    low, high = decompose(maps, sigma)
    shown, basis = principal_colours(maps)
    panels = {
        'image': ((images.cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy(),
        'features': shown,
        'low frequencies': principal_colours(low, basis)[0],
        'high frequencies': principal_colours(high, basis)[0],
    }
    energies = [part.square().sum((1, 2, 3)) for part in (high, maps)]
    shares = (energies[0] / energies[1].clamp_min(torch.finfo(torch.float32).tiny)).tolist()
    return [
        {'name': name, 'hfr': shares[row], 'pictures': {what: _png(panel[row]) for what, panel in panels.items()}}
        for row, name in enumerate(names)
    ]


def _png(pixels: np.ndarray) -> str:
    """(H, W, channels) in [0, 1] as a PNG in base64, scaled down to ``SIDE``."""
    from PIL import Image

    missing = 3 - pixels.shape[2]
    whole = np.pad(pixels, ((0, 0), (0, 0), (0, missing)), mode='edge') if missing else pixels
    picture = Image.fromarray((whole * 255).round().astype(np.uint8))
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _digest(content: dict[str, Any]) -> str:
    """Tells a selection from another of the same work directory."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
