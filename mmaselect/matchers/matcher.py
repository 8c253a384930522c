"""``FeatureMatcher``: finds points of one image in another, by the features of a backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmaselect.errors import InputError, check_count, check_number
from mmaselect.hooks.images import settle_normalisation
from mmaselect.tasks.correspondence import Frame, discard_massive, find, read_maps


@MODELS.register_module()
class PairDataPreprocessor(ImgDataPreprocessor):
    """mmengine's ``ImgDataPreprocessor``; of pairs it stacks all sources, then all targets, in one batch.

    Args:
        mean: Subtracted from each channel, in RGB order; ``std`` divides.
        bgr_to_rgb: mmcv reads BGR, models read RGB.
        **kwargs: As of ``ImgDataPreprocessor``.
    """

    def __init__(
        self, mean: Sequence[float] = (127.5,) * 3, std: Sequence[float] = (127.5,) * 3, bgr_to_rgb: bool = True,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(mean=mean, std=std, bgr_to_rgb=bgr_to_rgb, **kwargs)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalises, pads to the largest on the right and below, and stacks: (2B, 3, H, W) of B pairs."""
        inputs = data['inputs']
        if isinstance(inputs, dict):
            data = {**data, 'inputs': [*inputs['source'], *inputs['target']]}
        return super().forward(data, training)


@MODELS.register_module()
class FeatureMatcher(BaseModel):
    """Semantic correspondence by nearest neighbours in the features of a frozen backbone.

    Without a head it is zero-shot, and ``tools/test.py CONFIG none`` evaluates it. A data sample has
    ``source_points``, ``target_points``, and of both images size and ``matrix``, see
    :class:`~mmaselect.datasets.pairs.PairDataset`; it gets ``pred_points``, ``similarity`` and ``discarded``.

    Args:
        backbone: An ``ASelectDiT``; of several maps all are compared at once.
        head: Turns all maps into one, and is trained, see :class:`~mmaselect.heads.aggregation.AggregationHead`. None
            compares the backbone's own.
        resolution: Maps of the target are interpolated to so many cells a side before they are searched; None
            searches the cells of the finest.
        ensemble: Noises that features are averaged over in evaluation, each a forward pass.
        discard: Leave out massive channels: those above so many times the median magnitude, of each pair.
        remember: Features of so many images are kept, because pairs share images.
        data_preprocessor: A :class:`PairDataPreprocessor` by default.
        init_cfg: As in every OpenMMLab module.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        head: dict[str, Any] | None = None,
        resolution: int | None = None,
        ensemble: int = 1,
        discard: float | None = None,
        remember: int = 64,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor or dict(type='PairDataPreprocessor'), init_cfg)
        check_count(ensemble, 'ensemble')
        check_count(remember, 'remember', 0)
        if resolution is not None:
            check_count(resolution, 'resolution')
        if discard is not None:
            check_number(discard, 'discard', 1, open_low=True)
        self.backbone = MODELS.build(backbone)
        if not self.data_preprocessor.mean.is_meta:
            settle_normalisation(self.backbone, self.data_preprocessor)
        self.head = None if head is None else MODELS.build(head)
        self.resolution, self.ensemble, self.discard, self.remember = resolution, ensemble, discard, remember
        self._remembered: OrderedDict[tuple, list[Tensor]] = OrderedDict()

    def forward(self, inputs: Tensor, data_samples: Sequence[BaseDataElement] = (), mode: str = 'tensor') -> Any:
        """As of every OpenMMLab model.

        Args:
            inputs: (2B, 3, H, W): the sources of B pairs, then their targets.
            data_samples: Of the pairs.
            mode: ``'tensor'`` gives the maps, ``'loss'`` a dict of losses, ``'predict'`` the data samples.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        maps = self.extract(inputs)
        return maps if self.head is None else (self.head(maps),)

    def extract(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps, each (B, C, h, w). The one place that runs it."""
        if self.ensemble == 1 or self.training:
            return list(self.backbone(images))
        backbone = self.backbone
        unit = (images * _column(backbone.std, images) + _column(backbone.mean, images)) / 127.5 - 1
        settings = (backbone.timesteps, backbone.taps, backbone.noise, backbone.noise_seed, self.ensemble)
        return read_maps(backbone.diffusion, unit, *settings)

    def loss(self, inputs: Tensor, data_samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        """The head's losses.

        Raises:
            InputError: If there is no head.
        """
        if self.head is None:
            raise InputError('head=None has nothing to train: evaluate it by `tools/test.py CONFIG none`')
        maps, count = self.extract(inputs), len(data_samples)
        frames = [_frames(sample, inputs.shape[-2:]) for sample in data_samples]
        places = [
            [
                first.places(sample.source_points.to(inputs.device)),
                second.places(sample.target_points.to(inputs.device)),
            ]
            for (first, second), sample in zip(frames, data_samples)
        ]
        sources, targets = ([one[part] for one in maps] for part in (slice(count), slice(count, None)))
        return self.head.loss(sources, targets, places)

    def predict(self, inputs: Tensor, data_samples: Sequence[BaseDataElement]) -> list[BaseDataElement]:
        """Finds the points of each source in its target."""
        maps = self._maps_of(inputs, data_samples)
        for number, sample in enumerate(data_samples):
            both, discarded = [maps[number], maps[number + len(data_samples)]], list[list[int]]()
            if self.discard is not None:
                both, discarded = discard_massive(both, self.discard)
            if self.head is not None:
                both = [[self.head([one[None] for one in part])[0]] for part in both]
            frames = _frames(sample, inputs.shape[-2:])
            points = sample.source_points.to(inputs.device)
            found, similarity = find(both[0], frames[0], points, both[1], frames[1], self.resolution)
            sample.set_data(dict(pred_points=found, similarity=similarity))
            sample.set_metainfo(dict(discarded=discarded))
        return list(data_samples)

    def _maps_of(self, inputs: Tensor, data_samples: Sequence[BaseDataElement]) -> list[list[Tensor]]:
        """The maps (C, h, w) of each image; those of an image that was there a while ago are not computed again."""
        choice = (self.backbone.timesteps, self.backbone.taps, tuple(inputs.shape[-2:]))
        keys = [
            (*choice, sample.get(side), tuple(sample.get(f'{side}_matrix').flatten().tolist()))
            for side in SIDES
            for sample in data_samples
        ]
        known = {key: self._remembered[key] for key in keys if key in self._remembered}
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        if missing:
            computed = self.extract(inputs[list(missing.values())])
            known.update((key, [one[place] for one in computed]) for place, key in enumerate(missing))
        for key in keys:
            self._remembered[key] = known[key]
            self._remembered.move_to_end(key)
        while len(self._remembered) > self.remember:
            self._remembered.popitem(last=False)
        return [known[key] for key in keys]


SIDES = ('source', 'target')


def _frames(sample: BaseDataElement, size: Sequence[int]) -> tuple[Frame, Frame]:
    """Where both images of a pair lie in what the model saw, images of ``size`` (height, width)."""
    scale = torch.tensor([[1 / size[1]], [1 / size[0]]], dtype=torch.float64)
    source, target = (
        Frame(sample.get(f'{side}_size'), scale * sample.get(f'{side}_matrix').cpu().double()) for side in SIDES
    )
    return source, target


def _column(values: Sequence[float], images: Tensor) -> Tensor:
    return images.new_tensor(values).view(3, 1, 1)
