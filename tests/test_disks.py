"""Full disks, read-only folders, odd names: one line, and what was there before stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from conftest import DEMO, options, run_tool


class SmallDisk:
    """A tmpfs of its own."""

    def __init__(self, path, size):
        self.path = path
        path.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)], check=True)

    def fill(self, leave):
        """Fills all but some bytes."""
        free = shutil.disk_usage(self.path).free
        (self.path / 'filler').write_bytes(bytes(max(0, free - leave)))

    def make_read_only(self):
        subprocess.run(['mount', '-o', 'remount,ro', str(self.path)], check=True)

    def close(self):
        subprocess.run(['umount', '-l', str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    try:
        made = SmallDisk(tmp_path / 'disk', '2m')
    except subprocess.CalledProcessError:
        pytest.skip('needs the right to mount a file system')
    yield made
    made.close()


def last_line(done):
    """Of what went wrong; loggers that cannot write, either, say so before it."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: '), done.stderr[-2000:]
    return line


def results(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in ('.json', '.png', '.pth')}


def test_a_full_disk_keeps_the_last_selection(disk, digits):
    work = disk.path / 'work'
    settings = options(digits)
    done = run_tool('select_timestep.py', DEMO, '--work-dir', work, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    before = results(work)
    assert set(before) == {'selection.json', 'selection.png', 'decomposition.json'}
    # Enough for logs, too little for a picture.
    disk.fill(24_000)
    done = run_tool('select_timestep.py', DEMO, '--work-dir', work, '--seed', '1', *settings)
    assert 'cannot be written: No space left on device' in last_line(done)
    assert results(work) == before
    assert not [path for path in work.rglob('.*') if '.tmp' in path.name]
    # Nor does a training leave a checkpoint behind that looks like one.
    done = run_tool('train.py', DEMO, '--work-dir', work, *settings)
    assert 'cannot be written: No space left on device' in last_line(done)
    assert results(work) == before
    assert not (work / 'last_checkpoint').exists()


def test_a_cache_is_refused_before_it_is_begun(disk, digits, tmp_path):
    done = run_tool(
        'cache_features.py', DEMO, '--work-dir', tmp_path / 'work', '--dir', disk.path / 'cache',
        *options(digits, **{'model.backbone.timestep': 0, 'model.backbone.cache.pool': False}),
    )  # fmt: skip
    line = last_line(done)
    assert 'GB free, but the features would take 0.00246 GB: take fewer views' in line
    assert not list((disk.path / 'cache').rglob('*.safetensors*'))


def test_a_read_only_folder(disk, digits):
    (disk.path / 'work').mkdir()
    (disk.path / 'work/selection.json').write_text('{"kept": true}')
    disk.make_read_only()
    settings = options(digits)
    line = last_line(run_tool('train.py', DEMO, '--work-dir', disk.path / 'work', *settings))
    assert str(disk.path) in line
    assert 'cannot be written: Read-only file system' in line
    assert json.loads((disk.path / 'work/selection.json').read_text()) == {'kept': True}


def test_odd_names(digits, tmp_path):
    """Spaces, Unicode, quotes and a line break in classes and files, and a work directory of the same kind."""
    data = tmp_path / 'my data, größer (2)'
    names = ['black bird', 'Bläßhuhn', '鳥', "o'hare", 'a\nb', '-x', '#7', '100%', 'é', 'plain']
    for split in ('train', 'test'):
        for name, digit in zip(names, sorted((digits / split).iterdir())):
            (data / split / name).mkdir(parents=True)
            for number, file in enumerate(sorted(digit.iterdir())[:4]):
                shutil.copy(file, data / split / name / f'{number} of {name}.png')
    config = tmp_path / 'config.py'
    loaders = ''.join(
        f'{split}_dataloader = dict(dataset=dict(data_root={str(data)!r}))\n' for split in ('train', 'val', 'test')
    )
    config.write_text(f"_base_ = ['{DEMO}']\n{loaders}")
    settings = [value for value in options(digits) if 'data_root' not in value]
    work = tmp_path / 'wörk dir'
    done = run_tool('train.py', config, '--work-dir', work, *settings, 'train_cfg.max_epochs=1')
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work / 'epoch_1.pth').exists()
    assert json.loads((work / 'selection.json').read_text())['num_images'] == 40


def test_a_class_without_images(digits, tmp_path):
    data = tmp_path / 'digits'
    shutil.copytree(digits, data)
    for file in (data / 'train/7').iterdir():
        file.unlink()
    settings = options(data, **{'train_cfg.max_epochs': 1})
    done = run_tool('train.py', DEMO, '--work-dir', tmp_path / 'out', *settings)
    # mmpretrain takes it for a class without images, and says so.
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Found no valid file in the folder 7' in done.stdout
    assert json.loads((tmp_path / 'out/selection.json').read_text())['data']['train_images'] == 135


def test_a_folder_that_cannot_be_made(digits, call_tool):
    assert os.path.exists('/dev/null')
    done = call_tool('train.py', DEMO, '--work-dir', '/dev/null/work', *options(digits))
    line = last_line(done)
    assert '/dev/null/work' in line
    assert 'cannot be used: Not a directory' in line
