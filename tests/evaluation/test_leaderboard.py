"""The leaderboard, on a real run of tools/train.py and on copies of it that were tampered with."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import DEMO, ROOT, error_line, options, run_tool

from mmaselect.errors import InputError
from mmaselect.evaluation.leaderboard import FORMATS, make_leaderboard, read_published
from mmaselect.evaluation.runs import METRICS, Incomplete, find_runs, parse_config, read_run
from mmaselect.hooks.timestep_selection import TimestepSelectionHook


@pytest.fixture
def copy(trained, tmp_path):
    """Returns a function that copies the run and gives its folder, and those of its parts that tests change."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(trained[0], folder)
        return folder

    return make


def log_of(folder):
    (log,) = folder.glob('*/vis_data/scalars.json')
    return log


def edit(path, change):
    path.write_text(change(path.read_text()))


def edit_lines(folder, change):
    """``change`` gets each line of the log as a dict, and gives a dict, or None to drop it."""
    log = log_of(folder)
    lines = [change(json.loads(line)) for line in log.read_text().splitlines()]
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines if line is not None))


def set_seed(folder, seed, accuracy):
    config = log_of(folder).with_name('config.py')
    assert len(re.findall(r'\bseed=0\b', config.read_text())) == 1
    edit(config, lambda text: re.sub(r'\bseed=0\b', f'seed={seed}', text))
    edit_lines(folder, lambda line: {**line, 'accuracy/top1': accuracy} if 'accuracy/top1' in line else line)


def reason(folder):
    with pytest.raises(Incomplete) as caught:
        read_run(folder)
    return str(caught.value)


def test_a_run_says_what_it_did(trained):
    folder, printed = trained
    run = read_run(folder)
    selection = json.loads((folder / 'selection.json').read_text())
    assert run.name == DEMO.stem
    # The last validation, not the best one.
    assert run.value == pytest.approx(float(re.findall(r'accuracy/top1: ([\d.]+)', printed)[-1]), abs=1e-4)
    assert (run.seed, run.timesteps, run.taps) == (0, (selection['timestep'],), '2 query')
    assert run.recipe == selection['request']['recipe']
    assert run.block_evaluations == selection['block_evaluations'] == 3 * 40 * 3 * 2
    assert (run.task.images, run.task.image_size, run.task.metric) == (60, '16x16', 'top-1 accuracy (%)')
    assert run.task.dataset.startswith('CustomDataset few')
    assert run.training_seconds > 0
    assert re.fullmatch(r'\d{4}-\d\d-\d\d', run.finished)
    assert find_runs([folder.parent]) == find_runs([folder, folder.parent]) == [folder]


def test_mean_and_deviation_over_seeds(copy, tmp_path):
    values = {0: 90.0, 1: 94.0, 2: 95.0}
    for seed, value in values.items():
        set_seed(copy(f'seed-{seed}'), seed, value)
    (table,) = make_leaderboard([tmp_path])
    (entry,) = table.entries
    assert entry.mean == pytest.approx(93)
    assert entry.deviation == pytest.approx(statistics.stdev(values.values())) == pytest.approx(7**0.5)
    assert (entry.result, entry.seeds) == ('93.00 ± 2.65', '0, 1, 2')
    # The same seed again is no further evidence.
    set_seed(copy('seed-2-again'), 2, 97.0)
    (table,) = make_leaderboard([tmp_path])
    assert table.entries[0].seeds == '0, 1, 2'
    assert table.entries[0].mean == pytest.approx((90 + 94 + 97) / 3)
    assert 'seed 2 was run more than once: ' in table.entries[0].note


def test_other_settings_are_another_entry(copy, tmp_path):
    set_seed(copy('a'), 0, 90.0)
    other = copy('b')
    edit(log_of(other).with_name('config.py'), lambda text: text.replace('lr=0.02', 'lr=0.01'))
    set_seed(other, 1, 91.0)
    # Where it ran, and how many workers it had, changes nothing.
    same = copy('c')
    edit(log_of(same).with_name('config.py'), lambda text: text.replace('num_workers=0', 'num_workers=4'))
    edit(
        log_of(same).with_name('config.py'), lambda text: re.sub(r"data_root='/[^']*/", "data_root='/elsewhere/", text)
    )
    set_seed(same, 2, 92.0)
    (table,) = make_leaderboard([tmp_path])
    assert [(entry.seeds, entry.mean) for entry in table.entries] == [('0, 2', 91.0), ('1', 91.0)]
    assert 'optim_wrapper.optimizer.lr=0.02' in table.entries[0].name
    assert 'optim_wrapper.optimizer.lr=0.01' in table.entries[1].name
    assert table.entries[1].deviation is None


def test_a_selected_timestep_stands_beside_one_that_was_set(trained, digits, tmp_path):
    """Without a selection there is no selection.json to say how many images there were."""
    done = run_tool('train.py', DEMO, '--work-dir', tmp_path, *options(digits, **{'model.backbone.timestep': 900}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / 'selection.json').exists()
    selected, fixed = read_run(trained[0]), read_run(tmp_path)
    assert selected.task == fixed.task
    assert fixed.task.images == 60
    assert (fixed.timesteps, fixed.criterion) == ((900,), None)


def test_training_data_without_a_length_can_be_saved():
    checkpoint = {'meta': {}}
    TimestepSelectionHook().before_save_checkpoint(SimpleNamespace(_val_loop=None), checkpoint)
    assert checkpoint['meta']['data'] == {'val_images': None, 'split': None}


def test_a_validation_that_was_made_up_for_counts(copy, trained, digits):
    """By ``--resume`` of a run that was killed in its last validation; under the same settings alone."""
    killed = copy('killed')
    edit_lines(killed, lambda line: None if 'accuracy/top1' in line and line['step'] == 3 else line)
    first = log_of(killed).parent
    assert reason(killed) == 'no validation after its last epoch, 3'
    done = run_tool('train.py', DEMO, '--work-dir', killed, '--resume', *options(digits))
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_run(killed).value == read_run(trained[0]).value
    (second,) = [path for path in killed.glob('*/vis_data') if path != first]
    edit(second / 'config.py', lambda text: text.replace('batch_size=8', 'batch_size=9'))
    assert reason(killed) == 'no validation after its last epoch, 3'


def test_an_interrupted_run_has_no_number(copy, tmp_path):
    cut = copy('cut')
    edit_lines(
        cut, lambda line: None if line.get('epoch') == 3 or ('accuracy/top1' in line and line['step'] == 3) else line
    )
    assert reason(cut) == 'stopped at epoch 2 of 3'
    unvalidated = copy('unvalidated')
    edit_lines(unvalidated, lambda line: None if 'accuracy/top1' in line and line['step'] == 3 else line)
    assert reason(unvalidated) == 'no validation after its last epoch, 3'
    # A line that a kill cut in two.
    half = copy('half')
    edit(log_of(half), lambda text: text[: -len(text.splitlines()[-1]) // 2])
    assert reason(half) == 'no validation after its last epoch, 3'
    broken = copy('nan')
    edit_lines(broken, lambda line: {**line, 'accuracy/top1': float('nan')} if 'accuracy/top1' in line else line)
    assert 'its last validation has accuracy/top1=nan' in reason(broken)
    (table,) = make_leaderboard([tmp_path])
    assert table.title == 'incomplete: no result'
    assert [entry.result for entry in table.entries] == ['incomplete'] * 4
    for name, render in FORMATS.items():
        text = render([table])
        assert 'stopped at epoch 2 of 3' in text, name
        assert not re.search(r'\b\d\d\.\d\d\b', text), name


def test_a_validation_without_a_metric_of_ours_is_said_to_be_one(copy):
    """Of several labels, for example: there was a validation."""
    folder = copy('a')

    def rename(line):
        return {('multi-label/mAP' if key == 'accuracy/top1' else key): value for key, value in line.items()}

    edit_lines(folder, rename)
    assert reason(folder) == f'its last validation has none of {", ".join(METRICS)}, but multi-label/mAP'


def test_a_checkpoint_that_does_not_match_its_log(copy):
    def change(name, do):
        folder = copy(name)
        checkpoint = torch.load(folder / 'epoch_3.pth', weights_only=True)
        do(checkpoint)
        torch.save(checkpoint, folder / 'epoch_3.pth')
        return reason(folder)

    assert 'was written at epoch 2, its log ends at 3' in change('early', lambda c: c['meta'].update(epoch=2, iter=3))
    assert "is of the run 'other_20200101_000000'" in change(
        'other', lambda c: c['meta'].update(experiment_name='other_20200101_000000')
    )
    assert 'lacks backbone.recipe' in change('foreign', lambda c: c['state_dict'].pop('backbone.recipe'))
    assert 'taps or recipe in the checkpoint cannot be read' in change(
        'damaged', lambda c: c['state_dict']['backbone.recipe'].add_(1)
    )

    def another_block(checkpoint):
        ((block, component),) = json.loads(bytes(checkpoint['state_dict']['backbone.taps'].tolist()))
        content = json.dumps([[block + 1, component]]).encode()
        checkpoint['state_dict']['backbone.taps'] = torch.tensor(list(content), dtype=torch.uint8)

    def another_seed(checkpoint):
        recipe = json.loads(bytes(checkpoint['state_dict']['backbone.recipe'].tolist()))
        content = json.dumps({**recipe, 'noise_seed': 1}, sort_keys=True).encode()
        checkpoint['state_dict']['backbone.recipe'] = torch.tensor(list(content), dtype=torch.uint8)

    assert 'differ in recipe' in change('recipe', another_seed)
    assert 'differ in timestep' in change('timestep', lambda c: c['state_dict']['backbone.timestep'].add_(1))
    assert 'differ in taps' in change('taps', another_block)
    folder = copy('gone')
    (folder / 'epoch_3.pth').unlink()
    assert reason(folder) == 'its last checkpoint epoch_3.pth is missing'
    folder = copy('pointer')
    (folder / 'last_checkpoint').unlink()
    assert reason(folder) == 'no last_checkpoint'
    folder = copy('truncated')
    (folder / 'epoch_3.pth').write_bytes((folder / 'epoch_3.pth').read_bytes()[:5000])
    assert 'its checkpoint epoch_3.pth cannot be read: ' in reason(folder)
    folder = copy('unselected')
    (folder / 'selection.json').unlink()
    assert reason(folder) == 'its timestep was selected, but there is no selection.json'
    folder = copy('other-selection')
    edit(folder / 'selection.json', lambda text: text.replace('"decisions"', '"decided"'))
    assert "is not of this revision: KeyError('decisions')" in reason(folder)
    folder = copy('half-selected')
    edit(folder / 'selection.json', lambda text: text[:100])
    assert 'its selection.json cannot be read: ' in reason(folder)


def test_nothing_in_a_work_directory_is_executed(copy, tmp_path):
    trap = tmp_path / 'trap'

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    folder = copy('pickle')
    (folder / 'epoch_3.pth').write_bytes(pickle.dumps({'meta': Bomb(), 'state_dict': {}}))
    assert 'cannot be read' in reason(folder)
    for number, line in enumerate(
        (f'import os; os.mkdir({str(trap)!r})', f'x = __import__("os").mkdir({str(trap)!r})', 'x = [0][0]', 'x.y = 1')
    ):
        folder = copy(f'config-{number}')
        config = log_of(folder).with_name('config.py')
        edit(config, lambda text, line=line: f'{text}\n{line}\n')
        assert 'config.py of its log cannot be read: ' in reason(folder)
    assert not trap.exists()


def test_dumped_configs_are_read_as_they_are(tmp_path, monkeypatch):
    """Every fourth config of ours, against mmengine's own reading of what mmengine dumped, and yapf formatted."""
    from mmengine.config import Config, config

    monkeypatch.setattr(config, 'FormatCode', config.FormatCode.__wrapped__)
    paths = [path for path in ROOT.glob('configs/*/*.py') if path.parent.name != '_base_']
    assert len(paths) > 45
    for path in paths[::4]:
        Config.fromfile(path).dump(tmp_path / path.name)
        expected = json.loads(json.dumps(Config.fromfile(tmp_path / path.name).to_dict()))
        assert json.loads(json.dumps(parse_config(tmp_path / path.name))) == expected


def test_a_wrapper_may_have_named_the_weights(copy):
    """mmengine's ``DDPStrategy`` writes ``module.backbone.timestep``."""
    folder = copy('wrapped')
    whole = read_run(folder)
    checkpoint = torch.load(folder / 'epoch_3.pth', weights_only=True)
    checkpoint['state_dict'] = {f'module.{name}': value for name, value in checkpoint['state_dict'].items()}
    torch.save(checkpoint, folder / 'epoch_3.pth')
    again = read_run(folder)
    assert (again.timesteps, again.recipe) == (whole.timesteps, whole.recipe)


def test_a_resumed_run_is_one_run(copy):
    """Two logs: the first was killed in epoch 3, the second began after epoch 2."""
    folder = copy('resumed')
    whole = read_run(folder)
    second = log_of(folder).parents[1]
    first = second.with_name('20200101_000000')
    shutil.copytree(second, first)
    edit(second / 'vis_data/scalars.json', lambda text: ''.join(
        line + '\n' for line in text.splitlines() if json.loads(line).get('epoch', json.loads(line)['step']) >= 3
        and not line.startswith('{"selection')
    ))  # fmt: skip
    log = (first / 'vis_data/scalars.json').read_text().splitlines()
    killed = [line for line in log if json.loads(line).get('step') != 3 or 'loss' in line]
    (first / 'vis_data/scalars.json').write_text('\n'.join(killed[:-4]) + '\n{"loss": 1.')
    resumed = read_run(folder)
    assert (resumed.value, resumed.name, resumed.task) == (whole.value, whole.name, whole.task)
    assert resumed.training_seconds == pytest.approx(whole.training_seconds, rel=0.2)


def published(path, **fields):
    row = dict(method='Other', dataset='CustomDataset few0', split='validation', images=60, image_size='16x16',
               metric='top-1 accuracy (%)', value=91.5, source='them')  # fmt: skip
    content = {'sources': {'them': {'title': 'A paper', 'url': 'https://example.org'}}, 'results': [row | fields]}
    path.write_text(yaml.safe_dump(content))
    return path


def test_only_what_agrees_stands_in_one_table(copy, tmp_path):
    runs = tmp_path / 'runs'
    runs.mkdir()
    set_seed(copy('runs/small'), 0, 90.0)
    large = copy('runs/large')
    edit(log_of(large).with_name('config.py'), lambda text: re.sub(r'16,\n(\s*)16,', r'32,\n\1 32,', text))
    set_seed(large, 0, 95.0)
    dataset = read_run(runs / 'small').task.dataset
    tables = make_leaderboard([runs], published(tmp_path / 'p.yml', dataset=dataset))
    assert [[entry.name for entry in table.entries] for table in tables] in (
        [['Other', DEMO.stem], [DEMO.stem]], [[DEMO.stem], ['Other', DEMO.stem]]
    )  # fmt: skip
    assert {table.title.split(', ')[2] for table in tables} == {'16x16', '32x32'}
    for table in tables:
        assert re.search(r'kept apart for another image size \((16x16|32x32) here, (16x16|32x32) there\)', table.apart)
    # What is not known, or differs, keeps a published row out of every table of ours.
    for fields, why in (
        (dict(image_size=None), 'kept apart: image size not known'),
        (dict(images=None), 'kept apart: number of test images not known'),
        (dict(images=597), r'kept apart for another number of test images \(597 here, 60 there\)'),
        (dict(split='test'), r'kept apart for another split \(test here, validation there\)'),
        (dict(protocol='the maximum'), r'another protocol \(the maximum here, the last checkpoint, once there\)'),
        (dict(metric='mIoU (%)'), r'another metric \(mIoU \(%\) here, top-1 accuracy \(%\) there\)'),
    ):
        tables = make_leaderboard([runs], published(tmp_path / 'p.yml', dataset=dataset, **fields))
        assert [len(table.entries) for table in tables] == [1, 1, 1]
        assert tables[-1].title == f'{dataset}: published, not comparable with the above'
        assert re.search(why, tables[-1].entries[0].note), tables[-1].entries[0].note
    # Of a data set that no run has used, nothing is shown.
    assert len(make_leaderboard([runs / 'small'], published(tmp_path / 'p.yml', dataset='ADE20K'))) == 1


def test_formats(copy, tmp_path):
    set_seed(copy('a'), 0, 90.125)
    set_seed(copy('b'), 1, 91.125)
    tables = make_leaderboard([tmp_path])
    (row,) = csv.DictReader(io.StringIO(FORMATS['csv'](tables)))
    assert (row['entry'], row['mean'], row['seeds'], row['block']) == (DEMO.stem, '90.6250', '0, 1', '2 query')
    content = json.loads(FORMATS['json'](tables))
    assert content[0]['entries'][0]['mean'] == 90.625
    assert content[0]['entries'][0]['task']['images'] == 60
    lines = FORMATS['markdown'](tables).splitlines()
    header, rule, body = (line for line in lines if line.startswith('|'))
    assert header.count('|') == rule.count('|') == body.count('|')
    assert '| 90.62 ± 0.71 |' in body
    assert '90.62 ± 0.71' in FORMATS['table'](tables)


def test_the_tool(copy, call_tool, tmp_path):
    folder = copy('run')
    done = call_tool('leaderboard.py', folder)
    assert done.returncode == 0, done.stderr
    assert f'{read_run(folder).value:.2f}' in done.stdout
    done = call_tool('leaderboard.py', folder, '--format', 'csv', '--out', tmp_path / 'out/board.csv')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out/board.csv').read_text().startswith('table,mean,deviation,entry,')
    assert os.listdir(tmp_path / 'out') == ['board.csv']
    (tmp_path / 'empty').mkdir()
    assert 'holds no run of tools/train.py' in error_line(call_tool('leaderboard.py', tmp_path / 'empty'))
    assert "work_dir='/no/where' is not a folder" in error_line(call_tool('leaderboard.py', '/no/where'))
    (tmp_path / 'bad.yml').write_text('results: 7')
    done = call_tool('leaderboard.py', folder, '--published', tmp_path / 'bad.yml')
    assert 'is not a YAML file with sources and results' in error_line(done)
    published(tmp_path / 'bad.yml', value=101)
    done = call_tool('leaderboard.py', folder, '--published', tmp_path / 'bad.yml')
    assert 'result 1 is not valid' in error_line(done)


def test_published_results_are_cited_and_known():
    """Those that can be checked here: the toolboxes' own metafiles."""
    import mmpretrain
    import mmseg

    entries = read_published(ROOT / 'configs/published.yml')
    assert len(entries) > 10
    assert all(entry.source.startswith('published: ') and 'https://' in entry.source for entry in entries)
    assert {entry.task.metric for entry in entries} == set(METRICS.values()) - {METRICS['PCK/img_0.1/point']}
    folders = {'mmpretrain': mmpretrain, 'mmsegmentation': mmseg}
    checked = 0
    for entry in entries:
        toolbox = next((name for name in folders if f'metafiles of {name} ' in entry.source), None)
        if toolbox is None:
            # Of these, the authors' public files say it.
            assert entry.task.image_size is None or entry.task.dataset in ('SPair-71k', 'DatasetDDPM horse_21')
            continue
        root = os.path.dirname(folders[toolbox].__file__)
        text = run_grep(root, entry.note)
        key = 'mIoU' if 'mIoU' in entry.task.metric else 'Top 1 Accuracy'
        assert float(re.search(rf'{key}: ([\d.]+)', text)[1]) == entry.mean, entry.name
        checked += 1
    assert checked == 6


def run_grep(root, name):
    """The part of a toolbox's metafile that begins with a model's name."""
    from pathlib import Path

    for file in Path(root, '.mim/configs').rglob('metafile.y*ml'):
        _, found, rest = file.read_text().partition(f'Name: {name}\n')
        if found:
            return rest
    raise AssertionError(name)


def test_a_published_file_that_is_not_there():
    with pytest.raises(InputError, match=r"published='/no/where.yml' is not a YAML file"):
        read_published('/no/where.yml')
