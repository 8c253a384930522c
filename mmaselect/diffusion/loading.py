"""From files of weights to modules, reading no more than what will run; where the files are is in ``hub.py``."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmaselect.diffusion.hub import EMBEDDED, WEIGHTS, Source
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError, unknown
from mmaselect.progress import PATIENCE, progress_bar, working
from mmaselect.unpickling import admit

__all__ = ['EMBEDDED', 'WEIGHTS', 'Identity', 'Source', 'Tensors', 'load_into']

#: Dicts that wrappers of training scripts put around the tensors, the averaged ones first, and what they put before
#: the names.
WRAPPERS = ('ema', 'ema_model', 'model_ema', 'state_dict_ema', 'state_dict', 'model', 'module')
PREFIXES = ('module.', '_orig_mod.')
#: Tensors that quantised files have beside their weights: of bitsandbytes, fp8 with scales, quanto, GPTQ and AWQ.
SCALES = re.compile(
    r'(.*\.)?(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|SCB|weight_format|scaled_fp8|'
    r'scale_weight|scale_input|weight_scale(_inv|_2)?|input_scale|_scale|_data|qweight|qzeros|wscales)'
)
# Training scripts store their argparse.Namespace: a plain holder of values.
admit([(argparse.Namespace, 'argparse.Namespace')])

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Reads ``'float32'``, ``'bfloat16'`` or ``'float16'``.

    Raises:
        InputError: If it is none of them.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise unknown('dtype', dtype, DTYPES)
    return DTYPES[dtype]


def read_pickle(path: Path) -> Any:
    """Reads what ``torch.save`` wrote, with ``weights_only=True``: no code of the file runs.

    Raises:
        InputError: If it is none, or holds more than tensors and plain values.
    """
    try:
        # Of a zip file only the tensors that are used are read from the disk.
        return torch.load(str(path), map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        named = re.search(r'GLOBAL (\S+)', str(error))
        reason = f'it would run {named[1]}, which is refused' if named else 'it is no file of tensors'
        raise InputError(f'{path} is not readable as weights: {reason}; a .safetensors file runs nothing') from error


def unwrap(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Takes the tensors out of a checkpoint, averaged ones before others, and wrappers off their names.

    Raises:
        InputError: If there are none.
    """
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f'{path} holds a {type(content).__name__}, not tensors by name')
    tensors = {bare(name): value for name, value in content.items() if isinstance(value, Tensor)}
    # A library of averages keeps both models in one dict.
    averaged = {name: value for name, value in tensors.items() if name.startswith('ema_model.')}
    return {bare(name.removeprefix('ema_model.')): value for name, value in averaged.items()} or tensors


def bare(name: str) -> str:
    """The name of a tensor without what ``DistributedDataParallel`` and ``torch.compile`` put before it."""
    while name.startswith(PREFIXES):
        name = name.partition('.')[2]
    return name


class Pickled:
    """The file of ``torch.save`` as safetensors has files."""

    def __init__(self, path: Path) -> None:
        self._tensors = unwrap(read_pickle(path), path)

    def keys(self) -> Iterable[str]:
        """Names of the tensors."""
        return self._tensors

    def get_slice(self, name: str) -> Pickled.Slice:
        """A tensor that is not read yet."""
        return self.Slice(self._tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        """Reads a tensor; the copy does not depend on the file any more."""
        return self._tensors[name].clone()

    class Slice:
        """A tensor of which only the shape is known."""

        def __init__(self, tensor: Tensor) -> None:
            self._shape = list(tensor.shape)

        def get_shape(self) -> list[int]:
            """Its shape."""
            return self._shape


class TensorReader(Protocol):
    """Tensors by name, read one at a time."""

    source: Source

    def names(self) -> set[str]:
        """Names of all tensors, without reading one."""
        ...

    def get(self, name: str) -> Tensor:
        """Reads one tensor, on the CPU, in the dtype of the file."""
        ...


class Tensors:
    """Tensors of one model, read one at a time and only when asked for.

    Args:
        source: The model.
        files: File of each tensor; a single entry with key None for an unsharded model.
    """

    def __init__(self, source: Source, files: dict[str | None, str]) -> None:
        self.source = source
        self.files = files
        self._open: dict[str, Any] = {}

    def _handle(self, path: str) -> Any:
        if path not in self._open:
            file = self.source.find(path)
            if file is None:
                raise InputError(f'{self.source.field}={self.source.name!r} lacks its shard {path}')
            self._open[path] = self._open_file(file, Path(path).suffix)
        return self._open[path]

    def _open_file(self, file: Path, suffix: str) -> Any:
        if suffix != '.safetensors':
            return Pickled(file)
        from safetensors import safe_open

        try:
            return safe_open(str(file), framework='pt')
        except Exception as error:
            raise InputError(f'{file} is not a readable safetensors file (truncated?): {error}') from error

    def names(self) -> set[str]:
        """Names of all tensors, without reading one."""
        if None in self.files:
            return set(self._handle(self.files[None]).keys())
        return {name for name in self.files if name is not None}

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors by name, without reading one."""
        return {name: self._handle(self._path(name)).get_slice(name).get_shape() for name in self.names()}

    def _path(self, name: str) -> str:
        return self.files.get(None) or self.files[name]

    def get(self, name: str) -> Tensor:
        """Reads one tensor, on the CPU, in the dtype of the file."""
        path = self._path(name)
        handle = self._handle(path)
        try:
            return handle.get_tensor(name)
        except Exception as error:
            raise InputError(f'{path} of {self.source.name!r} has no readable tensor {name!r}: {error}') from error


class Identity:
    """SHA-256 over everything that is frozen: two models with the same identity give the same features.

    Names, shapes, dtypes and bytes go in as they stand in the files, before any cast, so that loading in bfloat16
    does not make it another model.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, bytes] = {}
        self._running: dict[str, Future[bytes]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def add(self, name: str, tensor: Tensor) -> Future[bytes]:
        """Adds one tensor under a name of its own.

        Returns:
            Its digest, which threads compute while the next ones are read. Until it is there, the tensor must stay as
            it is.
        """
        self._threads = self._threads or ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._running[name] = self._threads.submit(_hash, name, tensor.detach())
        return self._running[name]

    def settle(self) -> None:
        """Waits until all that was added is hashed."""
        if self._threads is not None:
            self._tensors.update({name: one.result() for name, one in self._running.items()})
            self._threads.shutdown()
            self._threads, self._running = None, {}

    def check(self, name: str, tensor: Tensor) -> None:
        """Raises :class:`InputError` unless a tensor that is read again is what was added under its name."""
        self.settle()
        if _hash(name, tensor) != self._tensors[name]:
            raise InputError(f'{name} is not what it was when the model was loaded: its file has changed; start again')

    def keep(self, role: str, names: Iterable[str]) -> None:
        """Forgets all tensors of a role but those named: what was pruned no longer tells models apart."""
        self.settle()
        kept = {f'{role}.{name}' for name in names}
        self._tensors = {
            name: content for name, content in self._tensors.items() if name in kept or not name.startswith(f'{role}.')
        }

    def digest(self) -> bytes:
        """The 32 bytes; the order in which tensors were added does not matter."""
        self.settle()
        return hashlib.sha256(b''.join(content for _, content in sorted(self._tensors.items()))).digest()


def _hash(name: str, tensor: Tensor) -> bytes:
    tensor = tensor.cpu().contiguous()
    content = hashlib.sha256(f'{name}|{tensor.dtype}|{tuple(tensor.shape)}|'.encode())
    if tensor.numel():
        raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        content.update(raw)
    return content.digest()


def load_into(
    module: nn.Module,
    tensors: TensorReader,
    identity: Identity,
    role: str,
    dtype: torch.dtype,
    rename: Callable[[str], str] | None = None,
) -> None:
    """Fills a module that was built on the meta device with exactly the tensors it has.

    Args:
        module: Pruned module; its parameters and persistent buffers are replaced.
        tensors: Where they are read from. Tensors that the module does not have are not read.
        identity: Gets every tensor, as read.
        role: ``'transformer'`` or ``'vae'``, for the identity and for messages.
        dtype: Floating tensors are cast to it one by one, so that no second copy of the model exists.
        rename: Maps a name in the file to a name in the module, for older formats.

    Raises:
        InputError: If a tensor is missing or has another shape, or the file is quantised.
    """
    in_file = {rename(name) if rename else name: name for name in tensors.names()}
    quantised = next((name for name in sorted(in_file) if SCALES.fullmatch(name)), None)
    if quantised:
        raise is_quantised(tensors.source, f'tensor {quantised!r}')
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(in_file))
    if missing:
        raise InputError(
            f'{role} of {tensors.source.field}={tensors.source.name!r} lacks {len(missing)} of {len(wanted)} tensors, '
            f'the first is {missing[0]!r}'
        )
    loaded = {}
    size = {name: value.numel() * dtype.itemsize for name, value in wanted.items()}
    options = dict(desc=f'loading {role}', unit='B', unit_scale=True, delay=PATIENCE, leave=False)
    with progress_bar(total=sum(size.values()), **options) as bar:
        for name in sorted(wanted):
            value = tensors.get(in_file[name])
            # 1x1 convolutions of older VAE files stand where newer models have linear layers.
            if value.shape != wanted[name].shape and value.squeeze().shape == wanted[name].squeeze().shape:
                value = value.reshape(wanted[name].shape)
            if value.shape != wanted[name].shape:
                raise InputError(
                    f'{role} of {tensors.source.field}={tensors.source.name!r}: tensor {name!r} is '
                    f'{tuple(value.shape)}, expected {tuple(wanted[name].shape)}'
                )
            if wanted[name].is_floating_point() and not value.is_floating_point():
                raise is_quantised(tensors.source, f'tensor {name!r} of {value.dtype}')
            hashed = identity.add(f'{role}.{name}', value)
            loaded[name] = value.to(dtype) if value.is_floating_point() else value
            if loaded[name] is not value:
                # What was cast goes before the next one comes: no second copy of the model exists.
                hashed.result()
            bar.update(size[name])
    module.load_state_dict(loaded, strict=True, assign=True)


def is_quantised(source: Source, found: str) -> InputError:
    """Makes the error for weights that are quantised, from what gave them away."""
    return InputError(
        f'{source.field}={source.name!r} is quantised ({found}): its numbers are no weights; give the unquantised model'
    )


class EmptyParameters(TorchFunctionMode):
    """Modules that are built in it have no weights yet, but buffers: the constructor computes what no file holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Puts what is not filled on the meta device; layers make their weights this way."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def add_random(module: Any, identity: Identity, role: str, seed: int, dtype: torch.dtype) -> Any:
    """Fills a module that was built without weights with random ones (see :func:`initialise`).

    Returns:
        The module, off the meta device.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device='cpu'), requires_grad=False))
    with working(f'drawing random weights of {role}'):
        initialise(module, seed)
    for name, parameter in sorted(module.named_parameters()):
        identity.add(f'{role}.{name}', parameter)
        parameter.data = parameter.data.to(dtype)
    return module


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fills a module with random weights that depend on the seed and the parameter's own name alone.

    Zero-initialised gates would make every block an identity, and a random model is used to stand in for a trained
    one, so each matrix gets variance 1 / fan_in and each vector a standard deviation of 0.02 (norm weights: 1).

    Args:
        module: Module whose parameters are overwritten in place.
        seed: Any integer. Pruning the module does not change what the remaining parameters get.
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(random_weight(name, tuple(parameter.shape), seed))


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The parameter that :func:`initialise` gives this name."""
    noise = seeded_noise(shape, seed, *name.encode())
    if len(shape) > 1:
        return noise / math.prod(shape[1:]) ** 0.5
    return 0.02 * noise + (1.0 if 'norm' in name and name.endswith('weight') else 0.0)


def check_class(config: dict[str, Any], allowed: Iterable[str], source: Source, family: str) -> None:
    """Rejects a folder that holds a model of another family, or a quantised one.

    Raises:
        InputError: If ``_class_name`` is not one of ``allowed``, or there is a ``quantization_config``.
    """
    allowed = tuple(allowed)
    if config.get('quantization_config'):
        raise is_quantised(source, 'its config.json has a quantization_config')
    if config.get('_class_name') not in allowed:
        raise InputError(
            f'pretrained={source.name!r} holds a {config.get("_class_name")!r}, which is not of family {family} '
            f'(expected {" or ".join(allowed)})'
        )
