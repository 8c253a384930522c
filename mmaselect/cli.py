"""What the command line tools share: OpenMMLab's usual arguments, and errors of one line."""

from __future__ import annotations

import argparse
import atexit
import errno
import inspect
import io
import os
import re
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaselect.compat import end_process_group
from mmaselect.errors import InputError, one_line  # InputError is re-exported: tools raise it
from mmaselect.files import remove_abandoned
from mmaselect.threads import set_threads
from mmaselect.toolboxes import scope_of, type_name

# torch and mmengine are imported where they are used: ``--help`` needs neither.
if TYPE_CHECKING:
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on; each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def find_input_error(error: BaseException | None) -> InputError | None:
    """Looks for an :class:`InputError` in the chain of causes: registries and data loaders wrap what they catch."""
    return next((cause for cause in causes(error) if isinstance(cause, InputError)), None)


def describe_data_error(error: BaseException) -> str | None:
    """Puts into one line what a toolbox's data set says when its files are not there; None for any other error."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    # Only these types: a fault in a data set class of the user's own deserves its traceback.
    if 'build_dataloader' not in frames or not isinstance(error, (FileNotFoundError, NotADirectoryError, RuntimeError)):
        return None
    return f'a data set cannot be built: {" ".join(str(error).split())}'


def run(main: Callable[[], None]) -> None:
    """Runs a tool; bad input ends it with one line on stderr and exit code 2.

    Args:
        main: The tool.
    """
    # mmengine's look-up of other packages' configs imports it; the user can do nothing about that.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated', category=UserWarning)
    # A character that the terminal does not know, of a folder's name or a table, ends no run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except Exception as error:
        line = (
            find_input_error(error)
            or describe_data_error(error)
            or describe_disk_error(error)
            or describe_lost_rank(error)
            or describe_unknown_field(error)
        )
        if line is None:
            if uses_gloo():
                traceback.print_exc()
                leave(1)
            raise
        sys.stderr.write(f'error: {line}\n')
        sys.stderr.flush()
        leave(2)
        sys.exit(2)
    leave()


def describe_unknown_field(error: BaseException) -> str | None:
    """Puts into one line that a class of ours was given a field that it does not have; None for any other error."""
    found = re.search(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or found is None:
        return None
    import mmaselect
    from mmaselect import pretraining

    # Python 3.9 does not name the class; mmengine's registry, which calls it, does.
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    kind = found[1] or getattr(frame.f_locals.get('obj_cls'), '__name__', '')
    owner = getattr(mmaselect, kind, None) or getattr(pretraining, kind, None)
    if owner is None:
        return None
    known = ', '.join(name for name in inspect.signature(owner).parameters)
    return f'field of {kind}={found[2]!r} is not known; choose from: {known}'


def describe_disk_error(error: BaseException | None) -> str | None:
    """Puts into one line that a file or folder cannot be written; None for any other error."""
    full = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG)
    closed = (errno.EACCES, errno.EPERM, errno.ENOTDIR)
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (*full, *closed):
            # What fails while it is written to knows its name no more.
            name = cause.filename or 'a file of this run'
            return f'{name} cannot be {"written" if cause.errno in full else "used"}: {cause.strerror}'
    return None


def describe_lost_rank(error: BaseException) -> str | None:
    """Puts into one line that another process of the run is gone; None for any other error."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()) or not isinstance(error, RuntimeError):
        return None
    signs = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'Timed out', 'NCCL', 'timed out')
    if not any(sign in str(error) for sign in signs):
        return None
    return (
        f'rank {distributed.get_rank()} of {distributed.get_world_size()} stops, because another one has ended or does '
        f'not answer; its own output says why ({one_line(error)})'
    )


def uses_gloo() -> bool:
    """Whether this process is a rank of a CPU run."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == 'gloo'


def leave(code: int = 0) -> None:
    """Ends a rank of a CPU run without tearing the interpreter down.

    A wrapped model keeps the process group alive after it was destroyed, and gloo's threads with it; one that runs
    while the interpreter shuts down now and then aborts a run that has succeeded. Destroying the group may never end,
    see :func:`mmaselect.compat.end_process_group`.

    Args:
        code: Exit status.
    """
    if uses_gloo():
        # What else was registered for the end, log files among it, is still done.
        atexit.unregister(end_process_group)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every OpenMMLab tool has: config, work dir, options, launcher."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file path')
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    add_cfg_options(parser)
    parser.add_argument('--no-pin-memory', action='store_true', help='disable pin_memory in dataloaders')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank since torch 2.0, --local_rank before.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


class _DictAction(argparse.Action):
    """mmengine's ``DictAction``, imported when there is an option to read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``, as every OpenMMLab tool has it."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_DictAction,
        help='override settings of the config, as key=value pairs: model.backbone.block=12, key="[a,b]" or key=a,b '
        'for a list, key="[(a,b),(c,d)]" for nested ones; no white space',
    )


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Reads a config, and merges ``--cfg-options`` where they are given.

    Raises:
        InputError: If there is no such config.
    """
    if not Path(path).is_file():
        raise InputError(f'config={path!r} is not a file')
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    if options is not None:
        cfg.merge_from_dict(options)
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and merges what :func:`base_parser` parsed; ``--cfg-options`` are merged by the caller, last.

    Args:
        args: Parsed arguments.

    Returns:
        The config, with ``launcher`` and ``work_dir`` set.

    Raises:
        InputError: If there is no such config.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    # The usual order: command line, then the config, then the config's name.
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    remove_abandoned(cfg.work_dir)
    return cfg


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Adds ``--resume``, as every OpenMMLab tool that trains has it."""
    parser.add_argument(
        '--resume',
        nargs='?',
        type=str,
        const='auto',
        help='a checkpoint to resume from, or nothing for the latest one in the work directory',
    )


def merge_resume(cfg: Config, resume: str | None) -> None:
    """Merges ``--resume``: a checkpoint, ``'auto'`` for the latest one, or None.

    Raises:
        InputError: If the checkpoint does not exist.
    """
    if resume is None:
        return
    if resume != 'auto' and not Path(resume).is_file():
        raise InputError(f'--resume {resume!r} is not a file')
    cfg.resume = True
    cfg.load_from = latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names, or else the newest that can be read.

    mmengine writes both files in place, so that a run that was killed may leave either of them cut off.

    Args:
        work_dir: Of the run.

    Returns:
        Its path; None if there is none.
    """
    folder = Path(work_dir)
    named = folder / 'last_checkpoint'
    try:
        first = [Path(named.read_text(encoding='utf-8').strip() or named)]
    except (OSError, UnicodeDecodeError):
        first = []
    # A work directory may have been moved since.
    first += [folder / path.name for path in first]
    newest = sorted(folder.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*first, *newest]:
        if path.suffix == '.pth' and _is_whole(path):
            if path not in first:
                sys.stderr.write(f'{named} names no checkpoint that can be read: resuming from {path}\n')
            return str(path)
    # mmengine would resume from whatever it names.
    named.unlink(missing_ok=True)
    return None


def check_checkpoint(path: str | Path) -> None:
    """Checks that a file is a checkpoint of tensors and plain values, and whole; nothing in it is run.

    Raises:
        InputError: If it is cut off, or names code.
    """
    import torch

    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'{path} cannot be read as a checkpoint (cut off, or not one of weights): {reason}') from error
    if not isinstance(content, dict):
        raise InputError(f'{path} cannot be read as a checkpoint: it holds a {type(content).__name__}')


def check_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Checks that a checkpoint has the weights of a model's head, and finite ones.

    mmengine only logs what does not fit, and goes on with the random weights that the head was built with.

    Raises:
        InputError: If a tensor is missing, has another shape, or holds NaN or infinity.
    """
    import torch

    content = torch.load(path, map_location='cpu', weights_only=True)
    found = {name.removeprefix('module.'): value for name, value in content.get('state_dict', content).items()}
    for name, expected in model.state_dict().items():
        # The backbone's own entries: it checks them when it takes them over.
        if name.split('.')[0] == 'backbone':
            continue
        value = found.get(name)
        if not isinstance(value, torch.Tensor):
            raise InputError(f'{path} has no {name}: it is not a checkpoint of this config')
        if value.shape != expected.shape:
            raise InputError(
                f'{path}: {name} is {tuple(value.shape)}, expected {tuple(expected.shape)}: it is not a checkpoint of '
                'this config'
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f'{path}: {name} holds NaN or infinity: the training diverged')


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint is a whole zip file, each of whose entries has its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def finish_config(cfg: Config, args: argparse.Namespace, persistent_workers: bool = True) -> Config:
    """Fills in what the toolboxes' own tools fill into dataloaders, then merges ``--cfg-options``.

    Args:
        cfg: The config.
        args: Parsed arguments.
        persistent_workers: Keep workers between epochs, where there are any.

    Returns:
        The same config.
    """
    import torch
    from mmengine.config import ConfigDict

    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(field)
        if loader is None:
            continue
        defaults = ConfigDict(pin_memory=torch.cuda.is_available() and not args.no_pin_memory)
        # mmpretrain's own tools collate by stacking, mmseg's leave lists; each data preprocessor expects its own.
        if scope_of(cfg) == 'mmpretrain':
            defaults.collate_fn = dict(type='default_collate')
        if not loader.get('num_workers', 0):
            # torch refuses it without workers, which --cfg-options may have taken away.
            loader.persistent_workers = False
        elif persistent_workers:
            defaults.persistent_workers = True
        for key, value in defaults.items():
            loader.setdefault(key, value)
        if args.no_pin_memory:
            loader.pin_memory = False
    return cfg


def check_data(cfg: Config, *fields: str) -> None:
    """Checks that the standard data sets of a config lie where it says, and that its head has their classes.

    Args:
        cfg: The config.
        *fields: The data loaders in use: ``'train_dataloader'`` and so on; those that the config lacks are passed over.

    Raises:
        InputError: If a folder, a file or the number of classes is not what the data set has.
    """
    from mmaselect.datasets import LAYOUTS, check_layout

    model = cfg.model
    while isinstance(model.get('module'), dict):
        model = model.module
    for field in fields:
        dataset: Any = (cfg.get(field) or {}).get('dataset')
        # Wrappers, such as RepeatDataset, hold the data set that counts.
        while isinstance(dataset, dict) and isinstance(dataset.get('dataset'), dict):
            dataset = dataset['dataset']
        name = type_name(dataset)
        if name not in LAYOUTS:
            continue
        if dataset.get('data_root'):
            check_layout(name, dataset['data_root'], dataset.get('split', 'train'))
        if dataset.get('metainfo') or dataset.get('classes'):
            continue
        for head in ('head', 'decode_head'):
            settings = model.get(head)
            found = settings.get('num_classes') if isinstance(settings, dict) else None
            if found not in (None, LAYOUTS[name].num_classes):
                raise InputError(
                    f'model.{head}.num_classes={found} does not fit {field}: {name} has '
                    f'{LAYOUTS[name].num_classes} classes'
                )


def build_runner(cfg: Config, *fields: str) -> Runner:
    """Builds the runner of a config: mmengine's, or the one that ``runner_type`` names.

    Args:
        cfg: The config.
        *fields: The data loaders that will be used, see :func:`check_data`.
    """
    from mmengine.device import get_device
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from mmaselect.datasets.readable import name_broken_files

    check_data(cfg, *fields)
    name_broken_files()
    if cfg.get('load_from') and Path(cfg.load_from).is_file():
        check_checkpoint(cfg.load_from)
    elif cfg.get('load_from') and '://' not in cfg.load_from:
        raise InputError(f'load_from={cfg.load_from!r} is not a file')
    wrapper = str((cfg.get('optim_wrapper') or {}).get('type'))
    if 'train_dataloader' in fields and 'AmpOptimWrapper' in wrapper and get_device() in ('cpu', 'mps'):
        raise InputError(f'--amp, or optim_wrapper.type={wrapper!r}, needs an accelerator: this machine has none')
    set_threads(cfg, get_device())
    return Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of tools that select; they override the hook of the config."""
    parser.add_argument(
        '--num-images', type=_number_or_auto, help="training images to select on, or 'auto' for as many as it takes"
    )
    parser.add_argument(
        '--timesteps', type=float, nargs='+', help='timesteps to try, 0-1000; default: those of the config'
    )
    parser.add_argument('--criterion', help='InstanceInformation, HighFrequencyRatio, NoiseConsistentHFR, ...')
    parser.add_argument('--sigma', type=float, help='sigma of the criterion, in cycles per sample')
    parser.add_argument('--search', help='sweep or coarse-to-fine')
    parser.add_argument('--seed', type=int, help='seed of images and noises')


def _number_or_auto(text: str) -> int | str:
    return text if text == 'auto' else int(text)


def build_selection(cfg: Config, args: argparse.Namespace, **overrides: Any) -> tuple[Any, Any]:
    """Builds a runner whose backbone has everything open that a selection can choose, and the hook that chooses.

    Args:
        cfg: The config, with or without a ``TimestepSelectionHook``.
        args: Parsed, with those of :func:`add_selection`.
        **overrides: Arguments of the hook that go before both.

    Returns:
        Runner and hook; the runner does not know the hook.
    """
    from mmaselect.hooks import TimestepSelectionHook

    settings: dict[str, Any] = {}
    for hook in cfg.get('custom_hooks') or []:
        if type_name(hook) == TimestepSelectionHook.__name__:
            settings = {key: value for key, value in hook.items() if key not in ('type', 'priority')}
    for key in ('num_images', 'timesteps', 'search', 'seed'):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.criterion is not None:
        settings['criterion'] = dict(type=args.criterion)
    if args.sigma is not None:
        settings['criterion'] = dict(settings.get('criterion') or dict(type='HighFrequencyRatio'), sigma=args.sigma)
    hook = TimestepSelectionHook(**{**settings, **overrides})
    cfg.load_from, cfg.resume = None, False
    # A timestep that the config sets is what the user wants to compare with, not a reason to stop.
    backbone = cfg.model.backbone
    if isinstance(backbone.get('timestep'), (list, tuple)):
        backbone.num_timesteps = len(backbone.timestep)
    backbone.timestep = 'auto'
    runner = build_runner(cfg, 'train_dataloader')
    hook.before_run(runner)
    return runner, hook
