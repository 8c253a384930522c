"""What a work directory says of its run: logs, checkpoint and ``selection.json``, checked against each other.

Nothing in a work directory is executed: its dumped config is Python, and is read as the literals that it consists of.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmaselect.backbones.aselect import RECIPE, TAPS, TIMESTEP, read_choice
from mmaselect.datasets.layouts import LAYOUTS
from mmaselect.diffusion.recipe import digest
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.files import write_json
from mmaselect.selection.report import name_taps, read_selection
from mmaselect.toolboxes import scope_of, type_name

if TYPE_CHECKING:
    from mmengine.runner import Runner

#: A timestamp folder of mmengine.
TIMESTAMP = re.compile(r'\d{8}_\d{6}')
#: What a log calls the metric of a task, and what a leaderboard calls it.
METRICS = {
    'accuracy/top1': 'top-1 accuracy (%)',
    'mIoU': 'mIoU (%)',
    'PCK/bbox_0.1/point': 'PCK@0.1 of the box, per point (%)',
    'PCK/img_0.1/point': 'PCK@0.1 of the image, per point (%)',
}
#: What an evaluation without training leaves in its work directory.
EVALUATION = 'evaluation.json'
#: Parts of a config that do not change what is learned, or that are told apart by other columns.
IRRELEVANT = (
    'randomness', 'work_dir', 'load_from', 'resume', 'launcher', 'experiment_name', 'env_cfg', 'log_level',
    'log_processor', 'visualizer', 'vis_backends', 'default_hooks', 'custom_imports', 'auto_scale_lr',
    'test_dataloader', 'test_evaluator', 'test_cfg', 'test_pipeline', 'train_pipeline', 'tta_model', 'tta_pipeline',
    'dataset', 'dataset_type', 'data_root', 'classes', 'palette', 'metainfo', 'norm_cfg', 'crop_size',
    'model_wrapper_cfg',
)  # fmt: skip
#: Fields that change speed alone, or name places: what is there is known by the recipe, and the task.
IRRELEVANT_IN = {
    'dataloader': ('num_workers', 'persistent_workers', 'pin_memory', 'collate_fn', 'prefetch_factor'),
    'dataset': ('data_root',),
    'diffusion': ('pretrained', 'vae', 'device', 'revision'),
}


class Incomplete(Exception):
    """A run that has no result: its message says why."""


@dataclass(frozen=True)
class Task:
    """What results must share to be comparable.

    Attributes:
        dataset: Name of the data set.
        split: Its test split.
        images: Images in it; None if unknown.
        image_size: What the model sees (classification) or is trained on (the crop, in segmentation), as ``'256x256'``;
            None if unknown.
        metric: Name and unit of the metric.
        protocol: What else a number depends on; empty for ours: one evaluation, of the last checkpoint.
    """

    dataset: str
    split: str
    images: int | None
    image_size: str | None
    metric: str
    protocol: str = ''


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: Its work directory.
        name: Name of its config.
        task: What it measured.
        value: The metric at the end of training, on the last validation; not the best of all validations.
        seed: Of the runner; None if none was set.
        timesteps: In use, in [0, 1000].
        taps: Blocks and components in use, as text.
        recipe: Digest of all that its features depend on, in hexadecimal; see :mod:`~mmaselect.diffusion.recipe`.
        criterion: What selected; None where the config sets the timestep.
        block_evaluations: Of the selection: images times blocks times passes.
        selection_seconds: Of the selection.
        training_seconds: Of the training iterations, by the log.
        settings: The config, flattened, without what does not change the result.
        finished: When the last checkpoint was written, ``YYYY-MM-DD``.
        log: The file that ``value`` was read from.
    """

    folder: Path
    name: str
    task: Task
    value: float
    seed: int | None
    timesteps: tuple[float, ...]
    taps: str
    recipe: str
    criterion: str | None
    block_evaluations: int | None
    selection_seconds: float | None
    training_seconds: float
    finished: str
    log: Path
    settings: dict[str, Any] = field(repr=False)

    @property
    def variant(self) -> str:
        """What must agree for two runs to be seeds of one entry: the settings and the recipe."""
        content = json.dumps([self.settings, self.recipe], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()


def find_runs(folders: list[str | Path]) -> list[Path]:
    """Finds work directories.

    Args:
        folders: Work directories, or folders that hold some, at any depth.

    Returns:
        Every work directory once, in the order found.

    Raises:
        InputError: If a folder is not there, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f'work_dir={str(folder)!r} is not a folder')
        logs = sorted(log for log in folder.rglob('vis_data') if TIMESTAMP.fullmatch(log.parent.name))
        # A folder of tests alone, such as tools/test.py writes, has no scalars of a training.
        runs = {
            log.parents[1]
            for log in logs
            if (log / 'config.py').is_file() and (_trained(_scalars(log)) or (log.parents[1] / EVALUATION).is_file())
        }
        if not runs:
            raise InputError(
                f'work_dir={str(folder)!r} holds no run of tools/train.py: expected a */vis_data/ with config.py and '
                'scalars.json below it'
            )
        found.update(dict.fromkeys(sorted(runs)))
    return list(found)


def read_run(folder: Path) -> Run:
    """Reads a work directory.

    Args:
        folder: The work directory.

    Returns:
        The run.

    Raises:
        Incomplete: If training has not come to its end, its last validation is missing, or checkpoint, log and
            selection do not fit each other.
    """
    found = {log: _scalars(log) for log in folder.glob('*/vis_data') if TIMESTAMP.fullmatch(log.parent.name)}
    logs = {log: lines for log, lines in sorted(found.items()) if _trained(lines)}
    if not logs:
        return _read_evaluation(folder)
    last = max(logs)
    config = parse_config(last / 'config.py')
    settings = _settings(config)
    # LastValidationHook makes up for a validation in a log of its own.
    made_up = [
        lines
        for log, lines in sorted(found.items())
        if log > last and lines and _settings(parse_config(log / 'config.py')) == settings
    ]
    metric, value, seconds, end = _result(config, [line for lines in [*logs.values(), *made_up] for line in lines])
    checkpoint = _checkpoint(folder, last.parent.name, *end)
    # Strategies of mmengine's write the prefix of the wrapper.
    state = {name.removeprefix('module.'): value for name, value in checkpoint['state_dict'].items()}
    meta = checkpoint['meta']
    missing = [name for name in (RECIPE, TIMESTEP, TAPS) if f'backbone.{name}' not in state]
    if missing:
        raise Incomplete(
            f'its checkpoint lacks backbone.{missing[0]}: not of an ASelectDiT backbone, or of an earlier revision'
        )
    try:
        timesteps, taps, recipe = read_choice(state, 'backbone.')
    except InputError as error:
        raise Incomplete(str(error)) from error
    if timesteps is None or taps is None or recipe is None:
        raise Incomplete('its checkpoint has no timestep: nothing had chosen one')
    recipe_digest = digest(recipe).hex()
    selection = _selection(folder, config, recipe_digest, timesteps, taps)
    return Run(
        folder=folder,
        name=meta['experiment_name'].removesuffix(f'_{last.parent.name}'),
        task=_task(config, metric, meta.get('data') or selection.get('data', {})),
        value=value,
        seed=config.get('randomness', {}).get('seed'),
        timesteps=timesteps,
        taps=', '.join(dict.fromkeys(f'{tap.block} {tap.component}' for tap in taps)),
        recipe=recipe_digest,
        criterion=selection.get('criterion_label'),
        block_evaluations=selection.get('block_evaluations'),
        selection_seconds=selection.get('seconds'),
        training_seconds=seconds,
        finished=time.strftime('%Y-%m-%d', time.strptime(meta['time'], '%Y%m%d_%H%M%S')),
        log=last / 'scalars.json',
        settings=settings,
    )


def write_evaluation(runner: Runner, metrics: dict[str, float]) -> None:
    """Writes what a leaderboard needs of an evaluation without training, which has no checkpoint.

    Args:
        runner: That has tested.
        metrics: What it found.
    """
    from mmaselect.hooks.images import find_backbone

    backbone = find_backbone(runner)
    content = {
        'name': runner.experiment_name.removesuffix(f'_{runner.timestamp}'),
        'log': runner.timestamp,
        'metrics': metrics,
        'images': len(runner.test_dataloader.dataset),
        'timesteps': list(backbone.timesteps or ()),
        'taps': [list(tap) for tap in backbone.taps or ()],
        'recipe': digest(backbone.recipe).hex(),
    }
    write_json(Path(runner.work_dir) / EVALUATION, content)


def _read_evaluation(folder: Path) -> Run:
    try:
        content = json.loads((folder / EVALUATION).read_text(encoding='utf-8'))
        config = parse_config(folder / content['log'] / 'vis_data' / 'config.py')
        metric = next(key for key in METRICS if key in content['metrics'])
        value, timesteps = float(content['metrics'][metric]), tuple(map(float, content['timesteps']))
        taps = tuple(Tap(*tap) for tap in content['taps'])
        finished = time.strftime('%Y-%m-%d', time.strptime(content['log'], '%Y%m%d_%H%M%S'))
        recipe, images, name = content['recipe'], content['images'], content['name']
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise Incomplete(f'its {EVALUATION} cannot be read: {error!r}') from error
    selection = _selection(folder, config, recipe, timesteps, taps)
    config['val_dataloader'] = config.get('test_dataloader')
    task = _task(config, metric, {})
    return Run(
        folder=folder, name=name, task=replace(task, images=images), value=value,
        seed=config.get('randomness', {}).get('seed'), timesteps=timesteps,
        taps=', '.join(dict.fromkeys(f'{tap.block} {tap.component}' for tap in taps)), recipe=recipe,
        criterion=selection.get('criterion_label'), block_evaluations=selection.get('block_evaluations'),
        selection_seconds=selection.get('seconds'), training_seconds=0.0, finished=finished,
        log=folder / EVALUATION, settings=_settings(config),
    )  # fmt: skip


def parse_config(path: Path) -> dict[str, Any]:
    """Reads a config that mmengine dumped: assignments of literals and ``dict(...)``, and nothing else.

    Args:
        path: The file.

    Returns:
        Its variables.

    Raises:
        Incomplete: If it holds anything that would have to be executed, or cannot be parsed.
    """
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        out = {}
        for statement in tree.body:
            if not isinstance(statement, ast.Assign):
                raise ValueError(f'line {statement.lineno} is not an assignment')
            for target in statement.targets:
                if not isinstance(target, ast.Name):
                    raise ValueError(f'line {statement.lineno} assigns to more than a name')
                out[target.id] = _literal(statement.value)
        return out
    except (OSError, SyntaxError, ValueError) as error:
        raise Incomplete(f'{path.name} of its log cannot be read: {error}') from error


def _literal(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict' or len(node.args) > 1:
            raise ValueError(f'line {node.lineno} calls something')
        out = dict(_literal(node.args[0])) if node.args else {}
        out.update({keyword.arg: _literal(keyword.value) for keyword in node.keywords})
        return out
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if node is None:
        raise ValueError('a dict is unpacked into another')
    return ast.literal_eval(node)


def _scalars(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off by a kill is passed over."""
    file, lines = log / 'scalars.json', []
    for line in file.read_text(encoding='utf-8').splitlines() if file.is_file() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            lines.append(content)
    return lines


def _trained(lines: list[dict[str, Any]]) -> bool:
    return any('loss' in line for line in lines)


def _result(config: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[str, float, float, tuple[str, int]]:
    """Metric, its value, seconds of training, and the epoch or iteration of its end, if the log reaches it."""
    loop = config.get('train_cfg') or {}
    unit = 'epoch' if loop.get('by_epoch', type_name(loop) == 'EpochBasedTrainLoop') else 'iter'
    end = int(loop.get('max_epochs' if unit == 'epoch' else 'max_iters') or 0)
    training = [line for line in lines if 'loss' in line]
    # An iteration that was done twice, before a kill and after a resume, counts once.
    by_iteration: dict[int, dict[str, Any]] = {line.get('iter', line.get('step', 0)): line for line in training}
    final = max(by_iteration)
    # A validation at the end shows that the end was reached; the log need not hold the last iterations.
    validations = [line for line in lines if line.get('step') == end and any(key in line for key in METRICS)]
    others = {key for line in lines if line.get('step') == end and 'loss' not in line for key in line}
    others = {key for key in others if key not in ('step', 'time', 'data_time') and not key.startswith('selection/')}
    if not validations and others:
        raise Incomplete(f'its last validation has none of {", ".join(METRICS)}, but {", ".join(sorted(others))}')
    if not validations:
        last = max(line.get(unit, line.get('step', 0)) for line in training)
        raise Incomplete(
            f'no validation after its last {unit}, {end}' if last == end else f'stopped at {unit} {last} of {end}'
        )
    name = next(key for key in METRICS if key in validations[-1])
    value = validations[-1][name]
    if not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise Incomplete(f'its last validation has {name}={value!r}')
    times = [line['time'] for line in by_iteration.values() if 'time' in line]
    seconds = sum(times) / len(times) * final if times else 0.0
    return name, float(value), seconds, (unit, end)


def _checkpoint(folder: Path, stamp: str, unit: str, end: int) -> dict[str, Any]:
    """The last checkpoint, if it is that of the end of the last training."""
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        raise Incomplete('no last_checkpoint')
    # The path inside may be of another machine.
    file = folder / Path(pointer.read_text(encoding='utf-8').strip()).name
    if not file.is_file():
        raise Incomplete(f'its last checkpoint {file.name} is missing')
    try:
        checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        meta, _ = checkpoint['meta'], checkpoint['state_dict']
        reached, experiment, _ = meta[unit], meta['experiment_name'], time.strptime(meta['time'], '%Y%m%d_%H%M%S')
    except Exception as error:  # whatever a truncated or foreign file makes the unpickler stumble over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Incomplete(f'its checkpoint {file.name} cannot be read: {reason}') from error
    if reached != end:
        raise Incomplete(f'its checkpoint {file.name} was written at {unit} {reached}, its log ends at {end}')
    if not experiment.endswith(f'_{stamp}'):
        raise Incomplete(f'its checkpoint {file.name} is of the run {experiment!r}, its last log of {stamp}')
    return checkpoint


def _selection(
    folder: Path, config: dict[str, Any], recipe: str, timesteps: tuple[float, ...], taps: tuple[Tap, ...]
) -> dict[str, Any]:
    """``selection.json``, if it is the one that the checkpoint was trained with; empty where none was needed."""
    backbone = config.get('model', {}).get('backbone', {})
    if 'auto' not in (backbone.get('timestep', 'auto'), backbone.get('block'), backbone.get('component')):
        return {}
    try:
        selection = read_selection(folder / 'selection.json')
    except InputError as error:
        raise Incomplete(f'its selection.json cannot be read: {error}') from error
    if selection is None:
        raise Incomplete('its timestep was selected, but there is no selection.json')
    try:
        request, decision = selection['request'], selection['decisions'][selection['criterion_label']]
        found: dict[str, tuple[Any, Any]] = {'taps': ([name_taps([tap]) for tap in taps], decision['taps'])}
        if backbone.get('timestep', 'auto') == 'auto':
            found['timestep'] = (list(timesteps), [float(value) for value in decision['timesteps']])
        # A model that was pruned after the selection has another recipe than the one that it was selected on.
        if len(request['alternatives']) == 1:
            found['recipe'] = (request['recipe'], recipe)
    except (KeyError, TypeError, ValueError) as error:
        raise Incomplete(f'its selection.json is not of this revision: {error!r}') from error
    for what, (left, right) in found.items():
        if left != right:
            raise Incomplete(f'its checkpoint and selection.json differ in {what}: {left} and {right}')
    return selection


def _task(config: dict[str, Any], metric: str, data: dict[str, Any]) -> Task:
    """What was measured; ``data`` is what ``TimestepSelectionHook`` notes of the validation data."""
    dataset = (config.get('val_dataloader') or {}).get('dataset') or {}
    kind = type_name(dataset)
    layout = LAYOUTS.get(kind)
    root = Path(str(dataset.get('data_root', ''))).name
    return Task(
        dataset=layout.title if layout else f'{kind} {root}'.strip(),
        split=data.get('split') or dataset.get('split') or 'validation',
        images=data.get('val_images'),
        image_size=_image_size(config),
        metric=METRICS[metric],
    )


def _image_size(config: dict[str, Any]) -> str | None:
    """The test crop in classification, the training crop in segmentation, as configs are named after them."""
    segmentation = scope_of(config) == 'mmseg'
    loader = config.get('train_dataloader' if segmentation else 'val_dataloader') or {}
    for transform in reversed((loader.get('dataset') or {}).get('pipeline') or []):
        kind = type_name(transform)
        size = {'CenterCrop': 'crop_size', 'RandomCrop': 'crop_size', 'Resize': 'scale'}.get(kind)
        if size in transform:
            value = transform[size]
            sides = value if isinstance(value, list) else [value, value]
            # Crops are (height, width), scales (width, height).
            return 'x'.join(str(side) for side in (sides if size == 'crop_size' else reversed(sides)))
    return None


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The config as dotted names and values, without what does not change the result."""
    flat: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if not items:
            flat[name] = value
            return
        for key, item in items:
            if key == '_scope_' or any(name.endswith(end) and key in keys for end, keys in IRRELEVANT_IN.items()):
                continue
            walk(f'{name}.{key}' if name else str(key), item)

    walk('', {key: value for key, value in config.items() if key not in IRRELEVANT})
    return flat
