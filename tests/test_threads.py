"""Cores are given out once: to torch, to workers, or to another process of the run."""

from __future__ import annotations

import pytest
import torch

from mmaselect.threads import MOST, set_threads, side_by_side, thread_plan

TORCHRUN = {'LOCAL_WORLD_SIZE': '4'}
SLURM = {'SLURM_NTASKS_PER_NODE': '8'}


@pytest.mark.parametrize(
    'workers,device,cores,environ,threads,most',
    [
        (0, 'cpu', 2, {}, 2, 0),
        # Two cores have none to spare: workers wait for the pass most of the time.
        (4, 'cpu', 2, {}, 2, 0),
        (1, 'cpu', 8, {}, 7, 2),
        (4, 'cpu', 8, {}, 6, 2),
        (4, 'cuda', 16, {}, 12, 15),
        (32, 'cuda', 16, {}, 1, 15),
        (4, 'cuda', 1, {}, 1, 1),
        (2, 'cuda', 64, TORCHRUN, 14, 15),
        (0, 'cpu', 2, TORCHRUN, 1, 0),
        (4, 'cuda', 128, SLURM, 12, 15),
        # Each task was given its own: they are not divided again.
        (4, 'cuda', 16, {**SLURM, 'SLURM_CPUS_PER_TASK': '16'}, 12, 15),
        (4, 'cuda', 16, {'OMP_NUM_THREADS': '3'}, 3, 15),
    ],
)
def test_no_core_is_given_out_twice(workers, device, cores, environ, threads, most):
    plan = thread_plan(workers, device, cores, environ)
    assert (plan.threads, plan.workers) == (threads, most)


def test_the_plan_says_why():
    assert str(thread_plan(4, 'cuda', 64, TORCHRUN)) == (
        '64 cores of 4 processes together: 12 threads of torch, at most 15 workers'
    )
    assert 'as OMP_NUM_THREADS says' in str(thread_plan(0, 'cpu', 2, {'OMP_NUM_THREADS': '1'}))


def test_a_run_takes_what_the_plan_says(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    try:
        assert set_threads(dict(train_dataloader=dict(num_workers=2)), 'cpu').set_by_user
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('before,number', [(3, 3), (MOST + 1, MOST)])
def test_side_by_side_each_thread_computes_alone(before, number):
    at_first = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        with side_by_side() as threads:
            assert threads._max_workers == number
            assert set(threads.map(lambda _: torch.get_num_threads(), range(20))) == {1}
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(at_first)
