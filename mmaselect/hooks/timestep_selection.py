"""``TimestepSelectionHook``: chooses the timestep before training starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from tqdm import tqdm

from mmaselect.backbones import ASelectDiT
from mmaselect.errors import InputError, unknown
from mmaselect.selection.criteria import Sums, build_criterion
from mmaselect.selection.report import Selection, read_selection
from mmaselect.selection.search import Batch, accumulate, finish, make_timesteps, num_draws
from mmaselect.version import __version__

#: Computed beside the deciding criterion, so that every report shows whether plain HFR can be trusted.
COMPARED = (
    dict(type='HighFrequencyRatio'),
    dict(type='NoiseConsistentHFR', centred=False),
    dict(type='NoiseConsistentHFR', centred=True),
)


@HOOKS.register_module()
class TimestepSelectionHook(Hook):
    """Selects the timestep of an ``ASelectDiT`` backbone before training, on training images, in one sweep.

    A backbone with ``timestep='auto'`` gets the timestep whose features score highest. Every rank takes its share of
    the images, and all ranks choose the same. ``selection.json`` and ``selection.png`` go to the work directory. The
    choice goes into every checkpoint; where one is loaded, or ``--resume`` finds the ``selection.json`` of the same
    selection, nothing is searched again.

    Args:
        criterion: What decides: ``dict(type='HighFrequencyRatio', sigma=0.25)`` (the paper's),
            ``dict(type='NoiseConsistentHFR')``, ``dict(type='FisherScore')`` (uses labels).
        timesteps: ``dict(start, stop, num)``, both ends included, or a list; each in [0, 1000].
        num_images: Training images to select on, drawn without replacement; None for all.
        batch_size: Images per forward pass.
        compare: Criteria to compute beside ``criterion``, for the report. The noise-consistent ones cost a second
            pass per timestep; an empty list saves it if ``criterion`` is not one of them.
        pipeline: Transforms for the images: a list, ``'val'`` for those of ``val_dataloader``, or ``'train'`` for the
            training ones under a fixed seed. None takes ``'val'``, but ``'train'`` in segmentation, whose validation
            images have many sizes and its training crops one.
        seed: Draws the images and their noises.

    Raises:
        InputError: If an argument is out of range.
    """

    # After mmengine's own hooks: the message hub and the visualizer are ready then.
    priority = 'LOW'

    def __init__(
        self,
        criterion: dict[str, Any] | None = None,
        timesteps: dict[str, Any] | Sequence[float] | None = None,
        num_images: int | None = 256,
        batch_size: int = 16,
        compare: Sequence[dict[str, Any]] = COMPARED,
        pipeline: Sequence[dict[str, Any]] | str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (('num_images', num_images), ('batch_size', batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f'{name}={value!r} is not valid: give a whole number of at least 1')
        if isinstance(pipeline, str) and pipeline not in ('val', 'train'):
            raise unknown('pipeline', pipeline, ('val', 'train'))
        self.config = dict(criterion or dict(type='HighFrequencyRatio', sigma=0.25))
        self.criterion = build_criterion(self.config)
        self.criteria = {self.criterion.label: self.criterion}
        for entry in compare:
            other = build_criterion(entry)
            self.criteria.setdefault(other.label, other)
        self.timesteps = make_timesteps(timesteps or dict(start=0, stop=1000, num=21))
        self.num_images, self.batch_size, self.pipeline, self.seed = num_images, batch_size, pipeline, seed

    def before_run(self, runner: Runner) -> None:
        """Checks that the backbone undoes the normalisation that the data preprocessor does."""
        check_normalisation(find_backbone(runner), _unwrap(runner).data_preprocessor)

    def before_train(self, runner: Runner) -> None:
        """Selects, unless the timestep is known: from the config, a checkpoint, or the selection being resumed."""
        backbone = find_backbone(runner)
        if backbone.configured_timestep is not None:
            runner.logger.info(f'timestep {backbone.timestep:g} is set in the config: nothing to select')
            return
        if backbone.timestep is not None:
            runner.logger.info(f'timestep {backbone.timestep:g} comes with the checkpoint: nothing to select')
            return
        if runner._resume:
            stored = [self._stored_choice(runner, backbone) if dist.is_main_process() else None]
            # The work directory of another machine may not have the file, and then its ranks would wait in a sweep.
            dist.broadcast_object_list(stored)
            if stored[0] is not None:
                backbone.set_timestep(stored[0])
                runner.logger.info(f'timestep {backbone.timestep:g} was selected before the interruption')
                return
        self.select(runner)

    def select(self, runner: Runner) -> dict[str, Any]:
        """Runs the sweep, sets the backbone's timestep, and reports.

        Args:
            runner: Its training data and its model are used.

        Returns:
            The content of ``selection.json``.

        Raises:
            InputError: If there are no images, or features are not finite; on all ranks, if on one.
        """
        backbone = find_backbone(runner)
        model, criteria = backbone.diffusion, list(self.criteria.values())
        dataset = runner.train_dataloader.dataset
        rank, world_size = dist.get_dist_info()
        indices = self._draw(len(dataset))
        mine = indices[rank::world_size]
        batches = self._batches(runner, backbone, dataset, mine)
        passes = -(-len(mine) // self.batch_size) * len(self.timesteps) * num_draws(criteria)
        runner.logger.info(
            f'selecting the timestep by {self.criterion.label}: {len(indices)} images, '
            f'{len(self.timesteps)} timesteps, {model.num_blocks} blocks'
        )
        partial, error = None, None
        # A bar that redraws itself is for eyes; in a log file it would be one endless line.
        interval = 0.1 if sys.stderr.isatty() else 10
        with tqdm(total=passes, desc='timestep selection', unit='pass', disable=rank != 0, mininterval=interval) as bar:
            try:
                partial = accumulate(model, batches, self.timesteps, criteria, self.seed, bar.update)
            except InputError as caught:
                error = str(caught)
        # A rank that stopped alone would leave the others waiting in the reduction.
        errors = [found for found in dist.all_gather_object(error) if found]
        if errors:
            raise InputError(errors[0])
        sweep = finish(partial, model, self.timesteps, criteria, _reduce_ranks if world_size > 1 else None)
        if not any(sweep.curve(self.criterion.label)):
            raise InputError(
                f'{self.criterion.label} is 0 at every timestep: nothing in the features depends on the image '
                '(are the images all alike, or num_images too small?)'
            )
        selection = Selection(sweep, self.criterion.label, self.config)
        chosen = [selection.timestep]
        dist.broadcast_object_list(chosen)
        backbone.set_timestep(chosen[0])
        content = self._report(runner, selection, backbone) if dist.is_main_process() else selection.to_dict()
        dist.barrier()
        return content

    def _stored_choice(self, runner: Runner, backbone: ASelectDiT) -> float | None:
        """The timestep of the work directory's ``selection.json``, if that is the selection asked for."""
        stored = read_selection(Path(runner.work_dir) / 'selection.json')
        if stored is None or stored.get('request') != self._request(backbone):
            return None
        return stored['timestep']

    def _request(self, backbone: ASelectDiT) -> dict[str, Any]:
        """What was asked for: a stored selection is only reused if this is the same."""
        return {
            'identity': backbone.identity.hex(),
            'taps': [list(tap) for tap in backbone.taps],
            'criteria': list(self.criteria),
            'criterion': self.criterion.label,
            'timesteps': self.timesteps,
            'num_images': self.num_images,
            'seed': self.seed,
        }

    def _report(self, runner: Runner, selection: Selection, backbone: ASelectDiT) -> dict[str, Any]:
        import diffusers
        import mmengine

        content = selection.save(
            runner.work_dir,
            seed=self.seed,
            request=self._request(backbone),
            config={
                'diffusion': json.loads(json.dumps(backbone.diffusion_config, default=str)),
                'timesteps': self.timesteps,
                'num_images': self.num_images,
                'pipeline': self._pipeline_name(runner) or 'given',
            },
            world_size=dist.get_world_size(),
            versions={
                'mmaselect': __version__,
                'torch': torch.__version__,
                'diffusers': diffusers.__version__,
                'mmengine': mmengine.__version__,
            },
        )
        runner.logger.info('\n' + selection.table())
        for label in selection.sweep.scores:
            for timestep, score in zip(selection.sweep.timesteps, selection.sweep.curve(label), strict=True):
                runner.visualizer.add_scalar(f'selection/{label}', score, step=round(timestep))
        import cv2

        curve = cv2.imread(str(Path(runner.work_dir) / 'selection.png'))
        runner.visualizer.add_image('selection', cv2.cvtColor(curve, cv2.COLOR_BGR2RGB))
        return content

    def _draw(self, size: int) -> list[int]:
        """Indices of the images to select on, ascending; the same on every rank."""
        count = size if self.num_images is None else min(self.num_images, size)
        return sorted(np.random.default_rng(self.seed).permutation(size)[:count].tolist())

    def _batches(self, runner: Runner, backbone: ASelectDiT, dataset: Any, indices: Sequence[int]) -> Iterator[Batch]:
        """Loads this rank's images, preprocesses them as in evaluation, and stacks neighbours of one size."""
        preprocessor = _unwrap(runner).data_preprocessor
        load = self._loader(runner, dataset)
        pending: list[tuple[int, Tensor, Tensor | None]] = []
        read_labels = any(criterion.needs_labels for criterion in self.criteria.values())
        # Training crops of segmentation are padded to their size by the preprocessor, in training mode only.
        pad = self._pipeline_name(runner) == 'train' and getattr(preprocessor, 'size', None) is not None

        def stack() -> Batch:
            labels = [label for _, _, label in pending]
            return Batch(
                images=torch.cat([image for _, image, _ in pending]),
                indices=[index for index, _, _ in pending],
                labels=None if any(label is None for label in labels) else torch.stack(labels),
            )

        for index in indices:
            sample = load(index)
            # Stacking here would have to know each toolbox's padding: one image needs none.
            data = preprocessor({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}, pad)
            image = backbone.to_unit_range(data['inputs'].float())
            if pending and (len(pending) == self.batch_size or pending[0][1].shape != image.shape):
                yield stack()
                pending.clear()
            cells = [side // backbone.stride for side in image.shape[-2:]]
            labels = labels_of(data['data_samples'][0], cells) if read_labels else None
            pending.append((index, image, labels))
        if pending:
            yield stack()

    def _pipeline_name(self, runner: Runner) -> str | None:
        """``'val'`` or ``'train'``; None for transforms of the user's own."""
        if self.pipeline is not None:
            return self.pipeline if isinstance(self.pipeline, str) else None
        return 'train' if runner.cfg.get('default_scope') == 'mmseg' else 'val'

    def _loader(self, runner: Runner, dataset: Any) -> Callable[[int], dict[str, Any]]:
        """Gives a function from index to sample, deterministic whatever was loaded before."""
        name = self._pipeline_name(runner)
        pipeline = self.pipeline if name is None else _evaluation_pipeline(runner.cfg) if name == 'val' else None
        if pipeline is not None and hasattr(dataset, 'get_data_info'):
            if hasattr(dataset, 'full_init'):
                dataset.full_init()
            transforms = Compose(pipeline)
            return lambda index: transforms(dataset.get_data_info(index))

        def seeded(index: int) -> dict[str, Any]:
            import random

            python, numpy = random.getstate(), np.random.get_state()
            with torch.random.fork_rng(devices=[]):
                random.seed(self.seed + index)
                np.random.seed((self.seed + index) % 2**32)
                torch.manual_seed(self.seed + index)
                try:
                    return dataset[index]
                finally:
                    random.setstate(python)
                    np.random.set_state(numpy)

        return seeded


def _unwrap(runner: Runner) -> torch.nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def find_backbone(runner: Runner) -> ASelectDiT:
    """Finds the backbone in a runner's model.

    Raises:
        InputError: If there is none, or more than one.
    """
    found = [module for module in _unwrap(runner).modules() if isinstance(module, ASelectDiT)]
    if len(found) != 1:
        raise InputError(f'TimestepSelectionHook needs a model with one ASelectDiT backbone; this one has {len(found)}')
    return found[0]


def check_normalisation(backbone: ASelectDiT, preprocessor: torch.nn.Module) -> None:
    """Compares what the data preprocessor does with what the backbone undoes.

    Raises:
        InputError: If they differ: the VAE would see wrong colours, and nobody would notice.
    """
    for name, neutral in (('mean', 0.0), ('std', 1.0)):
        value = getattr(preprocessor, name, None)
        applied = [neutral] * 3 if value is None else torch.as_tensor(value).flatten().tolist()
        undone = getattr(backbone, name)
        if len(applied) == 1:
            applied = applied * 3
        if not np.allclose(applied, undone, rtol=1e-5):
            rounded = [round(number, 3) for number in applied]
            raise InputError(
                f'model.backbone.{name}={list(undone)} but the data_preprocessor uses {name}={rounded}: '
                f'set model.backbone.{name}={rounded}'
            )


def _evaluation_pipeline(cfg: Any) -> list[dict[str, Any]] | None:
    """The transforms of the validation data, found below any data set wrappers."""
    loader = cfg.get('val_dataloader')
    node = None if loader is None else loader.get('dataset')
    while node is not None and 'pipeline' not in node:
        node = node.get('dataset') or (node.get('datasets') or [None])[0]
    return None if node is None else node['pipeline']


def labels_of(data_sample: Any, cells: Sequence[int]) -> Tensor | None:
    """Labels of one image, for criteria that use them.

    Args:
        data_sample: Of mmpretrain (one class) or mmseg (a class per pixel), preprocessed like the image.
        cells: Rows and columns of a map.

    Returns:
        A scalar; for segmentation (rows, columns), the label of the pixel in the middle of each cell; or None.
    """
    label = getattr(data_sample, 'gt_label', None)
    if isinstance(label, Tensor) and label.numel() == 1:
        return label.flatten()[0].cpu()
    pixels = getattr(data_sample, 'gt_sem_seg', None)
    if pixels is None:
        return None
    dense = pixels.data[None].float()
    return torch.nn.functional.interpolate(dense, size=tuple(cells), mode='nearest-exact')[0, 0].long().cpu()


def _reduce_ranks(sums: Sums) -> Sums:
    """Adds the sums of all ranks; ranks may hold different entries (classes that only one of them saw)."""
    described = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
    union: dict[str, tuple] = {}
    for ranks in dist.all_gather_object(described):
        for key, entry in ranks.items():
            if union.setdefault(key, entry)[0] != entry[0]:
                raise InputError(f'selection met maps of {union[key][0]} and {entry[0]}: its images must have one size')
    device = dist.get_comm_device() if dist.is_distributed() else torch.device('cpu')
    out = {}
    for key in sorted(union):
        shape, dtype = union[key]
        value = sums[key].clone() if key in sums else torch.zeros(shape, dtype=dtype)
        value = value.to(device)
        dist.all_reduce(value, op='sum')
        out[key] = value
    return out
