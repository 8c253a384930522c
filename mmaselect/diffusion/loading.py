"""From a diffusers folder or hub id to modules, reading no more than what will run.

The folder is what ``save_pretrained`` of a diffusers pipeline writes: ``transformer/``, ``vae/`` and ``scheduler/``,
each with a ``config.json`` and safetensors, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError, unknown

#: Prefix of the models that come inside the package.
EMBEDDED = 'mmaselect://'
WEIGHTS = 'diffusion_pytorch_model'
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


class Source:
    """A diffusers model folder, on this machine or on the hub.

    Args:
        pretrained: A folder, a hub id (``'stabilityai/stable-diffusion-3.5-medium'``), or the name of a model inside
            this package (``'mmaselect://dit-nano_digits'``).
        field: Name of the config field, for messages.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: If it is neither a folder nor of the form of a hub id.
    """

    def __init__(self, pretrained: str | Path, field: str = 'pretrained', revision: str | None = None) -> None:
        self.name = str(pretrained)
        self.field = field
        self.revision = revision
        folder = Path(self.name).expanduser()
        if self.name.startswith(EMBEDDED):
            folder = Path(__file__).parents[1] / 'assets' / self.name.removeprefix(EMBEDDED)
        self.folder = folder if folder.is_dir() else None
        if self.folder is None and not re.fullmatch(r'[\w.-]+/[\w.-]+', self.name):
            raise InputError(
                f'{field}={self.name!r} is not a folder (a diffusers model folder or a hub id is expected)'
            )

    def find(self, path: str) -> Path | None:
        """Finds a file of the model, downloading it if the model is on the hub.

        Args:
            path: Path inside the model folder, with forward slashes.

        Returns:
            The file, or None if the model has no such file.

        Raises:
            InputError: If the hub cannot be reached or does not know the model.
        """
        if self.folder is not None:
            file = self.folder / path
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, path, revision=self.revision))
        except LocalEntryNotFoundError as error:
            # Without the network a file that the model never had and one that was never fetched look alike. Of a model
            # that is in the cache, the first is meant: a missing weight file is reported by whoever needs it.
            if self._is_cached():
                return None
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's client raises from several libraries below it
            raise self._unreachable(error) from error

    def _is_cached(self) -> bool:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type='model')
        return (folder / 'snapshots').is_dir()

    def _unreachable(self, error: Exception) -> InputError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return InputError(f'{self.field}={self.name!r} is neither a folder here nor to be had from the hub: {reason}')

    def read_json(self, path: str) -> dict[str, Any] | None:
        """Reads a JSON file of the model; None if there is none.

        Raises:
            InputError: If the file does not hold a JSON object.
        """
        file = self.find(path)
        if file is None:
            return None
        try:
            content = json.loads(file.read_text(encoding='utf-8'))
        except (ValueError, RecursionError) as error:
            raise InputError(f'{file} is not valid JSON: {error}') from error
        if not isinstance(content, dict):
            raise InputError(f'{file} holds a {type(content).__name__}; a JSON object is expected')
        return content

    def tensors(self, subfolder: str, variant: str | None = None) -> Tensors:
        """Opens the safetensors of a subfolder.

        Args:
            subfolder: ``'transformer'`` or ``'vae'``; empty for the folder itself.
            variant: As diffusers' argument: ``'fp16'`` reads ``diffusion_pytorch_model.fp16.safetensors``.

        Raises:
            InputError: If there are none.
        """
        middle = f'.{variant}' if variant else ''
        prefix = f'{subfolder}/' if subfolder else ''
        single = f'{prefix}{WEIGHTS}{middle}.safetensors'
        index = self.read_json(f'{prefix}{WEIGHTS}.safetensors.index{middle}.json')
        if index is None:
            if self.find(single) is None:
                raise InputError(f'{self.field}={self.name!r} has no {single} (weights are read from safetensors only)')
            return Tensors(self, {None: single})
        shards = index.get('weight_map')
        if not isinstance(shards, dict) or not shards:
            raise InputError(f'{self.field}={self.name!r}: the index of {subfolder} has no weight_map')
        for shard in set(shards.values()):
            if not isinstance(shard, str) or not re.fullmatch(r'[\w.-]+\.safetensors', shard):
                raise InputError(f'{self.field}={self.name!r}: shard {shard!r} is not the name of a safetensors file')
        return Tensors(self, {key: f'{prefix}{shard}' for key, shard in shards.items()})


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
            from safetensors import safe_open

            file = self.source.find(path)
            if file is None:
                raise InputError(f'{self.source.field}={self.source.name!r} lacks its shard {path}')
            try:
                self._open[path] = safe_open(str(file), framework='pt')
            except Exception as error:
                raise InputError(f'{file} is not a readable safetensors file (truncated?): {error}') from error
        return self._open[path]

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

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor under a name of its own."""
        tensor = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(f'{name}|{tensor.dtype}|{tuple(tensor.shape)}|'.encode())
        if tensor.numel():
            raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            content.update(raw)
        self._tensors[name] = content.digest()

    def keep(self, role: str, names: Iterable[str]) -> None:
        """Forgets all tensors of a role but those named: what was pruned no longer tells models apart."""
        kept = {f'{role}.{name}' for name in names}
        self._tensors = {
            name: content for name, content in self._tensors.items() if name in kept or not name.startswith(f'{role}.')
        }

    def digest(self) -> bytes:
        """The 32 bytes; the order in which tensors were added does not matter."""
        return hashlib.sha256(b''.join(content for _, content in sorted(self._tensors.items()))).digest()


def load_into(
    module: nn.Module,
    tensors: Tensors,
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
        InputError: If a tensor is missing or has another shape.
    """
    in_file = {rename(name) if rename else name: name for name in tensors.names()}
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(in_file))
    if missing:
        raise InputError(
            f'{role} of {tensors.source.field}={tensors.source.name!r} lacks {len(missing)} of {len(wanted)} tensors, '
            f'the first is {missing[0]!r}'
        )
    loaded = {}
    for name in sorted(wanted):
        value = tensors.get(in_file[name])
        # 1x1 convolutions of older VAE files stand where newer models have linear layers.
        if value.shape != wanted[name].shape and value.squeeze().shape == wanted[name].squeeze().shape:
            value = value.reshape(wanted[name].shape)
        if value.shape != wanted[name].shape:
            raise InputError(
                f'{role} of {tensors.source.field}={tensors.source.name!r}: tensor {name!r} is {tuple(value.shape)}, '
                f'expected {tuple(wanted[name].shape)}'
            )
        identity.add(f'{role}.{name}', value)
        loaded[name] = value.to(dtype) if value.is_floating_point() else value
    module.load_state_dict(loaded, strict=True, assign=True)


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
        noise = seeded_noise(tuple(parameter.shape), seed, *name.encode())
        if parameter.dim() > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.02 * noise + (1.0 if 'norm' in name and name.endswith('weight') else 0.0)
        parameter.copy_(value)


def check_class(config: dict[str, Any], allowed: Iterable[str], source: str, family: str) -> None:
    """Rejects a folder that holds a model of another family.

    Raises:
        InputError: If ``_class_name`` is not one of ``allowed``.
    """
    allowed = tuple(allowed)
    if config.get('_class_name') not in allowed:
        raise InputError(
            f'pretrained={source!r} holds a {config.get("_class_name")!r}, which is not of family {family} '
            f'(expected {" or ".join(allowed)})'
        )
