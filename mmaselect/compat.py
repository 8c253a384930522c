"""Repairs of the OpenMMLab stack on a current machine. Each names its cause and is a no-op where nothing is broken."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def define_torchvision_operators() -> bool:
    """Lets ``import torchvision`` succeed where its compiled library does not fit the installed torch.

    torchvision's wheel on the package index is a CUDA build; beside a CPU build of torch its library cannot load, and
    registering fake kernels for ``torchvision::nms`` then fails on import. The schema is all the import needs; the
    transforms that the toolboxes use are pure Python.

    Returns:
        Whether anything was defined.
    """
    if 'torchvision' in sys.modules or importlib.util.find_spec('torchvision') is None:
        return False
    import torch

    schemas = {
        'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
        'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    }
    if _torchvision_library_loads(torch):
        return False
    defined = False
    for name, schema in schemas.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f'torchvision::{name}', schema)
            defined = True
    return defined


def _torchvision_library_loads(torch: types.ModuleType) -> bool:
    """Loads torchvision's library the way torchvision does, without importing the package."""
    spec = importlib.util.find_spec('torchvision')
    machinery = importlib.machinery
    finder = machinery.FileFinder(
        next(iter(spec.submodule_search_locations)),
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    )
    library = finder.find_spec('_C')
    if library is None:
        return False
    try:
        torch.ops.load_library(library.origin)
    except OSError:
        return False
    return True


class _MissingOps(types.ModuleType):
    """Stand-in for ``mmcv._ext``: every attribute is a function that says what is missing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f'the op {name!r} needs the full mmcv, but mmcv-lite is installed (pip install mmcv)')

        return missing


def provide_mmcv_extension() -> bool:
    """Lets ``mmseg.models`` and ``mmdet`` import with mmcv-lite, which has no compiled ``mmcv._ext``.

    Returns:
        Whether the stand-in was installed. A full mmcv is left alone.
    """
    if 'mmcv._ext' in sys.modules or importlib.util.find_spec('mmcv') is None:
        return False
    # Looked up beside mmcv/__init__.py, because find_spec('mmcv._ext') would import mmcv.
    location = next(iter(importlib.util.find_spec('mmcv').submodule_search_locations))
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    if importlib.machinery.FileFinder(location, loader).find_spec('_ext') is not None:
        return False
    module = _MissingOps('mmcv._ext', 'Stand-in by mmaselect: mmcv-lite has no compiled ops.')
    # A spec, so that importlib.util.find_spec('mmcv._ext') answers instead of raising.
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = module
    return True


def _history_buffer_attribute(owner: object, name: str) -> object:
    """Stands in for ``getattr`` in an mmengine checkpoint, and does no more than such a checkpoint asks of it.

    mmengine's ``HistoryBuffer`` pickles its table of statistics as ``getattr(HistoryBuffer, 'min')`` and the like.

    Raises:
        pickle.UnpicklingError: For any other attribute of any other object.
    """
    import pickle

    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'a checkpoint may not look up {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> bool:
    """Lets ``torch.load`` with ``weights_only=True``, the default since torch 2.6, read mmengine's own checkpoints.

    They hold the message hub: ``HistoryBuffer`` objects with numpy arrays and scalars. Exactly these are admitted;
    ``getattr``, which they also name, is replaced by :func:`_history_buffer_attribute`.

    Returns:
        Whether torch has such a list.
    """
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    if not hasattr(torch.serialization, 'add_safe_globals'):
        return False
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    dtypes = [type(np.dtype(kind)) for kind in ('float64', 'float32', 'int64', 'int32', 'bool')]
    names = [(_history_buffer_attribute, 'builtins.getattr')]
    for function in ('_reconstruct', 'scalar'):
        # numpy 1 and numpy 2 pickle the same function under two names; a checkpoint may come from either.
        names += [(getattr(multiarray, function), f'numpy.{core}.multiarray.{function}') for core in ('core', '_core')]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *dtypes, *names])
    return True


def provide_pkg_resources() -> bool:
    """Lets mmengine inherit configs across packages (``mmpretrain::...``) without ``pkg_resources``.

    setuptools removed it in version 82; mmengine imports it for three calls. ``setup.py`` depends on
    ``setuptools<81``; this covers environments that were changed afterwards.

    Returns:
        Whether the stand-in was installed.
    """
    if importlib.util.find_spec('pkg_resources') is not None:
        # mmengine's look-up reloads it for every inherited config, and each time it warns the user, who can do nothing.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated', category=UserWarning)
        return False
    from importlib import metadata
    from pathlib import Path

    class Distribution:
        def __init__(self, name: str) -> None:
            self._metadata = metadata.distribution(name)
            self.version = self._metadata.version
            self.location = str(Path(self._metadata.locate_file('')))

        def has_metadata(self, name: str) -> bool:
            return self._metadata.read_text(name) is not None

        def get_metadata(self, name: str) -> str:
            return self._metadata.read_text(name) or ''

    module = types.ModuleType('pkg_resources', 'Stand-in by mmaselect for what mmengine uses of it.')
    module.DistributionNotFound = metadata.PackageNotFoundError
    module.get_distribution = Distribution
    # mmengine reloads it before each look-up, which needs a spec whose loader does nothing.
    module.__spec__ = importlib.machinery.ModuleSpec('pkg_resources', _KeepAsIs())
    sys.modules['pkg_resources'] = module
    sys.meta_path.append(_KeepAsIs())
    return True


class _KeepAsIs:
    """Finder and loader of the ``pkg_resources`` stand-in, so that ``importlib.reload`` leaves it as it is."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == 'pkg_resources' else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def check_mmcv_version() -> bool:
    """Warns where mmsegmentation will refuse the installed mmcv, naming the versions that it accepts.

    Returns:
        Whether a warning was given.
    """
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = version('mmcv') or version('mmcv-lite')
    if found is None or version('mmsegmentation') is None:
        return False
    major, minor = (int(part) for part in found.split('.')[:2])
    if (major, minor) < (2, 2):
        return False
    warnings.warn(
        f'mmsegmentation {version("mmsegmentation")} does not import with mmcv {found}: '
        'install mmcv or mmcv-lite >=2.0.0,<2.2.0',
        stacklevel=2,
    )
    return True


def allow_cpu_ranks() -> bool:
    """Lets ``dist_train.sh`` run on machines without an accelerator.

    mmengine selects a CUDA device and passes its number to ``DistributedDataParallel`` without asking whether there is
    one, and most configs name the ``nccl`` backend. Without an accelerator: no device is selected, none is passed on,
    and ``gloo`` takes the place of ``nccl``.

    Returns:
        Whether mmengine was patched; on machines with an accelerator the patches hand everything on as it is.
    """
    import atexit
    import functools

    import torch
    from mmengine.device import get_device
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel

    if getattr(utils._init_dist_pytorch, 'patched_by_mmaselect', False):
        return False

    def end_process_group() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    start, wrap = utils._init_dist_pytorch, MMDistributedDataParallel.__init__

    @functools.wraps(start)
    def start_on_cpu(backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        if get_device() != 'cpu' or init_backend != 'torch':
            start(backend, init_backend=init_backend, **kwargs)
        else:
            torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend, **kwargs)
            # gloo's threads, if still running when the interpreter leaves, now and then abort a run that succeeded.
            atexit.register(end_process_group)

    @functools.wraps(wrap)
    def wrap_on_cpu(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if get_device() == 'cpu':
            kwargs['device_ids'] = None
        wrap(self, module, *args, **kwargs)

    start_on_cpu.patched_by_mmaselect = True
    utils._init_dist_pytorch, MMDistributedDataParallel.__init__ = start_on_cpu, wrap_on_cpu
    return True


def apply() -> None:
    """Applies every repair."""
    define_torchvision_operators()
    provide_mmcv_extension()
    allow_mmengine_checkpoints()
    provide_pkg_resources()
    check_mmcv_version()
    allow_cpu_ranks()
