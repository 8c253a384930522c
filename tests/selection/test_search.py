"""The sweep: what it computes, what it counts, and what it leaves behind."""

from __future__ import annotations

import json

import pytest
import torch

from mmaselect.diffusion.family import Tap, make_taps
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError
from mmaselect.selection.criteria import FisherScore, HighFrequencyRatio, NoiseConsistentHFR
from mmaselect.selection.report import Selection, read_selection
from mmaselect.selection.search import Batch, Sweep, make_timesteps, sweep
from mmaselect.selection.spectrum import high_frequency_ratio, noise_consistent_hfr

ARCH = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)
TIMESTEPS = [0.0, 200.0, 400.0]
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def make_model(blocks=(0, 1)):
    return DiffusionSpec('SiT', arch=ARCH, latent='pixels').load(make_taps(list(blocks), 'query', 3))


def batches(size, labels=True):
    for start in range(0, 6, size):
        part = slice(start, start + size)
        yield Batch(IMAGES[part], list(range(6))[part], LABELS[part] if labels else None)


def test_scores_equal_those_computed_by_hand():
    model = make_model()
    criteria = [HighFrequencyRatio(0.3), NoiseConsistentHFR(0.25, centred=True)]
    result = sweep(model, batches(4), TIMESTEPS, criteria, seed=7)
    noises = [torch.stack([seeded_noise((3, 8, 8), 7, index, draw) for index in range(6)]) for draw in (0, 1)]
    for tap in model.family.taps:
        for position, timestep in enumerate(TIMESTEPS):
            a, b = (model(IMAGES, noise, timestep)[tap] for noise in noises)
            expected = high_frequency_ratio(a, 0.3).mean().item()
            assert result.scores[criteria[0].label][tap][position] == pytest.approx(expected, rel=1e-5)
            expected = noise_consistent_hfr(a, b, 0.25, centred=True).item()
            assert result.scores[criteria[1].label][tap][position] == pytest.approx(expected, rel=1e-3)


def test_neither_batches_nor_ranks_change_the_scores():
    model = make_model()
    criteria = [HighFrequencyRatio(), NoiseConsistentHFR(), FisherScore()]
    whole = sweep(model, batches(6), TIMESTEPS, criteria)
    parts = sweep(model, batches(1), TIMESTEPS, criteria)
    for label in whole.scores:
        assert parts.curve(label) == pytest.approx(whole.curve(label), rel=1e-4)


def test_every_image_is_encoded_once_and_every_block_counted(monkeypatch):
    model = make_model()
    encoded, blocks = [], []
    model.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    for block in model.family.transformer.transformer_blocks:
        block.norm1.register_forward_hook(lambda _, args, __: blocks.append(len(args[0])))
    passes = []
    result = sweep(model, batches(4), TIMESTEPS, [NoiseConsistentHFR()], on_pass=lambda: passes.append(1))
    assert sum(encoded) == result.encoder_runs == result.num_images == 6
    assert sum(blocks) == result.block_evaluations == 6 * len(TIMESTEPS) * 2 * 2
    assert len(passes) == 2 * len(TIMESTEPS) * 2
    # A criterion of one noise costs one pass.
    assert sweep(model, batches(4), TIMESTEPS, [HighFrequencyRatio()]).block_evaluations == 6 * len(TIMESTEPS) * 2


def test_features_that_are_not_finite_are_named():
    model = make_model()
    model.family.transformer.transformer_blocks[1].attn1.to_q.weight.data[0, 0] = float('nan')
    with pytest.raises(InputError, match=r'features are not finite at timestep 0, block 1, query'):
        sweep(model, batches(6), TIMESTEPS, [HighFrequencyRatio()])


def test_no_images():
    with pytest.raises(InputError, match=r'selection has no images: the data set is empty'):
        sweep(make_model(), [], TIMESTEPS, [HighFrequencyRatio()])


def test_labels_that_are_missing():
    with pytest.raises(InputError, match=r"criterion 'Fisher Score \(labels\)' needs labels; these images have none"):
        sweep(make_model(), batches(6, labels=False), TIMESTEPS, [FisherScore()])


def test_timesteps():
    assert make_timesteps(dict(start=0, stop=1000, num=5)) == [0, 250, 500, 750, 1000]
    assert make_timesteps([500, 0, 500]) == [0, 500]
    for value, message in (
        ([1500], 'timesteps=1500 is not a timestep'),
        ([], r'timesteps=\[\] is not valid'),
        (dict(start=0, stop=1000), 'give start, stop and num, or a list'),
        (dict(start=-5, stop=1000, num=3), 'timesteps.start=-5 is not a timestep'),
        (dict(start=0, stop=1000, num=0), 'timesteps.num=0 is not valid'),
    ):
        with pytest.raises(InputError, match=message):
            make_timesteps(value)


def made_up(**curves):
    timesteps = [0.0, 100.0, 200.0, 300.0]
    scores = {label: {Tap(2, 'query'): curve} for label, curve in curves.items()}
    return Sweep(timesteps, scores, num_images=10, block_evaluations=120, encoder_runs=10, seconds=1.5)


def test_ties_go_to_the_cleaner_timestep():
    assert made_up(x=[0.1, 0.5, 0.5, 0.2]).choice('x') == 100


def test_the_report_says_when_criteria_disagree():
    agree = Selection(made_up(plain=[0.1, 0.5, 0.4, 0.2], other=[0.1, 0.4, 0.5, 0.2]), 'plain', {})
    assert agree.disagreement is None
    assert 'DISAGREE' not in agree.table()
    apart = Selection(made_up(plain=[0.1, 0.2, 0.3, 0.9], other=[0.5, 0.4, 0.3, 0.2]), 'other', {})
    assert 'The criteria DISAGREE: other -> 0; plain -> 300. Used: 0, by other.' in apart.disagreement
    assert apart.disagreement in apart.table()
    assert apart.choices == {'plain': 300, 'other': 0}


def test_the_report_can_be_read_back(tmp_path):
    selection = Selection(made_up(plain=[0.1, 0.2, 0.9, 0.3], other=[0.5, 0.4, 0.3, 0.2]), 'plain', dict(type='X'))
    selection.save(tmp_path, seed=3, versions={'torch': '2'})
    content = read_selection(tmp_path / 'selection.json')
    assert json.loads((tmp_path / 'selection.json').read_text()) == content
    assert (content['timestep'], content['block'], content['component']) == (200, 2, 'query')
    assert content['criterion'] == dict(type='X')
    assert content['scores'] == {'plain': [0.1, 0.2, 0.9, 0.3], 'other': [0.5, 0.4, 0.3, 0.2]}
    assert (content['num_images'], content['block_evaluations'], content['seconds']) == (10, 120, 1.5)
    assert (content['seed'], content['versions']) == (3, {'torch': '2'})
    again = Selection.from_dict(content)
    assert (again.timestep, again.choices, again.sweep) == (200, selection.choices, selection.sweep)
    assert (tmp_path / 'selection.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['selection.json', 'selection.png']


def test_what_is_no_selection_is_refused(tmp_path):
    assert read_selection(tmp_path / 'selection.json') is None
    for content in ('{"timestep": 2000}', '{', '[]', '{}'):
        (tmp_path / 'selection.json').write_text(content)
        with pytest.raises(InputError, match=r'selection.json is not a selection.json'):
            read_selection(tmp_path / 'selection.json')


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, 'savefig', lambda self, path: (path.write_bytes(b'half'), 1 / 0))
    selection = Selection(made_up(plain=[0.1, 0.2, 0.9, 0.3]), 'plain', {})
    with pytest.raises(ZeroDivisionError):
        selection.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
