"""``make demo``, on a few digits and timesteps."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, error_line, forks
from mmengine.config import Config

SHORT = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('demo', {str(ROOT / 'tools/demo.py')!r})
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
demo.IMAGES = dict(train=150, test=60)
whole = demo.read_config

def short(work_dir):
    cfg = whole(work_dir)
    cfg.custom_hooks[0].update(timesteps=[0, 400, 900], num_images=40, batch_size=16)
    cfg.train_cfg.update(max_epochs=3, val_interval=3)
    cfg.train_dataloader.batch_size = 8
    return cfg

demo.read_config = short
demo.main()
"""
#: Of the real one, which this one lacks.
ROWS = 21 - 3


def run(folder):
    script = folder / 'short_demo.py'
    script.write_text(SHORT)
    return forks().run(script, '--work-dir', str(folder / 'demo'))


@pytest.fixture(scope='module')
def demos(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo')
    shutil.copytree(digits, folder / 'demo' / 'digits')
    first = run(folder)
    assert first.returncode == 0, first.stderr[-3000:]
    left = {path: path.stat().st_mtime_ns for path in (folder / 'demo').rglob('*.pth')}
    again = run(folder)
    assert again.returncode == 0, again.stderr[-3000:]
    return SimpleNamespace(folder=folder / 'demo', first=first, again=again, left=left)


def test_it_prints_under_sixty_lines(demos):
    lines = [line for line in (demos.first.stdout + demos.first.stderr).splitlines() if line.strip()]
    assert 20 < len(lines) + ROWS < 60, demos.first.stdout + demos.first.stderr
    assert 'mmengine - INFO' not in demos.first.stdout + demos.first.stderr
    assert not re.search('warning', demos.first.stderr, re.IGNORECASE), demos.first.stderr
    for step in range(1, 5):
        assert f'\n{step}/4 ' in demos.first.stdout


def test_the_log_goes_to_its_file(demos):
    logs = list(demos.folder.glob('*/*.log'))
    assert len(logs) == 2
    text = ''.join(path.read_text() for path in logs)
    assert 'Epoch(train)' in text
    assert 'selected timestep' in text


def test_it_says_what_was_found_and_where(demos):
    selection = json.loads((demos.folder / 'selection.json').read_text())
    text = demos.first.stdout
    assert f'timestep {selection["timestep"]:g} of block 3, output' in text
    head = float(re.search(r'([\d.]+) % of the test images are right', text)[1])
    assert head > 50
    picture = re.search('picture: ([^;]*);', text)[1]
    assert (demos.folder / 'demo.png').samefile(picture)
    probes = json.loads((demos.folder / 'probes.json').read_text())
    assert [entry['request']['noise'] for entry in probes] == ['fixed', 'fresh']
    best = max(probes[0]['result']['accuracy'][0][-1])
    assert f'{best:.1f} % over all 3' in text
    assert 'mmaselect doctor' in text


def test_a_second_one_computes_nothing_again_and_says_so(demos):
    assert {path: path.stat().st_mtime_ns for path in demos.folder.rglob('*.pth')} == demos.left
    assert 'with what an earlier demo has computed from the same' in demos.again.stdout
    assert 'with what an earlier demo' not in demos.first.stdout
    facts = [re.findall(r'[\d.]+ %.*', done.stdout) for done in (demos.first, demos.again)]
    assert facts[0] == facts[1]
    assert len(facts[0]) > 5
    newest = max(demos.folder.glob('*/*.log'), key=lambda path: path.stat().st_mtime).read_text()
    assert 'comes with the checkpoint' in newest
    assert 'Epoch(train)' not in newest


def test_what_was_computed_from_another_config_is_not_used(tmp_path):
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools/demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    probes = tmp_path / 'probes.json'
    for rate, same in ((0.02, False), (0.02, True), (0.01, False), (0.01, True)):
        cfg = Config(dict(lr=rate, work_dir=str(tmp_path)))
        probes.write_text('[]')
        assert demo.resume(cfg, tmp_path) == cfg.get('resume', False) == same
        assert probes.exists() == same


def test_report_writes_its_page_again(demos, call_tool):
    page = demos.folder / 'report.html'
    before = page.read_text()
    page.unlink()
    done = call_tool('report.py', demos.folder)
    assert done.stdout.split() == [str(page)]
    assert page.read_text() == before
    assert 'no/selection.json' in error_line(call_tool('report.py', 'no/selection.json'))
