"""Runs that are killed at any moment, and ranks that die. ``--soak`` (``make soak``) kills twenty times each."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import time

import pytest
import torch
from conftest import DEMO, ROOT, accuracies, needs_exact_resume, options, run_tool, start_ranks, start_tool
from safetensors.torch import load_file

from mmaselect.files import ABANDONED_AFTER

EPOCHS = 4


def check_files(folder):
    """Nothing that was renamed into place is cut off, and what names its checksum has it."""
    for path in folder.rglob('*.json'):
        # The visualizer's log is appended to, line by line.
        if 'vis_data' not in path.parts and '.tmp' not in path.name:
            json.loads(path.read_text())
    for path in folder.rglob('*.safetensors'):
        if '.tmp' in path.name:
            continue
        load_file(path)
        if re.fullmatch('[0-9a-f]{64}', path.stem):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def age(folder):
    """As if the next start came later: temporary files of the last minutes may be those of a run that is alive."""
    for path in folder.rglob('.*.tmp*'):
        os.utime(path, (time.time() - 2 * ABANDONED_AFTER,) * 2)


class Harness:
    """Kills a tool again and again, at moments drawn from the time that an uninterrupted run takes.

    Args:
        count: How often.
        seed: Of the moments.
    """

    def __init__(self, count, seed):
        self.count, self.random = count, random.Random(seed)

    def run(self, tool, reference, folder, arguments, resume=()):
        """Gives the output of an uninterrupted run and of the last of those that were killed."""
        started = time.monotonic()
        expected = run_tool(tool, *arguments(reference))
        seconds = time.monotonic() - started
        assert expected.returncode == 0, expected.stderr[-3000:]
        moments, finished = [], 0
        while len(moments) < self.count:
            process = start_tool(tool, *arguments(folder), *(resume if folder.exists() else ()))
            moment = self.random.uniform(0, seconds)
            try:
                process.communicate(timeout=moment)
                # It was faster than the first: the next one begins anew.
                assert process.returncode == 0
                finished += 1
                shutil.rmtree(folder)
                continue
            except subprocess.TimeoutExpired:
                process.kill()
            moments.append(moment)
            if folder.exists():
                check_files(folder)
                age(folder)
        done = run_tool(tool, *arguments(folder), *resume)
        assert done.returncode == 0, done.stderr[-3000:]
        check_files(folder)
        assert not list(folder.rglob('.*.tmp*'))
        print(f'{tool}: killed at {", ".join(f"{moment:.1f}" for moment in moments)} of {seconds:.1f} s; '
              f'{finished} more had finished before')  # fmt: skip
        return expected, done


@pytest.fixture
def harness(soak):
    return Harness(20 if soak else 1, 0)


def scores(folder):
    content = json.loads((folder / 'selection.json').read_text())
    return {key: content[key] for key in ('timestep', 'block', 'component', 'choices', 'scores', 'num_images')}


def test_training(harness, digits, tmp_path):
    settings = options(digits, **{'train_cfg.max_epochs': EPOCHS})
    reference, folder = tmp_path / 'reference', tmp_path / 'killed'
    expected, _ = harness.run(
        'train.py', reference, folder, lambda where: [DEMO, '--work-dir', where, *settings], ['--resume']
    )
    assert scores(folder) == scores(reference)
    assert (folder / f'epoch_{EPOCHS}.pth').exists()
    # Selected once, then taken from selection.json or from a checkpoint.
    assert sum('selected timestep' in path.read_text() for path in folder.glob('*/*.log')) == 1
    # Also where nothing was left to train.
    logs = ''.join(path.read_text() for path in sorted(folder.glob('*/*.log')))
    assert accuracies(logs)[-1] == accuracies(expected.stdout)[-1]
    states = [torch.load(where / f'epoch_{EPOCHS}.pth', weights_only=True) for where in (reference, folder)]
    assert all(torch.equal(value, states[1]['state_dict'][key]) for key, value in states[0]['state_dict'].items())
    # mmengine's own leftovers among them, the leaderboard reads the folder as a run.
    board = run_tool('leaderboard.py', folder)
    assert board.returncode == 0, board.stderr[-3000:]
    assert f'{accuracies(expected.stdout)[-1]:.2f}' in board.stdout


def test_selecting(harness, digits, tmp_path):
    settings = options(digits)
    reference, folder = tmp_path / 'reference', tmp_path / 'killed'
    harness.run('select_timestep.py', reference, folder, lambda where: [DEMO, '--work-dir', where, *settings])
    assert scores(folder) == scores(reference)
    assert (folder / 'selection.png').read_bytes() == (reference / 'selection.png').read_bytes()


def test_caching(harness, digits, tmp_path):
    settings = options(digits)
    reference, folder = tmp_path / 'reference', tmp_path / 'killed'
    harness.run(
        'cache_features.py', reference, folder,
        lambda where: [DEMO, '--work-dir', where, '--dir', where / 'cache', '--dtype', 'float32', *settings],
    )  # fmt: skip
    rows = []
    for where in (reference, folder):
        found = {}
        for shard in (where / 'cache').rglob('*.safetensors'):
            from safetensors import safe_open

            with safe_open(str(shard), 'pt') as file:
                keys = json.loads(file.metadata()['rows'])
                found |= dict(zip(keys, file.get_tensor('maps.0')))
        rows.append(found)
    assert len(rows[0]) == 150
    assert rows[0].keys() == rows[1].keys()
    assert all(torch.allclose(value, rows[1][key], atol=1e-5) for key, value in rows[0].items())


@needs_exact_resume
def test_pretraining(harness, digits, tmp_path):
    settings = [f'train_dataloader.dataset.data_root={digits}', 'train_cfg.max_iters=40',
                'model.transformer.num_layers=2', 'default_hooks.checkpoint.interval=5',
                'train_dataloader.batch_size=16',
                'default_hooks.logger.interval=1']  # fmt: skip
    config = ROOT / 'configs/pretrain/dit-nano_digits.py'
    reference, folder = tmp_path / 'reference', tmp_path / 'killed'
    harness.run(
        'pretrain.py', reference, folder,
        lambda where: [config, '--work-dir', where, '--out', where / 'out', '--cfg-options', *settings], ['--resume'],
    )  # fmt: skip
    sizes = [where / 'out/transformer/diffusion_pytorch_model.safetensors' for where in (reference, folder)]
    weights = [load_file(path) for path in sizes]
    # Its transforms draw nothing, and noise depends on the step.
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize('damage', ['last_checkpoint cut off', 'checkpoint cut off', 'both gone'])
def test_resuming_from_what_a_kill_left(damage, tmp_path, capsys):
    """mmengine writes both in place."""
    from mmaselect.cli import latest_checkpoint

    for epoch in (1, 2):
        torch.save({'epoch': epoch}, tmp_path / f'epoch_{epoch}.pth')
        os.utime(tmp_path / f'epoch_{epoch}.pth', (epoch, epoch))
    named = tmp_path / 'last_checkpoint'
    named.write_text(str(tmp_path / 'epoch_2.pth'))
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    if damage == 'last_checkpoint cut off':
        named.write_text('')
        assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
        named.write_text(str(tmp_path / 'epoch_2.p'))
        assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
        assert 'last_checkpoint names no checkpoint that can be read: resuming from' in capsys.readouterr().err
    elif damage == 'checkpoint cut off':
        os.truncate(tmp_path / 'epoch_2.pth', (tmp_path / 'epoch_2.pth').stat().st_size - 50)
        assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')
    else:
        for path in tmp_path.glob('*.pth'):
            path.write_bytes(b'')
        assert latest_checkpoint(tmp_path) is None
        assert not named.exists()


def test_a_work_directory_that_was_moved(tmp_path):
    from mmaselect.cli import latest_checkpoint

    torch.save({}, tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_1.pth')
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


# --- ranks -----------------------------------------------------------------------------------------------------------


DEADLY = """
import os, signal
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS


@DATASETS.register_module()
class Deadly(CustomDataset):
    def get_data_info(self, index):
        self.count = getattr(self, 'count', 0) + 1
        if os.environ.get('RANK') == '1' and self.count >= int(os.environ['DIES_AT']):
            {end}
        return super().get_data_info(index)
"""


@pytest.mark.parametrize(
    'end,message',
    [
        (
            'os.kill(os.getpid(), signal.SIGKILL)',
            r'error: rank 0 of 2 stops, because another one has ended or does not',
        ),
        (
            "raise ValueError('this image is cursed')",
            r'error: a rank stopped: ValueError: this image is cursed',
        ),
    ],
    ids=['killed', 'fails'],
)
def test_a_rank_that_dies_during_selection_ends_the_run(digits, tmp_path, end, message):
    (tmp_path / 'deadly.py').write_text(DEADLY.format(end=end))
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = ['{DEMO}']\n"
        "custom_imports = dict(imports=['mmaselect', 'deadly'], allow_failed_imports=False)\n"
        "train_dataloader = dict(dataset=dict(type='Deadly'))\n"
    )
    settings = options(digits)
    started = time.monotonic()
    own = {'DIES_AT': '7', 'PYTHONPATH': str(tmp_path)}
    ranks = start_ranks(2, 'train.py', config, '--work-dir', tmp_path / 'out', *settings, env=own)
    try:
        printed = [''.join(process.communicate(timeout=120)) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert time.monotonic() - started < 120
    assert ranks[0].returncode == 2, printed[0][-2000:]
    assert ranks[1].returncode != 0
    assert re.search(message, printed[0].strip().splitlines()[-1]), printed[0][-2000:]
    assert not list((tmp_path / 'out').glob('selection.json'))


FAULTY = """
import time
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

# As torch's does now and then: a rank that leaves must not need it.
torch.distributed.destroy_process_group = lambda: time.sleep(1000)


@HOOKS.register_module()
class Faulty(Hook):

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.rank == 0 and runner.iter == 1:
            raise ZeroDivisionError('a fault of the user')
"""


def test_a_rank_that_fails_in_training_ends_the_run(digits, tmp_path):
    """Its traceback is shown, and neither waits for the other or for threads of gloo's."""
    (tmp_path / 'faulty.py').write_text(FAULTY)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = ['{DEMO}']\n"
        "custom_imports = dict(imports=['mmaselect', 'faulty'], allow_failed_imports=False)\n"
        "default_hooks = dict(faulty=dict(type='Faulty'))\n"
    )
    own = {'PYTHONPATH': str(tmp_path)}
    ranks = start_ranks(2, 'train.py', config, '--work-dir', tmp_path / 'out', *options(digits), env=own)
    try:
        printed = [''.join(process.communicate(timeout=120)) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 2], printed
    assert 'Traceback' in printed[0]
    assert printed[0].strip().splitlines()[-1] == 'ZeroDivisionError: a fault of the user'
    assert printed[1].strip().splitlines()[-1].startswith('error: rank 1 of 2 stops, because another one has ended')


def test_ranks_search_as_one_process(digits, tmp_path):
    """Coarse to fine on a doubling number of images: ranks that disagreed on the next step would wait forever."""
    many = ','.join(str(timestep) for timestep in range(0, 1000, 20))
    more = {'search': 'coarse-to-fine', 'num_images': 'auto', 'timesteps': f'[{many}]', 'batch_size': 32}
    settings = options(digits, **{f'custom_hooks.0.{key}': value for key, value in more.items()})
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        ranks = start_ranks(count, 'select_timestep.py', DEMO, '--work-dir', folder, *settings)
        printed = [''.join(process.communicate()) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * count, printed[0][-3000:]
        found.append(json.loads((folder / 'selection.json').read_text()))
    alone, both = found
    # It has doubled, and does not sweep.
    assert alone['num_images'] > 64
    assert len(alone['timesteps']) < 50
    assert both['num_images'] == alone['num_images']
    assert both['timestep'] == alone['timestep']
    assert both['timesteps'] == alone['timesteps']
    for label, curve in alone['scores'].items():
        assert both['scores'][label] == pytest.approx(curve, rel=1e-4, abs=1e-7)


def test_ranks_choose_and_measure_as_one_process(digits, tmp_path, soak):
    """57 test images and 41 to select on: neither divides by two or four."""
    settings = options(
        digits, **{'train_cfg.max_epochs': 1, 'custom_hooks.0.num_images': 41, 'val_dataloader.dataset.indices': 57,
                   'train_dataloader.batch_size': 12}
    )  # fmt: skip
    found = {}
    for count in (1, 2, 4) if soak else (2,):
        folder = tmp_path / str(count)
        # The same 12 images a step, whatever the number of ranks.
        own = [value.replace('batch_size=12', f'batch_size={12 // count}') for value in settings]
        ranks = start_ranks(count, 'train.py', DEMO, '--work-dir', folder, *own)
        printed = [''.join(process.communicate()) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * count, printed[0][-3000:]
        selection = json.loads((folder / 'selection.json').read_text())
        assert selection['num_images'] == 41
        # Each image and a view of it.
        assert selection['encoder_runs'] == 41 * 2
        assert (folder / 'epoch_1.pth').exists()
        # The first one's, for all.
        checkpoint = tmp_path / f'{1 if soak else 2}' / 'epoch_1.pth'
        tests = start_ranks(count, 'test.py', DEMO, checkpoint, '--work-dir', folder / 'test', *settings,
                            'test_dataloader.dataset.indices=57')  # fmt: skip
        outputs = [''.join(process.communicate()) for process in tests]
        assert [process.returncode for process in tests] == [0] * count, outputs[0][-3000:]
        found[count] = (selection, accuracies(outputs[0])[-1])
    alone, metric = next(iter(found.values()))
    # 57 images, each counted once: the accuracy is a multiple of 1 / 57.
    assert metric * 57 / 100 == pytest.approx(round(metric * 57 / 100), abs=1e-3)
    for selection, other in found.values():
        assert other == metric
        assert selection['timestep'] == alone['timestep']
        for label, curve in alone['scores'].items():
            assert selection['scores'][label] == pytest.approx(curve, rel=1e-4, abs=1e-7)
