"""Probes and figures: their numbers against what can be computed without them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, options, run_tool
from PIL import Image
from safetensors import safe_open

import mmaselect
from mmaselect.diffusion.taps import Tap
from mmaselect.evaluation.energy import PARTS
from mmaselect.evaluation.figures import correlation, decompose, principal_colours, write_csv
from mmaselect.evaluation.latents import remember_latents
from mmaselect.evaluation.probe import linear_probe
from mmaselect.evaluation.verdict import judge, judge_probe, judge_rule
from mmaselect.selection.spectrum import gaussian_high_pass, high_frequency_ratio

SIT = dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels')


def read(path):
    with Path(path).open(newline='', encoding='utf-8') as file:
        return [{key: value if key in ('component', 'criterion', 'image', 'noise', 'picks') else float(value)
                 for key, value in row.items()} for row in csv.DictReader(file)]  # fmt: skip


def test_the_parts_of_a_decomposition():
    maps = torch.randn(2, 3, 8, 10)
    low, high = decompose(maps, 0.3)
    torch.testing.assert_close(low + high, maps)
    share = high.square().sum((1, 2, 3)) / maps.square().sum((1, 2, 3))
    torch.testing.assert_close(share, high_frequency_ratio(maps, 0.3))
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(12) / 12).expand(1, 1, 12, 12)
    passed = gaussian_high_pass(12, 12, 0.25)[0, 3]
    torch.testing.assert_close(decompose(wave)[1], passed * wave, rtol=1e-4, atol=1e-5)


def test_principal_colours_follow_the_strongest_direction():
    maps = torch.zeros(1, 5, 4, 4)
    maps[0, 3] = torch.linspace(-1, 1, 16).view(4, 4)
    shown, basis = principal_colours(maps)
    assert basis.shape == (5, 3)
    assert abs(basis[3, 0].item()) == pytest.approx(1)
    red = shown[0, ..., 0].flatten()
    assert (np.diff(red if red[-1] > red[0] else -red) >= 0).all()
    assert red.min() == 0
    assert red.max() == 1


def test_correlation_of_a_constant_is_not_a_number():
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(correlation([1, 1, 1], [3, 2, 1]))


def accuracy_of(train, train_labels, test, test_labels):
    return 100 * (linear_probe(train, train_labels, test) == test_labels).mean()


def test_a_linear_probe_reads_what_is_there_and_nothing_else():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 4000)
    features = generator.normal(size=(4000, 8))
    # Chance is 25 %, with a standard error of 1.
    assert 21 < accuracy_of(features[:2000], labels[:2000], features[2000:], labels[2000:]) < 29
    features[:, :4] += 1000 + 20 * np.eye(4)[labels]
    assert accuracy_of(features[:2000], labels[:2000], features[2000:], labels[2000:]) == 100


def test_a_probe_of_cells_does_not_fit_noise():
    """Features that tell nothing leave the commonest class, which a logistic regression does not find in so few."""
    generator = np.random.default_rng(0)
    labels, features = generator.choice(3, 5000, p=[0.6, 0.3, 0.1]), generator.normal(size=(5000, 200))

    def accuracy(cells):
        found = linear_probe(features[:1000], labels[:1000], features[1000:], cells)
        return 100 * (found == labels[1000:]).mean()

    assert accuracy(cells=False) < 55
    assert accuracy(cells=True) == pytest.approx(100 * (labels[1000:] == 0).mean(), abs=0.5)
    features[:, :3] += 100 * np.eye(3)[labels]
    assert accuracy(cells=True) == 100


def test_csv_is_written_whole_or_not_at_all(tmp_path):
    write_csv(tmp_path / 'a.csv', [{'x': 1.5, 'y': 'a,b'}])
    assert (tmp_path / 'a.csv').read_text().splitlines() == ['x,y', '1.5,"a,b"']
    with pytest.raises(ValueError):
        write_csv(tmp_path / 'b.csv', [{'x': 1}, {'z': 2}])
    assert [path.name for path in tmp_path.iterdir()] == ['a.csv']


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('figures')


def draw(kind, digits, work_dir, *args, **settings):
    done = run_tool(
        'analysis_tools/figures.py', kind, DEMO, '--work-dir', work_dir, *args, *options(digits, **settings)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    picture = work_dir / f'figure_{kind}.png'
    assert done.stdout.splitlines()[-1] == f'{picture}, figure_{kind}.csv'
    # Something is drawn: more than a few colours, on more than a few rows.
    pixels = np.asarray(Image.open(picture).convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    return read(picture.with_suffix('.csv'))


def read_images(folder):
    files = sorted(folder.rglob('*.png'))
    # As the config's pipeline reads them.
    scaled = [cv2.resize(cv2.imread(str(path)), (16, 16), interpolation=cv2.INTER_CUBIC) for path in files]
    tensor = torch.stack([torch.from_numpy(image) for image in scaled])
    return tensor.permute(0, 3, 1, 2), np.array([int(path.parent.name) for path in files])


def test_scores_and_accuracy_over_timesteps(digits, work_dir):
    rows = draw('timesteps', digits, work_dir, '--noise', 'fresh')
    assert [row['timestep'] for row in rows] == [0, 400, 900]
    (train, train_labels), (test, test_labels) = (read_images(digits / split) for split in ('train', 'test'))
    for row in rows:
        x, y = (mmaselect.extract(SIT, images, row['timestep'], 2, noise='fresh', pool=True).numpy()
                for images in (train, test))  # fmt: skip
        assert row['probe accuracy (%)'] == pytest.approx(accuracy_of(x, train_labels, y, test_labels), abs=0.01)
    assert rows[0]['probe accuracy (%)'] > 80 > rows[2]['probe accuracy (%)']
    for label in ('HFR (sigma 0.25)', 'instance information (2 views, 1x1 and 2x2 cells)'):
        for row in rows:
            assert row[f'{label}, 2.5 %'] <= row[label] <= row[f'{label}, 97.5 %'] or row[label] == 0
    # Of 60 test images, 30 in either half.
    (entry,) = json.loads((work_dir / 'probes.json').read_text())
    (accuracy,), (even,), (odd,) = (
        [values for _, _, values in lists] for lists in (entry['result']['accuracy'], *entry['result']['halves'])
    )
    assert np.mean([even, odd], 0) == pytest.approx(accuracy)
    assert even != odd
    # A second figure of the same request trains no probe again.
    stored = json.loads((work_dir / 'probes.json').read_text())
    again = draw('timesteps', digits, work_dir, '--noise', 'fresh')
    assert again == rows
    assert json.loads((work_dir / 'probes.json').read_text()) == stored


def test_scores_against_the_fisher_score(digits, work_dir):
    rows = draw('fisher', digits, work_dir, **{'model.backbone.noise': 'fresh'})
    fisher = [row['Fisher Score (labels)'] for row in rows]
    # Under fresh noise, classes get ever harder to tell; so says instance information, and plain HFR the opposite.
    assert fisher == sorted(fisher, reverse=True)
    names = ('HFR (sigma 0.25)', 'instance information (2 views, 1x1 and 2x2 cells)')
    hfr, ours = ([row[name] for row in rows] for name in names)
    assert ours == sorted(ours, reverse=True)
    assert hfr == sorted(hfr)


def test_components_and_blocks(digits, work_dir):
    rows = draw('blocks', digits, work_dir, '--at', '400')
    assert {(row['component'], row['block']) for row in rows} == {
        (component, block) for component in ('query', 'key', 'value', 'attention', 'output') for block in range(5)
    }
    (train, train_labels), (test, test_labels) = (read_images(digits / split) for split in ('train', 'test'))
    x, y = (mmaselect.extract(SIT, images, 400, 3, 'value', pool=True).numpy() for images in (train, test))
    (row,) = [row for row in rows if (row['component'], row['block']) == ('value', 3)]
    assert row['probe accuracy (%)'] == pytest.approx(accuracy_of(x, train_labels, y, test_labels), abs=0.01)


def test_decomposition_beside_the_image(digits, work_dir):
    rows = draw('decomposition', digits, work_dir, '--at', '100', '--images', '3', '59')
    images, _ = read_images(digits / 'test')
    maps = mmaselect.extract(SIT, images[[3, 59]], 100, 2, noise='fresh')
    assert [row['image'] for row in rows] == ['image 3', 'image 59']
    assert [row['HFR'] for row in rows] == pytest.approx(high_frequency_ratio(maps).tolist(), rel=1e-3)


def test_bad_requests_get_one_line(digits, work_dir, call_tool):
    from conftest import error_line

    def call(*args):
        return error_line(call_tool('analysis_tools/figures.py', *args))

    assert "figure=['pie'] is not known; choose from: timesteps, decomposition, fisher, blocks" in call('pie', DEMO)
    line = call('decomposition', DEMO, '--work-dir', work_dir, '--at', '0', '--images', '60', *options(digits))
    assert '--images 60: the validation data has images 0 to 59' in line


def test_criteria_are_compared_with_the_oracle(digits, tmp_path):
    latents = tmp_path / 'latents.safetensors'
    done = run_tool(
        'analysis_tools/compare_criteria.py', DEMO, '--work-dir', tmp_path, '--blocks', 1, 2, '--latents', latents,
        *options(digits),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(tmp_path / 'criteria.csv')
    assert len(rows) == 2 * (18 + 4)
    probes = {
        entry['request']['noise']: entry['result'] for entry in json.loads((tmp_path / 'probes.json').read_text())
    }
    *_, by_halves = [row for row in rows if row['noise'] == 'fixed']
    assert by_halves['criterion'].startswith('the probe')
    assert 0 <= by_halves['gap'] <= by_halves['largest']
    for row in rows:
        if row['criterion'] == by_halves['criterion']:
            continue
        accuracy = np.array([values for *_, values in probes[row['noise']]['accuracy']])
        picks = [probes[row['noise']]['timesteps'].index(float(pick)) for pick in str(row['picks']).split()]
        losses = accuracy.max(1) - accuracy[[0, 1], picks]
        assert (row['gap'], row['largest']) == pytest.approx((losses.mean(), losses.max()), abs=1e-9)
    cost = {row['criterion']: row['block evaluations'] for row in rows}
    assert cost['centred noise-consistent HFR (sigma 0.25)'] == 2 * cost['HFR (sigma 0.25)'] == 2 * 40 * 3 * 3
    assert cost['instance information (2 views)'] == 2 * 40 * 3 * 3
    assert cost['always 0'] == 0
    assert '| Fisher Score (labels) |' in done.stdout
    # Each of 150 training and 60 test images once, and one further view of 40.
    with safe_open(latents, 'pt') as file:
        assert len(file.keys()) == 150 + 60 + 40


def test_settings_are_varied_one_at_a_time(digits, tmp_path, call_tool):
    call_tool(
        'analysis_tools/compare_criteria.py', DEMO, '--settings', '--noise', 'fixed', '--work-dir', str(tmp_path),
        '--blocks', '1', *options(digits),
    )  # fmt: skip
    cost = {row['criterion']: row['block evaluations'] for row in read(tmp_path / 'settings.csv')}
    # 40 images, 3 timesteps, 2 blocks, a pass per view; 150 images are all there are.
    assert cost['as configured'] == cost['pool=4'] == cost['shrinkage=0.3'] == 2 * 40 * 3 * 2
    assert cost["views with {'crop': 0.1}"] == cost['as configured']
    assert cost['num_views=8'] == 4 * cost['as configured']
    assert (cost['num_images=32'], cost['num_images=150']) == (2 * 32 * 3 * 2, 2 * 150 * 3 * 2)
    assert cost['always 500'] == 0


def test_a_verdict_is_computed_by_hand():
    accuracy = {Tap(1, 'query'): [50.0, 60.0, 55.0], Tap(2, 'query'): [70.0, 60.0, 65.0]}
    scores = {Tap(1, 'query'): [1.0, 2.0, 3.0], Tap(2, 'query'): [2.0, 1.0, 1.5]}
    found = judge(scores, accuracy, [0, 100, 200])
    assert (found.gap, found.largest, found.joint, found.picks) == (2.5, 5.0, 15.0, [200, 0])
    assert found.correlation == pytest.approx((0.5 + 1.0) / 2)
    rule = judge_rule(120, accuracy, [0, 100, 200])
    assert (rule.gap, rule.largest, rule.picks) == (5.0, 10.0, [100, 100])
    assert np.isnan(rule.joint)


def test_a_probe_is_judged_on_images_that_it_did_not_choose_on():
    even = {Tap(1, 'query'): [50.0, 60.0, 55.0], Tap(2, 'query'): [70.0, 60.0, 65.0]}
    odd = {Tap(1, 'query'): [58.0, 57.0, 50.0], Tap(2, 'query'): [68.0, 60.0, 66.0]}
    found = judge_probe((even, odd), [0, 100, 200])
    # Chosen on even images, 100 and 0: 1 and 0 points on odd ones. Chosen on odd images, 0 and 0: 10 and 0.
    assert (found.gap, found.largest, found.joint, found.picks) == ((0.5 + 5) / 2, 10.0, 0.0, [100, 0])


def test_traversal_search_counts_what_it_costs(digits, tmp_path):
    done = run_tool('analysis_tools/traversal_search.py', DEMO, '--work-dir', tmp_path, *options(digits))
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((tmp_path / 'traversal.json').read_text())
    selection, once, again = content['rows']
    # 40 images, 3 timesteps, 2 noises, 3 blocks; then 150 training images (3 epochs) and 60 test images.
    assert selection['block_evaluations'] == 40 * 3 * 2 * 3
    assert once['block_evaluations'] == (150 + 60) * 3 * 3
    assert again['block_evaluations'] == (3 * 150 + 60) * 3 * 3
    assert once['timestep'] == content['timesteps'][int(np.argmax(content['accuracy']))]
    assert selection['timestep'] == 400
    ratio = again['block_evaluations'] / selection['block_evaluations']
    assert re.search(rf'traversal, 3 epochs each \* .*{again["block_evaluations"]} .* {ratio:.1f} ', done.stdout)


def test_hfr_is_the_sum_of_its_parts(digits, work_dir):
    rows = draw('energy', digits, work_dir, **{'model.backbone.block': '[0,2]'})
    assert [(row['block'], row['timestep']) for row in rows if row['timestep'] == 400] == [(0, 400), (2, 400)]
    for row in rows:
        shares = {part: row[f'share of {part}'] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1)
        known = [part for part in PARTS if not np.isnan(row[f'HFR of {part}'])]
        left = sum(abs(shares[part]) for part in PARTS if part not in known)
        assert sum(shares[part] * row[f'HFR of {part}'] for part in known) == pytest.approx(row['HFR'], abs=1e-6 + left)
    by_step = {(row['block'], row['timestep']): row for row in rows}
    # A clean latent has no noise; what is left of the image sinks with the timestep.
    assert by_step[0, 0]['share of noise'] == pytest.approx(0, abs=1e-6)
    images = [by_step[2, timestep]['share of image'] for timestep in (0, 400, 900)]
    assert images == sorted(images, reverse=True)


def test_latents_are_remembered(tmp_path):
    model, images = mmaselect.load(SIT, 2), torch.rand(3, 3, 16, 16) * 2 - 1
    expected, calls = model.encode(images), []
    memory = remember_latents(model, tmp_path / 'latents.safetensors')
    memory.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    torch.testing.assert_close(model.encode(images[:2]), expected[:2])
    torch.testing.assert_close(model.encode(images), expected)
    memory.save()
    again = remember_latents(mmaselect.load(SIT, 2), tmp_path / 'latents.safetensors')
    again.encoder.register_forward_hook(lambda *_: pytest.fail('encoded twice'))
    torch.testing.assert_close(again(images.flip(0)), expected.flip(0))
    assert calls == [2, 1]
