"""The contract of a family of diffusion models: how to call its diffusers network, and where its taps are.

A family is a declaration. Which parameters a set of taps needs, the size of each map and where a pass ends are found by
a dry run of diffusers' own ``forward``, see :mod:`~mmaselect.diffusion.network`.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmaselect.diffusion.acceleration import (
    attention_kernel,
    autocast_dtype,
    check_attention,
    check_compile,
    compile_blocks,
    compiling,
    missing_kernel,
)
from mmaselect.diffusion.conditioning import zero_prompt
from mmaselect.diffusion.network import (
    BATCH,
    Constants,
    Plan,
    Site,
    drop_unused,
    dry_run,
    fold,
    reading,
    to_map,
    within,
)
from mmaselect.diffusion.noise import DDPM, ForwardProcess, RectifiedFlow
from mmaselect.diffusion.taps import AUTO_COMPONENTS, Tap
from mmaselect.errors import InputError
from mmaselect.progress import working

#: A model of diffusers: torch's annotations take each of its attributes for a tensor or a module.
DiffusersModule = Any


def block_sites(attention: str, item: int = 0) -> tuple[dict[str, Site], dict[str, Site]]:
    """Where the components of a transformer's block are, before and after its q/k normalisation.

    Args:
        attention: The block's attention, a module of diffusers' ``Attention``.
        item: Which of the block's outputs the image's tokens are.
    """
    sites = {'modulated': Site(f'{attention}.to_q', reads_input=True)}
    sites.update({name: Site(f'{attention}.to_{name[0]}') for name in ('query', 'key', 'value')})
    sites['attention'] = Site(f'{attention}.to_out.0')
    sites['output'] = Site('', item)
    return sites, {name: Site(f'{attention}.norm_{name[0]}', merge=(1, 3)) for name in ('query', 'key')}


def all_maps(read: Callable[..., object], *arguments: Any) -> dict[Tap, Tensor]:
    """What ``read(*arguments, visit)`` hands over tap by tap, at once."""
    maps: dict[Tap, Tensor] = {}
    read(*arguments, maps.__setitem__)
    return maps


class Family(nn.Module, ABC):
    """A frozen diffusion model that stops at the last tap.

    Args:
        transformer: The diffusers model; parameters that ``taps`` do not need are taken out of it.
        taps: What to read.
        process: The forward process the model was trained with.
        normalised: Read query and key after the block's q/k normalisation instead of before it. A model without such
            a normalisation gives the same map either way.
        prompt: What :meth:`prompt_widths` names, each (1, ..., width); for families that have one.

    Attributes:
        architectures: Known architectures by name, as keyword arguments of the diffusers class.
        class_names: Values of ``_class_name`` in a ``config.json`` that belong to this family; the first is the class
            that runs.
        process_class: The forward process.
        betas: DDPM's, as a ``scheduler_config.json`` has them, where the folder has none.
        sites: Where each component is, as a path inside a block.
        auto_components: Candidates of ``component='auto'``; none for all.
        tap_sets: Published sets of taps by name.
        own_fields: Fields of a config that diffusers' class does not have.
        latent_name: What diffusers' ``forward`` calls the noisy latent.
        folder: Where a pipeline's folder has the network.
        least_diffusers: The oldest diffusers that it was run with, where that is not what the package asks for.
        prompt_tokens: Of the constant prompt's embedding.
        dry_tokens: Of the prompt in a dry run. One stands for all, unless a tap's size depends on them.
        files_hold_all: Files of weights have every tensor of the network, also what its constructor computes.
        dry_batch: Images in a dry run: a prime that no other dimension has.
        image_first: The image's tokens come before the prompt's, where a block has both.
        normalised_sites: Those that differ after the q/k normalisation, in models that have one.

    Raises:
        InputError: If the prompt's embedding does not fit the model.
    """

    name: ClassVar[str]
    architectures: ClassVar[dict[str, dict[str, Any]]]
    class_names: ClassVar[tuple[str, ...]]
    process_class: ClassVar[type[RectifiedFlow] | type[DDPM]] = RectifiedFlow
    betas: ClassVar[dict[str, Any]] = {}
    sites: ClassVar[dict[str, Site]]
    auto_components: ClassVar[tuple[str, ...]] = AUTO_COMPONENTS
    tap_sets: ClassVar[dict[str, tuple[str, ...]]] = {}
    own_fields: ClassVar[tuple[str, ...]] = ()
    latent_name: ClassVar[str] = 'hidden_states'
    folder: ClassVar[str] = 'transformer'
    least_diffusers: ClassVar[str] = '0'
    prompt_tokens: ClassVar[int] = 0
    dry_tokens: ClassVar[int] = 1
    files_hold_all: ClassVar[bool] = False
    dry_batch: ClassVar[int] = BATCH
    image_first: ClassVar[bool] = False
    normalised_sites: ClassVar[dict[str, Site]] = {}

    def __init__(
        self,
        transformer: DiffusersModule,
        taps: Sequence[Tap],
        process: ForwardProcess,
        normalised: bool = False,
        prompt: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.transformer: DiffusersModule = transformer
        self.process = process
        self.normalised = normalised
        widths = self.prompt_widths(transformer.config)
        for name, width in widths.items():
            if prompt is None:
                raise InputError(f'prompt=None: {self.name} needs the embedding of its constant prompt')
            if prompt[name].shape[-1] != width:
                raise InputError(f'{name} is {prompt[name].shape[-1]} wide; this model expects {width}')
            self.register_buffer(name, prompt[name], persistent=False)
        self._constants = Constants()
        #: Reads parameters of the network again, of these names and shapes; without it none is ever dropped.
        self.read_again: Callable[[dict[str, torch.Size]], Iterable[tuple[str, Tensor]]] | None = None
        self._settled: tuple[float, ...] = ()
        # Shapes of the parameters that stand empty while their constants are known.
        self._dropped: dict[str, torch.Size] = {}
        self._attention = 'auto'
        self._compile: str | None = None
        self._set_taps(taps)

    # --- what a family declares ------------------------------------------------------------------------------------

    @classmethod
    def model_class(cls) -> type[DiffusersModule]:
        """The diffusers class, imported when asked for.

        Raises:
            InputError: If the diffusers that is installed is too old for it.
        """
        import diffusers

        if not cls.is_available():
            raise InputError(
                f'type={cls.name!r} needs diffusers >= {cls.least_diffusers}, found {diffusers.__version__}'
            )
        return getattr(diffusers, cls.class_names[0])

    @classmethod
    def is_available(cls) -> bool:
        """Whether the diffusers that is installed can run it."""
        import diffusers

        installed, least = (re.findall(r'\d+', text)[:2] for text in (diffusers.__version__, cls.least_diffusers))
        return list(map(int, installed)) >= list(map(int, least))

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float, config: Any = None) -> ForwardProcess:
        """Makes the forward process.

        Args:
            scheduler: A ``scheduler_config.json``, for DDPM's betas; empty if there is none. Its sampling shift is
                not applied.
            shift: Resolution shift of a rectified flow; DDPM has none.
            config: Of the network.

        Raises:
            InputError: If there is a shift where there is none.
        """
        if cls.process_class is RectifiedFlow:
            return RectifiedFlow(shift)
        if shift != 1:
            raise InputError(f'shift={shift!r} is not valid for {cls.name}: only rectified flow has a resolution shift')
        return DDPM.from_scheduler_config(scheduler or cls.betas)

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Channels of each tensor of the constant prompt's embedding; empty for a family without prompts."""
        return {}

    @classmethod
    @abstractmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """What ``forward`` reads beside latent and time.

        Args:
            config: Of the network.
            latent: (B, C, H, W); its batch and device count.
            prompt: The constant prompt's embedding, each tensor with a batch of 1.
        """

    def time(self, timestep: float) -> float:
        """What the network is told for a user's timestep in [0, 1000]."""
        return self.process.network_timestep(timestep)

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """Paths of the blocks that taps count."""
        return [f'transformer_blocks.{number}' for number in range(config['num_layers'])]

    @classmethod
    def multiple(cls, config: Any) -> int:
        """Height and width of a latent must be multiples of it."""
        return config['patch_size']

    @classmethod
    def latent_channels(cls, config: Any) -> int:
        """Channels of the latent."""
        return config['in_channels']

    @classmethod
    def latent_scale(cls, config: Any) -> tuple[float, float] | None:
        """``scaling_factor`` and ``shift_factor`` of its VAE, which an original file does not say; None if unknown."""
        return None

    @classmethod
    def side(cls, config: Any) -> int:
        """Side of the latents that the model was trained on."""
        return config['sample_size']

    @classmethod
    def pack(cls, latent: Tensor) -> Tensor:
        """Brings a latent (B, C, H, W) into the form that ``forward`` reads."""
        return latent

    @classmethod
    def arguments(cls, config: Any, latent: Tensor, time: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """All that ``forward`` reads.

        Args:
            config: Of the network.
            latent: Noisy latent, (B, C, H, W).
            time: What :meth:`time` gives, (B,), float32.
            prompt: See :meth:`condition`.
        """
        return {cls.latent_name: cls.pack(latent), 'timestep': time, **cls.condition(config, latent, prompt)}

    # --- what follows from it ----------------------------------------------------------------------------------------

    @classmethod
    def known_fields(cls) -> list[str]:
        """Names of the arguments of the diffusers class, and our own."""
        names = inspect.signature(cls.model_class().__init__).parameters
        return [*(name for name in names if name != 'self'), *cls.own_fields]

    @classmethod
    def complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Adds the defaults of the diffusers class to a ``config.json``."""
        parameters = inspect.signature(cls.model_class().__init__).parameters
        defaults = {name: value.default for name, value in parameters.items() if value.default is not value.empty}
        return {**defaults, **config}

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the diffusers model of a ``config.json``."""
        known = inspect.signature(cls.model_class().__init__).parameters
        return cls.model_class()(**{key: value for key, value in config.items() if key in known})

    @classmethod
    def plan(cls, config: Any, taps: Sequence[Tap], normalised: bool = False) -> Plan:
        """What a pass up to the last of some taps is made of; nothing is loaded or computed for it.

        Args:
            config: Arguments of the diffusers class.
            taps: What is to be read.
            normalised: See :class:`Family`.
        """
        return _plan(cls, cls._key(config), tuple(taps), normalised)

    @classmethod
    def catalogue(cls, network: DiffusersModule) -> dict[Tap, Site]:
        """Where each tap of a network is, in the order of the pass."""
        return {
            Tap(number, name): site._replace(module=f'{block}.{site.module}' if site.module else block)
            for number, block in enumerate(cls.blocks(network.config))
            for name, site in cls.sites.items()
        }

    @classmethod
    def known_taps(cls, config: Any) -> list[Tap]:
        """All taps of a model."""
        return list(cls.catalogue(cls._network(config)))

    @classmethod
    def tap_names(cls, config: Any) -> dict[str, Tap]:
        """All taps of a model by what ``taps`` calls them in a config."""
        return {f'{tap.block}-{tap.component}': tap for tap in cls.known_taps(config)}

    @classmethod
    def tap(cls, config: Any, name: str) -> Tap:
        """A tap by what ``taps`` calls it.

        Args:
            config: Arguments of the diffusers class.
            name: A short name, see :meth:`tap_names`, or the path of any module of the network that gives a map, such
                as ``'transformer_blocks.3.ff'``. It counts to the block that it is nearest to.

        Raises:
            InputError: If there is neither.
        """
        names, modules = _taps_by_name(cls, cls._key(config))
        if name in names:
            return names[name]
        if name in modules:
            return modules[name]
        if not isinstance(name, str) or name not in dict(cls._network(config).named_modules()) or not name:
            raise InputError(
                f'taps={name!r} is not known: give the path of a module of {cls.class_names[0]}, or one of '
                f'{", ".join(names)}'
            )

        def shared(module: str) -> int:
            pairs = zip(name.split('.'), module.split('.'))
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

        return Tap(modules[max(modules, key=shared)].block, name)

    @classmethod
    def _network(cls, config: Any) -> DiffusersModule:
        """The network on the meta device, built once."""
        return _network(cls, cls._key(config))

    @classmethod
    def _key(cls, config: Any) -> str:
        """What diffusers' constructor reads of a config, as a text that can be remembered by."""
        known = inspect.signature(cls.model_class().__init__).parameters
        return json.dumps({key: value for key, value in dict(config).items() if key in known}, sort_keys=True)

    @classmethod
    def find(cls, transformer: DiffusersModule, taps: Sequence[Tap], normalised: bool) -> dict[Tap, Site]:
        """Where each tap is in a network."""
        catalogue = cls.catalogue(transformer)
        found = {tap: catalogue.get(tap, Site(tap.component)) for tap in taps}
        for tap in taps:
            site = cls.normalised_sites.get(tap.component) if normalised else None
            if site is not None:
                path = f'{cls.blocks(transformer.config)[tap.block]}.{site.module}'
                # A model without this norm has None there.
                with suppress(AttributeError):
                    transformer.get_submodule(path)
                    found[tap] = site._replace(module=path)
        return found

    def accelerate(self, attention: str = 'auto', compile: bool | str = False) -> None:
        """Chooses how blocks are run; see :mod:`~mmaselect.diffusion.acceleration`.

        Args:
            attention: Kernel: ``'auto'``, ``'flash'``, ``'efficient'``, ``'cudnn'`` or ``'math'``.
            compile: Mode of ``torch.compile``: False, True or ``'max-autotune'``.

        Raises:
            InputError: If there is no such kernel or mode.
        """
        self._attention, mode = check_attention(attention), check_compile(compile)
        if mode != self._compile:
            self._compile = mode
            self._set_taps(self.taps)

    def _set_taps(self, taps: Sequence[Tap]) -> None:
        self._restore()
        self._constants.clear()
        self.taps = tuple(taps)
        self.last_block = max(tap.block for tap in taps)
        plan = self.plan(self.transformer.config, self.taps, self.normalised)
        self._sites = self.find(self.transformer, self.taps, self.normalised)
        #: Channels of each tap, and its stride in latent pixels.
        self.shapes = plan.shapes
        drop_unused(self.transformer, plan.parameters)
        read = {tap.block for tap in taps}
        blocks = self.blocks(self.transformer.config) if self._compile else []
        if self._compile and not blocks:
            raise InputError(f'compile={self._compile!r} is not for {self.name}: leave it out')
        compiled = [name for number, name in enumerate(blocks[: self.last_block]) if number not in read]
        self._folded = fold(self.transformer, plan, self._constants, compiled)
        self._droppable = [name for name in plan.folded if within(name, self._folded)]
        compile_blocks([self.transformer.get_submodule(name) for name in compiled], self._compile)
        self._to_compile = bool(compiled)

    def narrow(self, taps: Sequence[Tap]) -> None:
        """Reads fewer taps from now on, and drops in place what they do not need.

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
        self._set_taps(taps)

    def settle_on(self, timesteps: Sequence[float]) -> None:
        """Says at which timesteps images will be read.

        Weights that only constants need are dropped once these are known for all of the timesteps. Another device or
        dtype reads them again, and so does another timestep; then they stay, until this is called once more.
        """
        self._settled = tuple(timesteps)

    def _drop(self, timestep: float, autocast: Any) -> None:
        if self._dropped or self.read_again is None or timestep not in self._settled:
            return
        if all(self._constants.has((timestep, autocast), self._folded) for timestep in self._settled):
            for name in self._droppable:
                parameter = self.transformer.get_parameter(name)
                self._dropped[name] = parameter.shape
                # Networks ask their weights for their dtype.
                parameter.data = parameter.data.new_empty(0)

    def _restore(self) -> None:
        if self._dropped and self.read_again is not None:
            for name, value in self.read_again(self._dropped):
                parameter = self.transformer.get_parameter(name)
                parameter.data = value.reshape(self._dropped[name]).to(parameter.device, parameter.dtype)
            self._dropped = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.transformer.parameters()).dtype

    def read(self, latent: Tensor, timestep: float, visit: Callable[[Tap, Tensor], object]) -> None:
        """Reads the taps from a noisy latent, one after the other.

        Args:
            latent: Noisy latent ``z_t``, (B, C, H, W); H and W are multiples of the patch size.
            timestep: In [0, 1000]; the same for the whole batch.
            visit: Called with each tap and its map (B, D, h, w), in the dtype of the model, as soon as the pass is
                there; what it does not keep is freed.

        Raises:
            InputError: If the latent does not fit the model.
        """
        self._check(latent)
        size, device = (latent.shape[2], latent.shape[3]), latent.device
        key = (timestep, autocast_dtype(device))
        self._constants.begin(key, len(latent))
        if timestep not in self._settled:
            # A table of all timesteps would read the weights from the disk time and again.
            self._settled = ()
        if self._dropped and not self._constants.has(key, self._folded):
            self._restore()
        prompt = {name: getattr(self, name) for name in self.prompt_widths(self.transformer.config)}
        try:
            with (
                working('compiling the blocks') if self._to_compile else nullcontext(),
                attention_kernel(self._attention),
                compiling(self._compile),
                reading(
                    self.transformer,
                    self._sites,
                    lambda tap, value: visit(tap, to_map(value, size, self.shapes[tap][1], self.image_first)),
                ),
            ):
                time = torch.full((len(latent),), self.time(timestep), device=device)
                self.transformer(**self.arguments(self.transformer.config, latent, time, prompt), return_dict=False)
            self._to_compile = False
        except RuntimeError as error:
            line = missing_kernel(error, self._attention, device)
            if line is None:
                raise
            raise line from error
        self._drop(*key)

    def forward(self, latent: Tensor, timestep: float) -> dict[Tap, Tensor]:
        """All taps of :meth:`read` at once."""
        return all_maps(self.read, latent, timestep)

    def _apply(self, fn: Any, recurse: bool = True) -> Family:
        # On another device, or in another dtype, constants are others.
        self._constants.clear()
        return super()._apply(fn, recurse)

    def _check(self, latent: Tensor) -> None:
        channels, height, width = latent.shape[1:]
        patch = self.multiple(self.transformer.config)
        expected = self.latent_channels(self.transformer.config)
        if channels != expected:
            raise InputError(f'latent has {channels} channels; {self.name} expects {expected}')
        if height < patch or width < patch:
            raise InputError(f'latent of {height}x{width} is smaller than one cell of {patch}x{patch}')
        limit = getattr(self.transformer.config, 'pos_embed_max_size', None)
        if limit is not None and max(height, width) > limit * patch:
            raise InputError(
                f'latent of {height}x{width} is larger than the {limit * patch}x{limit * patch} of the position table '
                f"of {self.name}: use smaller images, or mode='slide' in segmentation"
            )
        if height % patch or width % patch:
            raise InputError(f'latent of {height}x{width} is not a multiple of {patch}')


@functools.lru_cache(maxsize=8)
def _network(family: type[Family], config: str) -> DiffusersModule:
    with torch.device('meta'):
        # In diffusers 0.31 a table of positions comes from numpy, on the CPU.
        return family.build(json.loads(config)).eval().to('meta')


@functools.lru_cache(maxsize=8)
def _taps_by_name(family: type[Family], config: str) -> tuple[dict[str, Tap], dict[str, Tap]]:
    """Taps by their short names, and by the modules whose outputs they are."""
    catalogue = family.catalogue(_network(family, config))
    modules = {site.module: tap for tap, site in catalogue.items() if not site.reads_input}
    return family.tap_names(json.loads(config)), modules


@functools.lru_cache(maxsize=64)
def _plan(family: type[Family], config: str, taps: tuple[Tap, ...], normalised: bool) -> Plan:
    network = _network(family, config)
    with torch.device('meta'):
        side = family.side(network.config)
        latent = torch.empty(family.dry_batch, family.latent_channels(network.config), side, side)
        prompt = zero_prompt(family.prompt_widths(network.config), family.dry_tokens)
        time = torch.empty(family.dry_batch)

    def call(noisy: Tensor) -> None:
        with torch.device('meta'):
            network(**family.arguments(network.config, noisy, time, prompt), return_dict=False)

    return dry_run(network, family.find(network, taps, normalised), latent, call)
