"""The contract of a family of diffusion transformers: embed, then block by block up to the last tap.

A family wraps one diffusers architecture. It says how a noisy latent becomes tokens (``embed``), how one block turns
tokens into tokens (``run_block``), which maps can be read on the way, and which parts a given set of taps never needs.
The loop over the blocks, the early exit and the shape of the maps are the same for all and live here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mmaselect.diffusion.acceleration import (
    attention_kernel,
    check_attention,
    check_compile,
    compile_block,
    missing_kernel,
)
from mmaselect.diffusion.noise import ForwardProcess
from mmaselect.errors import InputError, check_choice

#: What can be read from a block, in the order in which a block computes it. Checkpoints hold positions in this list:
#: append to it, never reorder it.
COMPONENTS = ('modulated', 'query', 'key', 'value', 'attention', 'output')
#: A model of diffusers or a part of one: torch's annotations take each of its attributes for a tensor or a module.
DiffusersModule: TypeAlias = Any
PROJECTIONS = ('query', 'key', 'value')
#: Candidates of ``component='auto'``: those that the paper compares.
AUTO_COMPONENTS = ('query', 'key', 'value', 'attention', 'output')


class Tap(NamedTuple):
    """A place to read features from.

    Attributes:
        block: Index of the block, counted from 0.
        component: One of ``COMPONENTS``: ``modulated`` (the block input after its AdaLN, what the attention reads),
            ``query``, ``key``, ``value`` (heads concatenated), ``attention`` (image tokens of the attention's output
            projection, before its gate and the residual), ``output`` (image tokens that leave the block).
    """

    block: int
    component: str


def make_taps(block: int | Sequence[int], component: str | Sequence[str], num_blocks: int) -> tuple[Tap, ...]:
    """Builds the taps of a config: every component of every block, in the order given.

    Args:
        block: One block index or several, each in [0, num_blocks).
        component: One component or several.
        num_blocks: Number of blocks of the model.

    Returns:
        ``len(blocks) * len(components)`` taps, block-major.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    blocks: list[Any] = list(block) if isinstance(block, (list, tuple)) else [block]
    components: list[Any] = list(component) if isinstance(component, (list, tuple)) else [component]
    if not blocks or not components:
        raise InputError(f'block={block!r}, component={component!r}: give at least one of each')
    for index in blocks:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_blocks:
            raise InputError(
                f'block={index!r} is out of range: the model has {num_blocks} blocks, 0 to {num_blocks - 1}'
            )
    for name in components:
        check_choice(name, 'component', COMPONENTS)
    return tuple(Tap(index, name) for index in blocks for name in components)


def make_alternatives(
    block: int | Sequence[int] | str, component: str | Sequence[str], num_blocks: int
) -> list[tuple[Tap, ...]]:
    """Builds what a selection may choose from.

    Args:
        block: As of :func:`make_taps`, or ``'auto'``: one of all blocks is to be chosen.
        component: Likewise; ``'auto'`` for one of ``AUTO_COMPONENTS``.
        num_blocks: Number of blocks of the model.

    Returns:
        Sets of taps, block-major; a single one where nothing is left open.

    Raises:
        InputError: If a block is out of range or a component unknown.
    """
    if isinstance(block, str) and block != 'auto':
        raise InputError(f"block={block!r} is not valid: give a number from 0 to {num_blocks - 1}, or 'auto'")
    blocks: list[Any] = list(range(num_blocks)) if block == 'auto' else [block]
    components: list[Any] = list(AUTO_COMPONENTS) if component == 'auto' else [component]
    return [make_taps(one, name, num_blocks) for one in blocks for name in components]


def all_taps(alternatives: Iterable[Sequence[Tap]]) -> list[Tap]:
    """Every tap of several sets, once, in the order of their first occurrence."""
    return list(dict.fromkeys(tap for taps in alternatives for tap in taps))


#: Timesteps whose constants are kept. A sweep over more computes them once per pass, at batch 1, which costs little.
KEPT_TIMESTEPS = 8


class Constants(NamedTuple):
    """What a pass needs that is the same for all images; batch 1.

    Attributes:
        blocks: What each block reads beside tokens and context.
        context: What the first block's context is made of; None for families without one.
    """

    blocks: list[Any]
    context: Any = None


class Family(nn.Module, ABC):
    """A frozen diffusion transformer that stops at the last tap.

    Args:
        transformer: The diffusers model, pruned by :meth:`prune` to what ``taps`` need.
        taps: What to read. Several taps of one block share its computation.
        process: The forward process the model was trained with.
        normalised: Read query and key after the block's q/k normalisation instead of before it. A model without such
            a normalisation gives the same map either way.

    Attributes:
        architectures: Known architectures by name, as keyword arguments of the diffusers class.
        class_names: Values of ``_class_name`` in a ``config.json`` that belong to this family.
        uses_prompt: Whether the constructor takes ``prompt``, the embedding of a constant prompt.
    """

    name: ClassVar[str]
    architectures: ClassVar[dict[str, dict[str, Any]]]
    class_names: ClassVar[tuple[str, ...]]
    uses_prompt: ClassVar[bool] = False

    def __init__(
        self, transformer: DiffusersModule, taps: Sequence[Tap], process: ForwardProcess, normalised: bool = False
    ) -> None:
        super().__init__()
        self.transformer: DiffusersModule = transformer
        self.process = process
        self.normalised = normalised
        self.accelerate()
        self._set_taps(taps)

    def accelerate(self, attention: str = 'auto', compile: bool | str = False) -> None:
        """Chooses how blocks are run; see :mod:`~mmaselect.diffusion.acceleration`.

        Args:
            attention: Kernel: ``'auto'``, ``'flash'``, ``'efficient'``, ``'cudnn'`` or ``'math'``.
            compile: Mode of ``torch.compile``: False, True or ``'max-autotune'``.

        Raises:
            InputError: If there is no such kernel or mode.
        """
        self.attention = check_attention(attention)
        self._kernel = attention_kernel(attention)
        self._run = compile_block(self.run_block, check_compile(compile))

    def _set_taps(self, taps: Sequence[Tap]) -> None:
        self._constants: dict[tuple, Constants] = {}
        self.taps = tuple(taps)
        self.last_block = max(tap.block for tap in taps)
        self.wanted = {
            index: tuple(dict.fromkeys(tap.component for tap in taps if tap.block == index))
            for index in range(self.last_block + 1)
        }

    # --- what a family says before any weight exists ---------------------------------------------------------------

    @classmethod
    @abstractmethod
    def model_class(cls) -> type[DiffusersModule]:
        """The diffusers class, imported when asked for."""

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Adds the defaults of the diffusers class to a ``config.json``."""
        parameters = inspect.signature(cls.model_class().__init__).parameters
        defaults = {name: value.default for name, value in parameters.items() if value.default is not value.empty}
        return {**defaults, **config}

    @classmethod
    def known_fields(cls) -> list[str]:
        """Names of the arguments of the diffusers class."""
        return [name for name in inspect.signature(cls.model_class().__init__).parameters if name != 'self']

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the diffusers model of a ``config.json`` (call it under ``torch.device('meta')``)."""
        known = inspect.signature(cls.model_class().__init__).parameters
        return cls.model_class()(**{key: value for key, value in config.items() if key in known})

    @classmethod
    @abstractmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float) -> ForwardProcess:
        """Makes the forward process from a ``scheduler_config.json`` (empty if the folder has none)."""

    @classmethod
    def channels(cls, config: dict[str, Any]) -> int:
        """Channels of every tap: all of them are as wide as the model."""
        return config['num_attention_heads'] * config['attention_head_dim']

    @classmethod
    @abstractmethod
    def unused(cls, block: DiffusersModule, components: frozenset[str], normalised: bool) -> Iterable[str]:
        """Names the submodules of the last block that the taps on it never reach."""

    @classmethod
    @abstractmethod
    def final_layers(cls) -> Iterable[str]:
        """Names the submodules of the transformer behind its last block."""

    @classmethod
    def restore_buffers(cls, transformer: DiffusersModule) -> None:
        """Computes the buffers that no checkpoint holds, after the model was built on the meta device."""

    @classmethod
    def make_buffers(cls, transformer: DiffusersModule) -> None:
        """Computes the buffers that a checkpoint would hold, for a model with random weights."""

    @classmethod
    def prune(cls, transformer: DiffusersModule, taps: Sequence[Tap], normalised: bool = False) -> None:
        """Removes in place all that lies behind the last tap, so that it is neither loaded nor run."""
        last = max(tap.block for tap in taps)
        transformer.transformer_blocks = transformer.transformer_blocks[: last + 1]
        components = frozenset(tap.component for tap in taps if tap.block == last)
        block = transformer.transformer_blocks[last]
        for root, names in ((transformer, cls.final_layers()), (block, cls.unused(block, components, normalised))):
            for path in names:
                parent, _, child = path.rpartition('.')
                setattr(root.get_submodule(parent), child, None)

    def narrow(self, taps: Sequence[Tap]) -> None:
        """Reads fewer taps from now on, and drops in place all that lies behind the last of them.

        Args:
            taps: Some of :attr:`taps`.

        Raises:
            InputError: If one of them cannot be read from this model.
        """
        for tap in taps:
            if tap not in self.taps:
                raise InputError(
                    f'block={tap.block}, component={tap.component!r} was not loaded: this model reads '
                    f'{", ".join(f"{name} of block {block}" for block, name in self.taps[:8])}'
                    f'{", ..." if len(self.taps) > 8 else ""}'
                )
        self.prune(self.transformer, taps, self.normalised)
        self._set_taps(taps)

    # --- the forward pass --------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, timestep: float) -> Constants:
        """Computes what depends on the timestep alone: embeddings, modulation, all that the prompt goes into."""

    @abstractmethod
    def embed(self, latent: Tensor, constants: Constants) -> tuple[Tensor, Any]:
        """Turns a noisy latent into tokens (B, N, D) and whatever else the blocks hand on (``context``)."""

    @abstractmethod
    def run_block(
        self, block: DiffusersModule, constants: Any, tokens: Tensor, context: Any, wanted: tuple[str, ...], last: bool
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Runs one block, or, if it is the last, no more of it than ``wanted`` needs.

        Args:
            block: The diffusers block.
            constants: This block's entry of ``Constants.blocks``.
            tokens: Image tokens, (B, N, D).
            context: What :meth:`embed` or the block before returned.
            wanted: Components to read here; may be empty.
            last: Whether nothing runs after this block.

        Returns:
            Tokens and context for the next block (meaningless if ``last``) and the read components, each (B, N, D).
        """

    def _readable(self, projections: dict[str, Tensor], ready: dict[str, Tensor]) -> dict[str, Tensor]:
        """Picks the maps of ``projections`` as the user asked for them: before or after the q/k normalisation."""
        return {name: merge_heads(value) for name, value in ready.items()} if self.normalised else dict(projections)

    @property
    def patch_size(self) -> int:
        """Side of a token in latent pixels."""
        return self.transformer.config.patch_size

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.transformer.config.in_channels

    def iterate(self, latent: Tensor, timestep: float) -> Iterator[tuple[Tap, Tensor]]:
        """Reads the taps from a noisy latent, one after the other, so that no more than a block's are in memory.

        Args:
            latent: Noisy latent ``z_t``, (B, C, H, W); H and W are multiples of the patch size.
            timestep: In [0, 1000]; the same for the whole batch.

        Yields:
            Each tap, block by block, with its map (B, D, H / patch, W / patch) in the dtype of the model.

        Raises:
            InputError: If the latent does not fit the model.
        """
        rows, columns = self._grid(latent)
        constants = self._constants_of(timestep)
        tokens, context = self.embed(latent, constants)
        for index, block in enumerate(self.transformer.transformer_blocks):
            arguments = (block, constants.blocks[index], tokens, context, self.wanted[index], index == self.last_block)
            tokens, context, read = self._run_as_asked(*arguments)
            for component in list(read):
                yield Tap(index, component), read.pop(component).transpose(1, 2).unflatten(2, (rows, columns))

    def _run_as_asked(self, *arguments: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
        try:
            # Around each block, not around them all: between two of them the caller's own attention may run.
            with self._kernel():
                return self._run(*arguments)
        except RuntimeError as error:
            line = missing_kernel(error, self.attention, arguments[2].device)
            if line is None:
                raise
            raise line from error

    def _constants_of(self, timestep: float) -> Constants:
        device = next(self.parameters()).device.type
        key = (timestep, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        constants = self._constants.pop(key, None)
        if constants is None:
            constants = self.prepare(timestep)
        # The latest stands last, and the first is the one that goes.
        self._constants[key] = constants
        if len(self._constants) > KEPT_TIMESTEPS:
            del self._constants[next(iter(self._constants))]
        return constants

    def _apply(self, fn: Any, recurse: bool = True) -> Family:
        # On another device, or in another dtype, constants are others.
        self._constants.clear()
        return super()._apply(fn, recurse)

    def forward(self, latent: Tensor, timestep: float) -> dict[Tap, Tensor]:
        """All taps of :meth:`iterate` at once."""
        return dict(self.iterate(latent, timestep))

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        channels, height, width = latent.shape[1:]
        patch = self.patch_size
        if channels != self.latent_channels:
            raise InputError(f'latent has {channels} channels; {self.name} expects {self.latent_channels}')
        if height < patch or width < patch:
            raise InputError(f'latent of {height}x{width} is smaller than one patch of {patch}x{patch}')
        limit = getattr(self.transformer.pos_embed, 'pos_embed_max_size', None)
        if limit is not None and max(height, width) > limit * patch:
            raise InputError(
                f'latent of {height}x{width} is larger than the {limit * patch}x{limit * patch} of the position table '
                f"of {self.name}: use smaller images, or mode='slide' in segmentation"
            )
        if height % patch or width % patch:
            raise InputError(f'latent of {height}x{width} is not a multiple of the patch size {patch}')
        return height // patch, width // patch


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) to (B, heads, N, d)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, heads, N, d) to (B, N, heads * d)."""
    return heads.transpose(1, 2).flatten(2)


def project(attention: DiffusersModule, tokens: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Runs the named image projections of a diffusers ``Attention``, and no others.

    Args:
        attention: Module with ``to_q``, ``to_k``, ``to_v``.
        tokens: What the attention reads, (B, N, D).
        names: Which of ``PROJECTIONS`` to run.

    Returns:
        The projections before any q/k normalisation, heads concatenated, (B, N, D).
    """
    layers = {'query': attention.to_q, 'key': attention.to_k, 'value': attention.to_v}
    return {name: layers[name](tokens) for name in PROJECTIONS if name in names}


def normalise(attention: DiffusersModule, projections: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits projections into heads and applies the q/k normalisation, where the model has one.

    Args:
        attention: Module with ``heads`` and optional ``norm_q``, ``norm_k``.
        projections: What :func:`project` returned.

    Returns:
        The projections, ready to attend, (B, heads, N, d).
    """
    norms = {'query': attention.norm_q, 'key': attention.norm_k, 'value': None}
    ready = {}
    for name, value in projections.items():
        split = split_heads(value, attention.heads)
        ready[name] = split if norms[name] is None else norms[name](split)
    return ready


def unused_projections(attention: str, components: frozenset[str], normalised: bool) -> list[str]:
    """Projections and norms that a last block read before its attention does not need."""
    layers = {'query': ('to_q', 'norm_q'), 'key': ('to_k', 'norm_k'), 'value': ('to_v',)}
    needed = {layers[name][0] for name in PROJECTIONS if name in components}
    if normalised:
        needed |= {layers[name][-1] for name in PROJECTIONS if name in components}
    return [f'{attention}.{layer}' for name in PROJECTIONS for layer in layers[name] if layer not in needed]


def sincos_positions(embed: DiffusersModule) -> Tensor:
    """The sine-cosine position table of a diffusers ``PatchEmbed``, (1, cells, D), as its constructor computes it."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    table = get_2d_sincos_pos_embed(
        embed.proj.out_channels,
        embed.pos_embed_max_size or (embed.height, embed.width),
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type='pt',
    )
    return table.float().unsqueeze(0)


def modulate(norm: DiffusersModule, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN of arXiv 2212.09748: normalise, scale and shift per channel by ``shift`` and ``scale``, (1 or B, D)."""
    return scale_and_shift(norm(tokens), shift, scale)


def scale_and_shift(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The second half of :func:`modulate`, for what is normalised once and modulated twice."""
    return normed * (1 + scale[:, None]) + shift[:, None]


def modulation(norm: DiffusersModule, embedding: Tensor) -> tuple[Tensor, ...]:
    """The vectors of an AdaLN layer, one after the other, each (1 or B, D).

    Args:
        norm: One of diffusers' ``AdaLayerNorm...`` layers, with ``silu`` and ``linear``.
        embedding: Timestep and condition, (1 or B, D).
    """
    count = norm.linear.out_features // norm.linear.in_features
    return norm.linear(norm.silu(embedding)).chunk(count, dim=1)


@torch.no_grad()
def initialise(module: DiffusersModule, seed: int) -> None:
    """Fills a module with random weights that depend on the seed and the parameter's own name alone.

    Zero-initialised gates would make every block an identity, and a random model is used to stand in for a trained
    one, so each matrix gets variance 1 / fan_in and each vector a standard deviation of 0.02 (norm weights: 1).

    Args:
        module: Module whose parameters are overwritten in place.
        seed: Any integer. Pruning the module does not change what the remaining parameters get.
    """
    from mmaselect.diffusion.noise import seeded_noise

    for name, parameter in module.named_parameters():
        noise = seeded_noise(tuple(parameter.shape), seed, *name.encode())
        if parameter.dim() > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.02 * noise + (1.0 if 'norm' in name and name.endswith('weight') else 0.0)
        parameter.copy_(value)
