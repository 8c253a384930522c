"""The sweep: what it computes, what it counts, and what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmaselect.diffusion.family import Tap, make_taps
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.errors import InputError
from mmaselect.selection.criteria import FisherScore, HighFrequencyRatio, NoiseConsistentHFR
from mmaselect.selection.criterion import add_sums
from mmaselect.selection.features import Features
from mmaselect.selection.report import Selection, read_selection
from mmaselect.selection.search import Batch, Choice, OneProcess, Search, Sweep, make_timesteps, run, sweep
from mmaselect.selection.spectrum import high_frequency_ratio

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
            # Six images are a group of four and one of two, each centred by itself.
            features = Features((a, b), torch.tensor([0, 0, 0, 0, 1, 1]))
            high, total = (features.energy(0, 1, sigma, centred=True).sum() for sigma in (0.25, None))
            expected = (high / total).item()
            assert result.scores[criteria[1].label][tap][position] == pytest.approx(expected, rel=1e-3)


def test_neither_batches_nor_ranks_change_the_scores():
    model = make_model()
    criteria = [HighFrequencyRatio(), NoiseConsistentHFR(), FisherScore()]
    whole = sweep(model, batches(6), TIMESTEPS, criteria)
    parts = sweep(model, batches(4), TIMESTEPS, criteria)
    ranks = Together([Search(model, TIMESTEPS, criteria) for _ in range(2)])
    ranks.members[0].add([next(batches(4))], range(3))
    ranks.members[1].add([replace(list(batches(4))[1], groups=[1, 1])], range(3))
    for other in (parts, ranks.finish()):
        assert (other.num_images, other.block_evaluations) == (whole.num_images, whole.block_evaluations)
        assert other.choices[criteria[1].label].agreement == whole.choices[criteria[1].label].agreement
        for label in whole.scores:
            assert other.curve(label) == pytest.approx(whole.curve(label), rel=1e-4)
    # One image has no mean of its own to be centred by, but plain scores do not mind.
    single = sweep(model, batches(1), TIMESTEPS, criteria)
    assert single.curve(criteria[0].label) == pytest.approx(whole.curve(criteria[0].label), rel=1e-4)


class Together:
    """Two ranks in one process: what is added is the sum of both."""

    def __init__(self, members):
        self.members = members

    def finish(self):
        self.members[0].ranks = self
        return self.members[0].finish()

    def check(self, error):
        assert error is None

    def add(self, sums):
        other = self.members[1]
        theirs = {'counts': other._counts, **{f'binned/{key}': value for key, value in other._binned.items()}}
        if 'counts' not in sums:
            key = next(key for key, value in self.members[0]._free.items() if value is sums)
            theirs = other._free[key]
        return add_sums(sums, theirs)


def test_every_image_is_encoded_once_and_every_block_counted(monkeypatch):
    model = make_model()
    encoded, blocks = [], []
    model.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    for block in model.family.transformer.transformer_blocks:
        block.norm1.norm.register_forward_hook(lambda _, args, __: blocks.append(len(args[0])))
    passes = []
    result = sweep(model, batches(4), TIMESTEPS, [NoiseConsistentHFR()], on_pass=lambda: passes.append(1))
    assert sum(encoded) == result.encoder_runs == result.num_images == 6
    assert sum(blocks) == result.block_evaluations == 6 * len(TIMESTEPS) * 2 * 2
    assert len(passes) == 2 * len(TIMESTEPS) * 2
    # A criterion of one noise costs one pass.
    assert sweep(model, batches(4), TIMESTEPS, [HighFrequencyRatio()]).block_evaluations == 6 * len(TIMESTEPS) * 2


def test_what_fails_on_one_rank_is_told_to_all():
    told = []

    class Ranks(OneProcess):
        def check(self, error):
            told.append(error)
            super().check(error)

    class Broken(HighFrequencyRatio):
        def sums(self, features):
            raise ZeroDivisionError('by zero')

    search = Search(make_model(), TIMESTEPS, [Broken()], ranks=Ranks())
    # Here with its own traceback, elsewhere as a line.
    with pytest.raises(ZeroDivisionError, match='by zero'):
        search.add(batches(4), [0])
    assert told == ['a rank stopped: ZeroDivisionError: by zero']


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
    tap = Tap(2, 'query')
    scores = {label: {tap: curve} for label, curve in curves.items()}
    choices = {
        label: Choice([timesteps[curve.index(max(curve))]], [tap], 0.75, {0.0: 0.25, 200.0: 0.75})
        for label, curve in curves.items()
    }
    intervals = {label: {tap: [[value - 0.05, value + 0.05] for value in curve]} for label, curve in curves.items()}
    return Sweep(timesteps, scores, choices, intervals, 10, 120, 10, 1.5, 'sweep')


def test_blocks_and_components_are_chosen_with_the_timestep():
    """All from the passes of one sweep, and the choice is the highest score of all."""
    model = DiffusionSpec('SiT', arch=ARCH, latent='pixels').load(make_taps([0, 1, 2], ['query', 'output'], 3))
    alternatives = [[tap] for tap in model.family.taps]
    criteria = [HighFrequencyRatio()]
    result = run(Search(model, TIMESTEPS, criteria, alternatives), [batches(4)])
    assert result.block_evaluations == 6 * len(TIMESTEPS) * 3
    (label,) = result.scores
    assert list(result.scores[label]) == [tap for (tap,) in alternatives]
    for tap in model.family.taps:
        alone = DiffusionSpec('SiT', arch=ARCH, latent='pixels').load([tap])
        expected = sweep(alone, batches(4), TIMESTEPS, criteria).curve(label)
        assert result.scores[label][tap] == pytest.approx(expected, rel=1e-5)
    choice, (bounds,) = result.choices[label], result.intervals.values()
    best = max(max(curve) for curve in result.scores[label].values())
    chosen = result.scores[label][choice.taps[0]][TIMESTEPS.index(choice.timesteps[0])]
    spread = max(high - low for by_timestep in bounds.values() for low, high in by_timestep)
    assert best - spread <= chosen <= best
    assert 0 < choice.agreement <= 1
    assert sum(choice.resamples.values()) == pytest.approx(1)


def test_memory_does_not_grow_with_the_number_of_taps():
    """A map is gone when the next block runs."""
    import gc
    import weakref

    model = DiffusionSpec('SiT', arch=ARCH, latent='pixels').load(make_taps([0, 1, 2], ['query', 'key'], 3))
    alive, most = [], 0
    for _, value in model.iterate(IMAGES, torch.zeros_like(IMAGES), 0):
        alive.append(weakref.ref(value))
        del value
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
    assert (len(alive), most) == (6, 1)


def test_images_until_the_choice_is_stable():
    model, criteria = make_model(), [HighFrequencyRatio()]
    portions = [
        [Batch(IMAGES[:4], range(4), LABELS[:4], [0, 0, 1, 1])],
        [Batch(IMAGES[4:], range(4, 6), LABELS[4:], [2, 2])],
    ]
    assert run(Search(model, TIMESTEPS, criteria), portions, stability=1e-6).num_images == 4
    assert run(Search(model, TIMESTEPS, criteria), portions, stability=1.1).num_images == 6
    with pytest.raises(InputError, match=r"num_images='auto' needs a criterion that can be resampled; Fisher Score"):
        run(Search(model, TIMESTEPS, [FisherScore()]), portions, stability=0.9)


def test_coarse_to_fine_encodes_once_and_says_what_it_did():
    model, criteria = make_model([0]), [NoiseConsistentHFR(centred=False)]
    timesteps = make_timesteps(dict(start=0, stop=1000, num=51))
    encoded = []
    model.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    whole = run(Search(model, timesteps, criteria), [batches(6)])
    fast = run(Search(model, timesteps, criteria, keep=True), [batches(6)], 'coarse-to-fine')
    assert sum(encoded) == 12
    label = criteria[0].label
    for timestep, score in zip(fast.timesteps, fast.curve(label), strict=True):
        assert score == pytest.approx(whole.curve(label)[whole.timesteps.index(timestep)], rel=1e-5)
    if fast.strategy.startswith('coarse-to-fine'):
        assert fast.strategy == f'coarse-to-fine: {len(fast.timesteps)} of 51 timesteps'
        assert 3 * fast.block_evaluations <= whole.block_evaluations
        assert abs(fast.choice(label) - whole.choice(label)) <= 20
    else:
        assert fast.timesteps == whole.timesteps
    with pytest.raises(InputError, match=r"search='fast' is not known; choose from: sweep, coarse-to-fine"):
        run(Search(model, timesteps, criteria), [batches(6)], 'fast')
    with pytest.raises(InputError, match=r"coarse-to-fine' finds one timestep"):
        run(Search(model, timesteps, criteria, num_timesteps=2, keep=True), [batches(6)], 'coarse-to-fine')


def test_several_timesteps_are_chosen_for_what_they_add():
    model, criteria = make_model([1]), [HighFrequencyRatio()]
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    result = run(Search(model, [0.0, 1.0, 500.0], criteria, num_timesteps=2), [[Batch(images, range(32))]])
    chosen = result.choices[criteria[0].label].timesteps
    assert chosen[0] == result.timesteps[max(range(3), key=result.curve(criteria[0].label).__getitem__)]
    # 0 and 1 show the same.
    assert set(chosen) != {0.0, 1.0}
    with pytest.raises(InputError, match=r'num_timesteps=4 is more than the 3 timesteps to choose from'):
        Search(model, [0.0, 1.0, 500.0], criteria, num_timesteps=4)


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


MANY = torch.rand(22, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def all_at_once():
    yield Batch(MANY[:18], list(range(18)), torch.arange(18) % 3)
    yield Batch(MANY[18:], list(range(18, 22)), torch.arange(18, 22) % 3)


def run_out_of_memory(monkeypatch, model, most, error):
    """Lets a model fail in the middle of a pass, with more images than ``most``; returns the sizes that it ran."""
    iterate, sizes = model.iterate, []

    def limited(latent, noise, timestep):
        sizes.append(len(latent))
        for number, item in enumerate(iterate(latent, noise, timestep)):
            if number == 1 and len(latent) > most and timestep > 0:
                raise error
            yield item

    monkeypatch.setattr(model, 'iterate', limited)
    return sizes


@pytest.mark.parametrize('strategy', ['sweep', 'coarse-to-fine'])
@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory.'),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_a_batch_that_does_not_fit_memory_is_halved(strategy, error, monkeypatch, caplog):
    timesteps = make_timesteps(dict(start=0, stop=1000, num=41 if strategy != 'sweep' else 3))
    criteria = [NoiseConsistentHFR(), FisherScore()]

    def search(model):
        finder = Search(model, timesteps, criteria, [(tap,) for tap in model.family.taps], keep=strategy != 'sweep')
        return run(finder, [all_at_once()], strategy)

    whole = search(make_model())
    model = make_model()
    sizes = run_out_of_memory(monkeypatch, model, 8, error)
    with caplog.at_level('WARNING', logger='mmaselect'):
        halved = search(model)
    # 18 images are five groups: two and three of them, of which the three are too many again.
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == '18 images at once do not fit memory: going on with 10'
    assert said[1] == '10 images at once do not fit memory: going on with 6'
    assert len(said) == 2
    # What failed is not tried again, and nothing of it was counted.
    assert max(sizes[sizes.index(6) :]) <= 8
    assert (halved.num_images, halved.block_evaluations, halved.encoder_runs) == (
        whole.num_images, whole.block_evaluations, whole.encoder_runs
    )  # fmt: skip
    assert halved.timesteps == whole.timesteps
    for label in whole.scores:
        for tap in whole.scores[label]:
            assert halved.scores[label][tap] == pytest.approx(whole.scores[label][tap], rel=1e-4, abs=1e-6)
    choices = [
        (choice.timesteps, choice.taps) for result in (whole, halved) for choice in result.choices.values()
    ]  # fmt: skip
    assert choices[: len(choices) // 2] == choices[len(choices) // 2 :]


def test_one_group_that_does_not_fit_memory(monkeypatch):
    model = make_model()
    run_out_of_memory(monkeypatch, model, 3, torch.OutOfMemoryError('CUDA out of memory.'))
    with pytest.raises(InputError, match='4 images, the fewest that are scored together, do not fit memory'):
        run(Search(model, TIMESTEPS, [HighFrequencyRatio()]), [all_at_once()])


def test_other_errors_of_the_model_are_not_swallowed(monkeypatch):
    model = make_model()
    run_out_of_memory(monkeypatch, model, 8, RuntimeError('shapes do not match'))
    with pytest.raises(RuntimeError, match='shapes do not match'):
        run(Search(model, TIMESTEPS, [HighFrequencyRatio()]), [all_at_once()])
