"""Memory over long runs; ``--soak`` runs them in full: 2,000 iterations, and 50 timesteps on 2,000 images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner

import mmaselect
from mmaselect.images import Batch
from mmaselect.selection.criteria import NoiseConsistentHFR
from mmaselect.selection.search import Search, run

#: What an allocator may keep back between one look and another.
SLACK = 12e6


def resident():
    """Bytes of this process that are in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def check_flat(name, values, step):
    """From a quarter of the run on, the higher half is no higher than the lower one."""
    settled = values[len(values) // 4 :]
    half = len(settled) // 2
    before, after = max(settled[:half]), max(settled[half:])
    every = max(1, len(values) // 8)
    shown = [f'{value / 1e6:.0f} MB at {index * step}' for index, value in enumerate(values) if index % every == 0]
    print(f'{name}: {", ".join(shown)}, {values[-1] / 1e6:.0f} MB at the end')
    assert after - before < SLACK, values


@HOOKS.register_module()
class Resident(Hook):
    """Notes the memory now and then."""

    values: list[int] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter % 10 == 0:
            self.values.append(resident())


@pytest.mark.parametrize('cached', [False, True], ids=['images', 'cache'])
def test_training(digits, tmp_path, soak, cached):
    iterations = 2000 if soak else 200
    config = Config.fromfile(DEMO)
    config.model.backbone.update(timestep=0, mean=[127.5] * 3, std=[127.5] * 3)
    config.custom_hooks = [dict(type='Resident')]
    if cached:
        config.model.backbone.cache = dict(dir=str(tmp_path / 'cache'))
        config.custom_hooks.append(dict(type='FeatureCacheHook'))
    config.train_dataloader.update(batch_size=16, num_workers=0, persistent_workers=False)
    config.train_dataloader.dataset.data_root = str(digits)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    config.train_dataloader.collate_fn = dict(type='default_collate')
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=10**6)
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.param_scheduler = []
    config.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=iterations // 4)
    config.default_hooks.logger.interval = 50
    config.work_dir = str(tmp_path / 'run')
    config.experiment_name = config.visualizer.name = f'long {tmp_path.name}'
    Resident.values.clear()
    try:
        Runner.from_cfg(config).train()
    finally:
        DefaultScope._instance_dict.clear()
    assert len(Resident.values) == iterations // 10
    check_flat(f'{iterations} iterations of head training', Resident.values, 10)


def test_a_sweep(soak):
    images, timesteps = (2000, 50) if soak else (192, 10)
    model = mmaselect.load(dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels'), 2)
    values = []

    def batches():
        generator = torch.Generator().manual_seed(0)
        for start in range(0, images, 16):
            values.append(resident())
            yield Batch(torch.rand(16, 3, 16, 16, generator=generator) * 2 - 1, range(start, start + 16))
        values.append(resident())

    grid = torch.linspace(0, 1000, timesteps, dtype=torch.float64).tolist()
    sweep = run(Search(model, grid, [NoiseConsistentHFR()]), [batches()])
    assert sweep.num_images == images
    assert sweep.block_evaluations == images * timesteps * 2 * 3
    check_flat(f'{timesteps} timesteps on {images} images', values, 16)
