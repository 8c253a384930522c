"""How many images fit memory at once: measured before, and halved where it was too many."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mmaselect.diffusion.reader import FrozenDiffusion, pad_to_cells
from mmaselect.errors import InputError, NotFinite

logger = logging.getLogger('mmaselect')

Batch = TypeVar('Batch')
Result = TypeVar('Result')

#: Images per pass beyond which an accelerator, or a CPU, gains nothing.
MOST = {'cuda': 64, 'cpu': 16}
#: Share of the free memory that a pass may take: the allocator and other processes want some, too.
SHARE = 0.5


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is used up, on an accelerator or on the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or 'DefaultCPUAllocator: can' in str(error)


@torch.no_grad()
def fit_batch_size(model: FrozenDiffusion, image: Tensor, group: int = 1, draws: int = 1) -> int:
    """Measures what a pass of a few images takes, and says how many fit.

    Args:
        model: On its device.
        image: (3, H, W) in [-1, 1]; its size counts, not its content.
        group: Images that must stay together.
        draws: Passes whose maps are in memory together.

    Returns:
        Images per batch: ``group`` times a power of two, at most ``MOST``. Where memory cannot be measured, or so much
        of it is free, that.
    """
    device = model.device
    most = max(MOST.get(device.type, MOST['cuda']), group)
    images = pad_to_cells(image[None].to(device), model.multiple).expand(group, -1, -1, -1)

    def passes() -> None:
        latent = model.encode(images)
        latent = latent.repeat(draws, 1, 1, 1)
        model.read(latent, torch.zeros_like(latent), 0.0, lambda tap, value: None)

    measured = (_measure_cuda if device.type == 'cuda' else _measure_cpu)(passes)
    if measured is None:
        return most // group * group
    taken, free = measured
    size = group
    while 2 * size <= most and 2 * size / group * taken <= SHARE * free:
        size *= 2
    return size


def _measure_cuda(work: Callable[[], None]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.mem_get_info()[0]


def _measure_cpu(work: Callable[[], None]) -> tuple[int, int] | None:
    """Bytes that work takes at its peak and bytes that are free; None where the system does not say."""
    try:
        # Memory that was freed before but not given back would hide what is taken now.
        gc.collect()
        with suppress(OSError, AttributeError):  # where the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)
        # Sets the peak back to what is in use now (Linux).
        Path('/proc/self/clear_refs').write_text('5')
        before = _read_kilobytes('/proc/self/status', 'VmRSS')
        work()
        taken = _read_kilobytes('/proc/self/status', 'VmHWM') - before
        return 1024 * max(taken, 0), 1024 * _read_kilobytes('/proc/meminfo', 'MemAvailable')
    except OSError:
        return None


def _read_kilobytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1])
    raise OSError(f'{file} has no {field}')


class Halving(Generic[Batch, Result]):
    """Does work on batches, in halves where memory does not suffice for the whole, then for all batches to come.

    Args:
        work: From a batch to a result. If it runs out of memory it must leave nothing behind.
        halve: From a batch to its halves; None if it must stay together.
        size: Images in a batch.
    """

    def __init__(
        self,
        work: Callable[[Batch], Result],
        halve: Callable[[Batch], Sequence[Batch] | None],
        size: Callable[[Batch], int] = len,  # type: ignore[assignment]
    ) -> None:
        self.work, self.halve, self.size = work, halve, size
        self.most: int | None = None

    def __call__(self, batch: Batch) -> list[Result]:
        """Gives the result of the batch, or those of its parts, in their order.

        Raises:
            InputError: If what must stay together does not fit.
        """
        count = self.size(batch)
        # Halves are copies: they are made only where they are needed.
        halves = self.halve(batch) if self.most is not None and count > self.most else None
        if halves is None:
            try:
                return [self.work(batch)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the handler, whose traceback keeps the tensors of the failed attempt alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            halves = self.halve(batch)
            if halves is None:
                which = 'a single image does' if count == 1 else f'{count} images, which must stay together, do'
                raise InputError(f'{which} not fit memory: use smaller images, or a smaller dtype')
            self.most = max(map(self.size, halves))
            logger.warning('%d images at once do not fit memory: going on with %d', count, self.most)
        results: list[Result] = []
        before = 0
        for half in halves:
            try:
                results += self(half)
            except NotFinite as error:
                error.images = [before + place for place in error.images]
                raise
            before += self.size(half)
        return results


def halve_images(images: Tensor) -> Sequence[Tensor] | None:
    """Two halves of images (B, ...); None for a single one."""
    return images.split(-(-len(images) // 2)) if len(images) > 1 else None


def join_maps(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Maps (B, ...) of a batch from those of its parts."""
    return [torch.cat(values) for values in zip(*parts)]


def check_batch_size(batch_size: int | str) -> int | str:
    """Raises :class:`InputError` unless it is ``'auto'`` or a whole number of at least 1."""
    if batch_size == 'auto':
        return batch_size
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} is not valid: give a whole number of at least 1, or 'auto'")
    return batch_size
