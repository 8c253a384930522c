"""Other people's projects: mmpretrain's own installed tools, unmodified, on configs with our backbone and hook."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, SHARED_DATA, run_script, run_tool
from miniatures import make


def mmpretrain_tool(name):
    import mmpretrain

    return Path(mmpretrain.__file__).parent / '.mim' / 'tools' / name


@pytest.fixture(scope='module')
def miniature_cub(tmp_path_factory):
    return make('CUB', tmp_path_factory.mktemp('cub'))


def data_options(root, epochs=1):
    return [
        *(f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val', 'test')),
        *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
        # mmpretrain's tools switch this on, which torch refuses without workers.
        *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
        f'train_cfg.max_epochs={epochs}',
        # To mmengine 0.10.1 the last epoch is no reason to validate.
        'train_cfg.val_interval=1',
        'custom_hooks.0.num_images=4',
        'custom_hooks.0.timesteps=[0,500]',
    ]


def small_sd3(folder):
    """Settings that put a miniature of SD3.5-medium in the place of the real one."""
    return [
        f'model.backbone.diffusion.pretrained={folder}',
        'model.backbone.diffusion.dtype=float32',
        'model.backbone.block=2',
        'model.head.in_channels=64',
        *(f'{split}_dataloader.dataset.pipeline.1.scale=72' for split in ('train', 'val', 'test')),
        *(f'{split}_dataloader.dataset.pipeline.2.crop_size=64' for split in ('train', 'val', 'test')),
    ]


def test_the_cub_config_by_mmpretrains_own_tools(miniature_cub, model_folder, tmp_path):
    config = ROOT / 'configs/classification/sd35-medium_linear_4xb32-100e_cub-256px.py'
    options = [
        '--cfg-options', *data_options(miniature_cub), *small_sd3(model_folder('SD3.5-medium')),
        'model.neck.1.input_features=64',
    ]  # fmt: skip
    done = run_script(mmpretrain_tool('train.py'), config, '--work-dir', tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    selection = json.loads((tmp_path / 'selection.json').read_text())
    assert selection['criterion'] == {'type': 'HighFrequencyRatio', 'sigma': 0.25}
    assert (selection['block'], selection['component'], selection['num_images']) == (2, 'query', 4)
    assert re.search(r'Epoch\(val\) \[1\].*accuracy/top1', done.stdout)
    done = run_script(mmpretrain_tool('test.py'), config, tmp_path / 'epoch_1.pth', '--work-dir', tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'accuracy/top1' in done.stdout


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f'needs real photographs in {SHARED_DATA}')
def test_real_birds(tmp_path):
    """CUB's own files and photographs; random weights, because only the way through is tested."""
    arch = 'num_layers=3 num_attention_heads=4 attention_head_dim=36 in_channels=3 sample_size=32 patch_size=4'
    options = [
        *data_options(SHARED_DATA / 'CUB_200_2011_subset'),
        'model.backbone.diffusion.pretrained=None',
        *(f'model.backbone.diffusion.arch.{field}' for field in arch.split()),
    ]
    config = ROOT / 'configs/classification/dit-micro_linear_bs64-100e_cub-32px.py'
    done = run_tool('train.py', config, '--work-dir', tmp_path, '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r'Epoch\(train\)\s+\[1\]\[15/15\]', done.stdout), done.stdout[-3000:]
    assert re.search(r'Epoch\(val\) \[1\]\[15/15\].*accuracy/top1', done.stdout)


def test_cost_before_a_choice(tmp_path):
    """mmpretrain's get_flops.py on the demo's config as it is, without a checkpoint."""
    done = run_script(mmpretrain_tool('analysis_tools/get_flops.py'), DEMO, '--shape', 16)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'nothing has chosen what to read yet: traced at timestep 500, block 2' in done.stdout
    # Of the head alone; a line gives the frozen ones.
    assert 'Params: 1.29K' in done.stdout
    assert '858,880 frozen parameters are not among those that the model counts' in done.stdout


def test_schedules_and_curves(trained, tmp_path):
    """vis_scheduler.py trains a dummy under our hook; analyze_logs.py reads the log of a real run."""
    folder, _ = trained
    (log,) = folder.glob('*/vis_data/scalars.json')
    curves = ('plot_curve', log, '--keys', 'accuracy/top1', '--out', tmp_path / 'curve.png')
    schedule = (
        folder / DEMO.name, '--not-show', '--save-path', tmp_path / 'schedule.png', '--cfg-options',
        f'work_dir={tmp_path}',
    )  # fmt: skip
    for tool, arguments in (('analysis_tools/analyze_logs.py', curves), ('visualization/vis_scheduler.py', schedule)):
        done = run_script(mmpretrain_tool(tool), *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob('*.png')} == {'curve.png', 'schedule.png'}
