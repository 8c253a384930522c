"""Recipes: everything that features depend on, in words. Two models with equal recipes give equal features.

What provably changes nothing is not in a recipe: device, batch size, attention kernel, ``compile``. Timestep and taps
stand beside it, because they may be chosen later.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mmaselect.diffusion.reader import FrozenDiffusion

Recipe = dict[str, Any]


def describe(model: FrozenDiffusion, **more: Any) -> Recipe:
    """The recipe of a model.

    Args:
        model: The frozen model.
        **more: What else features depend on: the policy and seed of the noise, the normalisation of images.

    Returns:
        Names and values, as JSON has them.
    """
    family, encoder = model.family, model.encoder
    config = {name: value for name, value in dict(family.transformer.config).items() if not name.startswith('_')}
    recipe = {
        'weights': model.identity.hex(),
        'family': family.name,
        'architecture': config,
        'process': {'type': type(family.process).__name__, **vars(family.process)},
        'normalised_qk': family.normalised,
        'dtype': str(family.dtype).removeprefix('torch.'),
        'encoder': {
            'type': type(encoder).__name__,
            **{name: getattr(encoder, name, None) for name in ('scaling_factor', 'shift_factor')},
        },
        **more,
    }
    # As JSON has it: tuples are lists, and of a tensor (the schedule of a process) its digest is enough.
    return json.loads(json.dumps(recipe, default=lambda value: hashlib.sha256(value.numpy().tobytes()).hexdigest()))


def digest(recipe: Recipe) -> bytes:
    """32 bytes (SHA-256) that name a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).digest()


def difference(asked: Recipe, found: Recipe) -> str | None:
    """Names the first field in which two recipes differ, with both values; None if there is none.

    Args:
        asked: What a config says.
        found: What a checkpoint or a file was made with.
    """
    # Weights last: where the architecture differs, they do as well.
    for name in sorted({*asked, *found}, key=lambda name: (name == 'weights', name)):
        one, other = asked.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(other, dict) and one != other:
            line = difference(one, other)
            return f'{name}.{line}'
        if one != other:
            return f'{name}={_short(one)} in the config, {_short(other)} in training'
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f'{text[:12]}...'
