"""``mmaselect extract``: features in a file, with names."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DEMO, error_line, run_tool
from safetensors import safe_open

import mmaselect
from mmaselect.apis.features import write_features

NANO = 'mmaselect://dit-nano_digits'
MODEL = dict(type='SiT', pretrained=NANO, latent='pixels')


def read(path):
    with safe_open(str(path), framework='pt') as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata()


def test_the_tool_writes_what_extract_gives(digits, tmp_path):
    out = tmp_path / 'new' / 'features.safetensors'
    single = next((digits / 'test' / '7').glob('*.png'))
    done = run_tool('extract.py', DEMO, digits / 'test' / '3', single, '-o', out, '--timestep', 400, '--block', 3,
                    '--component', 'output', '--pool', '--device', 'cpu')  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'{out}: t400.block3.output (7, 128)' in done.stdout
    tensors, metadata = read(out)
    files = [*sorted((digits / 'test' / '3').iterdir()), single]
    assert json.loads(metadata['images']) == [str(file) for file in files]
    expected = mmaselect.extract(MODEL, files, 400, 3, 'output', pool=True)
    torch.testing.assert_close(tensors, {'t400.block3.output': expected})
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_taps_of_a_config_are_read(digits, tmp_path, call_tool):
    out, names = tmp_path / 'features.safetensors', ['1-query', '3-output']
    taken = ['model.backbone.block=None', 'model.backbone.taps=' + ','.join(names)]
    done = call_tool('extract.py', DEMO, digits / 'test' / '3', '-o', out, '--timestep', 400, '--pool',
                     '--device', 'cpu', '--cfg-options', *taken)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = mmaselect.extract(MODEL, digits / 'test' / '3', 400, taps=names, pool=True)
    found, _ = read(out)
    assert sorted(found) == ['t400.block1.query', 't400.block3.output']
    for (timestep, block, component), value in expected.items():
        torch.testing.assert_close(found[f't{timestep:g}.block{block}.{component}'], value)


def test_a_selection_brings_timestep_and_tap(digits, tmp_path):
    loaded = mmaselect.load(MODEL, 'auto', 'output')
    selection = mmaselect.select(loaded, digits / 'train' / '1', 'auto', timesteps=[0, 400], num_images=8)
    (tap,) = selection.taps
    out = tmp_path / 'features.safetensors'
    shapes = write_features(out, MODEL, [digits / 'test' / '1'], selection)
    assert shapes == {f't{selection.timestep:g}.block{tap.block}.output': (6, 128, 8, 8)}
    tensors, metadata = read(out)
    assert metadata['weights'] == mmaselect.load(MODEL, tap.block, 'output').identity.hex()
    expected = mmaselect.extract(MODEL, digits / 'test' / '1', selection)
    torch.testing.assert_close(next(iter(tensors.values())), expected)


@pytest.mark.parametrize(
    'arguments, said',
    (
        ([DEMO], 'timestep is open: give --timestep, or --selection'),
        ([DEMO, '--timestep', '1001'], 'timestep=1001.0 is not a timestep'),
        ([NANO, '--selection', 'nowhere.json'], "--selection 'nowhere.json' is not a file"),
    ),
)
def test_bad_input_gets_a_line(digits, tmp_path, call_tool, arguments, said):
    model, *more = arguments
    out = tmp_path / 'features.safetensors'
    assert said in error_line(call_tool('extract.py', model, digits / 'test' / '3', '-o', out, *more))
    assert not list(tmp_path.iterdir())
