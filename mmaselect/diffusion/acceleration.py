"""How a block is run: which attention kernel, and compiled or not. Neither changes what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mmaselect.errors import InputError, check_choice

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ModuleNotFoundError:  # before torch 2.3
    from torch.backends.cuda import SDPBackend, sdp_kernel

    def sdpa_kernel(backend: SDPBackend) -> AbstractContextManager:  # type: ignore[misc]
        """Allows one kernel."""
        order = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION)
        return sdp_kernel(*(backend == one for one in order))


#: Kernels of ``scaled_dot_product_attention`` by the name that a config gives them.
ATTENTION = {
    'auto': None,
    'flash': SDPBackend.FLASH_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'cudnn': getattr(SDPBackend, 'CUDNN_ATTENTION', None),
    'math': SDPBackend.MATH,
}
#: Modes of ``torch.compile``. Those with CUDA graphs are left out: the next pass would overwrite the maps of this one.
COMPILE = {True: 'default', 'default': 'default', 'max-autotune': 'max-autotune-no-cudagraphs'}

#: Kinds of blocks that are compiled, at most, before torch would fall back to running them as they are.
RECOMPILE_LIMIT = 64


def check_attention(name: str) -> str:
    """Raises :class:`InputError` if there is no such kernel."""
    check_choice(name, 'attention', ATTENTION)
    if name != 'auto' and ATTENTION[name] is None:
        raise InputError(f'attention={name!r} needs torch >= 2.5, found {torch.__version__}')
    return name


def check_compile(mode: bool | str) -> str | None:
    """Reads ``False``, ``True``, ``'default'`` or ``'max-autotune'``.

    Returns:
        The mode of ``torch.compile``; None for none.

    Raises:
        InputError: If it is something else.
    """
    if mode is False:
        return None
    return COMPILE[check_choice(mode, 'compile', (False, *COMPILE))]


def attention_kernel(name: str) -> AbstractContextManager:
    """Gives a context in which attention is computed by one kernel, or by none.

    Args:
        name: Of ``ATTENTION``; ``'auto'`` leaves the choice to torch.
    """
    backend = ATTENTION[name]
    return nullcontext() if backend is None else sdpa_kernel(backend)


def compile_blocks(blocks: Iterable[nn.Module], mode: str | None) -> None:
    """Compiles blocks where they stand.

    Blocks of one kind share what is compiled, so that compiling takes as long for 38 blocks as for one.

    Args:
        blocks: Modules in which nothing is read.
        mode: What :func:`check_compile` returned.
    """
    for block in blocks:
        block.compile(mode=mode)


def compiling(mode: str | None) -> AbstractContextManager:
    """Gives a context in which compiled blocks are run."""
    if mode is None:
        return nullcontext()
    config: Any = torch._dynamo.config
    # torch 2.6 knows it by its former name alone.
    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
    # First, dual or not, and again once the batch size has changed: more kinds than torch allows for.
    return config.patch({limit: RECOMPILE_LIMIT})


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off, or there is none (on the meta device)."""
    if hasattr(torch.amp, 'is_autocast_available'):
        known = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if known else None
    # Before torch 2.4 each device had functions of its own.
    if device.type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if device.type == 'cuda' and torch.is_autocast_enabled() else None


def missing_kernel(error: RuntimeError, name: str, device: torch.device) -> InputError | None:
    """Puts into a line that a kernel does not exist for this device, dtype or shape; None for any other error."""
    if 'No available kernel' not in str(error) and 'No viable backend' not in str(error):
        return None
    return InputError(
        f"attention={name!r} has no kernel for this model on {device.type}: set attention='auto', or another of "
        f'{", ".join(ATTENTION)}'
    )
