"""``TimestepSelectionHook``: chooses the timestep before training starts."""

from __future__ import annotations

import functools
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import LocalVisBackend
from PIL import Image

from mmaselect.backbones.aselect import ASelectDiT
from mmaselect.datasets.readable import name_broken_files
from mmaselect.diffusion.memory import check_batch_size
from mmaselect.diffusion.recipe import digest
from mmaselect.diffusion.taps import Tap, all_taps
from mmaselect.errors import InputError, check_choice, check_count
from mmaselect.hooks.images import RunnerImages, check_last_batch, find_backbone, has_backbone
from mmaselect.hooks.ranks import RunnerRanks
from mmaselect.images import AUTO_IMAGES, draw_portions
from mmaselect.selection.criteria import PAPER, RECOMMENDED, build_criteria
from mmaselect.selection.report import Selection, identifier, read_selection
from mmaselect.selection.search import SEARCHES, count_passes, make_timesteps
from mmaselect.selection.select import check_group, select_on
from mmaselect.unreadable import SHARE, Unreadable
from mmaselect.version import __version__

#: Computed beside the deciding criterion, at no further pass: every report shows what the paper's would have chosen.
COMPARED = (PAPER,)


@HOOKS.register_module()
class TimestepSelectionHook(Hook):
    """Selects what an ``ASelectDiT`` backbone reads, before training, on training images.

    A backbone with ``timestep='auto'`` gets the timestep whose features score highest. With ``block='auto'`` or
    ``component='auto'`` all combinations are scored in the same passes, and of blocks within one standard error of the
    best the earliest is chosen. Every rank takes its share of the images, and all ranks choose the same.
    ``selection.json``, ``selection.png`` and ``report.html`` go to the work directory. The choice goes into every
    checkpoint; where one is loaded, or ``--resume`` finds the ``selection.json`` of the same selection, nothing is
    searched again.

    Args:
        criterion: What decides; None for ``dict(type='InstanceInformation')``, which docs/en/evidence.md recommends.
            ``dict(type='HighFrequencyRatio', sigma=0.25)`` is the paper's, ``dict(type='FisherScore')`` uses labels.
        timesteps: ``dict(start, stop, num)``, both ends included, or a list; each in [0, 1000].
        num_images: Training images to select on, drawn without replacement; None for all. ``'auto'`` begins with 64
            and doubles them (up to 4,096) until ``stability`` is reached.
        batch_size: Images per forward pass; ``'auto'`` measures how many fit memory. What does not fit is halved.
        compare: Criteria to compute beside ``criterion``, for the report. Noise-consistent ones cost a second noise
            per image and timestep.
        pipeline: Transforms for the images: a list, ``'val'`` for those of ``val_dataloader``, or ``'train'`` for the
            training ones under a fixed seed. None takes ``'val'``, but ``'train'`` in segmentation, whose validation
            images have many sizes and its training crops one.
        seed: Draws the images, their views, and with ``noise='fresh'`` their noises. The policy of the noise is the
            backbone's, and so is a fixed noise: the head will see them.
        search: ``'sweep'``, or ``'coarse-to-fine'``, which tries at most a third of 41 or more timesteps; where the
            curve is flat or has several peaks it goes on to the sweep and says so; or ``'racing'``, which drops after
            32, 64, 128, ... images the timesteps that can no longer win.
        stability: Share of bootstrap resamples that must agree with the choice, for ``num_images='auto'``.
        blocks: Candidates of ``block='auto'``; None for all blocks.
        components: Candidates of ``component='auto'``; None for query, key, value, attention and output.
        max_unreadable: Share of the images that may be unreadable: they are passed over, counted and listed. 0 ends the
            run at the first.

    Raises:
        InputError: If an argument is out of range.
    """

    # After mmengine's own hooks: the message hub and the visualizer are ready then.
    priority = 'LOW'

    def __init__(
        self,
        criterion: dict[str, Any] | None = None,
        timesteps: dict[str, Any] | Sequence[float] | None = None,
        num_images: int | str | None = 256,
        batch_size: int | str = 'auto',
        compare: Sequence[dict[str, Any]] = COMPARED,
        pipeline: Sequence[dict[str, Any]] | str | None = None,
        seed: int = 0,
        search: str = 'sweep',
        stability: float = 0.95,
        blocks: Sequence[int] | None = None,
        components: Sequence[str] | None = None,
        max_unreadable: float = SHARE,
    ) -> None:
        Unreadable(max_unreadable)
        self.max_unreadable = max_unreadable
        check_batch_size(batch_size)
        if num_images not in (None, 'auto'):
            check_count(num_images, 'num_images')
        if pipeline is not None and not isinstance(pipeline, (list, tuple)):
            check_choice(pipeline, 'pipeline', ('val', 'train'))
        check_count(seed, 'seed', 0)
        check_candidates(blocks, components)
        self.config = RECOMMENDED if criterion is None else criterion
        if not isinstance(compare, (list, tuple)):
            raise InputError(f'compare={compare!r} is not valid: give a list of criteria')
        fields = ['criterion', *['compare'] * len(compare)]
        self.criteria = build_criteria([self.config, *compare], fields)
        self.criterion = next(iter(self.criteria.values()))
        self.config = dict(self.config)
        check_choice(search, 'search', SEARCHES)
        if isinstance(stability, bool) or not isinstance(stability, (int, float)) or not 0 < stability <= 1:
            raise InputError(f'stability={stability!r} is not valid: give a share in (0, 1]')
        check_group(self.criteria.values(), batch_size)
        self.search, self.stability = search, stability
        self.blocks, self.components = blocks, components
        self.timesteps = make_timesteps(dict(start=0, stop=1000, num=21) if timesteps is None else timesteps)
        self.num_images, self.batch_size, self.pipeline, self.seed = num_images, batch_size, pipeline, seed

    def before_run(self, runner: Runner) -> None:
        """Tells the backbone what the data preprocessor does, before a checkpoint is loaded."""
        name_broken_files()
        if has_backbone(runner, self):
            find_backbone(runner)

    def before_train(self, runner: Runner) -> None:
        """Selects, unless all is known: from the config, a checkpoint, or the selection being resumed."""
        if not has_backbone(runner, self):
            return
        # What would end the first epoch is said before anything is searched.
        check_last_batch(runner)
        backbone = find_backbone(runner)
        if backbone.decided:
            where = 'comes with the checkpoint' if backbone.configured_timesteps is None else 'is set in the config'
            runner.logger.info(f'timestep {_list(backbone.timesteps)} {where}: nothing to select')
            return
        if runner._resume:
            stored = [self._stored_choice(runner, backbone) if dist.is_main_process() else None]
            # The work directory of another machine may not have the file, and then its ranks would wait in a sweep.
            dist.broadcast_object_list(stored)
            if stored[0] is not None:
                backbone.set_choice(*stored[0])
                runner.logger.info(f'timestep {_list(backbone.timesteps)} was selected before the interruption')
                return
        self.select(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Notes the validation data for the leaderboard, also where the timestep is set in the config."""
        checkpoint['meta']['data'] = _describe_validation(runner)

    def before_test(self, runner: Runner) -> None:
        """Selects for an evaluation without training, which has no checkpoint that would hold a choice."""
        if runner._load_from is None and has_backbone(runner, self) and not find_backbone(runner).decided:
            self.select(runner)

    def select(self, runner: Runner) -> dict[str, Any]:
        """Runs the search, sets the backbone's timestep, block and component, and reports.

        Args:
            runner: Its training data and its model are used.

        Returns:
            The content of ``selection.json``.

        Raises:
            InputError: If there are no images, or features are not finite; on all ranks, if on one.
        """
        backbone = find_backbone(runner)
        request, alternatives = self._request(backbone), self._alternatives(backbone)
        backbone.diffusion.narrow(all_taps(alternatives))
        selection, images = self.score(runner, alternatives)
        selection.check()
        chosen: list[Any] = [selection.timesteps, selection.taps]
        # Float sums differ between ranks in the last digit on some backends, and so might near ties.
        dist.broadcast_object_list(chosen)
        timesteps, taps = chosen
        backbone.set_choice(backbone.configured_timesteps or timesteps, taps)
        content = self._report(runner, selection, request, images) if dist.is_main_process() else selection.to_dict()
        dist.barrier()
        return content

    def score(
        self, runner: Runner, alternatives: Sequence[Sequence[Tap]] | None = None
    ) -> tuple[Selection, RunnerImages]:
        """Scores timesteps and alternatives; the backbone stays as it is.

        Args:
            runner: Its training data and its model are used.
            alternatives: Sets of taps of which one is to be chosen; None for what the backbone's config leaves open.

        Returns:
            The selection, and the images it was made on.
        """
        backbone = find_backbone(runner)
        model = backbone.diffusion
        alternatives = self._alternatives(backbone) if alternatives is None else alternatives
        timesteps = self.timesteps if backbone.configured_timesteps is None else sorted(backbone.configured_timesteps)
        labels = any(criterion.needs_labels for criterion in self.criteria.values())
        dataset = runner.train_dataloader.dataset
        num_timesteps = backbone.num_timesteps if backbone.configured_timesteps is None else 1
        images = RunnerImages(
            runner, dataset, self.pipeline, self.batch_size, self.seed, labels,
            sum(count_passes(list(self.criteria.values()), num_timesteps)) - 1, self.max_unreadable,
        )  # fmt: skip
        count = AUTO_IMAGES[1] if self.num_images == 'auto' else self.num_images or len(images)
        choices = f', {len(alternatives)} choices of block and component' if len(alternatives) > 1 else ''
        runner.logger.info(
            f'selecting by {self.criterion.label}: {min(count, len(images))} images'
            f'{" at most" if self.num_images == "auto" else ""}, {len(timesteps)} timesteps, '
            f'{model.num_blocks} blocks{choices}, {backbone.noise} noise ({self.search})'
        )
        selection = select_on(
            model,
            images,
            self.criteria,
            self.config,
            timesteps,
            alternatives,
            num_timesteps,
            self.num_images,
            self.search,
            self.stability,
            backbone.noise,
            backbone.noise_seed,
            self.seed,
            RunnerRanks(),
            logger=runner.logger,
        )
        return selection, images

    def _alternatives(self, backbone: ASelectDiT) -> list[tuple[Tap, ...]]:
        """The backbone's alternatives that ``blocks`` and ``components`` leave."""
        if backbone.taps is not None:
            return [backbone.taps]
        left = backbone.alternatives
        names = dict.fromkeys(tap.component for taps in left for tap in taps)
        for component in self.components or ():
            check_choice(component, 'components', names)
        if self.blocks is not None and backbone.block == 'auto':
            left = [taps for taps in left if all(tap.block in self.blocks for tap in taps)]
        if self.components is not None and backbone.component == 'auto':
            left = [taps for taps in left if all(tap.component in self.components for tap in taps)]
        if not left:
            raise InputError(
                f'blocks={self.blocks!r}, components={self.components!r} leave nothing to choose from: blocks are 0 to '
                f'{backbone.spec.num_blocks - 1}, components {", ".join(names)}'
            )
        return left

    def _stored_choice(self, runner: Runner, backbone: ASelectDiT) -> tuple[list[float], list[Tap]] | None:
        """The choice of the work directory's ``selection.json``, if that is the selection asked for."""
        stored = read_selection(Path(runner.work_dir) / 'selection.json')
        if stored is None or stored.get('request') != self._request(backbone):
            return None
        selection = Selection.from_dict(stored)
        return list(backbone.configured_timesteps or selection.timesteps), selection.taps

    def _request(self, backbone: ASelectDiT) -> dict[str, Any]:
        """What was asked for: a stored selection is only reused if this is the same."""
        request = {
            'recipe': digest(backbone.recipe).hex(),
            'alternatives': [[list(tap) for tap in taps] for taps in self._alternatives(backbone)],
            'num_timesteps': backbone.num_timesteps,
            'criteria': [criterion.parameters for criterion in self.criteria.values()],
            'timesteps': self.timesteps,
            'search': self.search,
            'num_images': self.num_images,
            'stability': self.stability,
            'seed': self.seed,
        }
        # As it comes back from the file.
        return json.loads(json.dumps(request))

    def _report(
        self, runner: Runner, selection: Selection, request: dict[str, Any], images: RunnerImages
    ) -> dict[str, Any]:
        import diffusers
        import mmengine

        backbone = images.backbone
        content = selection.save(
            runner.work_dir,
            functools.partial(self._write_pictures, runner, selection, images),
            seed=self.seed,
            request=request,
            config={
                'diffusion': json.loads(json.dumps(backbone.diffusion_config, default=str)),
                'timesteps': self.timesteps,
                'noise': backbone.noise,
                'noise_seed': backbone.noise_seed,
                'num_images': self.num_images,
                'pipeline': images.pipeline,
                'batch_size': images.batch_size,
            },
            data={'train_images': len(runner.train_dataloader.dataset), **_describe_validation(runner)},
            unreadable=[list(entry) for entry in images.unreadable.found],
            world_size=dist.get_world_size(),
            command=_command(),
            recipe=backbone.recipe,
            versions={
                'python': platform.python_version(),
                'mmaselect': __version__,
                'torch': torch.__version__,
                'diffusers': diffusers.__version__,
                'mmengine': mmengine.__version__,
            },
        )
        runner.logger.info('\n' + selection.table())
        # mmengine's own file is the log of the training: whoever plots it takes a step for an iteration.
        boards = [board for board in runner.visualizer._vis_backends.values() if not isinstance(board, LocalVisBackend)]
        for label in selection.sweep.scores:
            for timestep, score in zip(selection.sweep.timesteps, selection.curve(label)):
                for backend in boards:
                    backend.add_scalar(f'selection/{identifier(label)}', score, step=round(timestep))
        # Not by OpenCV, which does not know every name that a folder may have.
        with Image.open(Path(runner.work_dir) / 'selection.png') as curve:
            # With the suffix: MLflow writes a file of this name.
            runner.visualizer.add_image('selection.png', np.asarray(curve.convert('RGB')))
        return content

    def _write_pictures(
        self, runner: Runner, selection: Selection, images: RunnerImages, content: dict[str, Any]
    ) -> None:
        """Writes what ``report.html`` shows of images. A pass that fails here costs no selection, only the pictures."""
        from mmaselect.pages.pictures import write_pictures

        model, sigma = images.backbone.diffusion, getattr(self.criterion, 'sigma', 0.25)
        (drawn,) = draw_portions(len(images), images.group, self.seed)
        try:
            write_pictures(runner.work_dir, content, model, images, drawn, selection.taps[0], sigma)
        except (InputError, RuntimeError) as error:  # an image that has gone since, or no memory left
            runner.logger.warning(f'report.html has no pictures: {error!r}')


def _describe_validation(runner: Runner) -> dict[str, Any]:
    """What results must share to be comparable, and no log holds: how many images there are."""
    loop = runner._val_loop
    validation = loop.dataloader.dataset if isinstance(loop, BaseLoop) else None
    return {
        'val_images': None if validation is None else len(validation),
        'split': getattr(validation, 'split', None),
    }


def check_candidates(blocks: Sequence[int] | None, components: Sequence[str] | None) -> None:
    """Raises :class:`InputError` unless each is None or a list of what may be a block, or a component."""
    for name, values in (('blocks', blocks), ('components', components)):
        if values is not None and (not isinstance(values, (list, tuple)) or not values):
            raise InputError(f'{name}={values!r} is not valid: give a list, or None for all')
    for block in blocks or ():
        check_count(block, 'blocks', 0)
    for component in components or ():
        if not isinstance(component, str):
            raise InputError(f'components={components!r} is not valid: give names, such as query and value')


def _command() -> str:
    """The command that runs, to be pasted into a shell."""
    program, *arguments = sys.argv
    # ``mmaselect select`` is two words.
    start = program if program.startswith('mmaselect ') else shlex.quote(program)
    return ' '.join(['python ' * program.endswith('.py') + start, *map(shlex.quote, arguments)])


def _list(timesteps: Sequence[float] | None) -> str:
    return ', '.join(f'{timestep:g}' for timestep in timesteps or ())
