"""What a selection says of itself to people, and to machines."""

from __future__ import annotations

import re
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.visualization import MLflowVisBackend
from PIL import Image

from mmaselect.diffusion.taps import Tap
from mmaselect.selection.criteria import PAPER, RECOMMENDED, build_criteria
from mmaselect.selection.report import identifier, name_taps

CRITERIA = [
    RECOMMENDED, PAPER, dict(type='HighFrequencyRatio', sigma=0.1, norm=1), dict(type='FisherScore', pool=2),
    dict(type='NoiseConsistentHFR', centred=True), dict(type='NoiseConsistentHFR', centred=False),
]  # fmt: skip


def test_labels_become_names_of_metrics():
    labels = list(build_criteria(CRITERIA, ['criterion'] * len(CRITERIA)))
    names = [identifier(label) for label in labels]
    assert identifier('HFR (sigma 0.25)') == 'HFR_sigma_0.25'
    assert len(set(names)) == len(labels)
    assert all(re.fullmatch(r'[A-Za-z][\w.-]*', name, re.ASCII) for name in names)


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """Stands for MLflow: its rule for names (its own words), and its way to write a picture."""
    module, logged = types.ModuleType('mlflow'), {}

    def log_metric(key, value, step=None):
        if not re.fullmatch(r'[\w\-./ ]+', key, re.ASCII):
            raise ValueError(f'Invalid metric name: {key!r}')
        logged[key] = value

    def log_image(image, artifact_file):
        Image.fromarray(image).save(tmp_path / artifact_file)

    module.__spec__ = ModuleSpec('mlflow', None)
    module.log_metric, module.log_image = log_metric, log_image
    for name in ('set_tracking_uri', 'create_experiment', 'set_experiment', 'get_experiment_by_name'):
        setattr(module, name, lambda *args, **kwargs: None)
    monkeypatch.setitem(sys.modules, 'mlflow', module)
    return logged


def test_a_tap_that_several_scales_read_is_named_once():
    """UPerNet's four scales from one block."""
    assert name_taps([Tap(5, 'output')] * 4) == 'block 5 output'
    assert name_taps([Tap(5, 'query'), Tap(1, 'query')]) == 'block 5 query, block 1 query'


def test_a_tracker_takes_what_the_hook_logs(mlflow, tmp_path, monkeypatch, digits):
    from conftest import DEMO
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner

    monkeypatch.setattr(MLflowVisBackend, 'add_config', lambda self, config: None)
    config = Config.fromfile(DEMO)
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset.data_root = str(digits)
        config[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
        config[f'{split}_dataloader'].collate_fn = dict(type='default_collate')
    config.custom_hooks[0].update(num_images=20, timesteps=[0, 500])
    config.visualizer.vis_backends = [dict(type='MLflowVisBackend', save_dir=str(tmp_path))]
    config.work_dir, config.experiment_name = str(tmp_path), config.visualizer.setdefault('name', tmp_path.name)
    runner = Runner.from_cfg(config)
    runner.call_hook('before_run')
    (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'TimestepSelectionHook']
    content = hook.select(runner)
    DefaultScope._instance_dict.clear()
    for label, curve in content['scores'].items():
        assert mlflow[f'selection/{identifier(label)}'] == pytest.approx(curve[-1])
    with Image.open(tmp_path / 'selection.png') as picture:
        assert np.asarray(picture).std() > 0
