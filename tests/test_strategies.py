"""mmengine's strategies: the frozen model is in no flat parameter and no checkpoint, and stays as it was."""

from __future__ import annotations

import json
import socket
import types

import pytest
import torch
from conftest import DEMO, ROOT, forks, needs_torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from strategies import sums

from mmaselect.hooks.images import settle_normalisation

RANKS = 2
#: Of the demo's head: 128 channels, ten digits.
HEAD = 128 * 10 + 10


@pytest.fixture(scope='module')
def config(digits, tmp_path_factory):
    """The demo, for an epoch of two iterations, without validation."""
    cfg = Config.fromfile(DEMO)
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    cfg.train_dataloader.dataset.update(data_root=str(digits), indices=64)
    cfg.train_dataloader.update(batch_size=16, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.collate_fn = dict(type='default_collate')
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    (hook,) = cfg.custom_hooks
    hook.update(timesteps=[0, 400], num_images=8, batch_size=4, pipeline='train')
    path = tmp_path_factory.mktemp('strategies') / 'config.py'
    cfg.dump(path)
    return path


def train(config, strategy, out):
    """Runs all ranks; gives what each reports, and the checkpoint."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    shared = dict(WORLD_SIZE=str(RANKS), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    runs = [
        forks().start(
            ROOT / 'tests/strategies.py', str(config), strategy, str(out),
            env={**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(200)
        assert run.returncode == 0, errors[-3000:]
    reports = [json.loads((out / f'{rank}.json').read_text()) for rank in range(RANKS)]
    return reports, torch.load(out / 'epoch_1.pth', weights_only=True)


@pytest.fixture(scope='module')
def alone(config):
    """The same model, built alone."""
    init_default_scope('mmpretrain')
    try:
        return MODELS.build(Config.fromfile(config).model)
    finally:
        DefaultScope._instance_dict.clear()


@pytest.fixture(scope='module', autouse=True)
def as_read(alone):
    """The frozen model before any of it goes."""
    return sums(alone.backbone)


@pytest.mark.parametrize(
    'strategy,wrapper',
    [
        ('DDPStrategy', 'MMDistributedDataParallel'),
        pytest.param(
            'FSDPStrategy',
            'ShardedOnCPU',
            marks=pytest.mark.skipif(
                torch.__version__ < '2.7', reason='FSDP of torch 2.6 does not gather its shards on a CPU'
            ),
        ),
    ],
)
def test_two_ranks(config, alone, as_read, strategy, wrapper, tmp_path):
    reports, checkpoint = train(config, strategy, tmp_path)
    for report in reports:
        assert (report['wrapper'], report['device']) == (wrapper, 'cpu')
        assert report['identity'] == alone.backbone.identity.hex()
        assert report['timestep'] == reports[0]['timestep'] in (0, 400)
    sizes = [sum(report['parameters'].values()) for report in reports]
    if strategy == 'FSDPStrategy':
        # One flat parameter, of which each rank has a half.
        assert [list(report['parameters']) for report in reports] == [['_fsdp_wrapped_module._flat_param']] * RANKS
        assert sum(sizes) == HEAD
    else:
        assert sizes == [HEAD] * RANKS
    # What the chosen timestep does not need is gone in both once an image was read; what is left is as it was read.
    alone.backbone.set_choice(reports[0]['timestep'])
    settle_normalisation(alone.backbone, alone.data_preprocessor)
    alone.backbone.eval()(torch.zeros(1, 3, 16, 16))
    left = {name: as_read[name] for name in sums(alone.backbone)}
    assert 0 < len(left) < len(as_read)
    assert [report['frozen'] for report in reports] == [pytest.approx(left, rel=1e-12)] * RANKS
    # mmengine writes what its wrapper gives it, and strips the prefix when it loads.
    state = {key.removeprefix('module.'): value for key, value in checkpoint['state_dict'].items()}
    assert sorted(key for key in state if key.startswith('backbone')) == [
        f'backbone.{name}' for name in ('recipe', 'taps', 'timestep')
    ]
    assert state['backbone.timestep'] == reports[0]['timestep']
    # Any number of ranks may go on from it, one among them.
    assert alone.load_state_dict(state).missing_keys == []
    assert sum(value.numel() for key, value in state.items() if key.startswith('head')) == HEAD
    buffers = [value for entry in checkpoint['optimizer']['state'].values() for value in entry.values()]
    assert max(value.numel() for value in buffers if isinstance(value, torch.Tensor)) <= HEAD


class Engine(torch.nn.Module):
    """What DeepSpeed makes of a model, as far as it matters here: it halves it and flattens what the optimizer has."""

    def __init__(self, module):
        super().__init__()
        self.module = module.half()
        self.flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@needs_torch('2.6', 'float16 on a CPU')
def test_deepspeed(config, alone):
    """mmengine's wrapper around a stand-in for DeepSpeed's engine."""
    from mmengine._strategy.deepspeed import MMDeepSpeedEngineWrapper
    from mmpretrain.structures import DataSample

    init_default_scope('mmpretrain')
    try:
        model = MODELS.build(Config.fromfile(config).model)
    finally:
        DefaultScope._instance_dict.clear()
    for one in (model, alone):
        one.backbone.set_choice(400)
        settle_normalisation(one.backbone, one.data_preprocessor)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    seen, steps = [], []
    model.backbone.register_forward_hook(lambda _, __, maps: seen.append(maps[0]))
    wrapper = MMDeepSpeedEngineWrapper(model=Engine(model), inputs_to_half=['inputs'])
    assert wrapper.flat.numel() == HEAD
    assert {parameter.dtype for parameter in model.backbone.diffusion.parameters()} == {torch.float32}
    samples = [DataSample().set_gt_label(number) for number in range(4)]
    losses = wrapper.train_step(
        dict(inputs=images, data_samples=samples), types.SimpleNamespace(update_params=steps.append)
    )
    assert steps[0].requires_grad
    assert losses['loss'] > 0
    assert seen[0].dtype == torch.float16
    exact = alone.backbone.eval()(alone.data_preprocessor(dict(inputs=images))['inputs'])[0]
    torch.testing.assert_close(seen[0].float(), exact, rtol=0.01, atol=0.01)
    assert sum(value.numel() for key, value in wrapper.module.state_dict().items() if 'head' in key) == HEAD
    assert not [key for key in wrapper.module.state_dict() if 'transformer' in key]
