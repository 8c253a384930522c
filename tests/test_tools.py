"""The tools as users run them: real processes on small real data."""

from __future__ import annotations

import html
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import DEMO as CONFIG
from conftest import ROOT, accuracies, error_line, launch, options, run_tool, start_ranks, start_tool
from mmengine.registry import DefaultScope
from safetensors import safe_open

from mmaselect.diffusion.recipe import digest

EPOCHS = re.compile(r'Epoch\(train\)\s+\[\s*(\d+)\]')


def test_training_selects_trains_and_saves_little(trained):
    folder, printed = trained
    selection = json.loads((folder / 'selection.json').read_text())
    for key in ('timestep', 'block', 'component', 'criterion', 'config', 'timesteps', 'scores', 'num_images',
                'block_evaluations', 'seconds', 'versions', 'seed'):  # fmt: skip
        assert key in selection
    assert selection['timesteps'] == [0, 400, 900]
    assert selection['config']['diffusion']['pretrained'] == 'mmaselect://dit-nano_digits'
    # Two criteria, two views, three blocks up to block 2.
    label = 'instance information (2 views, 1x1 and 2x2 cells)'
    assert list(selection['scores']) == [label, 'HFR (sigma 0.25)']
    assert selection['criterion']['views'] == dict(crop=0.7, rotate=15)
    assert selection['noise'] == 'fixed'
    assert selection['block_evaluations'] == 40 * 3 * 2 * 3
    assert selection['encoder_runs'] == 40 * 2
    # Plain HFR follows the injected noise, instance information does not.
    assert selection['timestep'] == selection['choices'][label] == 400
    assert selection['choices']['HFR (sigma 0.25)'] == 900
    assert 'The criteria DISAGREE' in printed
    assert 'Trust instance information most.' in printed
    assert f'selected timestep 400, block 2 query, by {label}: sweep' in printed
    assert (folder / 'selection.png').read_bytes().startswith(b'\x89PNG')
    # The command, and the recipe whose digest the leaderboard shows.
    assert selection['command'].startswith(f'python {ROOT}/tools/train.py {CONFIG} --work-dir {folder} ')
    assert digest(selection['recipe']).hex() == selection['request']['recipe']
    page = (folder / 'report.html').read_text()
    assert 'Timestep 400, block 2 query' in page
    assert selection['command'] in html.unescape(page)
    pictures = json.loads((folder / 'decomposition.json').read_text())
    assert (pictures['timestep'], pictures['tap']) == (400, 'block 2 query')
    assert [0 < image['hfr'] < 1 for image in pictures['images']] == [True] * 3
    assert all(image['name'] in page for image in pictures['images'])

    checkpoint = torch.load(folder / 'epoch_3.pth', weights_only=True)
    backbone = {key: value for key, value in checkpoint['state_dict'].items() if key.startswith('backbone')}
    assert set(backbone) == {'backbone.timestep', 'backbone.recipe', 'backbone.taps'}
    assert backbone['backbone.timestep'] == 400
    assert (folder / 'epoch_3.pth').stat().st_size < 200_000
    # 150 images in 3 epochs are enough to be far from the 10 % of chance.
    assert accuracies(printed)[-1] > 40
    assert not [path for path in folder.rglob('*') if '.tmp' in path.name]


def test_the_log_of_the_training_holds_nothing_else(trained):
    """The toolboxes' tools take every line without a learning rate for a validation, and its step for an iteration."""
    from mmpretrain.utils import load_json_log

    folder, printed = trained
    (scalars,) = folder.glob('*/vis_data/scalars.json')
    log = load_json_log(scalars)
    assert [entry['accuracy/top1'] for entry in log['val']] == pytest.approx(accuracies(printed), abs=1e-3)
    assert [entry['step'] for entry in log['val']] == [1, 2, 3]
    assert [entry['iter'] for entry in log['train']] == list(range(1, 58))
    assert list(folder.glob('*/vis_data/vis_image/selection.png_*.png'))


def test_testing_uses_the_stored_choice(trained, digits, tmp_path):
    folder, printed = trained
    out = tmp_path / 'metrics.json'
    done = run_tool(
        'test.py', CONFIG, folder / 'epoch_3.pth', '--work-dir', tmp_path, '--out', out, '--out-item', 'metrics',
        *options(digits),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())['accuracy/top1'] == pytest.approx(accuracies(printed)[-1], abs=1e-4)
    assert 'selecting the timestep' not in done.stdout
    assert not (tmp_path / 'selection.json').exists()


def test_a_checkpoint_over_other_frozen_weights(trained, digits, tmp_path):
    folder, _ = trained
    done = run_tool(
        'test.py', CONFIG, folder / 'epoch_3.pth', '--work-dir', tmp_path,
        *options(digits, **{'model.backbone.block': 3}),
    )  # fmt: skip
    assert 'trained on block 2 query, but the config says block=3' in error_line(done)
    other = tmp_path / 'other.py'
    arch = dict(num_layers=5, num_attention_heads=4, attention_head_dim=32, in_channels=1, sample_size=16)
    diffusion = dict(_delete_=True, type='SiT', arch=arch, latent='pixels')
    other.write_text(f'_base_ = {str(CONFIG)!r}\nmodel = dict(backbone=dict(diffusion={diffusion!r}))\n')
    done = run_tool('test.py', other, folder / 'epoch_3.pth', '--work-dir', tmp_path, *options(digits))
    assert re.search(r'trained on other features: .* in the config, .* in training', error_line(done))


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda state: state.pop('head.fc.bias'), 'has no head.fc.bias: it is not a checkpoint of this config'),
        (
            lambda state: state.update({'head.fc.bias': torch.zeros(3)}),
            'head.fc.bias is (3,), expected (10,): it is not a checkpoint of this config',
        ),
        (lambda state: state['head.fc.weight'].fill_(math.nan), 'head.fc.weight holds NaN or infinity'),
        (lambda state: state.clear(), 'it is not a checkpoint of this config'),
    ],
    ids=['missing', 'shape', 'nan', 'empty'],
)
def test_checkpoints_that_do_not_fit(trained, digits, tmp_path, call_tool, change, message):
    """mmengine would log it, and test random weights."""
    content = torch.load(trained[0] / 'epoch_3.pth', weights_only=True)
    change(content['state_dict'])
    torch.save(content, tmp_path / 'changed.pth')
    line = error_line(call_tool('test.py', CONFIG, tmp_path / 'changed.pth', '--work-dir', tmp_path, *options(digits)))
    assert message in line
    DefaultScope._instance_dict.clear()


def test_a_checkpoint_that_is_cut_off(trained, digits, tmp_path, call_tool):
    whole = (trained[0] / 'epoch_3.pth').read_bytes()
    for share in (0, 0.3, 0.99):
        (tmp_path / 'cut.pth').write_bytes(whole[: int(share * len(whole))])
        for arguments in (
            ['test.py', CONFIG, tmp_path / 'cut.pth'],
            ['train.py', CONFIG, '--resume', tmp_path / 'cut.pth'],
        ):
            line = error_line(call_tool(*arguments, '--work-dir', tmp_path / 'out', *options(digits)))
            assert 'cut.pth cannot be read as a checkpoint' in line
    DefaultScope._instance_dict.clear()


def start_and_kill(command, ready, timeout=180):
    """Starts a tool and ends it by SIGKILL as soon as ``ready()``."""
    process = start_tool(*command)
    deadline = time.monotonic() + timeout
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, 'the run never came so far'
            time.sleep(0.05)
    finally:
        process.kill()


def test_resuming_after_sigkill_between_selection_and_the_first_checkpoint(digits, tmp_path):
    command = ['train.py', CONFIG, '--work-dir', tmp_path, *options(digits)]
    start_and_kill(command, (tmp_path / 'selection.json').exists)
    (tmp_path / 'last_checkpoint').unlink(missing_ok=True)
    for checkpoint in tmp_path.glob('*.pth'):
        checkpoint.unlink()
    selection = (tmp_path / 'selection.json').read_bytes()
    done = run_tool(*command, '--resume')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'timestep 400 was selected before the interruption' in done.stdout
    assert 'selecting the timestep' not in done.stdout
    assert (tmp_path / 'selection.json').read_bytes() == selection
    assert (tmp_path / 'epoch_3.pth').exists()


def test_an_interrupted_last_validation_is_made_up_for(digits, tmp_path, trained):
    """mmengine writes the last checkpoint before it."""
    folder, printed = trained
    shutil.copy(folder / 'epoch_3.pth', tmp_path)
    command = ['train.py', CONFIG, '--work-dir', tmp_path, '--resume', *options(digits)]
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'nothing is left to train: validating' in done.stdout
    assert 'Epoch(train)' not in done.stdout
    assert accuracies(done.stdout) == accuracies(printed)[-1:]
    # Where something is left, the validation is the loop's.
    done = run_tool(*command, 'train_cfg.max_epochs=4')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'nothing is left' not in done.stdout
    assert len(accuracies(done.stdout)) == 1
    done = run_tool(*command, 'train_cfg.max_epochs=3', '--no-validate')
    assert done.returncode == 0, done.stderr[-3000:]
    assert not accuracies(done.stdout)


def test_selecting_without_training(digits, tmp_path, trained):
    done = run_tool(
        'select_timestep.py', CONFIG, '--work-dir', tmp_path, '--timesteps', '0', '400', '900', '--criterion',
        'FisherScore', '--num-images', '40', *options(digits),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    selection = json.loads((tmp_path / 'selection.json').read_text())
    assert selection['criterion'] == {'type': 'FisherScore'}
    assert f'timestep {selection["timestep"]:g}, block 2, query -> {tmp_path}/selection.json' in done.stdout
    assert min(selection['scores']['Fisher Score (labels)']) > 0
    # The criteria that both runs computed agree to the last digit.
    before = json.loads((trained[0] / 'selection.json').read_text())['scores']
    shared = set(before) & set(selection['scores'])
    assert shared == {'HFR (sigma 0.25)'}
    assert {label: selection['scores'][label] for label in shared} == {label: before[label] for label in shared}
    assert not list(tmp_path.glob('*.pth'))


def test_two_processes_choose_as_one(digits, tmp_path, trained):
    """And each computes its half of the cached features."""
    config = tmp_path / 'cached.py'
    config.write_text(
        f"_base_ = ['{CONFIG}']\n"
        f"model = dict(backbone=dict(cache=dict(dir='{tmp_path}/cache', dtype='float32')))\n"
        "custom_hooks = [*_base_.custom_hooks, dict(type='FeatureCacheHook')]\n"
    )
    # The config says nccl, as most do; the learning rate is for 64 images a step, here there are 2 x 8.
    settings = options(digits, **{'train_cfg.max_epochs': 1})
    done = launch('dist_train.sh', config, 2, '--work-dir', tmp_path, '--auto-scale-lr', *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'LR is set based on batch size of 64 and the current batch size is 16' in done.stdout
    alone = json.loads((trained[0] / 'selection.json').read_text())
    together = json.loads((tmp_path / 'selection.json').read_text())
    assert (alone['world_size'], together['world_size']) == (1, 2)
    for key in ('timestep', 'num_images', 'block_evaluations', 'encoder_runs', 'choices', 'decisions'):
        assert together[key] == alone[key], key
    for label, curve in alone['scores'].items():
        assert together['scores'][label] == pytest.approx(curve, rel=1e-4)
    ranks = start_ranks(2, 'test.py', CONFIG, tmp_path / 'epoch_1.pth', '--work-dir', tmp_path / 'test', *settings)
    tested = [''.join(process.communicate()) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], tested[0][-3000:]
    assert accuracies(tested[0])[-1] == accuracies(done.stdout)[-1]
    shards = list((tmp_path / 'cache').glob('*/*.safetensors'))
    counts = []
    for shard in shards:
        with safe_open(str(shard), 'pt') as file:
            counts.append(len(file.get_tensor('maps.0')))
    assert counts == [75, 75]
    # One process finds all that two have computed.
    single = run_tool('cache_features.py', config, '--work-dir', tmp_path, *settings)
    assert single.returncode == 0, single.stderr[-3000:]
    assert 'timestep 400 was selected before' in single.stdout
    assert '150 of 150 views are there' in single.stdout
    assert sorted((tmp_path / 'cache').glob('*/*.safetensors')) == sorted(shards)


def test_block_and_component_are_selected_with_the_timestep(digits, tmp_path):
    """All that can be left open: 41 timesteps coarse to fine, 25 taps, and as many images as it takes."""
    settings = options(
        digits,
        **{
            # mmengine's --cfg-options know lists, but no dict(...).
            'custom_hooks.0.timesteps': str(list(range(0, 801, 20))).replace(' ', ''),
            'custom_hooks.0.num_images': 'auto',
            'custom_hooks.0.stability': 0.5,
            'custom_hooks.0.search': 'coarse-to-fine',
            # One scale, in a third of the time.
            'custom_hooks.0.criterion.pool': 1,
            'model.backbone.block': 'auto',
            'model.backbone.component': 'auto',
        },
    )
    done = run_tool('train.py', CONFIG, '--work-dir', tmp_path, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    selection = json.loads((tmp_path / 'selection.json').read_text())
    assert selection['num_images'] in (64, 128, 150)
    assert len(selection['scores_per_tap']['HFR (sigma 0.25)']) == 25
    label = selection['criterion_label']
    tried = len(selection['timesteps'])
    if selection['search'].startswith('coarse-to-fine'):
        # How stable the choice is, is judged on the coarse grid.
        assert tried <= 41 // 3
    else:
        assert (tried, selection['search'].split(':')[0]) == (41, 'sweep')
    assert selection['block_evaluations'] == selection['num_images'] * tried * 2 * 5
    assert selection['encoder_runs'] == selection['num_images'] * 2
    name = f'block {selection["block"]} {selection["component"]}'
    chosen = selection['scores_per_tap'][label][name][selection['timesteps'].index(selection['timestep'])]
    highest = max(max(curve) for curve in selection['scores_per_tap'][label].values())
    assert 0.8 * highest <= chosen <= highest
    checkpoint = torch.load(tmp_path / 'epoch_3.pth', weights_only=True)['state_dict']
    assert json.loads(bytes(checkpoint['backbone.taps'].tolist()))[0][0] == selection['block']
    assert (tmp_path / 'epoch_3.pth').stat().st_size < 200_000
    tested = run_tool('test.py', CONFIG, tmp_path / 'epoch_3.pth', '--work-dir', tmp_path / 'test', *settings)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert accuracies(tested.stdout)[-1] == accuracies(done.stdout)[-1]


def test_several_timesteps_are_fused(digits, tmp_path):
    config = ROOT / 'configs/demo/dit-nano_fusion-3t_bs64-20e_digits-16px.py'
    settings = options(digits, **{'custom_hooks.0.timesteps': '[0,50,400,800]'})
    done = run_tool('train.py', config, '--work-dir', tmp_path, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    selection = json.loads((tmp_path / 'selection.json').read_text())
    assert len(selection['timestep']) == 3
    assert selection['timestep'][0] == selection['choices'][selection['criterion_label']]
    state = torch.load(tmp_path / 'epoch_3.pth', weights_only=True)['state_dict']
    assert state['backbone.timestep'].tolist() == selection['timestep']
    assert state['neck.0.logits'].shape == (1, 3)
    assert state['neck.0.logits'].abs().max() > 0
    tested = run_tool('test.py', config, tmp_path / 'epoch_3.pth', '--work-dir', tmp_path / 'test', *settings)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert accuracies(tested.stdout)[-1] == accuracies(done.stdout)[-1] > 40


@pytest.mark.parametrize(
    'script,arguments,expected',
    [
        (
            'slurm_train.sh',
            ['part', 'job', 'c.py', 'out', '--amp'],
            ['c.py', '--work-dir=out', '--amp', '--launcher=slurm'],
        ),
        (
            'slurm_test.sh',
            ['part', 'job', 'c.py', 'a.pth', '--out', 'x y'],
            ['c.py', 'a.pth', '--out', 'x y', '--launcher=slurm'],
        ),
    ],
)
def test_slurm_scripts_pass_their_arguments_on(tmp_path, script, arguments, expected):
    (tmp_path / 'srun').write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    (tmp_path / 'srun').chmod(0o755)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16'}
    done = subprocess.run(
        ['bash', str(ROOT / 'tools' / script), *arguments], capture_output=True, text=True, env=environment, check=True
    )
    words = done.stdout.splitlines()
    assert words[:4] == ['-p', 'part', '--job-name=job', '--gres=gpu:8']
    assert '--ntasks=16' in words
    assert words[-len(expected) :] == expected


@pytest.mark.parametrize(
    'script,arguments,expected',
    [
        ('dist_train.sh', ['c.py', '2', '--resume', 'x y'], ['train.py', 'c.py', '--resume', 'x y']),
        ('dist_test.sh', ['c.py', 'a.pth', '2', '--out', 'x y'], ['test.py', 'c.py', 'a.pth', '--out', 'x y']),
    ],
)
def test_launchers_pass_their_arguments_on(tmp_path, script, arguments, expected):
    (tmp_path / 'python').write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    (tmp_path / 'python').chmod(0o755)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    command = ['bash', str(ROOT / 'tools' / script), *arguments]
    words = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert words[:3] == ['-m', 'torch.distributed.run', '--nnodes=1']
    assert '--nproc_per_node=2' in words
    tool, *rest = expected
    assert words[words.index(f'{ROOT}/tools/{tool}') + 1 :] == [*rest, '--launcher', 'pytorch']


@pytest.mark.parametrize('path', ['', '/home/me/project'])
@pytest.mark.parametrize(
    ('program', 'script', 'arguments'),
    [('python', 'dist_run.sh', ['train.py', '2', 'c.py']), ('srun', 'slurm_train.sh', ['part', 'job', 'c.py'])],
)
def test_the_working_directory_is_not_put_on_the_path(tmp_path, program, script, arguments, path):
    """An empty entry in PYTHONPATH means it: a checkout there would hide the installed package."""
    (tmp_path / program).write_text('#!/bin/sh\necho "PYTHONPATH=$PYTHONPATH"\n')
    (tmp_path / program).chmod(0o755)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHONPATH': path}
    command = ['bash', str(ROOT / 'tools' / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('PYTHONPATH=')]
    assert line == f'PYTHONPATH={":".join(filter(None, [f"{ROOT}/tools/..", path]))}'


def predictions(digits, checkpoint, folder, *arguments, config=CONFIG, **settings):
    """Scores of every test image, by ``tools/test.py --out``."""
    done = run_tool(
        'test.py', config, checkpoint, '--work-dir', folder, '--out', folder / 'out.pkl', *arguments,
        *options(digits, **settings),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    content = pickle.loads((folder / 'out.pkl').read_bytes())
    return torch.stack([one['pred_score'] for one in content])


def test_test_time_augmentation_averages_an_image_and_its_mirror_image(trained, digits, tmp_path):
    checkpoint = trained[0] / 'epoch_3.pth'
    mirrored = tmp_path / 'mirrored.py'
    pipeline = '[*_base_.test_pipeline[:2], dict(type="RandomFlip", prob=1.0), dict(type="PackInputs")]'
    mirrored.write_text(f"_base_ = ['{CONFIG}']\ntest_dataloader = dict(dataset=dict(pipeline={pipeline}))\n")
    plain = predictions(digits, checkpoint, tmp_path)
    turned = predictions(digits, checkpoint, tmp_path, config=mirrored)
    assert (plain - turned).abs().max() > 0.1
    both = predictions(digits, checkpoint, tmp_path, '--tta')
    torch.testing.assert_close(both, (plain + turned) / 2, rtol=1e-4, atol=1e-5)


def test_a_flexible_runner_builds_its_model_late(trained, digits, tmp_path):
    folder, printed = trained
    settings = options(digits, runner_type='FlexibleRunner')
    done = run_tool('test.py', CONFIG, folder / 'epoch_3.pth', '--work-dir', tmp_path, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert accuracies(done.stdout) == accuracies(printed)[-1:]
    done = run_tool('cache_features.py', CONFIG, '--dir', tmp_path / 'cache', '--work-dir', tmp_path, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '150 images, 1 view(s) of each, at timestep 400' in done.stdout
    chosen, before = (json.loads((path / 'selection.json').read_text()) for path in (tmp_path, folder))
    assert chosen['scores'] == before['scores']


PURE = """
from mmengine.config import read_base

with read_base():
    from .base import *

model.update(neck=[dict(type=GlobalAveragePooling), dict(type=ClsBatchNormNeck, input_features=128)])
"""
PURE_BASE = """
from mmcv.transforms import Resize
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs
from mmpretrain.engine import VisualizationHook
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import ClsBatchNormNeck, GlobalAveragePooling, ImageClassifier, LinearClsHead
from mmpretrain.visualization import UniversalVisualizer
from torch.optim import AdamW

from mmaselect import ASelectDiT, TimestepSelectionHook

default_scope = None
data_preprocessor = dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
diffusion = dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels')
model = dict(
    type=ImageClassifier,
    backbone=dict(type=ASelectDiT, diffusion=diffusion, block=2),
    head=dict(type=LinearClsHead, in_channels=128, num_classes=10, topk=(1,)),
)
pipeline = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(16, 16)), dict(type=PackInputs)]
dataset = dict(type=CustomDataset, data_root='DATA', pipeline=pipeline)
train_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(data_prefix='train', **dataset),
)
val_dataloader = dict(
    batch_size=64, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(data_prefix='test', **dataset),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=Accuracy, topk=(1,))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1, val_interval=1)
val_cfg, test_cfg = dict(type=ValLoop), dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=0.02))
custom_hooks = [dict(type=TimestepSelectionHook, timesteps=[0, 400, 900], num_images=40, batch_size=16)]
default_hooks = dict(visualization=dict(type=VisualizationHook))
visualizer = dict(type=UniversalVisualizer, vis_backends=[dict(type=LocalVisBackend)])
log_level, load_from, resume, randomness = 'INFO', None, False, dict(seed=0)
"""


def test_pure_python_configs(digits, tmp_path):
    (tmp_path / 'base.py').write_text(PURE_BASE.replace('DATA', str(digits)))
    config = tmp_path / 'pure.py'
    config.write_text(PURE)
    done = run_tool('train.py', config, '--work-dir', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / 'run/selection.json').read_text())['config']['pipeline'] == 'val'
    tested = run_tool(
        'test.py', config, tmp_path / 'run/epoch_1.pth', '--work-dir', tmp_path / 'test', '--show-dir',
        tmp_path / 'painted',
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert list((tmp_path / 'painted').glob('*.png'))
    assert accuracies(tested.stdout) == accuracies(done.stdout)


#: Prints the tools whose ``--help`` has imported what takes seconds; in one process for all of them.
HELP = """
import contextlib, io, runpy, sys
for tool in sys.argv[1:]:
    sys.argv[:] = [tool, '--help']
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_path(tool, run_name='__main__')
    assert said.getvalue().startswith('usage: '), tool
    heavy = {'torch', 'mmengine', 'diffusers', 'sklearn', 'cv2'} & set(sys.modules)
    if heavy:
        print(tool, heavy)
        for name in heavy:
            del sys.modules[name]
"""


def test_help_of_every_tool_imports_neither_torch_nor_mmengine():
    tools = [path for path in sorted((ROOT / 'tools').rglob('*.py')) if path.parent.name != 'benchmarks']
    assert len(tools) > 12
    done = subprocess.run(
        [sys.executable, '-c', HELP, *map(str, tools)], capture_output=True, text=True, check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
