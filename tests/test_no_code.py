"""Data is data: a pickle, a YAML or a JSON that would run code runs none, wherever a user can put it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress

import pytest
import torch
from conftest import DEMO, error_line, options
from mmengine.registry import DefaultScope

from mmaselect.errors import InputError

ASSETS = 'mmaselect/assets/dit-nano_digits'


@pytest.fixture
def marker(tmp_path):
    """A file that appears if code is run."""
    path = tmp_path / 'code_was_run'
    yield path
    DefaultScope._instance_dict.clear()
    assert not path.exists()


class Evil:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_pickle(marker):
    return pickle.dumps(Evil(marker))


def test_the_trap_works(tmp_path):
    pickle.loads(evil_pickle(tmp_path / 'sprung'))
    assert (tmp_path / 'sprung').exists()


def raw(path, marker):
    path.write_bytes(evil_pickle(marker))


def zipped(path, marker):
    torch.save({'state_dict': {}, 'meta': Evil(marker)}, path)


def legacy(path, marker):
    torch.save({'state_dict': {}, 'meta': Evil(marker)}, path, _use_new_zipfile_serialization=False)


def hidden(path, marker):
    """A sound checkpoint, but for what it calls a history."""
    hub = {'log_scalars': {'loss': Evil(marker)}}
    torch.save({'state_dict': {'head.fc.bias': torch.zeros(10)}, 'message_hub': hub}, path)


@pytest.mark.parametrize('write', [raw, zipped, legacy, hidden])
def test_checkpoints(write, marker, tmp_path, digits, call_tool):
    checkpoint = tmp_path / 'evil.pth'
    write(checkpoint, marker)
    settings = options(digits)
    for tool, arguments in (
        ('test.py', [checkpoint]),
        ('train.py', ['--resume', checkpoint]),
        ('train.py', []),
        ('cache_features.py', ['--dir', tmp_path / 'cache']),
    ):
        more = [] if arguments[:1] in ([checkpoint], ['--resume']) else [f'load_from={checkpoint}']
        line = error_line(call_tool(tool, DEMO, *arguments, '--work-dir', tmp_path / 'out', *settings, *more))
        assert f'{checkpoint} cannot be read as a checkpoint' in line, (tool, line)
    # Found by itself, in a work directory.
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(checkpoint, work / 'epoch_1.pth')
    (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
    done = call_tool('train.py', DEMO, '--resume', '--work-dir', work, *settings, 'train_cfg.max_epochs=1')
    assert done.returncode in (0, 2), done.stderr[-2000:]


@pytest.mark.parametrize('write', [raw, zipped, legacy])
def test_converted_weights(write, marker, tmp_path, call_tool):
    checkpoint = tmp_path / 'evil.pt'
    write(checkpoint, marker)
    line = error_line(call_tool('model_converters/dit_to_diffusers.py', checkpoint, tmp_path / 'out'))
    assert str(checkpoint) in line
    assert not (tmp_path / 'out').exists()


def test_pretrained_weights_run_nothing(marker, tmp_path):
    from conftest import ROOT

    from mmaselect.diffusion.model import DiffusionSpec
    from mmaselect.diffusion.taps import Tap

    folder = tmp_path / 'model'
    shutil.copytree(ROOT / ASSETS, folder)
    weights = folder / 'transformer/diffusion_pytorch_model.safetensors'
    spec = dict(type='SiT', pretrained=str(folder), latent='pixels')
    # In place of the safetensors file, and as the .bin that diffusers would take.
    for write in (raw, zipped, legacy):
        write(weights, marker)
        with pytest.raises(InputError, match='is not a readable safetensors file'):
            DiffusionSpec.from_dict(spec).load([Tap(0, 'query')])
    weights.unlink()
    for write, reason in (
        (raw, r'it is no file of tensors|it would run'),
        (zipped, r'it would run \w+\.mkdir'),
        (legacy, 'it would run'),
    ):
        write(weights.with_suffix('.bin'), marker)
        with pytest.raises(InputError, match=rf'is not readable as weights: {reason}'):
            DiffusionSpec.from_dict(spec).load([Tap(0, 'query')])
        for suffix in ('.ckpt', '.pt', '.pth'):
            write(tmp_path / f'single{suffix}', marker)
            for field in ('pretrained', 'vae'):
                one = {**spec, 'latent': 'vae', field: str(tmp_path / f'single{suffix}')}
                with pytest.raises(InputError, match=rf'is not readable as weights: {reason}'):
                    DiffusionSpec.from_dict(one).load([Tap(0, 'query')])


def test_prompts_and_cached_features(marker, tmp_path):
    from mmaselect.cache.store import FeatureStore
    from mmaselect.diffusion.conditioning import read_prompt

    raw(tmp_path / 'prompt.safetensors', marker)
    with pytest.raises(InputError, match='is not a file made by'):
        read_prompt(tmp_path / 'prompt.safetensors')
    store = FeatureStore(tmp_path / 'cache')
    raw(store.folder / f'{"a" * 64}.safetensors', marker)
    assert store.verify(store.shards()) == ['a' * 64]
    raw(store.folder / f'{"b" * 64}.safetensors', marker)
    with pytest.raises(InputError, match='is not a shard of features'):
        store.refresh()


YAML = '!!python/object/apply:os.mkdir ["{}"]\n'


def test_yaml_and_json(marker, tmp_path):
    from mmaselect.evaluation.leaderboard import read_published
    from mmaselect.selection.report import read_selection

    board = tmp_path / 'published.yml'
    board.write_text(YAML.format(marker))
    with pytest.raises(InputError, match=r'published\.yml'):
        read_published(board)
    for content in (YAML.format(marker), f'{{"__reduce__": ["os.mkdir", ["{marker}"]]}}', '[' * 100_000):
        (tmp_path / 'selection.json').write_text(content)
        with suppress(InputError):
            read_selection(tmp_path / 'selection.json')


def test_the_leaderboard_reads_configs_without_running_them(marker, tmp_path, call_tool):
    """A work directory may come from anyone: the config that mmengine dumps there is parsed, not imported."""
    run = tmp_path / 'run' / '20260101_000000'
    (run / 'vis_data').mkdir(parents=True)
    (run / 'vis_data/config.py').write_text(f'import os\nos.mkdir({str(marker)!r})\nmodel = dict()\n')
    (run / 'vis_data/scalars.json').write_text(json.dumps({'accuracy/top1': 99.0, 'step': 1}) + '\n')
    zipped(tmp_path / 'run/epoch_1.pth', marker)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'run/epoch_1.pth'))
    done = call_tool('leaderboard.py', tmp_path / 'run')
    assert '99.0' not in done.stdout


def test_a_shard_index_stays_in_its_folder(marker, tmp_path):
    from conftest import ROOT

    from mmaselect.diffusion.loading import Source

    folder = tmp_path / 'model'
    shutil.copytree(ROOT / ASSETS, folder)
    (tmp_path / 'elsewhere.safetensors').write_bytes(b'')
    index = folder / 'transformer/diffusion_pytorch_model.safetensors.index.json'
    for shard in (
        '../../elsewhere.safetensors',
        '/etc/passwd',
        'sub/x.safetensors',
        '..\\x.safetensors',
        'x.bin',
        3,
        None,
        '',
    ):
        index.write_text(json.dumps({'weight_map': {'a': shard}}))
        with pytest.raises(InputError, match='is not the name of a safetensors file'):
            Source(str(folder)).weights('transformer')


def test_a_zip_that_unpacks_to_more_than_it_is(tmp_path, digits, call_tool):
    """A checkpoint that claims a tensor it does not hold."""
    path = tmp_path / 'bomb.pth'
    torch.save({'state_dict': {'head.fc.bias': torch.zeros(10)}}, path)
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, 'w') as new:
        for name in old.namelist():
            new.writestr(name, b'' if '/data/' in name else old.read(name))
    path.write_bytes(content.getvalue())
    line = error_line(call_tool('test.py', DEMO, path, '--work-dir', tmp_path / 'out', *options(digits)))
    assert 'bomb.pth cannot be read as a checkpoint' in line
