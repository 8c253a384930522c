"""One rank of a training under a strategy of mmengine's; it writes what it finds to ``OUT/RANK.json``.

    python tests/strategies.py CONFIG STRATEGY OUT

Run with the environment that ``torchrun`` gives its processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import MMFullyShardedDataParallel
from mmengine.registry import MODEL_WRAPPERS, RUNNERS

from mmaselect.hooks.images import find_backbone


@MODEL_WRAPPERS.register_module()
class ShardedOnCPU(MMFullyShardedDataParallel):
    """mmengine gives the number of the process as that of its device, where there is none."""

    def __init__(self, *args, device_id=None, **kwargs):
        super().__init__(*args, device_id=torch.device('cpu'), **kwargs)


def sums(backbone: torch.nn.Module) -> dict[str, float]:
    """Of the values of each frozen parameter that is there."""
    parameters = backbone.diffusion.named_parameters()
    return {name: value.double().abs().sum().item() for name, value in parameters if value.numel()}


def main(config: str, strategy: str, out: str) -> None:
    """Trains, and reports."""
    cfg = Config.fromfile(config)
    cfg.update(launcher='pytorch', work_dir=out, runner_type='FlexibleRunner')
    cfg.strategy = dict(type=strategy)
    if strategy == 'FSDPStrategy':
        cfg.strategy.update(model_wrapper=dict(type='ShardedOnCPU', use_orig_params=False), state_dict_cfg='full')
    runner = RUNNERS.build(cfg)
    runner.train()
    backbone = find_backbone(runner)
    report = dict(
        wrapper=type(runner.model).__name__,
        timestep=backbone.timestep,
        # As the wrapper sees them: of a sharded model flat ones, of which each rank has its share.
        parameters={name: parameter.numel() for name, parameter in runner.model.named_parameters()},
        frozen=sums(backbone),
        device=str(backbone.diffusion.device),
        identity=backbone.identity.hex(),
    )
    Path(out, f'{os.environ["RANK"]}.json').write_text(json.dumps(report))


if __name__ == '__main__':
    main(*sys.argv[1:])
