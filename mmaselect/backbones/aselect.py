"""``ASelectDiT``: a frozen diffusion transformer as an OpenMMLab backbone."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmaselect.diffusion.acceleration import autocast_dtype
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import NOISES, pixel_noise, seeded_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.recipe import Recipe, describe, difference
from mmaselect.diffusion.taps import Tap, all_taps
from mmaselect.errors import InputError, check_choice, check_count, check_number, check_timesteps, naming

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
#: Names of the entries that the backbone adds to a checkpoint.
TIMESTEP, RECIPE, TAPS = 'timestep', 'recipe', 'taps'
#: What stood in the place of the recipe in earlier revisions.
FROZEN_ID = 'frozen_id'


class _Frozen:
    """Keeps the frozen model, and what was chosen for it, out of sight of ``nn.Module``.

    What ``nn.Module`` does not see is in no optimizer, no checkpoint, no gradient bucket and no weight average. A copy
    of the backbone (mmengine's EMA makes one) shares it: frozen weights need no second copy, and a timestep that is
    selected after the copy was made holds for the copy too.
    """

    def __init__(self, timesteps: tuple[float, ...] | None, taps: tuple[Tap, ...] | None) -> None:
        self.model: FrozenDiffusion | None = None
        self.timesteps = timesteps
        self.taps = taps
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __deepcopy__(self, memo: dict) -> _Frozen:
        return self


class _Map(nn.Module):
    """Passes one map on. Who hooks onto it, as class activation maps do, gets gradients with respect to the map."""

    def forward(self, value: Tensor) -> Tensor:
        listened = self._forward_hooks and torch.is_grad_enabled()
        return value.detach().requires_grad_() if listened else value


@MODELS.register_module()
class ASelectDiT(BaseModule):
    """Features of a frozen diffusion transformer at one timestep (A-SelecT, arXiv 2603.25758).

    An image is mapped to [-1, 1], encoded to a latent, noised to ``timestep`` and run through the transformer up to
    the last block that is read. What is read goes to an ordinary head as maps (B, C, h, w).

    Args:
        diffusion: The frozen model: ``type`` (``'SD3'``, ``'DiT'``, ``'SiT'``), ``pretrained`` and more, see
            :class:`~mmaselect.diffusion.model.DiffusionSpec`.
        block: Block to read, counted from 0, or several, or ``'auto'``: chosen by ``TimestepSelectionHook``. Until
            then the whole model is in memory.
        component: What to read of it, or several: ``'query'`` (the paper's), ``'key'``, ``'value'``,
            ``'attention'``, ``'output'``, ``'modulated'``, see :class:`~mmaselect.diffusion.taps.Tap`; or ``'auto'``.
        taps: Names of what to read, in place of ``block`` and ``component``, or of a published set, see
            :class:`~mmaselect.diffusion.families.unet.UNet`.
        timestep: In [0, 1000] (0 clean, 1000 noise), or several, or ``'auto'``.
        num_timesteps: How many timesteps ``'auto'`` chooses. Each costs a forward pass.
        noise: ``'fixed'`` gives every image of one size the same noise, in training and evaluation: to the head it is a
            constant, which costs far less accuracy than noise that varies. ``'fresh'`` draws anew in training, and in
            evaluation gives every image a noise of its own that depends on nothing but its pixels: for heads that are
            trained on crops and tested on images of other sizes.
        noise_seed: Seed of the noise in evaluation, and of the fixed one.
        mean: Per channel, what the ``data_preprocessor`` subtracts from images in [0, 255], in RGB order. None takes it
            from there (our hooks do so) or from a checkpoint. Where neither is at hand, as in tools that count
            operations, it is ImageNet's; training without either is an error.
        std: Per channel, what it divides by; goes with ``mean``.
        cache: Keep the features of the training images instead of computing them in every epoch:
            ``dict(dir=..., dtype='bfloat16', views=1)``, see :class:`~mmaselect.cache.settings.CacheSettings`. Goes
            with ``dict(type='FeatureCacheHook')`` in ``custom_hooks``.
        init_cfg: As in every OpenMMLab module; the backbone has no weights to initialise.

    Attributes:
        out_channels: Channels of each map, a tuple, known before the weights are read.
        out_indices: Numbers of the maps, as the toolboxes' tools name them.
        maps: A module for each map, which passes it on: ``backbone.maps.0`` is a target layer for class activation
            maps.
        multiple: Images are padded to multiples of so many pixels.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        diffusion: dict[str, Any],
        block: int | Sequence[int] = 12,
        component: str | Sequence[str] = 'query',
        taps: str | Sequence[str] | None = None,
        timestep: float | Sequence[float] | str = 'auto',
        num_timesteps: int = 1,
        noise: str = 'fixed',
        noise_seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        cache: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if isinstance(timestep, str) and timestep != 'auto':
            raise InputError(f"timestep={timestep!r} is not valid: give a number from 0 to 1000, or several, or 'auto'")
        check_count(num_timesteps, 'num_timesteps')
        check_count(noise_seed, 'noise_seed', 0)
        if num_timesteps > 1 and timestep != 'auto':
            raise InputError(f"num_timesteps={num_timesteps} goes with timestep='auto', not with {timestep!r}")
        check_choice(noise, 'noise', NOISES)
        for name, values, least in (('mean', mean, -math.inf), ('std', std, 0)):
            if values is None:
                continue
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise InputError(f'{name}={values!r} is not valid: give three numbers')
            for value in values:
                check_number(value, name, least, open_low=least == 0)
        if (mean is None) != (std is None):
            raise InputError(f"mean={mean!r}, std={std!r}: give both, or neither to take the data_preprocessor's")
        if cache is not None and not isinstance(cache, dict):
            raise InputError(f"cache={cache!r} is not valid: give dict(dir='FOLDER'), or None")
        if not isinstance(diffusion, dict):
            raise InputError(f"diffusion={diffusion!r} is not valid: give dict(type='SD3', pretrained='FOLDER')")
        self.diffusion_config = dict(diffusion)
        self.spec = DiffusionSpec.from_dict(self.diffusion_config)
        self.block, self.component, self.named = block, component, taps is not None
        if block is None and taps is None:
            raise InputError("block=None is not valid: give a number, 'auto', or taps")
        self.alternatives = self.spec.alternatives(block, component, taps)
        self.configured_timesteps = None if timestep == 'auto' else check_timesteps(timestep)
        self.num_timesteps = len(self.configured_timesteps or ()) or num_timesteps
        self.noise, self.noise_seed = noise, noise_seed
        self.cache = None if cache is None else dict(cache)
        self._shapes = self.spec.shapes(all_taps(self.alternatives))
        channels = {tuple(self._shapes[tap][0] for tap in taps): taps[0] for taps in self.alternatives}
        if len(channels) > 1:
            found = ', '.join(f'{wide[0]} (block {tap.block}, {tap.component})' for wide, tap in channels.items())
            raise InputError(
                f'block={block!r}, component={component!r} leave a choice among maps of {found} channels, but a head '
                'is built for one number: select first, then set the block'
            )
        self.out_channels = next(iter(channels)) * self.num_timesteps
        self.out_indices = tuple(range(len(self.out_channels)))
        self.maps = nn.ModuleList(_Map() for _ in self.out_channels)
        self.multiple = self.spec.multiple
        self._noise_cache: dict[tuple, Tensor] = {}
        #: Sizes of latents that the head was trained on; None once a size that is not among them has been told of.
        self._trained_sizes: set[tuple[int, ...]] | None = set()
        chosen = self.alternatives[0] if len(self.alternatives) == 1 else None
        self._frozen = _Frozen(self.configured_timesteps, chosen)
        if mean is not None and std is not None:
            self.set_normalisation(mean, std)
        # On the meta device only shapes are asked for (tests and tools build the largest models there).
        if torch.empty(()).device.type != 'meta':
            self._frozen.model = self.spec.load(all_taps(self.alternatives))
            self._frozen.model.settle_on(self.configured_timesteps or ())
        # The name that all versions of torch have.
        self._register_state_dict_hook(_save_choice)

    # --- the frozen model and the chosen timestep --------------------------------------------------------------------

    @property
    def diffusion(self) -> FrozenDiffusion:
        """The frozen model.

        Raises:
            InputError: If the backbone was built on the meta device.
        """
        if self._frozen.model is None:
            raise InputError('ASelectDiT was built on the meta device and has no weights')
        return self._frozen.model

    def load_taps(self, taps: Sequence[Tap]) -> None:
        """Loads the frozen model anew, for other taps: for tools that compare what the backbone itself does not read.

        Args:
            taps: Of the same network.
        """
        device = self.diffusion.device
        # The old one goes before the new one comes.
        self._frozen.model = None
        self._frozen.model = self.spec.load(taps).to(device)

    @property
    def timesteps(self) -> tuple[float, ...] | None:
        """The timesteps in use, each in [0, 1000]; None while ``'auto'`` has not been decided."""
        return self._frozen.timesteps

    @property
    def timestep(self) -> float | None:
        """The timestep in use, of several the first."""
        return None if self.timesteps is None else self.timesteps[0]

    @property
    def taps(self) -> tuple[Tap, ...] | None:
        """What is read, block-major; None while ``'auto'`` has not been decided."""
        return self._frozen.taps

    @property
    def strides(self) -> tuple[int, ...]:
        """Image pixels per cell of each map, known before the weights are read; of the first choice, if one is left."""
        return tuple(self._shapes[tap][1] for tap in self.taps or self.alternatives[0]) * self.num_timesteps

    @property
    def decided(self) -> bool:
        """Whether timestep, block and component are known."""
        return self.timesteps is not None and self.taps is not None

    def set_choice(self, timesteps: float | Sequence[float], taps: Sequence[Tap] | None = None) -> None:
        """Sets what is read, for this backbone and every copy of it; blocks behind it are dropped for good.

        Args:
            timesteps: One, or as many as the backbone was built for, each in [0, 1000].
            taps: One of :attr:`alternatives`; None leaves block and component as they are.

        Raises:
            InputError: If a timestep is out of range, or the number of maps would change.
        """
        timesteps = check_timesteps(timesteps)
        if len(timesteps) != self.num_timesteps:
            raise InputError(
                f'timestep={list(timesteps)!r}: this backbone was built for {self.num_timesteps} of them '
                '(num_timesteps)'
            )
        if taps is not None:
            taps = tuple(Tap(*tap) for tap in taps)
            if taps not in self.alternatives:
                raise InputError(
                    f'{", ".join(f"block {tap.block} {tap.component}" for tap in taps)} is not what '
                    f'block={self.block!r}, component={self.component!r} allows'
                )
            if self._frozen.model is not None and taps != self.taps:
                self._frozen.model.narrow(taps)
            self._frozen.taps = taps
        self._frozen.timesteps = timesteps
        if self._frozen.model is not None:
            self._frozen.model.settle_on(timesteps)

    @property
    def normalisation_is_known(self) -> bool:
        """Whether the config, the data preprocessor or a checkpoint said what images are normalised by."""
        return self._frozen.normalisation is not None

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Says what images are normalised by, for this backbone and every copy of it; see the arguments."""
        self._frozen.normalisation = tuple(map(float, mean)), tuple(map(float, std))

    @property
    def mean(self) -> tuple[float, ...]:
        """What was subtracted from each channel of the images."""
        return (self._frozen.normalisation or (IMAGENET_MEAN, IMAGENET_STD))[0]

    @property
    def std(self) -> tuple[float, ...]:
        """What each channel was divided by."""
        return (self._frozen.normalisation or (IMAGENET_MEAN, IMAGENET_STD))[1]

    @property
    def identity(self) -> bytes:
        """32 bytes that name the frozen weights, see :class:`~mmaselect.diffusion.loading.Identity`."""
        return self.diffusion.identity

    @property
    def recipe(self) -> Recipe:
        """All that features depend on but timestep and taps, see :mod:`~mmaselect.diffusion.recipe`."""
        own = dict(noise=self.noise, noise_seed=self.noise_seed, mean=self.mean, std=self.std)
        return describe(self.diffusion, **own)

    def _apply(self, fn: Any, recurse: bool = True) -> ASelectDiT:
        """Moves the frozen model along with ``to()`` and ``cuda()``, which it would otherwise not hear of.

        Its precision stays that of the config, whatever ``half()`` makes of the head: features, and the recipe that
        names them, depend on it, and some autoencoders overflow in float16. Its values stay, too: ``to_empty()``, by
        which FSDP's ``skip_init_weights`` gives a model its place that was built on the meta device, loads them.
        """
        super()._apply(fn, recurse)
        model = self._frozen.model
        device = fn(torch.empty(0, device='meta' if model is None else model.device)).device
        if model is not None:
            model.to(device)
        elif device.type != 'meta':
            self._frozen.model = self.spec.load(all_taps(self.alternatives)).to(device)
        return self

    def follow(self, device: torch.device) -> None:
        """Moves the frozen model to where the images are: strategies that shard a model do not call ``to()``."""
        model = self._frozen.model
        if model is not None and model.device != device:
            model.to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the timestep over from a checkpoint, after a check that its features were made as these are."""
        if prefix + FROZEN_ID in state_dict:
            raise InputError(
                'the checkpoint is of an earlier revision of mmaselect and holds no recipe: train it again'
            )
        timesteps, taps, recipe = read_choice(state_dict, prefix)
        if timesteps is not None:
            self._take_over(timesteps, taps)
        if recipe is not None and not self.normalisation_is_known:
            self.set_normalisation(recipe['mean'], recipe['std'])
        if recipe is not None and self._frozen.model is not None and recipe != self.recipe:
            raise InputError(
                f'the checkpoint was trained on other features: {difference(self.recipe, recipe)}; diffusion, noise, '
                'mean and std must be those of its training'
            )
        own = (prefix + RECIPE, prefix + TIMESTEP, prefix + TAPS)
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(others, prefix, *args)

    def _take_over(self, timesteps: tuple[float, ...], taps: tuple[Tap, ...] | None) -> None:
        """Sets what a checkpoint was trained with, unless the config asks for something else."""
        if self.configured_timesteps is not None and timesteps != self.configured_timesteps:
            asked, found = (
                str(list(values)) if len(values) > 1 else f'{values[0]:g}'
                for values in (self.configured_timesteps, timesteps)
            )
            raise InputError(
                f'timestep={asked} in the config, but the checkpoint was trained at '
                f"{found}: set timestep={found} or 'auto'"
            )
        if taps is not None and taps not in self.alternatives:
            names = ', '.join(f'block {tap.block} {tap.component}' for tap in taps)
            raise InputError(
                f'the checkpoint was trained on {names}, but the config says block={self.block!r}, '
                f'component={self.component!r}: set those of its training'
            )
        self.set_choice(timesteps, taps)

    # --- the forward pass --------------------------------------------------------------------------------------------

    def to_unit_range(self, images: Tensor) -> Tensor:
        """Undoes the toolbox's normalisation.

        Args:
            images: (B, 3, H, W), RGB, normalised by ``mean`` and ``std``.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (images * std + mean) / 127.5 - 1

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reads the features.

        While the model is traced, which is how the toolboxes count its operations, a choice that is still open gets a
        stand-in, and a warning says so.

        Args:
            images: (B, 3, H, W), RGB, as the toolbox's ``data_preprocessor`` delivers them; or maps from the cache,
                which are passed on.

        Returns:
            One map (B, C, ceil(H / stride), ceil(W / stride)) per timestep, block and component, in this order from the
            outside in, each with its own channels and stride, in the dtype of the images. Its cells divide the image
            evenly, as every head assumes, also where the image was padded.

        Raises:
            InputError: If nothing has chosen a timestep, block or component yet, if an image is smaller than a patch or
                has no three channels, or if features are not finite.
        """
        read = self._read(images) if isinstance(images, Tensor) else [maps.float() for maps in images]
        return tuple(passed(one) for passed, one in zip(self.maps, self._deliver(read)))

    @torch.no_grad()
    def _read(self, images: Tensor) -> list[Tensor]:
        timesteps, taps = self._choice()
        if not images.is_meta:
            self.follow(images.device)
        if self.training and not self.normalisation_is_known:
            raise InputError(
                "nothing has said how images are normalised: add dict(type='TimestepSelectionHook') to custom_hooks, "
                'which asks the data_preprocessor, or set mean and std of the backbone to its own'
            )
        if self.cache is not None and self.training:
            raise InputError(
                "model.backbone.cache is set, but nothing fills it: add dict(type='FeatureCacheHook') to custom_hooks"
            )
        if images.dim() != 4 or images.shape[1] != 3:
            raise InputError(f'images of shape {tuple(images.shape)} are not valid: expected RGB, (B, 3, H, W)')
        if torch.jit.is_tracing() or type(images) not in (Tensor, nn.Parameter):
            # Tracers and fake tensors belong to a thread. What is computed once, the noise and the constants of a
            # timestep, is computed in another: it is no part of a trace, and what is kept is real.
            size, device = tuple(map(int, images.shape[1:])), images.device
            with ThreadPoolExecutor(1) as thread:
                thread.submit(lambda: self._read_at(torch.zeros(1, *size, device=device), timesteps)).result()
        maps = self._read_at(images, timesteps)
        return [maps[timestep, tap].to(images.dtype) for timestep in timesteps for tap in taps]

    @torch.no_grad()
    def _read_at(self, images: Tensor, timesteps: Sequence[float]) -> dict[tuple[float, Tap], Tensor]:
        # In its own half precision the model is told what to compute in; only in float32 does --amp decide.
        with (
            naming(lambda place: _name_of(place, len(images)), range(len(images))),
            torch.autocast(images.device.type, enabled=self._amp_applies(images)),
        ):
            return self.diffusion.maps_of(self.to_unit_range(images.float()), timesteps, self._make_noise)

    def _choice(self) -> tuple[tuple[float, ...], tuple[Tap, ...]]:
        """What is to be read.

        Raises:
            InputError: If nothing has chosen it yet.
        """
        if torch.jit.is_tracing():
            count = sum(parameter.numel() for parameter in self.diffusion.parameters())
            self._say(f'{count:,} frozen parameters are not among those that the model counts', logging.INFO)
        if self.timesteps is not None and self.taps is not None:
            return self.timesteps, self.taps
        if not torch.jit.is_tracing():
            open_field, valid = ('block', 'a block') if self.taps is None else ('timestep', 'a number from 0 to 1000')
            if self.taps is None and self.block != 'auto':
                open_field, valid = 'component', 'a component'
            raise InputError(
                f"{open_field}='auto', but nothing has chosen one: add dict(type='TimestepSelectionHook') to "
                f'custom_hooks, load a checkpoint that holds the choice, or set {valid}'
            )
        # Operations are the same at every timestep; of blocks the last one, which costs the most.
        timesteps = self.timesteps or tuple(500.0 + number for number in range(self.num_timesteps))
        taps = self.taps or max(self.alternatives, key=lambda taps: max(tap.block for tap in taps))
        self._say(
            f'nothing has chosen what to read yet: traced at timestep {timesteps[0]:g}, block {taps[-1].block}. Good '
            'for a count of operations; export only what was trained',
            logging.WARNING,
        )
        return timesteps, taps

    def _say(self, message: str, level: int) -> None:
        print_log(f'ASelectDiT: {message}', logger='current', level=level)

    @staticmethod
    def _deliver(read: list[Tensor]) -> tuple[Tensor, ...]:
        # Tokens make channels-last maps. A head that begins with a group norm would crash on them: its backward on the
        # CPU (torch 2.13) does not expect a channels-last input that needs no gradient.
        return tuple(value.contiguous() if value.device.type == 'cpu' else value for value in read)

    def _amp_applies(self, images: Tensor) -> bool:
        return self.spec.dtype == torch.float32 and autocast_dtype(images.device) is not None

    def _make_noise(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.noise == 'fixed':
            shape = tuple(map(int, shape))
            self._compare_size(shape[1:])
            key = (shape, images.device)
            if key not in self._noise_cache:
                self._noise_cache[key] = seeded_noise(shape, self.noise_seed).to(images.device)
            return self._noise_cache[key]
        if self.training:
            return torch.randn((len(images), *shape), device=images.device)
        return pixel_noise(images, shape, self.noise_seed)

    def _compare_size(self, size: tuple[int, ...]) -> None:
        """Says once that a head is tested under another fixed noise than it was trained under."""
        if self._trained_sizes is None or not any(self.timesteps or ()):
            return
        if self.training:
            self._trained_sizes.add(size)
        elif self._trained_sizes and size not in self._trained_sizes:
            trained, found = ('x'.join(map(str, one)) for one in (min(self._trained_sizes), size))
            self._say(
                f"noise='fixed' is one noise for each size: the head was trained on latents of {trained}, and is "
                f"tested on {found}, which have another; set noise='fresh', or test windows of one size "
                "(test_cfg.mode='slide')",
                logging.WARNING,
            )
            self._trained_sizes = None

    def extra_repr(self) -> str:
        """The choices, for ``print(model)``."""
        chosen = 'auto (not chosen yet)'
        if self.timesteps is not None:
            chosen = ', '.join(f'{timestep:g}' for timestep in self.timesteps)
        taps = f'block={self.block}, component={self.component!r}'
        if self.taps is not None and (len(self.alternatives) > 1 or self.named):
            taps = ', '.join(f'block={tap.block}, component={tap.component!r}' for tap in self.taps)
        return f'{self.spec.family.name}, {taps}, timestep={chosen}, out_channels={self.out_channels}, frozen'

    def init_weights(self) -> None:
        """Does nothing but say so: the frozen weights were read when the backbone was built."""
        if self._frozen.model is not None:
            count = sum(parameter.numel() for parameter in self.diffusion.parameters())
            print_log(
                f'ASelectDiT: {self.spec.family.name}, {count / 1e6:.1f} M frozen parameters of '
                f'{self.diffusion.num_blocks} of {self.spec.num_blocks} blocks, identity {self.identity.hex()[:12]}',
                logger='current',
                level=logging.INFO,
            )
        super().init_weights()


def _name_of(place: int, count: int) -> str:
    """Path of an image of a batch, by the data samples of the model that called; its place, where there are none."""
    frame = inspect.currentframe()
    while frame is not None:
        samples = frame.f_locals.get('data_samples')
        if isinstance(samples, (list, tuple)) and len(samples) == count:
            return str(getattr(samples[place], 'img_path', f'image {place} of the batch'))
        frame = frame.f_back
    return f'image {place} of the batch'


def read_choice(
    state_dict: dict[str, Tensor], prefix: str
) -> tuple[tuple[float, ...] | None, tuple[Tap, ...] | None, Recipe | None]:
    """Reads what a checkpoint says of its backbone.

    Args:
        state_dict: Of the checkpoint.
        prefix: Of the backbone's entries, with the dot.

    Returns:
        Timesteps, taps and recipe; None for what it does not say.

    Raises:
        InputError: If the recipe is damaged.
    """
    recipe, timestep, stored = (state_dict.get(prefix + key) for key in (RECIPE, TIMESTEP, TAPS))
    return (
        None if timestep is None or timestep.isnan().any() else tuple(timestep.flatten().tolist()),
        None if stored is None else tuple(Tap(*tap) for tap in _from_bytes(stored)),
        None if recipe is None else _from_bytes(recipe),
    )


def _from_bytes(stored: Tensor) -> Any:
    try:
        return json.loads(bytes(stored.cpu().tolist()))
    except ValueError as error:
        raise InputError(f'taps or recipe in the checkpoint cannot be read: {error}') from error


def _save_choice(backbone: ASelectDiT, state_dict: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Adds timestep and recipe to a checkpoint: as tensors, because mmengine moves every entry to the CPU."""
    if backbone._frozen.model is None:
        return
    timesteps = (backbone.decided and backbone.timesteps) or (math.nan,) * backbone.num_timesteps
    # One timestep is a scalar, as in checkpoints from before there could be several.
    value = timesteps[0] if len(timesteps) == 1 else list(timesteps)
    state_dict[prefix + TIMESTEP] = torch.tensor(value, dtype=torch.float64)
    if backbone.taps is not None:
        state_dict[prefix + TAPS] = _to_bytes([list(tap) for tap in backbone.taps])
    state_dict[prefix + RECIPE] = _to_bytes(backbone.recipe)


def _to_bytes(content: Any) -> Tensor:
    return torch.tensor(list(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)
