"""A runner's process group: what one rank cannot do, none goes on without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from mmengine import dist
from torch import Tensor

from mmaselect.errors import InputError
from mmaselect.selection.criterion import Sums, unlike_maps


class RunnerRanks:
    """The process group, as a search needs it."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_dist_info()

    def add(self, sums: Sums) -> Sums:
        """Adds the entries of all ranks; an entry that a rank lacks counts as zero."""
        return _reduce(sums) if dist.get_world_size() > 1 else sums

    def gather(self, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Brings the rows of all ranks together, in the order of their groups, on every rank."""
        parts = [part for part in dist.all_gather_object((rows, groups)) if len(part[1])]
        groups = torch.cat([part[1] for part in parts])
        order = groups.argsort(stable=True)
        return torch.cat([part[0] for part in parts])[order], groups[order]

    def check(self, error: str | None) -> None:
        """Raises :class:`InputError` on every rank if one of them brings an error."""
        errors = [found for found in _exchange(error) if found]
        if errors:
            raise InputError(errors[0])

    def collect(self, entries: list[Any]) -> list[Any]:
        """Brings the entries of all ranks together, on every rank."""
        return [entry for part in dist.all_gather_object(entries) for entry in part]


@contextmanager
def all_ranks() -> Iterator[None]:
    """A block that all ranks run; where it fails on one of them, it fails on all, instead of leaving them waiting.

    Raises:
        InputError: On the ranks where it did not fail, with the message of the one where it did.
    """
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    messages = _exchange(None if failed is None else f'{failed}')
    if failed is not None:
        raise failed
    found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if found:
        raise InputError(f'rank {found[0][0]} stopped: {found[0][1]}')


def _exchange(message: str | None) -> list[str | None]:
    """Gathers the messages of all ranks, in their order."""
    messages = dist.all_gather_object(message)
    if any(found is not None for found in messages):
        # A rank that left now would break the connection on which others still wait for its message.
        with suppress(RuntimeError):
            dist.barrier()
    return messages


def _reduce(sums: Sums) -> Sums:
    """Adds the sums of all ranks; ranks may hold different entries (classes that only one of them saw)."""
    described = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
    union: dict[str, tuple] = {}
    for ranks in dist.all_gather_object(described):
        for key, entry in ranks.items():
            if union.setdefault(key, entry)[0] != entry[0]:
                raise unlike_maps(union[key][0], entry[0])
    device = dist.get_comm_device() if dist.is_distributed() else torch.device('cpu')
    out = {}
    for key in sorted(union):
        shape, dtype = union[key]
        value = sums[key].clone() if key in sums else torch.zeros(shape, dtype=dtype)
        value = value.to(device)
        dist.all_reduce(value, op='sum')
        out[key] = value
    return out
