"""Starts scripts in forks of one process that has imported what they all import.

A tool imports torch, diffusers and the toolboxes for five seconds before it does anything, and the suite starts some
hundred of them. A fork is a process of its own all the same: with its own registries, loggers and exit status, and it
can be killed.

Where the order of imports is what is tested, the process has imported only what knows nothing of us and of what we
repair: half of the time, still.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path


class Fork:
    """What ``subprocess.Popen`` is for a program.

    Args:
        command: Script and arguments.
        pid: Process and process group.
        folder: What it prints, and in the end its exit status.
    """

    def __init__(self, command: list[str], pid: int, folder: tempfile.TemporaryDirectory):
        self._command, self.pid, self._folder = command, pid, folder
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit status, minus the signal that ended it, or None as long as it runs."""
        file = Path(self._folder.name, 'status')
        if self.returncode is None and file.exists():
            self.returncode = int(file.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end, and gives what was printed on stdout and stderr.

        Args:
            timeout: After so many seconds the test goes on without it; None is for a run that must end.

        Raises:
            subprocess.TimeoutExpired: It runs still after ``timeout`` seconds.
            AssertionError: It must have ended, and has not; says what it printed, and where its threads are.
        """
        end = time.monotonic() + (300 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                if timeout is not None:
                    raise subprocess.TimeoutExpired(self._command, timeout)
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGUSR1)
                time.sleep(1)
                printed = '\n'.join(text[-5000:] for text in self._printed())
                raise AssertionError(f'{self._command} does not end\n{printed}')
            time.sleep(0.01)
        return self._printed()

    def _printed(self) -> tuple[str, str]:
        out, err = (Path(self._folder.name, name).read_text() for name in ('stdout', 'stderr'))
        return out, err

    def kill(self) -> tuple[str, str]:
        """Ends it and all of its group by SIGKILL; gives what was printed until then."""
        if self.poll() is None:
            # It may end by itself this moment.
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return self.communicate()


class Forks:
    """The process of which tools are forks, seen from the tests.

    Args:
        environment: Its environment variables.
        imports: What it imports: ``'tools'`` or ``'others'``.
        python: Its interpreter.
        cwd: Where scripts run; by default where the tests do.
    """

    def __init__(
        self, environment: dict[str, str], imports: str, python: str | Path = sys.executable, cwd: Path | None = None
    ):
        self._environment, self._cwd = environment, cwd
        self._process = subprocess.Popen(
            [python, __file__, imports],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        atexit.register(self._process.stdin.close)

    def start(self, script: Path, *args: str, env: dict[str, str] | None = None) -> Fork:
        """Starts a script.

        Args:
            script: Its path.
            *args: Its arguments.
            env: Environment variables beside those of the process.
        """
        folder, command = tempfile.TemporaryDirectory(), [str(script), *args]
        environment = {**self._environment, **(env or {})}
        order = dict(command=command, folder=folder.name, cwd=str(self._cwd or os.getcwd()), environment=environment)
        self._process.stdin.write(json.dumps(order) + '\n')
        self._process.stdin.flush()
        return Fork(command, int(self._process.stdout.readline()), folder)

    def run(self, script: Path, *args: str) -> subprocess.CompletedProcess:
        """Runs a script to its end; gives what ``subprocess.run`` gives.

        Args:
            script: Its path.
            *args: Its arguments.
        """
        fork = self.start(script, *args)
        try:
            out, err = fork.communicate()
        finally:
            fork.kill()
        return subprocess.CompletedProcess([str(script), *args], fork.returncode, out, err)


def leave_configs_unformatted() -> None:
    """A runner formats its whole config by yapf, which takes up to a second and changes no value.

    mmengine takes the function from yapf when it is imported, so this comes before.
    """
    from yapf.yapflib import yapf_api

    @functools.wraps(yapf_api.FormatCode)
    def leave(text: str, style_config: dict) -> tuple[str, bool]:
        return text, False

    yapf_api.FormatCode = leave


def read_metafiles_once() -> None:
    """A config that inherits from a toolbox's reads the metafiles of all its models, a hundred files each time."""
    from mmengine.config import Config, utils

    utils._get_cfg_metainfo = functools.cache(utils._get_cfg_metainfo)
    Config.fromfile(Path(__file__).parents[1] / 'configs/demo/dit-nano_linear_bs64-20e_digits-16px.py')


#: What takes long and neither repairs nor is repaired.
OTHERS = (
    'torch.distributed.fsdp', 'torch.distributed.optim', 'transformers', 'yaml', 'cv2', 'matplotlib.pyplot', 'sklearn',
)  # fmt: skip


def import_others() -> None:
    """Imports what must not matter to the order of the rest."""
    for name in OTHERS:
        with suppress(ImportError):
            importlib.import_module(name)
    toolboxes = {'mmengine', 'mmcv', 'mmpretrain', 'mmseg', 'mmdet'}
    assert not {'mmaselect', 'torchvision', 'diffusers', 'pkg_resources', *toolboxes} & set(sys.modules)


def import_tools() -> None:
    """Imports what tools import, in their order: ours first, because it repairs the stack."""
    import mmaselect  # noqa: F401, I001
    import mmengine.runner  # noqa: F401
    import mmpretrain.apis  # noqa: F401
    import mmseg.apis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torchvision  # noqa: F401
    from diffusers import AutoencoderKL, DiTTransformer2DModel, SD3Transformer2DModel  # noqa: F401

    read_metafiles_once()


def next_order() -> dict | None:
    """Answers each order with the number of a fork; returns the order in that fork, and None when there are no more."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
    # What imports print must not pass for an answer.
    os.dup2(2, 1)
    leave_configs_unformatted()
    {'tools': import_tools, 'others': import_others}[sys.argv[1]]()
    # Every data set of mmengine's collects garbage when it is built: what was imported is none.
    gc.freeze()
    for line in orders:
        order = json.loads(line)
        # Two generations: somebody has to wait for each run, and this process for orders.
        if os.fork() == 0:
            pid = os.fork()
            if pid == 0:
                return order
            os.setpgid(pid, pid)
            answers.write(f'{pid}\n')
            answers.flush()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            Path(order['folder'], 'status.tmp').write_text(str(status))
            Path(order['folder'], 'status.tmp').rename(Path(order['folder'], 'status'))
            os._exit(0)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return None


def become(order: dict) -> None:
    """Runs a script as ``python SCRIPT`` would."""
    # Not before: as long as it is no group of its own, nobody was told its number, and nobody can kill it.
    while os.getpgid(0) != os.getpid():
        time.sleep(0.001)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(Path(order['folder'], name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(order['cwd'])
    os.environ.clear()
    os.environ.update(order['environment'])
    sys.argv = order['command']
    paths = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    sys.path[:] = [str(Path(sys.argv[0]).parent), *(path for path in paths if path not in sys.path), *sys.path[1:]]

    import numpy
    import torch

    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # A test that waits in vain says where.
    faulthandler.register(signal.SIGUSR1)
    # All forks would draw the same numbers, and what was never seeded would look as if it were.
    random.seed()
    numpy.random.seed()
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    order = next_order()
    if order is not None:
        become(order)
