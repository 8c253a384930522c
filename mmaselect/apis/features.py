"""Features in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmaselect.apis.inference import Model, extract, load, load_taps
from mmaselect.errors import check_timesteps
from mmaselect.files import atomic_path
from mmaselect.images import list_images
from mmaselect.selection.report import Selection


def write_features(
    path: str | Path,
    model: Model,
    images: Sequence[str | Path],
    timestep: float | Sequence[float] | Selection,
    block: int | Sequence[int] | None = None,
    component: str | Sequence[str] = 'query',
    taps: str | Sequence[str] | None = None,
    **options: Any,
) -> dict[str, torch.Size]:
    """Writes the features of image files as safetensors, under a temporary name until they are whole.

    Args:
        path: The file. Its metadata has the names of the images, in the order of the rows, and the digest of the frozen
            weights.
        model: See :func:`~mmaselect.load`.
        images: Files and folders.
        timestep: See :func:`~mmaselect.extract`.
        block: See :func:`~mmaselect.load`.
        component: Likewise.
        taps: Likewise.
        **options: Of :func:`~mmaselect.extract`.

    Returns:
        Shape of each tensor by its name, ``t450.block12.query``.

    Raises:
        InputError: If an argument is out of range, or there are no images.
    """
    from safetensors.torch import save_file

    files: list[Path] = []
    for place in map(Path, images):
        files += list_images(place) if place.is_dir() else [place]
    if isinstance(timestep, Selection):
        loaded, timesteps = load_taps(model, timestep.taps), tuple(timestep.timesteps)
    else:
        loaded, timesteps = load(model, block, component, taps), check_timesteps(timestep)
    found = extract(loaded, files, timesteps, **options)
    if isinstance(found, torch.Tensor):
        found = {(timesteps[0], *loaded.family.taps[0]): found}
    tensors = {f't{t:g}.block{number}.{name}': value.contiguous() for (t, number, name), value in found.items()}
    metadata = {'images': json.dumps([str(file) for file in files]), 'weights': loaded.identity.hex()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata)
    return {name: value.shape for name, value in tensors.items()}
