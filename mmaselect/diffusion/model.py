"""What a config says of a frozen diffusion model, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmaselect.diffusion.acceleration import check_attention, check_compile
from mmaselect.diffusion.families import FAMILIES
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
    add_random,
    check_class,
    load_into,
    parse_dtype,
)
from mmaselect.diffusion.network import drop_unused
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap, make_alternatives
from mmaselect.errors import InputError, check_choice, check_count, check_fields, check_flag, check_number

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
        type: Family: ``'SD3'``, ``'DiT'`` or ``'SiT'``.
        pretrained: diffusers folder, hub id or ``'mmaselect://NAME'``. None gives random weights, which need ``arch``.
        arch: Architecture for random weights: a name the family knows (``'sd3.5-medium'``) or a dict of arguments of
            the diffusers class.
        latent: ``'vae'``, ``'pixels'``, or ``'auto'``: the folder's ``vae/``, or what ``vae`` names.
        vae: Folder or hub id of the VAE, where ``pretrained`` has none of its own: diffusers' ``AutoencoderKL`` or
            ``AutoencoderTiny``, or a folder of the TAESD project.
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
        variant: Variant of the weight files, as in diffusers.
        revision: Revision on the hub.
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
        seed: int = 0,
    ) -> None:
        check_choice(type, 'diffusion.type', FAMILIES)
        check_choice(latent, 'latent', ('auto', 'vae', 'pixels'))
        for field, value in (('pretrained', pretrained), ('vae', vae)):
            if value is not None and (not isinstance(value, (str, Path)) or not str(value)):
                raise InputError(f'{field}={value!r} is not valid: give a folder or a hub id')
        check_flag(normalised_qk, 'normalised_qk')
        check_number(shift, 'shift', 0, open_low=True)
        check_count(seed, 'seed', 0)
        check_device(device)
        if (pretrained is None) == (arch is None):
            raise InputError(f'pretrained={pretrained!r}, arch={arch!r}: give exactly one of them')
        self.family = FAMILIES[type]
        self.prompt, self.shift, self.normalised_qk = prompt, shift, normalised_qk
        self.dtype, self.device, self.variant, self.seed = parse_dtype(dtype), device, variant, seed
        check_compile(compile)
        self.attention, self.compile = check_attention(attention), compile
        self.source = None if pretrained is None else Source(pretrained, 'pretrained', revision)
        self.config = self.family.complete(self._read_config(arch))
        for name in SIZES:
            value = self.config.get(name)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if one is not None:
                    check_count(one, name)
        self.latent, self.vae = self._resolve_latent(latent, vae)
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

    def _read_config(self, arch: str | dict[str, Any] | None) -> dict[str, Any]:
        if self.source is None:
            if isinstance(arch, dict):
                return dict(check_fields(arch, 'arch', self.family.known_fields(), ''))
            return dict(self.family.architectures[check_choice(arch, 'arch', self.family.architectures)])
        config = self.source.read_json(f'{self.family.folder}/config.json')
        if config is None:
            raise InputError(f'pretrained={self.source.name!r} has no {self.family.folder}/config.json')
        check_class(config, self.family.class_names, self.source.name, self.family.name)
        return config

    def _resolve_latent(self, latent: str, vae: str | Path | None) -> tuple[str, tuple[Source, str] | None]:
        """Settles where latents come from: ``'pixels'``, or ``'vae'`` with its folder (None for a random one)."""
        if latent == 'pixels':
            return latent, None
        if vae is not None:
            return 'vae', find_vae(vae)
        if self.source is None:
            return 'vae', None
        if self.source.find('vae/config.json') is None:
            raise InputError(
                f"pretrained={self.source.name!r} has no vae/: name one with vae='...', or set latent='pixels'"
            )
        return 'vae', (self.source, 'vae')

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
        with EmptyParameters():
            transformer = self.family.build(self.config)
        drop_unused(transformer, self.family.plan(self.config, taps, self.normalised_qk).parameters)
        if self.source is None:
            transformer = add_random(transformer, identity, 'transformer', self.seed, self.dtype)
        else:
            tensors = self.source.tensors(self.family.folder, self.variant)
            load_into(transformer, tensors, identity, 'transformer', self.dtype)
        scheduler = self.source.read_json('scheduler/scheduler_config.json') if self.source else None
        process = self.family.make_process(scheduler or {}, self.shift)
        prompt = self._load_prompt(identity, transformer.config)
        family = self.family(transformer, tuple(taps), process, self.normalised_qk, prompt)
        family.accelerate(self.attention, self.compile)
        encoder = self._load_encoder(identity)
        expected = family.latent_channels(self.config)
        if encoder.channels != expected:
            raise InputError(f'the latent has {encoder.channels} channels; {self.family.name} expects {expected}')
        model = FrozenDiffusion(encoder, family, identity)
        return model if self.device is None else model.to(self.device)

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
        return load_vae(*self.vae, identity, self.dtype, self.variant, self.statistics)
