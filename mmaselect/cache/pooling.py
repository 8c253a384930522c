"""Whether a cache can keep vectors: where all that a neck does to the maps first is to pool them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def pooling_of(model: nn.Module, backbone: Any) -> nn.Module | None:
    """The neck of a classifier, or its first part, if it makes a vector of each map and has nothing to learn.

    It is tried out on random maps. It must pool each image apart from the others, give the same twice, and leave a map
    of one cell as it is. Then vectors can go through the model as maps of one cell, and nothing else has to change.

    Args:
        model: That owns the backbone. Of any but mmpretrain's ``ImageClassifier`` it is not known that nothing else
            reads the maps.
        backbone: Its :class:`~mmaselect.backbones.ASelectDiT`.

    Returns:
        The module; None where maps must be kept.
    """
    own: Any = getattr(model, 'backbone', None)
    neck = getattr(model, 'neck', None)
    first = neck[0] if isinstance(neck, nn.Sequential) and len(neck) else neck
    if not isinstance(first, nn.Module) or own is None or own is not backbone:
        return None
    if not _reads_only_the_neck(type(model)) or any(True for _ in (*first.parameters(), *first.buffers())):
        return None
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, channels, 3, 5, generator=generator) for channels in own.out_channels)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            pooled, again = (pool(first, maps) for _ in range(2))
            alone, once = pool(first, tuple(one[:1] for one in maps)), pool(first, pooled)
        except Exception:  # it wants other maps than these
            return None
    expected = [(2, channels, 1, 1) for channels in own.out_channels]
    if [tuple(one.shape) for one in pooled] != expected or len(once) != len(pooled):
        return None
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(pooled, again, once))
    apart = all(torch.allclose(a[:1], b) for a, b in zip(pooled, alone))
    return first if same and apart else None


def pool(neck: nn.Module, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Maps (B, C, h, w) to maps of one cell, (B, C, 1, 1)."""
    return tuple(vectors.flatten(1)[..., None, None] for vectors in neck(maps))


def _reads_only_the_neck(kind: type) -> bool:
    """Whether a model is mmpretrain's classifier, or one that passes its features on in the same way."""
    base: Any = next((one for one in kind.__mro__ if one.__module__.startswith('mmpretrain.models.classifiers')), None)
    if base is None or base.__name__ != 'ImageClassifier':
        return False
    return all(getattr(kind, name) is getattr(base, name) for name in ('forward', 'extract_feat', 'loss'))
