"""Images of a runner's data set, for whoever selects or probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import Compose, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler

from mmaselect.backbones.aselect import ASelectDiT
from mmaselect.datasets.readable import check_sample
from mmaselect.errors import InputError
from mmaselect.images import IGNORED, ImageSource
from mmaselect.toolboxes import scope_of
from mmaselect.unreadable import SHARE, Unreadable

#: Images that are read twice, to see whether a seed decides what random transforms give.
SEED_PROBES = 8


class RunnerImages(ImageSource):
    """Images of a runner's data set, preprocessed as in evaluation, and the same whatever was read before.

    Args:
        runner: Its model's data preprocessor and backbone are used.
        dataset: Where the images are.
        pipeline: Transforms: a list, ``'val'`` for those of ``val_dataloader``, or ``'train'`` for the data set's own
            under a fixed seed. None takes ``'val'``, but ``'train'`` in segmentation, whose validation images have
            many sizes and its training crops one.
        batch_size: Images per batch; ``'auto'`` for as many as fit memory.
        seed: Of random transforms.
        labels: Whether to read labels.
        passes: Of an image that are in memory together, for ``batch_size='auto'``.
        max_unreadable: Share of the images that may be unreadable and are passed over.
    """

    def __init__(
        self,
        runner: Runner,
        dataset: Any,
        pipeline: Sequence[dict[str, Any]] | str | None = None,
        batch_size: int | str = 'auto',
        seed: int = 0,
        labels: bool = False,
        passes: int = 1,
        max_unreadable: float = SHARE,
    ) -> None:
        self.backbone, self.preprocessor = find_backbone(runner), unwrap(runner).data_preprocessor
        # Of a data set of pairs, each image once.
        self.dataset, self.seed, self.labels = getattr(dataset, 'single_images', dataset), seed, labels
        if pipeline is None:
            pipeline = 'train' if scope_of(runner.cfg) == 'mmseg' else 'val'
        self.pipeline = pipeline if isinstance(pipeline, str) else 'given'
        transforms: Any = pipeline
        if self.pipeline != 'given':
            transforms = _evaluation_pipeline(runner.cfg) if pipeline == 'val' else None
        self.transforms = None
        if transforms is not None and hasattr(dataset, 'get_data_info'):
            if hasattr(dataset, 'full_init'):
                dataset.full_init()
            self.transforms = Compose(transforms)
        # Training crops of segmentation are padded to their size by the preprocessor, in training mode only.
        self._pad = self.pipeline == 'train' and getattr(self.preprocessor, 'size', None) is not None
        self._ignored = ignored_label(unwrap(runner))
        self.unreadable = Unreadable(max_unreadable)
        if self.pipeline != 'val':
            check_seeded(self._read, range(min(SEED_PROBES, len(self))))
        self.fit(self.backbone.diffusion, batch_size, passes=passes)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Its path."""
        return name_of(self.dataset, index)

    def _read(self, index: int) -> dict[str, Any]:
        if self.transforms is None:
            return self.dataset[index]
        return self.transforms(self.dataset.get_data_info(index))

    def load(self, index: int) -> tuple[Tensor, Tensor | None]:
        """See :class:`~mmaselect.images.ImageSource`."""
        sample = read_seeded(self._read, index, self.seed + index)
        check_sample(sample)
        # Stacking here would have to know each toolbox's padding: one image needs none.
        data = self.preprocessor({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}, self._pad)
        image = self.backbone.to_unit_range(data['inputs'].float())[0]
        return image, labels_of(data['data_samples'][0], self._ignored) if self.labels else None


def name_of(dataset: Any, index: int) -> str:
    """Path of an image of a data set; its number, where the data set does not say."""
    try:
        return str(dataset.get_data_info(index)['img_path'])
    except (AttributeError, KeyError, TypeError):
        return f'number {index}'


def read_seeded(read: Callable[[int], dict[str, Any]], index: int, seed: int) -> dict[str, Any]:
    """Reads a sample whose random transforms depend on a seed alone; all random states are left as they were.

    Args:
        read: Gives a transformed sample.
        index: Of the sample.
        seed: At least 0.

    Returns:
        The transformed sample.
    """
    import random

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would seed accelerators, too, which nothing puts back.
        torch.default_generator.manual_seed(seed)
        try:
            return read(index)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def check_seeded(read: Callable[[int], dict[str, Any]], indices: Sequence[int], draws: int = 1) -> None:
    """Reads samples twice under one seed; those that cannot be read are for others to tell.

    Args:
        read: See :func:`read_seeded`.
        indices: Of the samples.
        draws: Seeds to try.

    Raises:
        InputError: If a sample comes out in two ways.
    """
    for index in indices:
        for seed in range(draws):
            try:
                first, second = (read_seeded(read, index, seed)['inputs'] for _ in range(2))
            except Exception:
                break
            if isinstance(first, Tensor) and not (first.shape == second.shape and torch.equal(first, second)):
                raise InputError(
                    'the pipeline gives two images under one seed: a transform has random numbers of its own, as those '
                    'of Albumentations 2 do; give it a seed for every image, or leave it out'
                )


def transforms_of(dataset: Any) -> list[Any]:
    """The transforms of a data set and of all that it wraps, from the outside in."""
    steps = getattr(dataset, 'pipeline', None) or []
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or [])]
    return [
        *getattr(steps, 'transforms', steps),
        *(step for one in inner if one is not None for step in transforms_of(one)),
    ]


def backends_of(dataset: Any) -> dict[str, Any]:
    """How a data set's transforms read files: ``backend_args`` by the key of a sample that names the file.

    Raises:
        InputError: If its parts read by unlike ones: of a sample it is not known which part it is from.
    """
    found: dict[str, Any] = {}
    for step in transforms_of(dataset):
        if hasattr(step, 'backend_args'):
            key = 'seg_map_path' if hasattr(step, '_load_seg_map') else 'img_path'
            if found.setdefault(key, step.backend_args) != step.backend_args:
                raise InputError(f'{key} is read by {found[key]} and by {step.backend_args}: give one backend_args')
    return found


def built_model(runner: Runner) -> Any:
    """The runner's model, with whatever is around it.

    mmengine's ``FlexibleRunner`` builds it in ``train()`` and ``test()`` only; where a tool asks earlier, it is built,
    and put on its device, here. Such a runner can test, but no longer train.
    """
    if isinstance(runner.model, dict):
        flexible: Any = runner
        flexible.strategy.prepare(runner.model)
        runner.model = flexible.strategy.model
    return runner.model


def unwrap(runner: Runner) -> Any:
    """The model that owns the backbone: the innermost one around it that has a data preprocessor.

    Around it there may be wrappers of distributed training, engines of strategies and test-time augmentation, which
    has a data preprocessor of its own that does nothing. Without a backbone it is the innermost of all.
    """
    model = built_model(runner)
    owners = [module for module in model.modules() if hasattr(module, 'data_preprocessor')]
    around = [owner for owner in owners if backbones_of(owner)]
    return (around or owners or [model])[-1]


def backbones_of(model: Any) -> list[ASelectDiT]:
    """Every ``ASelectDiT`` of a model."""
    return [module for module in model.modules() if isinstance(module, ASelectDiT)]


def has_backbone(runner: Runner, hook: Hook) -> bool:
    """Whether a hook of ours has anything to do; a model without a backbone, such as a tool's dummy, is a warning."""
    found = bool(backbones_of(built_model(runner)))
    if not found:
        runner.logger.warning(f'the model has no ASelectDiT backbone: {type(hook).__name__} does nothing')
    return found


def find_backbone(runner: Runner) -> ASelectDiT:
    """Finds the backbone in a runner's model, and tells it how the model's images are normalised and where they are.

    Raises:
        InputError: If there is none, or more than one, or if its ``mean`` and ``std`` are not the data preprocessor's.
    """
    owner, found = unwrap(runner), backbones_of(built_model(runner))
    if len(found) != 1:
        raise InputError(f'TimestepSelectionHook needs a model with one ASelectDiT backbone; this one has {len(found)}')
    settle_normalisation(found[0], owner.data_preprocessor)
    check_channel_order(runner.cfg, owner.data_preprocessor)
    device = getattr(owner.data_preprocessor, 'device', None)
    if device is not None:
        found[0].follow(torch.device(device))
    return found[0]


def check_last_batch(runner: Runner) -> None:
    """Checks that no training batch is too small for the batch norms of the head.

    Raises:
        InputError: If one has a single image, and a batch norm sees one value per channel of each image.
    """
    loader = runner.train_dataloader
    sampler = getattr(loader, 'batch_sampler', None)
    if not isinstance(sampler, BatchSampler) or not isinstance(sampler.sampler, Sized):
        return
    size, images = sampler.batch_size, len(sampler.sampler)
    endless = isinstance(sampler.sampler, InfiniteSampler)
    if size > 1 and (endless or sampler.drop_last or images % size != 1):
        return
    pooled = next((name for name, module in unwrap(runner).named_modules() if _needs_two(module)), None)
    if pooled is not None:
        raise InputError(
            f'train_dataloader: the last batch of {images} images has one image, but the '
            f'batch norm in {pooled} needs two: set train_dataloader.drop_last=True, or another batch_size'
            if size > 1
            else f'train_dataloader.batch_size=1, but the batch norm in {pooled} needs two images: set at least 2'
        )


def _needs_two(module: torch.nn.Module) -> bool:
    """Whether a module normalises over a batch what has one value per channel in each image."""
    if isinstance(module, torch.nn.BatchNorm1d):
        return True
    pools = any(
        isinstance(one, torch.nn.AdaptiveAvgPool2d) and one.output_size in (1, (1, 1)) for one in module.children()
    )
    norms = (one for one in module.modules() if isinstance(one, _BatchNorm))
    synchronised = dist.get_world_size() > 1
    return pools and any(not (synchronised and isinstance(norm, torch.nn.SyncBatchNorm)) for norm in norms)


def settle_normalisation(backbone: ASelectDiT, preprocessor: torch.nn.Module) -> None:
    """Tells the backbone what the data preprocessor does to images, or compares that with what the backbone undoes.

    Raises:
        InputError: If they differ: the VAE would see wrong colours, and nobody would notice.
    """
    applied: dict[str, list[float]] = {}
    for name, neutral in (('mean', 0.0), ('std', 1.0)):
        value = getattr(preprocessor, name, None)
        values = [neutral] if value is None else torch.as_tensor(value).flatten().tolist()
        if len(values) not in (1, 3):
            raise InputError(f'data_preprocessor.{name}={values} is for {len(values)} channels: images must be RGB')
        applied[name] = values * 3 if len(values) == 1 else values
    if not backbone.normalisation_is_known:
        # What a float32 buffer holds, in the digits that a config has.
        backbone.set_normalisation(*([float(f'{number:.6g}') for number in values] for values in applied.values()))
        return
    for name, values in applied.items():
        undone = getattr(backbone, name)
        if not np.allclose(values, undone, rtol=1e-5):
            rounded = [round(number, 3) for number in values]
            raise InputError(
                f'model.backbone.{name}={list(undone)} but the data_preprocessor uses {name}={rounded}: '
                f'leave mean and std of the backbone out, or set model.backbone.{name}={rounded}'
            )


#: Transforms that read a file as OpenCV does: blue, green, red.
READ_BGR = ('LoadImageFromFile', 'LoadReadableImage')


def check_channel_order(cfg: Any, preprocessor: torch.nn.Module) -> None:
    """Checks that images which are read as BGR arrive as RGB: the VAE would see wrong colours, and nobody would notice.

    Args:
        cfg: Of the runner: its data loaders are looked at.
        preprocessor: The model's. One that does not say what it does, or a pipeline that reads images by a transform of
            its own, is left alone.

    Raises:
        InputError: If they are swapped never, or twice.
    """
    field, swaps = next(
        ((shown, getattr(preprocessor, name)) for name, shown in SWAPS.items() if hasattr(preprocessor, name)),
        (None, False),
    )
    if field is None:
        return
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for pipeline in pipelines_of(cfg.get(loader)):
            steps = [step for step in pipeline if isinstance(step, dict)]
            names = [str(step.get('type')).split('.')[-1].rstrip("'>") for step in steps]
            if not any(name in READ_BGR for name in names):
                continue
            # mmcv's Normalize swaps unless it is told not to.
            own = [
                step.get('to_rgb', name == 'Normalize') or step.get('to_bgr', False) for name, step in zip(names, steps)
            ]
            if (sum(map(bool, own)) + bool(swaps)) % 2 == 0:
                fault = 'turned twice' if swaps else 'never turned'
                raise InputError(
                    f'the images of {loader} are read as BGR and {fault} to RGB, which the VAE expects: set '
                    f'data_preprocessor.{field}={not swaps}'
                )


#: What data preprocessors keep of their own swap, and the field that sets it.
SWAPS = {'to_rgb': 'to_rgb', 'channel_conversion': 'bgr_to_rgb', '_channel_conversion': 'bgr_to_rgb'}


def pipelines_of(config: Any) -> list[list[Any]]:
    """Every ``pipeline`` in the config of a data set and of what it wraps, from the outside in."""
    if isinstance(config, (list, tuple)):
        return [found for item in config for found in pipelines_of(item)]
    if not isinstance(config, dict):
        return []
    inner = [found for key, value in config.items() if key != 'pipeline' for found in pipelines_of(value)]
    return ([config['pipeline']] if 'pipeline' in config else []) + inner


def _evaluation_pipeline(cfg: Any) -> list[dict[str, Any]] | None:
    """The transforms of the validation data, found below any data set wrappers."""
    loader = cfg.get('val_dataloader')
    node = None if loader is None else loader.get('dataset')
    while node is not None and 'pipeline' not in node:
        node = node.get('dataset') or (node.get('datasets') or [None])[0]
    return None if node is None else node['pipeline']


def ignored_label(model: torch.nn.Module) -> int:
    """The label that a model's segmentation head ignores, as its config has it."""
    found = (getattr(module, 'ignore_index', None) for module in model.modules())
    return next((label for label in found if isinstance(label, int)), IGNORED)


def labels_of(data_sample: Any, ignored: int = IGNORED) -> Tensor | None:
    """Labels of one image, for criteria that use them.

    Args:
        data_sample: Of mmpretrain (one class) or mmseg (a class per pixel), preprocessed like the image.
        ignored: Pixels of this label belong to no class.

    Returns:
        A scalar; for segmentation (H, W), ``IGNORED`` where there is no class; or None.
    """
    label = getattr(data_sample, 'gt_label', None)
    if isinstance(label, Tensor) and label.numel() == 1:
        return label.flatten()[0].cpu()
    pixels = getattr(getattr(data_sample, 'gt_sem_seg', None), 'data', None)
    if pixels is None:
        return None
    dense = pixels[0].long().cpu()
    return dense.masked_fill(dense == ignored, IGNORED)
