"""What a config says of a frozen diffusion model, and how it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.acceleration import check_attention, check_compile
from mmaselect.diffusion.families import FAMILIES
from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT
from mmaselect.diffusion.families.sit import DATA_TIME, PATH_TYPE
from mmaselect.diffusion.family import Family
from mmaselect.diffusion.latent import (
    VAE_CONFIGS,
    LatentEncoder,
    PixelEncoder,
    check_statistics,
    downsampling,
    find_vae,
    load_vae,
    random_vae,
    read_vae_config,
    standardise,
)
from mmaselect.diffusion.loading import (
    EmptyParameters,
    Identity,
    Source,
    TensorReader,
    Tensors,
    add_random,
    check_class,
    load_into,
    parse_dtype,
    random_weight,
)
from mmaselect.diffusion.network import drop_unused
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.single_file import convert_network, has_vae, infer_network
from mmaselect.diffusion.taps import Tap, make_alternatives
from mmaselect.errors import InputError, check_choice, check_count, check_fields, check_flag, check_number

logger = logging.getLogger('mmaselect')

#: Fields of an architecture that are numbers of something.
SIZES = ('num_layers', 'num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'patch_size',
         'sample_size', 'joint_attention_dim', 'caption_projection_dim', 'pooled_projection_dim',
         'pos_embed_max_size', 'num_embeds_ada_norm')  # fmt: skip


def check_device(device: str | torch.device | None) -> None:
    """Raises :class:`InputError` if there is no such device on this machine."""
    if device is None:
        return
    try:
        if not isinstance(device, (str, torch.device)):
            raise RuntimeError
        # The only test that knows every kind of device.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r} is not on this machine: give 'cpu', 'cuda' or 'cuda:1'") from error


class DiffusionSpec:
    """A ``diffusion=dict(...)`` entry of a config, checked, its ``config.json`` read, its weights not yet.

    Args:
        type: Family: ``'SD3'``, ``'DiT'``, ... or ``'auto'`` for what ``model_index.json`` or ``config.json`` says.
        pretrained: diffusers folder, hub id, ``'mmaselect://NAME'`` or a single file in the original layout, see
            :class:`~mmaselect.diffusion.hub.Source`. None gives random weights, which need ``arch``.
        arch: Architecture for random weights: a name the family knows (``'sd3.5-medium'``) or a dict of arguments of
            the diffusers class. Also of a single file, where its tensors alone do not tell.
        latent: ``'vae'``, ``'pixels'``, or ``'auto'``: the folder's ``vae/``, or what ``vae`` names.
        vae: Folder, hub id or original file of the VAE, where ``pretrained`` has none of its own: diffusers'
            ``AutoencoderKL`` or ``AutoencoderTiny``, or a folder of the TAESD project.
        latents_mean: Mean of each channel of the latent, subtracted; one number per channel. None for what
            ``vae/config.json`` says, or the shift of all channels that it has.
        latents_std: Standard deviation of each channel, divided by; goes with ``latents_mean``.
        prompt: Text-conditional families only: the constant prompt, empty by default, see
            :func:`~mmaselect.diffusion.conditioning.load_prompt`. Class-conditional ones run under their null class.
        shift: Resolution shift of a rectified flow; 1 for none.
        normalised_qk: Read query and key after the q/k normalisation.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``.
        attention: Kernel of the attention: ``'auto'`` (torch decides), ``'flash'``, ``'efficient'``, ``'cudnn'``,
            ``'math'``.
        compile: Compile the blocks: False, True or ``'max-autotune'``. The first images take longer for it.
        device: Where the weights go; None leaves them on the CPU for the runner to move.
        variant: Variant of the weight files, as in diffusers; a part that has none of it is read without.
        revision: Revision of ``pretrained`` on the hub.
        subfolder: Where the model is in ``pretrained``.
        token: For the hub.
        cache_dir: Of the hub's files.
        local_files_only: Never ask the hub, read what its cache has.
        timestep_freq_shift: Of DiT and SiT, 0 or 1: of the embedding of the timestep; None for what
            ``config.json`` says.
        seed: Seed of random weights.

    Raises:
        InputError: If a field is unknown or does not fit the others.
    """

    def __init__(
        self,
        type: str,
        pretrained: str | Path | None = None,
        arch: str | dict[str, Any] | None = None,
        latent: str = 'auto',
        vae: str | Path | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        prompt: str | None = None,
        shift: float = 1.0,
        normalised_qk: bool = False,
        dtype: str | torch.dtype = 'float32',
        attention: str = 'auto',
        compile: bool | str = False,
        device: str | torch.device | None = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        timestep_freq_shift: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice(type, 'diffusion.type', [*FAMILIES, 'auto'])
        check_choice(latent, 'latent', ('auto', 'vae', 'pixels'))
        for field, value in (('pretrained', pretrained), ('vae', vae)):
            if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
                raise InputError(f'{field}={value!r} is not valid: give a folder or a hub id')
        for field, value in (('revision', revision), ('subfolder', subfolder), ('variant', variant)):
            if value is not None and not isinstance(value, str):
                raise InputError(f'{field}={value!r} is not valid: give a text')
        if cache_dir is not None and not isinstance(cache_dir, (str, Path)):
            raise InputError(f'cache_dir={cache_dir!r} is not valid: give a folder')
        if token is not None and not isinstance(token, (str, bool)):
            raise InputError('token is not valid: give a text, or leave it out and set HF_TOKEN')
        check_flag(normalised_qk, 'normalised_qk')
        check_flag(local_files_only, 'local_files_only')
        check_number(shift, 'shift', 0, open_low=True)
        check_count(seed, 'seed', 0)
        check_device(device)
        hub: dict[str, Any] = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        self.source = None if pretrained is None else Source(pretrained, 'pretrained', revision, subfolder, **hub)
        if (pretrained is None) == (arch is None) and not (self.source and self.source.single):
            raise InputError(
                f'pretrained={pretrained!r}, arch={arch!r}: give exactly one of them (both only with a single file)'
            )
        self.prompt, self.shift, self.normalised_qk = prompt, shift, normalised_qk
        self.dtype, self.device, self.variant, self.seed = parse_dtype(dtype), device, variant, seed
        check_compile(compile)
        self.attention, self.compile = check_attention(attention), compile
        #: Where the network is in ``source``.
        self.folder = ''
        self.family, config = self._read_config(type, arch)
        if timestep_freq_shift is not None:
            if FREQUENCY_SHIFT not in self.family.known_fields():
                raise InputError(f'{FREQUENCY_SHIFT}={timestep_freq_shift!r} is not valid for {self.family.name}')
            config[FREQUENCY_SHIFT] = check_choice(timestep_freq_shift, FREQUENCY_SHIFT, (0, 1))
        self.config = self.family.complete(config)
        for name in SIZES:
            value = self.config.get(name)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if one is not None:
                    check_count(one, name)
        self.latent, self.vae = self._resolve_latent(latent, vae, hub)
        self.statistics = check_statistics(latents_mean, latents_std, self.family.latent_channels(self.config))
        if self.statistics is not None and self.latent == 'pixels':
            raise InputError(
                "latents_mean, latents_std: pixels are not standardised; leave them out with latent='pixels'"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> DiffusionSpec:
        """Reads a config entry; a field that does not exist is named, with those that do."""
        import inspect

        known = [name for name in inspect.signature(cls.__init__).parameters if name != 'self']
        check_fields(config, 'diffusion', known, "dict(type='SD3', pretrained='FOLDER OR HUB ID')")
        if 'type' not in config:
            raise InputError(f'diffusion has no type; choose from: {", ".join(FAMILIES)}')
        return cls(**config)

    def _read_config(self, type: str, arch: str | dict[str, Any] | None) -> tuple[type[Family], dict[str, Any]]:
        families: list[Any] = list(FAMILIES.values()) if type == 'auto' else [FAMILIES[type]]
        family = families[0]
        if self.source is None:
            if type == 'auto':
                raise InputError("diffusion.type='auto' needs pretrained: with arch alone, name the family")
            if isinstance(arch, dict):
                return family, dict(check_fields(arch, 'arch', family.known_fields(), ''))
            return family, dict(family.architectures[check_choice(arch, 'arch', family.architectures)])
        if self.source.single:
            family, config = infer_network(self.source, families, arch)
            return (choose_family(family.class_names[0], {}, self.source) if type == 'auto' else family), config
        folders = list(dict.fromkeys(family.folder for family in families))
        found = self.source.locate(folders)
        if found is None:
            raise self.source.lacks(' or '.join(f'{self.source.join(folder)}/config.json' for folder in folders))
        # What is beside the network is in the pipeline's folder, even if the network alone was named.
        self.folder, self.source.subfolder, config = found
        if type == 'auto':
            family = choose_family(config.get('_class_name'), config, self.source)
        check_class(config, family.class_names, self.source, family.name)
        return family, config

    def _resolve_latent(
        self, latent: str, vae: str | Path | None, hub: dict[str, Any]
    ) -> tuple[str, tuple[Source, str] | None]:
        """Settles where latents come from: ``'pixels'``, or ``'vae'`` with its folder (None for a random one)."""
        if latent == 'pixels':
            return latent, None
        folder, there = '', False
        if self.source is not None and self.source.single:
            there = has_vae(self.source)
        elif self.source is not None:
            folder = self.source.join('vae')
            there = self.source.find(f'{folder}/config.json') is not None
        if vae is not None:
            if there:
                logger.warning('vae=%r takes the place of the VAE that the model has: features differ', str(vae))
            return 'vae', find_vae(vae, **hub)
        if self.source is None:
            return 'vae', None
        if not there:
            raise self.source.lacks('vae/', ": name one with vae='...', or set latent='pixels'")
        return 'vae', (self.source, folder)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return 1 + max(tap.block for tap in self.family.known_taps(self.config))

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        if self.latent == 'pixels':
            return 1
        return downsampling(
            read_vae_config(*self.vae) if self.vae else VAE_CONFIGS[self.family.latent_channels(self.config)]
        )

    @property
    def multiple(self) -> int:
        """Height and width of an image must be multiples of it, in pixels."""
        return self.factor * self.family.multiple(self.config)

    def alternatives(self, block: Any, component: Any, taps: Any = None) -> list[tuple[Tap, ...]]:
        """What a selection may choose from; a single set of taps where nothing is left open.

        Args:
            block: Number of a block, or several, ``'auto'``, or None for the middle one.
            component: What of it, or several, or ``'auto'``.
            taps: Names of taps or paths of modules in place of both, see :meth:`Family.tap`, or the name of a
                published set.

        Raises:
            InputError: If there is no such tap.
        """
        if taps is None:
            known = self.family.known_taps(self.config)
            middle = (1 + max(tap.block for tap in known)) // 2
            return make_alternatives(middle if block is None else block, component, known, self.family.auto_components)
        if isinstance(taps, str):
            taps = self.family.tap_sets[check_choice(taps, 'taps', self.family.tap_sets)]
        if not isinstance(taps, (list, tuple)) or not taps:
            raise InputError(f'taps={taps!r} is not valid: give a list of names')
        return [tuple(self.family.tap(self.config, name) for name in taps)]

    def shapes(self, taps: Sequence[Tap]) -> dict[Tap, tuple[int, int]]:
        """Channels of each tap's map, and image pixels per cell; known without reading a weight."""
        factor, shapes = self.factor, self.family.plan(self.config, taps, self.normalised_qk).shapes
        return {tap: (shapes[tap][0], factor * shapes[tap][1]) for tap in taps}

    def load(self, taps: Sequence[Tap]) -> FrozenDiffusion:
        """Builds what ``taps`` need and reads its tensors, and no others.

        Args:
            taps: What to read.

        Returns:
            The frozen model, on ``device``.

        Raises:
            InputError: If the weights are missing, truncated or of another shape.
        """
        identity = Identity()
        # What files hold, constructors need not compute: the positions of SD3.5-medium's take six seconds and 4 GB.
        place: Any = torch.device('meta') if self.source and self.family.files_hold_all else EmptyParameters()
        with place:
            transformer = self.family.build(self.config)
        drop_unused(transformer, self.family.plan(self.config, taps, self.normalised_qk).parameters)
        if self.source is None:
            transformer = add_random(transformer, identity, 'transformer', self.seed, self.dtype)
        else:
            load_into(transformer, self._tensors(self.source), identity, 'transformer', self.dtype)
        scheduler = None
        if self.source is not None and not self.source.single:
            scheduler = self.source.read_json(self.source.join('scheduler/scheduler_config.json'))
        process = self.family.make_process(scheduler or {}, self.shift, self.config)
        prompt = self._load_prompt(identity, transformer.config)
        family = self.family(transformer, tuple(taps), process, self.normalised_qk, prompt)
        family.accelerate(self.attention, self.compile)
        family.read_again = partial(self._read_again, identity)
        encoder = self._load_encoder(identity)
        expected = family.latent_channels(self.config)
        if encoder.channels != expected:
            raise InputError(f'the latent has {encoder.channels} channels; {self.family.name} expects {expected}')
        identity.settle()
        model = FrozenDiffusion(encoder, family, identity)
        return model if self.device is None else model.to(self.device)

    def _read_again(self, identity: Identity, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Reads parameters of the network that are not in memory any more, one at a time, by name and shape."""
        tensors = None if self.source is None else self._tensors(self.source)
        for name, shape in shapes.items():
            value = tensors.get(name) if tensors else random_weight(name, tuple(shape), self.seed)
            identity.check(f'transformer.{name}', value)
            yield name, value

    def _tensors(self, source: Source) -> TensorReader:
        if source.single:
            return convert_network(source, self.family, self.config)
        return Tensors(source, source.weights(self.folder, self.variant))

    def _load_prompt(self, identity: Identity, config: Any) -> dict[str, Tensor] | None:
        widths = self.family.prompt_widths(config)
        if not widths:
            if self.prompt is not None:
                raise InputError(f'prompt={self.prompt!r}: {self.family.name} is class-conditional and takes no prompt')
            return None
        from mmaselect.diffusion.conditioning import load_prompt

        embeds = load_prompt(self.prompt, self.source, widths, self.family.prompt_tokens)
        for name, value in sorted(embeds.items()):
            identity.add(name, value)
        return {name: value.to(self.dtype) for name, value in embeds.items()}

    def _load_encoder(self, identity: Identity) -> LatentEncoder:
        if self.latent == 'pixels':
            return PixelEncoder(self.family.latent_channels(self.config))
        if self.vae is None:
            encoder = random_vae(self.family.latent_channels(self.config), identity, self.seed, self.dtype)
            standardise(encoder, self.statistics, identity)
            return encoder
        scale = self.family.latent_scale(self.config)
        return load_vae(*self.vae, identity, self.dtype, self.variant, self.statistics, scale)


def choose_family(kind: Any, config: dict[str, Any], source: Source) -> type[Family]:
    """The family of a diffusers class.

    Args:
        kind: Name of the class.
        config: The ``config.json``.
        source: Of the model, for ``model_index.json``.

    Raises:
        InputError: If there is none, or more than one.
    """
    fitting = [family for family in FAMILIES.values() if kind in family.class_names]
    names = [family.name for family in fitting] or list(FAMILIES)
    if len(fitting) > 1:
        # DiT and SiT are one network.
        index = None if source.single else source.read_json(source.join('model_index.json'))
        marked = 'SiT' if {DATA_TIME, PATH_TYPE} & set(config) else (index or {}).get('_class_name', '')
        fitting = [family for family in fitting if marked in (family.name, f'{family.name}Pipeline')]
    if len(fitting) != 1:
        raise InputError(
            f"diffusion.type='auto': {source.field}={source.name!r} holds a {kind!r}, which does not tell its family: "
            f'give one of {", ".join(names)}'
        )
    return fitting[0]
