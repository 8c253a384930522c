"""One file in a model's original layout, converted by diffusers' own functions on tensors that are not read yet."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmaselect.diffusion.family import Family
from mmaselect.diffusion.hub import Source
from mmaselect.diffusion.loading import SCALES, Tensors, bare, is_quantised
from mmaselect.diffusion.network import leaves_of
from mmaselect.errors import InputError, check_choice, check_fields, one_line

#: What whole checkpoints put before the names of the network.
NETWORK = 'model.diffusion_model.'
#: Tensors that a converted tensor is made of are kept until the next few: query, key and value are parts of one.
KEPT = 4


class Lazy(Tensor):
    """A tensor on the meta device that remembers how it is made: operations on it run when the value is asked for."""

    make: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: Iterable[int], make: Callable[[], Tensor]) -> Lazy:
        """Wraps what makes a tensor of a shape."""
        lazy: Any = torch.empty(tuple(shape), device='meta').as_subclass(cls)
        lazy.make = make
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on shapes, and gives each result the same operation on values."""
        out = super().__torch_function__(func, types, args, kwargs or {})

        def make(index: int) -> Tensor:
            real = tree_map_only(Lazy, lambda lazy: lazy.make(), (args, kwargs or {}))
            return leaves_of(func(*real[0], **real[1]))[index]

        for index, leaf in enumerate(leaves_of(out)):
            if isinstance(leaf, Lazy):
                leaf.make = functools.partial(make, index)
        return out


def names_of(tensors: Tensors, prefix: str) -> dict[str, str]:
    """Names of a file's tensors without wrappers and a prefix, and as they are there.

    Raises:
        InputError: If the file is quantised.
    """
    names = {bare(name): name for name in tensors.names()}
    if any(name.startswith(prefix) for name in names):
        # Of a whole checkpoint: text encoders and VAE are not the network's.
        names = {name.removeprefix(prefix): there for name, there in names.items() if name.startswith(prefix)}
    quantised = next((name for name in sorted(names) if SCALES.fullmatch(name)), None)
    if quantised:
        raise is_quantised(tensors.source, f'tensor {quantised!r}')
    return names


class Converted:
    """The tensors of a single file under diffusers' names.

    Args:
        tensors: Of the file.
        kind: Name of the diffusers class.
        config: Its complete config.
        expected: Names of the class's tensors: a file that has them all is in diffusers' layout already. None if it is
            not.
        prefix: What the conversion expects before the names.

    Raises:
        InputError: If diffusers cannot convert it.
    """

    def __init__(
        self,
        tensors: Tensors,
        kind: str,
        config: dict[str, Any],
        expected: Iterable[str] | None = None,
        prefix: str = NETWORK,
    ) -> None:
        self.source = tensors.source
        self._read = functools.lru_cache(KEPT)(tensors.get)
        shapes = tensors.shapes()
        lazy = {
            name: Lazy.of(shapes[there], functools.partial(self._read, there))
            for name, there in names_of(tensors, prefix).items()
        }
        there = expected is not None and set(expected) <= set(lazy)
        self._lazy = lazy if there else self._convert(lazy, kind, config, prefix)

    def _convert(self, lazy: dict[str, Lazy], kind: str, config: dict[str, Any], prefix: str) -> dict[str, Lazy]:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        if kind not in SINGLE_FILE_LOADABLE_CLASSES:
            raise InputError(
                f'{self.source.field}={self.source.name!r}: diffusers does not convert original files of a '
                f'{kind}: give a diffusers folder'
            )
        entry: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]
        try:
            return entry['checkpoint_mapping_fn'](
                checkpoint={prefix + name: value for name, value in lazy.items()}, config=config
            )
        except Exception as error:  # it takes the names for granted
            raise InputError(
                f'{self.source.field}={self.source.name!r} is no original file of a {kind}: {one_line(error)} is not '
                'there as expected'
            ) from error

    def names(self) -> set[str]:
        """Names of all tensors, without reading one."""
        return set(self._lazy)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, without reading one."""
        return {name: tuple(value.shape) for name, value in self._lazy.items()}

    def get(self, name: str) -> Tensor:
        """Makes one tensor from those of the file, in their dtype."""
        value = self._lazy[name].make()
        # A part of a larger tensor would keep all of it.
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def open_single(source: Source) -> Tensors:
    """Opens the one file of a model."""
    assert source.single is not None
    return Tensors(source, {None: source.single})


def convert_network(source: Source, family: type[Family], config: dict[str, Any]) -> Converted:
    """Converts the network of a single file.

    Args:
        source: The file.
        family: Its family.
        config: Its complete config.
    """
    expected = family._network(config).state_dict()
    return Converted(open_single(source), family.class_names[0], config, expected)


def infer_network(
    source: Source, families: Iterable[type[Family]], arch: str | dict[str, Any] | None
) -> tuple[type[Family], dict[str, Any]]:
    """Finds the architecture of a single file by the names and shapes of its tensors.

    Args:
        source: The file.
        families: What it may be.
        arch: A name or a dict of arguments of the diffusers class, where it is known; a dict needs one family.

    Returns:
        The family and the complete config of the architecture.

    Raises:
        InputError: If it is none of the known ones.
    """
    families = list(families)
    if isinstance(arch, dict) and len(families) > 1:
        raise InputError("arch is a dict of arguments: name the family it is of in place of type='auto'")
    tensors = open_single(source)
    if {'blocks.0.attn.qkv.weight', 'x_embedder.proj.weight'} <= set(names_of(tensors, NETWORK)):
        raise InputError(
            f'{source.field}={source.name!r} is an original DiT or SiT: convert it with '
            '`python tools/model_converters/dit_to_diffusers.py`'
        )
    refused: InputError | None = None
    converts = False
    for family in filter(lambda one: one.is_available(), families):
        known = {name: config for name, config in family.architectures.items() if arch in (None, name)}
        if isinstance(arch, dict):
            known = {'arch': check_fields(arch, 'arch', family.known_fields(), '')}
        for one in known.values():
            config = family.complete(one)
            try:
                # To build a network takes longer than to see that the file is another family's.
                if len(families) > 1 and not Converted(tensors, family.class_names[0], config).shapes():
                    continue
                expected = {name: tuple(value.shape) for name, value in family._network(config).state_dict().items()}
                found = Converted(tensors, family.class_names[0], config, expected).shapes()
            except InputError as error:
                refused = error
                continue
            converts = True
            wrong = next((n for n in sorted({*expected, *found}) if found.get(n) != expected.get(n)), None)
            if wrong is None:
                return family, config
            if arch is not None:
                raise InputError(
                    f'{source.field}={source.name!r} is not of arch={arch!r}: tensor {wrong!r} is {found.get(wrong)}, '
                    f'expected {expected.get(wrong)}'
                )
    if refused is not None and not converts and len(families) == 1:
        raise refused
    names = [name for family in families for name in family.architectures]
    if isinstance(arch, str):
        check_choice(arch, 'arch', names)
    raise InputError(
        f'{source.field}={source.name!r} is none of the architectures {", ".join(names)}: give another type, or arch '
        'as a dict of arguments of the diffusers class'
    )


def has_vae(source: Source) -> bool:
    """Whether a single file holds a VAE beside the network."""
    return any(name.endswith('encoder.conv_in.weight') for name in open_single(source).names())


def convert_vae(source: Source) -> tuple[dict[str, Any], Converted]:
    """Reads the config of an original VAE off its shapes, and converts its tensors.

    Args:
        source: A file of a VAE, or of a whole model.

    Returns:
        The config, but for the scale of the latents, and the tensors, of an ``AutoencoderKL``.

    Raises:
        InputError: If there is no such VAE.
    """
    tensors = open_single(source)
    shapes = tensors.shapes()
    prefix = next((one for one in ('first_stage_model.', 'vae.') if any(n.startswith(one) for n in shapes)), '')
    own = {bare(name).removeprefix(prefix): shape for name, shape in shapes.items() if bare(name).startswith(prefix)}
    levels = {}
    for name, shape in own.items():
        # In diffusers' layout or in the original one.
        block = re.fullmatch(r'encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.(\d+)\.conv2\.weight', name)
        if block:
            levels[int(block[1]), int(block[2])] = shape[0]
    moments = own.get('encoder.conv_out.weight')
    if not levels or moments is None:
        raise InputError(f'{source.field}={source.name!r} holds no VAE of Stable Diffusion or FLUX')
    widths = [levels[level, 0] for level in range(1 + max(level for level, _ in levels))]
    config = {
        '_class_name': 'AutoencoderKL',
        'block_out_channels': widths,
        'layers_per_block': 1 + max(layer for _, layer in levels),
        'latent_channels': moments[0] // 2,
        'down_block_types': ['DownEncoderBlock2D'] * len(widths),
        'up_block_types': ['UpDecoderBlock2D'] * len(widths),
        'use_quant_conv': 'quant_conv.weight' in own,
        'use_post_quant_conv': 'post_quant_conv.weight' in own,
    }
    return config, Converted(tensors, 'AutoencoderKL', config, ['encoder.down_blocks.0.resnets.0.conv1.weight'], prefix)
