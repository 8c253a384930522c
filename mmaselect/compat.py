"""Repairs of the OpenMMLab stack on a current machine.

A repair waits for the failure that it mends: what is installed is used as it is, and only where that raises for the
known cause is it mended and tried again. A repair that is not needed leaves nothing behind. Where it cannot wait, its
docstring says why. Each names the versions that it was seen with.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import time
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    import torch


# --- imports that are repaired and tried again -----------------------------------------------------------------------


@dataclass(frozen=True)
class Repair:
    """What to do about the import of a module.

    Attributes:
        known: Says whether the error of a failed import has the known cause.
        mend: Called once, before the module is run a second time.
        then: Called once the import has succeeded.
    """

    known: Callable[[Exception], bool] = lambda error: False
    mend: Callable[[], None] = lambda: None
    then: Callable[[], None] = lambda: None


_libraries: list[torch.library.Library] = []


def define_torchvision_operators() -> None:
    """Declares the two operators that ``import torchvision`` asks for.

    torchvision's wheel on the package index is a CUDA build; beside a CPU build of torch its compiled library cannot
    load, and the import ends in ``RuntimeError: operator torchvision::nms does not exist``. The declarations are all it
    needs; the transforms that the toolboxes use are pure Python. Where the library does load, a second declaration
    aborts the process: so never before the failure.

    Seen with torch 2.13.0+cpu and torchvision 0.28.0; not needed with torch 2.14.1 and torchvision 0.29.1 (CUDA).
    """
    import torch

    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    # A declaration lasts as long as its library.
    _libraries.append(library)


class _MissingOps(types.ModuleType):
    """Stand-in for ``mmcv._ext``: every attribute is a function that says what is missing, but for ``nms``."""

    @staticmethod
    def nms(bboxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
        """torchvision's, which is mmcv's with ``offset=0``: a detector can be evaluated with mmcv-lite."""
        if offset:
            raise RuntimeError(f"the op 'nms' with offset={offset} needs the full mmcv (pip install mmcv)")
        from torchvision.ops import nms

        return nms(bboxes, scores, iou_threshold)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(f'the op {name!r} needs the full mmcv, but mmcv-lite is installed (pip install mmcv)')

        return missing


def provide_mmcv_extension() -> None:
    """Puts a stand-in where mmcv-lite has no compiled ``mmcv._ext``.

    ``mmseg.models`` and ``mmdet`` import ``mmcv.ops``, which needs it: ``No module named 'mmcv._ext'``. A full mmcv
    whose library is there but does not load raises another error, and is left alone.

    Seen with mmcv-lite 2.0.0 and 2.1.0 and mmsegmentation 1.2.2.
    """
    module = _MissingOps('mmcv._ext', 'Stand-in by mmaselect: mmcv-lite has no compiled ops.')
    # Without a loader: by that mmengine's mmcv_full_available() tells that the ops are not there.
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = module


def leave_out_multimodal_models() -> None:
    """Lets mmpretrain go on without its multimodal models, as it does where their packages are not installed.

    It imports them where it finds pycocotools and transformers, whatever the version of these. With transformers 5 that
    ends in ``TypeError: NoneType takes no arguments``. mmdet needs pycocotools, and imports mmpretrain if it is there.

    Seen with mmpretrain 1.2.0, transformers 5.23.0 and mmdet 3.3.0.
    """
    from mmengine.registry import Registry
    from mmpretrain import registry
    from mmpretrain.utils import dependency

    dependency.WITH_MULTIMODAL = False
    # What was registered before the failure makes place for mmpretrain's placeholders.
    for one in vars(registry).values():
        if isinstance(one, Registry):
            found = [
                name for name, kind in one.module_dict.items() if getattr(kind, '__module__', '').startswith(MULTIMODAL)
            ]
            for name in found:
                del one.module_dict[name]


MULTIMODAL = 'mmpretrain.models.multimodal'
#: By the module whose import fails.
REPAIRS = {
    'torchvision': Repair(
        lambda error: isinstance(error, RuntimeError) and 'operator torchvision::' in str(error),
        define_torchvision_operators,
    ),
    'mmcv.ops': Repair(
        lambda error: isinstance(error, ModuleNotFoundError) and error.name == 'mmcv._ext',
        provide_mmcv_extension,
    ),
    MULTIMODAL: Repair(
        lambda error: isinstance(error, (ImportError, TypeError)) and 'transformers' in sys.modules,
        leave_out_multimodal_models,
    ),
}


class _Watch:
    """Finder that repairs one module's import; it goes as soon as that import has ended, one way or the other."""

    def __init__(self, name: str, repair: Repair) -> None:
        self.watches, self.repair = name, repair

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Finds the module as the other finders do, and puts a loader in between that tries twice."""
        if name != self.watches:
            return None
        # Another copy of this module has classes of its own: two watches of one import would ask each other for ever.
        others = (finder for finder in list(sys.meta_path) if getattr(finder, 'watches', None) != name)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _TriesTwice(self, spec.loader)  # type: ignore[assignment]
        return spec


class _TriesTwice:
    """Loader that runs a module, and where this fails for the known cause, repairs and runs it again."""

    def __init__(self, watch: _Watch, loader: Any) -> None:
        self._watch, self._loader = watch, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        if self._watch in sys.meta_path:
            sys.meta_path.remove(self._watch)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        repair = self._watch.repair
        try:
            self._loader.exec_module(module)
        except Exception as error:
            if not repair.known(error):
                raise
            repair.mend()
            self._loader.exec_module(module)
        repair.then()


def watch_imports(repairs: Mapping[str, Repair]) -> None:
    """Has imports watched, unless they have succeeded already.

    Args:
        repairs: By the name of the module.
    """
    watched = {getattr(finder, 'watches', None) for finder in sys.meta_path}
    for name, repair in repairs.items():
        if name not in sys.modules and name not in watched:
            sys.meta_path.insert(0, _Watch(name, repair))


class _PkgResources:
    """Finder and loader of a stand-in for ``pkg_resources``, asked after all others."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, cast(Any, self)) if name == 'pkg_resources' else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        from importlib import metadata

        class Distribution:
            def __init__(self, name: str) -> None:
                self._metadata = metadata.distribution(name)
                self.version = self._metadata.version
                self.location = str(self._metadata.locate_file(''))

            def has_metadata(self, name: str) -> bool:
                return self._metadata.read_text(name) is not None

            def get_metadata(self, name: str) -> str:
                return self._metadata.read_text(name) or ''

        module: Any = types.ModuleType('pkg_resources', 'Stand-in by mmaselect for what mmengine uses of it.')
        module.DistributionNotFound = metadata.PackageNotFoundError
        module.get_distribution = Distribution
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing; mmengine reloads the module before each look-up, which leaves it as it is."""


def provide_pkg_resources() -> None:
    """Lets mmengine inherit configs across packages (``mmpretrain::...``) without ``pkg_resources``.

    setuptools removed it in version 82, and mmengine imports it for three calls. Nobody's setuptools is downgraded for
    that. The finder is asked only when no other has found the module, and is added only where that is so.

    Seen with setuptools 84 and mmengine 0.10.1 to 0.10.7.
    """
    if importlib.util.find_spec('pkg_resources') is None:
        sys.meta_path.append(_PkgResources())


# --- behaviour of mmengine -------------------------------------------------------------------------------------------


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


def allow_mmengine_checkpoints() -> None:
    """Lets ``torch.load`` with ``weights_only=True``, the default since torch 2.6, read mmengine's own checkpoints.

    They hold the message hub: ``HistoryBuffer`` objects with numpy arrays and scalars. Exactly these are admitted;
    ``getattr``, which they also name, is replaced by :func:`_history_buffer_attribute`.

    It cannot wait for the failure: mmengine and the toolboxes call ``torch.load`` themselves, and it has no place to
    try again. Every torch needs the entries, so there is no stack on which they are too many.

    Seen with torch 2.1.0 to 2.14.1 and mmengine 0.10.1 to 0.10.7.
    """
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    from mmaselect.unpickling import admit

    core: Any = np._core if hasattr(np, '_core') else np.core
    multiarray = core.multiarray
    dtypes = [type(np.dtype(kind)) for kind in ('float64', 'float32', 'int64', 'int32', 'bool')]
    names: list[tuple[Any, str]] = [(_history_buffer_attribute, 'builtins.getattr')]
    for function in ('_reconstruct', 'scalar'):
        # numpy 1 and numpy 2 pickle the same function under two names; a checkpoint may come from either.
        names += [(getattr(multiarray, function), f'numpy.{core}.multiarray.{function}') for core in ('core', '_core')]
    classes = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    admit([(one, f'{one.__module__}.{one.__name__}') for one in classes] + names)


def end_process_group() -> None:
    """Ends gloo's process group before the interpreter shuts down.

    After a collective, gloo's threads release Python's tensors, and need the interpreter's lock for that. A thread that
    needs it at shutdown aborts a run that has succeeded. One that needs it while the group is destroyed waits for ever,
    because ``destroy_process_group`` holds the lock and joins the thread. So the threads get half a second first.

    Seen with torch 2.1.0, two ranks and busy cores (https://github.com/pytorch/pytorch/issues/75097): of 300 processes
    8 aborted, and of 23 runs 2 waited.
    """
    import torch

    if torch.distributed.is_initialized():
        time.sleep(0.5)
        torch.distributed.destroy_process_group()


def allow_cpu_ranks() -> None:
    """Lets ``dist_train.sh`` run on machines without an accelerator; elsewhere nothing is touched.

    mmengine selects a CUDA device and passes its number to ``DistributedDataParallel`` without asking whether there is
    one, and most configs name the ``nccl`` backend. Both calls are made as mmengine makes them. Where they fail, no
    device is selected, none is passed on, and ``gloo`` takes the place of ``nccl``. The functions have to be wrapped
    before they fail, since the runner calls them while it is built. ``SyncBatchNorm``, which refuses tensors on a CPU,
    becomes ordinary batch norm, as mmengine makes it in a single process: each rank then has statistics of its own.

    Seen with mmengine 0.10.1 to 0.10.7 and torch 2.1.0 to 2.14.1.
    """
    import atexit
    import functools

    import torch
    from mmengine.device import get_device
    from mmengine.dist import utils
    from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm

    if get_device() != 'cpu' or hasattr(utils._init_dist_pytorch, '__wrapped__'):
        return

    start, wrap = utils._init_dist_pytorch, MMDistributedDataParallel.__init__

    @functools.wraps(start)
    def start_on_cpu(backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        try:
            start(backend, init_backend=init_backend, **kwargs)
        except (AssertionError, AttributeError, RuntimeError):
            # What a CPU build lacks is an AttributeError. Selecting a device comes first: nothing has been started.
            if init_backend != 'torch' or torch.distributed.is_initialized():
                raise
            torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend, **kwargs)
            atexit.register(end_process_group)

    @functools.wraps(wrap)
    def wrap_on_cpu(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        module = revert_sync_batchnorm(module)
        try:
            wrap(self, module, *args, **kwargs)
        except ValueError as error:
            if 'device_ids' not in str(error):
                raise
            wrap(self, module, *args, **{**kwargs, 'device_ids': None})

    utils._init_dist_pytorch, MMDistributedDataParallel.__init__ = start_on_cpu, wrap_on_cpu


def check_mmcv_version() -> None:
    """Warns where mmsegmentation will refuse the installed mmcv, naming the versions that it accepts.

    It repairs nothing. Seen with mmsegmentation 1.2.2 and mmcv-lite 2.2.0.
    """
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = version('mmcv') or version('mmcv-lite')
    if found is None or version('mmsegmentation') is None:
        return
    major, minor = (int(part) for part in found.split('.')[:2])
    if (major, minor) >= (2, 2):
        warnings.warn(
            f'mmsegmentation {version("mmsegmentation")} does not import with mmcv {found}: '
            'install mmcv or mmcv-lite >=2.0.0,<2.2.0',
            stacklevel=2,
        )


def mend_mmengine() -> None:
    """Repairs mmengine, which has been imported: no part of it is run for someone who does not use it."""
    provide_pkg_resources()
    allow_mmengine_checkpoints()
    allow_cpu_ranks()
    check_mmcv_version()


def apply(register: Callable[[], None]) -> None:
    """Puts every repair in its place: of mmengine at once if it is imported, else as soon as it is.

    Args:
        register: Called when mmengine is repaired.
    """

    def then() -> None:
        mend_mmengine()
        register()

    watch_imports({**REPAIRS, 'mmengine': Repair(then=then)})
    if sys.modules.get('mmengine') is not None:
        then()
