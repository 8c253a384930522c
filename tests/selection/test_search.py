"""The sweep: what it computes, what it counts, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace

import pytest
import torch
from mmengine import dist

from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.hooks.ranks import RunnerRanks
from mmaselect.images import Batch
from mmaselect.selection.criteria import FisherScore, HighFrequencyRatio, NoiseConsistentHFR
from mmaselect.selection.features import Features
from mmaselect.selection.instance import InstanceInformation, LiDAR, RankMe, ViewConsistency
from mmaselect.selection.report import Selection, read_selection
from mmaselect.selection.search import Choice, OneProcess, Search, SearchResult, make_timesteps, run, sweep
from mmaselect.selection.spectrum import high_frequency_ratio
from mmaselect.selection.views import Views

ARCH = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)
TIMESTEPS = [0.0, 200.0, 400.0]
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def make_model(blocks=(0, 1)):
    return DiffusionSpec('SiT', arch=ARCH, latent='pixels').load([Tap(block, 'query') for block in blocks])


def batches(size, labels=True):
    for start in range(0, 6, size):
        part = slice(start, start + size)
        yield Batch(IMAGES[part], list(range(6))[part], LABELS[part] if labels else None)


def by_hand(noise, seed, noise_seed, draw, indices):
    """The noises of images."""
    if noise == 'fresh':
        return torch.stack([seeded_noise((3, 8, 8), seed, index, draw) for index in indices])
    one = seeded_noise((3, 8, 8), noise_seed) if draw == 0 else seeded_noise((3, 8, 8), noise_seed, draw)
    return one.expand(len(indices), -1, -1, -1)


@pytest.mark.parametrize('noise', ['fixed', 'fresh'])
def test_scores_equal_those_computed_by_hand(noise):
    model = make_model()
    criteria = [HighFrequencyRatio(0.3), NoiseConsistentHFR(0.25, centred=True)]
    result = sweep(model, batches(4), TIMESTEPS, criteria, seed=7, noise=noise, noise_seed=3)
    assert result.noise == noise
    noises = [by_hand(noise, 7, 3, draw, range(6)) for draw in (0, 1)]
    for tap in model.family.taps:
        for position, timestep in enumerate(TIMESTEPS):
            a, b = (model(IMAGES, one, timestep)[tap] for one in noises)
            expected = high_frequency_ratio(a, 0.3).mean().item()
            assert result.scores[criteria[0].label][tap][position] == pytest.approx(expected, rel=1e-5)
            # Six images are a group of four and one of two, each centred by itself.
            features = Features((a, b), torch.tensor([0, 0, 0, 0, 1, 1]))
            high, total = (features.energy(0, 1, sigma, centred=True).sum() for sigma in (0.25, None))
            expected = (high / total).item()
            assert result.scores[criteria[1].label][tap][position] == pytest.approx(expected, rel=1e-3)


def test_the_fixed_noise_is_the_default_and_has_a_seed_of_its_own():
    model, criteria = make_model(), [HighFrequencyRatio()]

    def scores(**more):
        return sweep(model, batches(6), TIMESTEPS, criteria, **more).scores

    assert scores() == scores(noise='fixed', noise_seed=0) == scores(seed=5)
    assert scores(noise_seed=1) != scores()
    assert scores(noise='fresh', noise_seed=1) == scores(noise='fresh')
    assert scores(noise='fresh', seed=1) != scores(noise='fresh') != scores()
    with pytest.raises(InputError, match=r"noise='own' is not known; choose from: fixed, fresh"):
        scores(noise='own')


def test_neither_batches_nor_ranks_change_the_scores(monkeypatch):
    model = make_model()
    criteria = [HighFrequencyRatio(), NoiseConsistentHFR(), FisherScore()]
    whole = sweep(model, batches(6), TIMESTEPS, criteria)
    parts = sweep(model, batches(4), TIMESTEPS, criteria)
    first, second = batches(4)
    ranks = together(monkeypatch, model, TIMESTEPS, criteria, [[first], [replace(second, groups=[1, 1])]])
    for other in (parts, *ranks):
        assert (other.num_images, other.block_evaluations) == (whole.num_images, whole.block_evaluations)
        assert other.choices[criteria[1].label].agreement == whole.choices[criteria[1].label].agreement
        for label in whole.scores:
            assert other.curve(label) == pytest.approx(whole.curve(label), rel=1e-4)
    # One image has no mean of its own to be centred by, but plain scores do not mind.
    single = sweep(model, batches(1), TIMESTEPS, criteria)
    assert single.curve(criteria[0].label) == pytest.approx(whole.curve(criteria[0].label), rel=1e-4)


class Together:
    """Ranks that are threads: each waits for what the others bring to a call."""

    def __init__(self, number):
        self.number, self.barrier, self.here = number, threading.Barrier(number, timeout=60), threading.local()
        self.brought = [None] * number

    def all_gather_object(self, value):
        self.brought[self.here.rank] = value
        self.barrier.wait()
        values = list(self.brought)
        self.barrier.wait()
        return values

    def all_reduce(self, value, op):
        assert op == 'sum'
        value.copy_(sum(self.all_gather_object(value.clone())))


def together(monkeypatch, model, timesteps, criteria, shares, search='sweep', **more):
    """What a search says on each of several ranks, each with its share of the batches, or of several portions."""
    ranks = Together(len(shares))
    monkeypatch.setattr(dist, 'get_world_size', lambda: ranks.number)
    monkeypatch.setattr(dist, 'all_gather_object', ranks.all_gather_object)
    monkeypatch.setattr(dist, 'all_reduce', ranks.all_reduce)
    results = [None] * ranks.number

    def work(rank):
        ranks.here.rank = rank
        try:
            own = copy.deepcopy(model)
            portions = [shares[rank]] if search == 'sweep' else shares[rank]
            results[rank] = run(Search(own, timesteps, criteria, ranks=RunnerRanks(), **more), portions, search)
        except BaseException as error:
            results[rank] = error
            ranks.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks.number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


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


def made_up(resamples=None, **curves):
    timesteps = [0.0, 100.0, 200.0, 300.0]
    tap = Tap(2, 'query')
    scores = {label: {tap: curve} for label, curve in curves.items()}
    choices = {}
    for label, curve in curves.items():
        best = timesteps[curve.index(max(curve))]
        drawn = {0.0: 0.25, 200.0: 0.75} if resamples is None else resamples
        choices[label] = Choice([best], [tap], drawn.get(best, 0.0) if drawn else None, drawn)
    intervals = {label: {tap: [[value - 0.05, value + 0.05] for value in curve]} for label, curve in curves.items()}
    return SearchResult(timesteps, scores, choices, intervals, 10, 120, 10, 1.5, 'sweep')


def test_blocks_and_components_are_chosen_with_the_timestep():
    """All from the passes of one sweep, and the choice is the highest score of all."""
    model = DiffusionSpec('SiT', arch=ARCH, latent='pixels').load(
        [Tap(block, name) for block in range(3) for name in ('query', 'output')]
    )
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

    model = DiffusionSpec('SiT', arch=ARCH, latent='pixels').load(
        [Tap(block, name) for block in range(3) for name in ('query', 'key')]
    )
    alive, most = [], []

    def visit(tap, value):
        alive.append(weakref.ref(value))
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))

    model.read(IMAGES, torch.zeros_like(IMAGES), 0, visit)
    assert most == [1] * 6


def test_all_taps_of_a_u_net_are_scored_as_they_come(monkeypatch):
    """A sweep over all of them keeps no map that the network itself does not keep as a skip connection."""
    import weakref

    from mmaselect.diffusion.reader import FrozenDiffusion

    arch = dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), in_channels=3, out_channels=3,
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    )  # fmt: skip
    spec = DiffusionSpec('UNet', arch=arch, latent='pixels', prompt='zeros')
    taps = [tap for tap in spec.family.known_taps(spec.config) if not tap.component.endswith('-map')]
    model, read, alive, most = spec.load(taps), FrozenDiffusion.read, [], []

    def watched(self, latent, noise, timestep, visit):
        def see(tap, value):
            alive.append(weakref.ref(value))
            held = {id(one): one.nbytes for one in (reference() for reference in alive) if one is not None}
            most.append((sum(held.values()), value.nbytes))
            visit(tap, value)

        read(self, latent, noise, timestep, see)

    monkeypatch.setattr(FrozenDiffusion, 'read', watched)
    model.read(IMAGES, torch.zeros_like(IMAGES), 0.0, lambda tap, value: None)
    alone, most[:] = list(most), []
    result = sweep(model, batches(6), [0.0], [HighFrequencyRatio()])
    assert len(taps) == len(result.scores['HFR (sigma 0.25)']) == len(most) > 30
    assert most == alone
    # All of them at once would be many times as much.
    assert 4 * max(held for held, _ in most) < sum(size for _, size in most)


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
    for timestep, score in zip(fast.timesteps, fast.curve(label)):
        assert score == pytest.approx(whole.curve(label)[whole.timesteps.index(timestep)], rel=1e-5)
    if fast.search.startswith('coarse-to-fine'):
        assert fast.search == f'coarse-to-fine: {len(fast.timesteps)} of 51 timesteps'
        assert 3 * fast.block_evaluations <= whole.block_evaluations
        assert abs(fast.choice(label) - whole.choice(label)) <= 20
    else:
        assert fast.timesteps == whole.timesteps
    with pytest.raises(InputError, match=r"search='fast' is not known; choose from: sweep, coarse-to-fine, racing"):
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
    """A choice that the resamples of the deciding criterion rule out, however near or far it is."""
    near, far = dict(one=[0.1, 0.5, 0.4, 0.2], two=[0.1, 0.4, 0.5, 0.2]), dict(one=[0.1, 0.5, 0, 0], two=[0, 0, 0, 0.5])
    unsure, sure = {100.0: 0.6, 200.0: 0.37, 300.0: 0.03}, {100.0: 0.97, 200.0: 0.015, 300.0: 0.015}
    for curves in (near, far):
        assert Selection(made_up(unsure, **curves), 'one', {}).disagreement is None
        assert 'The criteria DISAGREE' in Selection(made_up(sure, **curves), 'one', {}).disagreement
    # Without a bootstrap, what is more than one step away.
    assert Selection(made_up({}, **near), 'one', {}).disagreement is None
    assert 'The criteria DISAGREE' in Selection(made_up({}, **far), 'one', {}).disagreement
    # What all choose is no disagreement, however few resamples choose it.
    assert Selection(made_up({0.0: 1.0}, one=near['one'], two=near['one']), 'one', {}).disagreement is None
    apart = Selection(made_up(plain=[0.1, 0.2, 0.3, 0.9], other=[0.5, 0.4, 0.3, 0.2]), 'other', {})
    assert apart.disagreement == 'The criteria DISAGREE: other -> 0; plain -> 300. Used: 0, by other.'
    assert apart.disagreement in apart.table()
    assert 'DISAGREE' not in Selection(made_up(unsure, **near), 'one', {}).table()
    assert apart.choices == {'plain': 300, 'other': 0}


def test_the_report_says_which_criterion_to_trust():
    labels = [HighFrequencyRatio().label, InstanceInformation().label]
    curves = dict(zip(labels, ([0.1, 0.2, 0.3, 0.9], [0.5, 0.4, 0.3, 0.2])))
    for used in labels:
        said = Selection(made_up({}, **curves), used, {}).disagreement
        assert f'by {used}. Trust instance information most. Instance information asks what tells images apart' in said
        assert said.endswith('Plain HFR rises with injected noise where the network lets it through.')
        assert 'noise-consistent' not in said.lower()


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ['report.html', 'selection.json', 'selection.png']


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


#: Each of a colour of its own, which a crop does not take away, with noise.
COLOURS = torch.rand(22, 3, 1, 1, generator=torch.Generator().manual_seed(3)) * 1.2 - 0.6
MANY = COLOURS + 0.2 * torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)


def all_at_once():
    yield Batch(MANY[:18], list(range(18)), torch.arange(18) % 3)
    yield Batch(MANY[18:], list(range(18, 22)), torch.arange(18, 22) % 3)


def run_out_of_memory(monkeypatch, model, most, error, passes):
    """Lets a model fail in the middle of a pass, with more images than ``most``; returns how many it ran at once."""
    read, sizes = model.read, []

    def limited(latent, noise, timestep, visit):
        sizes.append(len(latent) // passes)
        reached = []

        def fail(tap, value):
            if reached and sizes[-1] > most and timestep > 0:
                raise error
            reached.append(tap)
            visit(tap, value)

        read(latent, noise, timestep, fail)

    monkeypatch.setattr(model, 'read', limited)
    return sizes


@pytest.mark.parametrize(
    'search,error',
    [
        ('sweep', torch.cuda.OutOfMemoryError('CUDA out of memory.')),
        ('coarse-to-fine', torch.cuda.OutOfMemoryError('CUDA out of memory.')),
        (
            'sweep',
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        ),
    ],
)
def test_a_batch_that_does_not_fit_memory_is_halved(search, error, monkeypatch, caplog):
    timesteps = make_timesteps(dict(start=0, stop=1000, num=41 if search != 'sweep' else 3))
    criteria = [NoiseConsistentHFR(), FisherScore(), InstanceInformation()]

    def select(model):
        finder = Search(model, timesteps, criteria, [(tap,) for tap in model.family.taps], keep=search != 'sweep')
        return run(finder, [all_at_once()], search)

    whole = select(make_model())
    model = make_model()
    # Two noises and a second view.
    sizes = run_out_of_memory(monkeypatch, model, 8, error, passes=3)
    with caplog.at_level('WARNING', logger='mmaselect'):
        halved = select(model)
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
    assert max(whole.curve(criteria[2].label)) > 2
    for label in whole.scores:
        for tap in whole.scores[label]:
            assert halved.scores[label][tap] == pytest.approx(whole.scores[label][tap], rel=1e-4, abs=1e-6)
    choices = [
        (choice.timesteps, choice.taps) for result in (whole, halved) for choice in result.choices.values()
    ]  # fmt: skip
    assert choices[: len(choices) // 2] == choices[len(choices) // 2 :]


def test_one_group_that_does_not_fit_memory(monkeypatch):
    model = make_model()
    run_out_of_memory(monkeypatch, model, 3, torch.cuda.OutOfMemoryError('CUDA out of memory.'), passes=1)
    with pytest.raises(InputError, match='4 images, which must stay together, do not fit memory'):
        run(Search(model, TIMESTEPS, [HighFrequencyRatio()]), [all_at_once()])


def test_other_errors_of_the_model_are_not_swallowed(monkeypatch):
    model = make_model()
    run_out_of_memory(monkeypatch, model, 8, RuntimeError('shapes do not match'), passes=1)
    with pytest.raises(RuntimeError, match='shapes do not match'):
        run(Search(model, TIMESTEPS, [HighFrequencyRatio()]), [all_at_once()])


# --- criteria on views -----------------------------------------------------------------------------------------------

COUNT = len(MANY)


def shares(sizes):
    """Images in batches of these sizes, in whole groups of four."""
    start = 0
    for size in sizes:
        part = range(start, min(start + size, COUNT))
        yield Batch(MANY[part.start : part.stop], list(part), None, [index // 4 for index in part])
        start += size


def in_nats(rows, shrinkage=0.1):
    """Instance information of (n, q, C), as its definition reads."""
    n, q, channels = rows.shape

    rows = (rows - rows.mean((0, 1))) / rows.std((0, 1), correction=0)

    def information(rows):
        mean = rows.mean((0, 1))
        s_w, s_b = (torch.zeros(channels, channels, dtype=torch.float64) for _ in range(2))
        for image in rows:
            s_b += torch.outer(image.mean(0) - mean, image.mean(0) - mean) / (n - 1)
            for view in image:
                s_w += torch.outer(view - image.mean(0), view - image.mean(0)) / (n * (q - 1))
        s_b -= s_w / q
        level = shrinkage * s_w.trace() / channels + 1e-6
        s_w = (1 - shrinkage) * s_w + level * torch.eye(channels, dtype=torch.float64)
        ratio = torch.linalg.eigvals(torch.linalg.solve(s_w, s_b)).real
        return 0.5 * torch.log1p(ratio).sum().item()

    strangers = torch.stack([rows[:, number].roll(number, 0) for number in range(q)], 1)
    return information(rows) - information(strangers)


def pooled(model, noise, timestep, num_views, views, seed, noise_seed):
    """Features of the images and their views, (n, views, C), by tap."""
    found = {tap: [] for tap in model.family.taps}
    for number in range(num_views):
        images = MANY if number == 0 else views(MANY, range(COUNT), seed, number)
        # Fresh: 0 and 1 are the image's own noises.
        one = by_hand(noise, seed, noise_seed, 0 if number == 0 or noise == 'fixed' else number + 1, range(COUNT))
        for tap, value in model(images, one, timestep).items():
            found[tap].append(value.mean((2, 3)).double())
    return {tap: torch.stack(parts, 1) for tap, parts in found.items()}


@pytest.mark.parametrize('noise', ['fixed', 'fresh'])
def test_scores_of_views_equal_those_computed_by_hand(noise):
    model, timesteps = make_model(), [0.0, 100.0]
    fields = dict(crop=0.5, mirror=True, colour=0.1)
    criteria = [
        HighFrequencyRatio(),
        InstanceInformation(3, fields, pool=1, shrinkage=0.1),
        NoiseConsistentHFR(),
        ViewConsistency(2, fields, pool=1),
        InstanceInformation(2, fields, pool=1, shrinkage=0.5),
    ]
    criteria[-1].label = 'two views'
    more = dict(seed=7, noise=noise, noise_seed=3)
    result = sweep(model, shares([8] * 3), timesteps, criteria, **more)
    alone = sweep(model, shares([8] * 3), timesteps, criteria[::2][:2], **more)
    for position, timestep in enumerate(timesteps):
        rows = pooled(model, noise, timestep, 3, Views(**fields), 7, 3)
        for tap in model.family.taps:
            expected = in_nats(rows[tap])
            assert expected > 2
            assert result.scores[criteria[1].label][tap][position] == pytest.approx(expected, rel=1e-3)
            # A criterion of fewer views reads the first of them.
            expected = in_nats(rows[tap][:, :2], 0.5)
            assert result.scores['two views'][tap][position] == pytest.approx(expected, rel=1e-3)
            unit = torch.nn.functional.normalize(rows[tap][:, :2] - rows[tap][:, :2].mean((0, 1)), dim=-1)
            same = (unit[:, 0] * unit[:, 1]).sum(-1).mean()
            cosines = torch.einsum('iac,jbc->iajb', unit, unit)
            other = torch.cat([cosines[i, :, j].flatten() for i in range(COUNT) for j in range(COUNT) if i != j]).mean()
            found = result.scores[criteria[3].label][tap][position]
            assert found == pytest.approx((same - other).item(), rel=1e-4)
            assert found > 0.3
            # Views leave the others alone.
            for label in alone.scores:
                assert alone.scores[label][tap] == result.scores[label][tap]


@pytest.mark.parametrize('noise', ['fixed', 'fresh'])
def test_what_is_computed_beside_changes_no_score(noise):
    model, criterion = make_model([1]), InstanceInformation(3)
    alone = sweep(model, shares([22]), TIMESTEPS, [criterion], noise=noise)
    for more in ([NoiseConsistentHFR()], [RankMe(4)], [HighFrequencyRatio(), LiDAR(2, pool=2)]):
        beside = sweep(model, shares([22]), TIMESTEPS, [criterion, *more], noise=noise)
        assert beside.scores[criterion.label] == alone.scores[criterion.label]
        assert beside.intervals[criterion.label] == alone.intervals[criterion.label]
        assert beside.choices[criterion.label] == alone.choices[criterion.label]
    (curve,) = alone.scores[criterion.label].values()
    assert min(curve) > 0


def test_neither_batches_nor_ranks_change_the_scores_of_views(monkeypatch):
    model = make_model()
    criteria = [InstanceInformation(), ViewConsistency(pool=2), NoiseConsistentHFR()]
    for noise in ('fixed', 'fresh'):
        whole = sweep(model, shares([22]), TIMESTEPS, criteria, noise=noise)
        others = [sweep(model, shares(sizes), TIMESTEPS, criteria, noise=noise) for sizes in ([4] * 6, [12, 4, 6])]
        batches = list(shares([4] * 6))
        for split in ([batches[::2], batches[1::2]], [batches[:1], batches[1:]], [batches, []]):
            with monkeypatch.context() as patch:
                ranks = together(patch, model, TIMESTEPS, criteria, split, noise=noise)
            assert replace(ranks[0], seconds=0) == replace(ranks[1], seconds=0)
            others.append(ranks[0])
        for other in others:
            assert (other.num_images, other.block_evaluations, other.encoder_runs) == (
                whole.num_images, whole.block_evaluations, whole.encoder_runs
            )  # fmt: skip
            for criterion in criteria:
                label = criterion.label
                assert other.choices[label] == whole.choices[label]
                for tap in model.family.taps:
                    assert other.scores[label][tap] == pytest.approx(whole.scores[label][tap], rel=1e-3, abs=1e-5)
        assert min(whole.curve(criteria[0].label)) > 0


def test_a_rank_that_fails_stops_the_others(monkeypatch):
    """The images of the second rank hold what the network cannot read."""
    first, second = list(shares([12, 12]))
    second.images = second.images * float('nan')
    with pytest.raises(InputError, match='features are not finite at timestep 0'):
        together(monkeypatch, make_model(), TIMESTEPS, [InstanceInformation()], [[first], [second]])


def test_views_are_encoded_and_counted():
    model = make_model()
    encoded, passes = [], []
    handle = model.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    blocks = [
        block.norm1.norm.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
        for block in model.family.transformer.transformer_blocks
    ]
    # Two noises of the image, and one of each of two further views.
    for criteria, views, each in (
        ([InstanceInformation()], 2, 2),
        ([InstanceInformation(3), HighFrequencyRatio()], 3, 3),
        ([InstanceInformation(3), NoiseConsistentHFR()], 3, 4),
        ([InstanceInformation(2), LiDAR(4), ViewConsistency(3)], 4, 4),
    ):
        encoded.clear()
        passes.clear()
        told = []
        search = Search(model, TIMESTEPS, criteria, on_pass=lambda told=told: told.append(1))
        result = run(search, [shares([8] * 3)])
        assert search.passes == each
        assert sum(encoded) == result.encoder_runs == views * COUNT
        assert sum(passes) == result.block_evaluations == COUNT * len(TIMESTEPS) * each * 2
        assert len(told) == 3 * len(TIMESTEPS) * each
    for hook in (handle, *blocks):
        hook.remove()


def test_criteria_that_ask_for_different_views():
    criteria = [InstanceInformation(views=dict(crop=0.5), pool=1), HighFrequencyRatio(), ViewConsistency(pool=1)]
    with pytest.raises(
        InputError, match=r'instance information \(2 views\) and view consistency \(2 views\) ask for different views'
    ):
        Search(make_model(), TIMESTEPS, criteria)
    Search(make_model(), TIMESTEPS, [InstanceInformation(views=dict(crop=0.4)), ViewConsistency(3, dict(crop=0.4))])


def test_coarse_to_fine_scores_views_as_a_sweep_does():
    model, criteria = make_model([0]), [InstanceInformation(), HighFrequencyRatio()]
    timesteps = make_timesteps(dict(start=0, stop=1000, num=41))
    encoded = []
    model.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    whole = run(Search(model, timesteps, criteria), [shares([8] * 3)])
    search = Search(model, timesteps, criteria, keep=True)
    fast = run(search, [shares([8] * 3)], 'coarse-to-fine')
    assert sum(encoded) == 2 * 2 * COUNT
    assert fast.encoder_runs == 2 * COUNT
    assert fast.block_evaluations == COUNT * len(fast.timesteps) * 2
    assert len(fast.timesteps) > 3
    for criterion in criteria:
        for timestep, score in zip(fast.timesteps, fast.curve(criterion.label)):
            expected = whole.curve(criterion.label)[whole.timesteps.index(timestep)]
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max(whole.curve(criteria[0].label)) > 2


def test_images_are_scored_once_however_often_a_search_looks(monkeypatch):
    model, criterion, scored = make_model([0]), InstanceInformation(), []
    score = criterion.score
    monkeypatch.setattr(criterion, 'score', lambda rows: scored.append(len(rows)) or score(rows))
    search = Search(model, TIMESTEPS, [criterion], keep=True)
    search.add(shares([12, 12]), [0])
    first = search.finish()
    # All images; leaving out a group at a time does not score anew.
    assert scored == [22]
    search.extend([2])
    second = search.finish()
    assert scored == [22, 22]
    assert second.curve(criterion.label)[0] == first.curve(criterion.label)[0]
    # More images are another score.
    search.add([Batch(MANY[:4], range(22, 26), None, [6] * 4)], [0, 2])
    assert search.finish().curve(criterion.label) != second.curve(criterion.label)
    assert scored.count(26) == 2


def test_images_until_the_choice_by_views_is_stable():
    model, criteria = make_model(), [InstanceInformation()]
    label = criteria[0].label

    def stop(stability):
        first, second = shares([16, 6])
        portions = [[first], [second]]
        return run(Search(model, TIMESTEPS, criteria), portions, stability=stability)

    early, late = stop(1e-6), stop(1.1)
    assert (early.num_images, late.num_images) == (16, 22)
    assert early.scores == sweep(model, [next(shares([16]))], TIMESTEPS, criteria).scores
    assert late.choices[label].agreement == sweep(model, shares([22]), TIMESTEPS, criteria).choices[label].agreement
    assert 0 < early.choices[label].agreement <= 1
    low, high = late.intervals[label][model.family.taps[0]][0]
    assert low < late.scores[label][model.family.taps[0]][0] < high


def test_fewer_images_than_channels_are_told_apart():
    """Of 16 channels, six images and their views would be apart whatever the channels hold."""
    model, criteria = make_model([1]), [InstanceInformation()]
    images = [Batch(MANY[:7], range(7), None, [0, 0, 1, 1, 2, 2, 2])]
    (curve,) = sweep(model, images, [0.0, 1000.0], criteria).scores[criteria[0].label].values()
    assert curve[0] > 1
    assert curve[1] == 0
    with pytest.raises(InputError, match=r'instance information \(2 views.*\) needs at least 2 images; there is 1'):
        sweep(model, [Batch(MANY[:1], range(1))], [0.0], criteria)
    two = sweep(model, [Batch(MANY[:2], range(2))], [0.0], criteria)
    assert two.choices[criteria[0].label].agreement is None
    assert two.intervals == {}


def test_one_noise_for_all_is_worth_nothing_to_criteria_on_views():
    """At timestep 1000 all images are the same; batches of unlike sizes round unlike."""
    criteria = [InstanceInformation(), ViewConsistency(), RankMe(), LiDAR()]
    for sizes in ([22], [12, 4, 6]):
        result = sweep(make_model(), shares(sizes), [0.0, 1000.0], criteria)
        for criterion in criteria:
            for curve in result.scores[criterion.label].values():
                assert curve[0] > 0.3
                assert curve[1] == 0


def test_fresh_noises_are_worth_next_to_nothing_to_criteria_on_views():
    """Six parts of few images are wrong about one draw in twenty; where there is something they are not."""
    model, criteria = make_model([1]), [InstanceInformation(), ViewConsistency()]
    results = [sweep(model, shares([22]), [0.0, 1000.0], criteria, seed=seed, noise='fresh') for seed in range(16)]
    for criterion in criteria:
        curves = [result.curve(criterion.label) for result in results]
        assert all(clean > 0.3 for clean, _ in curves)
        assert sum(noisy == 0 for _, noisy in curves) >= 14
