"""How many threads torch takes, so that data loader workers and the other processes of a run have cores, too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

#: Threads that compute side by side: more would wait for Python's lock.
MOST = 8


@dataclass(frozen=True)
class ThreadPlan:
    """Threads and workers of one process.

    Attributes:
        cores: That this process may use.
        processes: Of the run on this machine: they share the cores.
        threads: That torch takes in this process.
        workers: Data loader workers that the rest of the cores can feed; more only get in each other's way.
        set_by_user: Whether ``OMP_NUM_THREADS`` has decided.
    """

    cores: int
    processes: int
    threads: int
    workers: int
    set_by_user: bool = False

    def __str__(self) -> str:
        shared = '' if self.processes == 1 else f' of {self.processes} processes together'
        why = ', as OMP_NUM_THREADS says' if self.set_by_user else ''
        return f'{self.cores} cores{shared}: {self.threads} threads of torch{why}, at most {self.workers} workers'


def thread_plan(
    workers: int = 0, device: str = 'cpu', cores: int | None = None, environ: Mapping[str, str] = os.environ
) -> ThreadPlan:
    """Divides the cores between torch's threads and data loader workers.

    The rule: the processes of a run on one machine share its cores evenly. On an accelerator torch leaves a core to
    each worker, because its own threads have little to do. On a CPU the pass of a frozen model takes far longer than
    decoding its images, so that workers mostly wait: at most a quarter of the cores is left to them. What
    ``OMP_NUM_THREADS`` says goes before all that. The number of workers is the config's: it decides which random
    numbers an augmentation draws, and a run must not depend on the machine.

    Args:
        workers: ``num_workers`` of the training data loader.
        device: Type of the device that runs the model.
        cores: That this process may use; None asks the system.
        environ: Where ``LOCAL_WORLD_SIZE`` (torchrun), ``SLURM_NTASKS_PER_NODE`` and ``SLURM_CPUS_PER_TASK`` are.

    Returns:
        The plan.
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    tasks = environ.get('LOCAL_WORLD_SIZE') or environ.get('SLURM_NTASKS_PER_NODE') or '1'
    processes = int(tasks) if tasks.isdigit() else 1
    share = max(cores // max(processes, 1), 1)
    if environ.get('SLURM_CPUS_PER_TASK', '').isdigit():
        share = min(cores, int(environ['SLURM_CPUS_PER_TASK']))
    most = share // 4 if device == 'cpu' else max(share - 1, 1)
    threads = max(share - min(workers, most), 1)
    asked = environ.get('OMP_NUM_THREADS', '')
    return ThreadPlan(cores, processes, int(asked) if asked.isdigit() else threads, most, asked.isdigit())


def set_threads(cfg: Mapping, device: str) -> ThreadPlan:
    """Gives torch in this process the threads of the plan for a config.

    Args:
        cfg: Of a run: its ``train_dataloader``, or else its ``test_dataloader``, says how many workers there are.
        device: Type of the device that runs the model.

    Returns:
        The plan.
    """
    loader = cfg.get('train_dataloader') or cfg.get('test_dataloader') or {}
    import torch

    plan = thread_plan(loader.get('num_workers', 0), device)
    torch.set_num_threads(plan.threads)
    return plan


@contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Threads of Python in the place of torch's, which gain little on small matrices.

    The results do not depend on how many there are.

    Yields:
        As many threads as torch has, at most :data:`MOST`.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(before, MOST)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)
