"""Images of a runner's data set, for whoever selects or probes."""

from __future__ import annotations

from collections.abc import Sequence, Sized
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

from mmaselect.backbones import ASelectDiT
from mmaselect.errors import InputError
from mmaselect.images import IGNORED, ImageSource
from mmaselect.toolboxes import scope_of
from mmaselect.unreadable import SHARE, Unreadable


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
        self.fit(self.backbone.diffusion, batch_size, passes=passes)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Its path."""
        return name_of(self.dataset, index)

    def load(self, index: int) -> tuple[Tensor, Tensor | None]:
        """See :class:`~mmaselect.images.ImageSource`."""
        if self.transforms is None:
            sample = read_seeded(self.dataset, index, self.seed + index)
        else:
            sample = self.transforms(self.dataset.get_data_info(index))
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


def read_seeded(dataset: Any, index: int, seed: int) -> dict[str, Any]:
    """Reads a sample whose random transforms depend on a seed alone; all random states are left as they were.

    Args:
        dataset: With its transforms.
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
        torch.manual_seed(seed)
        try:
            return dataset[index]
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
    pixels = getattr(data_sample, 'gt_sem_seg', None)
    if pixels is None:
        return None
    dense = pixels.data[0].long().cpu()
    return dense.masked_fill(dense == ignored, IGNORED)
