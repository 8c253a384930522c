"""The matcher, its head and its metric: by hand, through the runner, through the tools."""

from __future__ import annotations

import copy
import functools
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, run_tool, start_ranks
from gdf_miniatures import shrink_backbone, shrink_channels
from miniatures import COUNT, make, write_image
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, DefaultScope, init_default_scope
from mmengine.structures import BaseDataElement
from PIL import Image

import mmaselect  # noqa: F401
from mmaselect.errors import InputError
from mmaselect.evaluation.runs import read_run
from mmaselect.tasks.correspondence import Frame, find, read_maps

CONFIGS = sorted(ROOT.glob('configs/correspondence/*.py'))
SPAIR = [path for path in CONFIGS if 'spair' in path.stem]
#: Architecture of each model at its true size.
TRUE = {'sd15': 'sd1.5', 'sd15-legacy': 'sd1.5', 'sd21': 'sd2.1', 'sdxl': 'sdxl', 'flux-dev': 'flux.1-dev'}


@functools.cache
def read_once(path):
    return Config.fromfile(path)


def read(path):
    return copy.deepcopy(read_once(path))


@pytest.fixture(autouse=True)
def scope():
    yield
    DefaultScope._instance_dict.clear()


@pytest.mark.parametrize('path', SPAIR, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path):
    config = read(path)
    name, _, data = path.stem.partition('_')
    diffusion = config.model.backbone.diffusion
    config.model.backbone.diffusion = dict(type=diffusion.type, arch=TRUE[name])
    with torch.device('meta'):
        model = MODELS.build(config.model)
    backbone, side = model.backbone, int(re.search(r'-(\d+)px', data)[1])
    assert config.test_dataloader.dataset.split == 'test'
    assert config.test_dataloader.dataset.pipeline[1].scale == (side, side)
    # GDF searches 512x512 places whatever the size of its images.
    assert model.resolution == (512 if name.startswith(('sd15', 'sdxl')) else side)
    assert side % backbone.multiple == 0
    if model.head is None:
        return
    assert model.head.in_channels == backbone.out_channels
    # GDF's: 3520 and 3840 channels.
    assert model.head.conv.weight.shape[:2] == (sum(backbone.out_channels),) * 2
    assert sum(backbone.out_channels) == {'sd15': 3520, 'sdxl': 3840}[name]
    assert (model.head.size, model.head.temperature) == (128, 0.07)
    assert (config.train_dataloader.batch_size, config.train_cfg.max_iters) == (1, 10000)
    # A maximum over evaluations cannot be reported where there is one.
    assert config.train_cfg.val_interval == config.train_cfg.max_iters


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pairs')
    for number in range(4):
        write_image(folder / 'photographs' / f'{number}.png', number, (60, 80))
    return {'SPair71k': make('SPair71k', folder / 'spair'), 'WarpedPairs': folder / 'photographs'}


def shrink(config, name, data):
    model = config.model
    shrink_backbone(model.backbone, 'sit' if name.startswith('dit') else name)
    model.resolution = min(model.resolution, 16)
    model.ensemble = min(model.get('ensemble', 1), 2)
    if model.get('head'):
        model.head.update(in_channels=shrink_channels(model.head.in_channels), size=8)
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data[loader.dataset.type])
        loader.dataset.pipeline[1].scale = (16, 16)
        loader.dataset.indices = 3
    (hook,) = config.custom_hooks
    hook.update(num_images=4, timesteps=[0, 500], batch_size=4)
    # So few images tell too little at two scales.
    hook.criterion.pool = 1
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.logger.interval = 1
    config.optim_wrapper.optimizer.lr = 0.01


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_miniature(path, data, tmp_path):
    """Zero-shot: an evaluation; with a head: two iterations and an evaluation."""
    from mmengine.runner import Runner

    config = read(path)
    shrink(config, path.stem, data)
    config.work_dir, config.experiment_name = str(tmp_path), path.stem
    init_default_scope('mmengine')
    runner = Runner.from_cfg(config)
    if config.model.get('head') is None:
        assert not list(runner.model.parameters())
        metrics = runner.test()
        with pytest.raises(InputError, match=r'head=None has nothing to train: evaluate it by `tools/test.py CONFIG'):
            runner.model.loss(None, [])
    else:
        before = runner.model.head.conv.weight.clone()
        metrics = runner.train() and runner.val()
        assert not torch.equal(before, runner.model.head.conv.weight)
        checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=True)['state_dict']
        assert sorted(checkpoint) == ['backbone.recipe', 'backbone.taps', 'backbone.timestep', 'head.conv.weight']
    by = ('img',) if 'warped' in path.stem else ('bbox', 'img')
    for side in by:
        assert 0 <= metrics[f'PCK/{side}_0.1/point'] <= 100
    assert ('PCK/bbox_0.1/point' in metrics) == ('bbox' in by)
    # Where the config leaves the timestep open, it was selected, on single images.
    assert (tmp_path / 'selection.json').is_file() == ('timestep' not in read(path).model.backbone)


def build(**fields):
    arch = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=3, sample_size=8, patch_size=4)
    diffusion = dict(type='SiT', arch=arch, latent='pixels')
    backbone = dict(type='ASelectDiT', diffusion=diffusion, block=[0, 1], component='output', timestep=200)
    return MODELS.build(dict(type='FeatureMatcher', backbone={**backbone, 'noise': 'fresh'}, **fields)).eval()


def pairs(count=2, size=(40, 48), seed=0):
    """Images and samples whose images were stretched from another size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {side: [torch.randint(0, 256, (3, *size), generator=generator).byte() for _ in range(count)]
              for side in ('source', 'target')}  # fmt: skip
    samples = []
    for number in range(count):
        sample = BaseDataElement(metainfo=dict(name=f'{number}', category='cat', target_box=[0, 0, 50, 40]))
        for side, (width, height) in (('source', (90, 60)), ('target', (70, 110))):
            matrix = torch.tensor([[size[1] / width, 0, 0], [0, size[0] / height, 0]], dtype=torch.float64)
            points = torch.rand(3, 2, generator=generator) * torch.tensor([width, height])
            sample.set_metainfo({side: f'{side} {number}', f'{side}_size': (width, height)})
            sample.set_data({f'{side}_matrix': matrix, f'{side}_points': points})
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def test_predictions_are_those_of_the_pure_functions():
    for fields in ({}, dict(ensemble=3), dict(discard=1.2), dict(resolution=24)):
        model, data = build(**fields), pairs()
        with torch.no_grad():
            predicted = model.test_step(data)
        images = torch.stack([*data['inputs']['source'], *data['inputs']['target']]).float().flip(1) / 127.5 - 1
        backbone = model.backbone
        maps = read_maps(backbone.diffusion, images, [200], backbone.taps, 'fresh', 0, fields.get('ensemble', 1))
        for number, sample in enumerate(predicted):
            both = [[one[place] for one in maps] for place in (number, number + 2)]
            if 'discard' in fields:
                from mmaselect.tasks.correspondence import discard_massive

                both, discarded = discard_massive(both, 1.2)
                assert sample.discarded == discarded
                assert any(discarded)
            frames = [Frame.stretched(sample.get(f'{side}_size')) for side in ('source', 'target')]
            found, similarity = find(both[0], frames[0], sample.source_points, both[1], frames[1],
                                     fields.get('resolution'))  # fmt: skip
            torch.testing.assert_close(sample.pred_points, found)
            torch.testing.assert_close(sample.similarity, similarity, atol=1e-5, rtol=0)


def test_an_image_that_comes_again_is_not_computed_again(monkeypatch):
    model, seen = build(remember=3), []
    extract = model.extract
    monkeypatch.setattr(model, 'extract', lambda images: seen.append(len(images)) or extract(images))
    data = pairs(1)
    with torch.no_grad():
        first = model.test_step(data)[0].pred_points.clone()
        again = model.test_step(data)[0].pred_points
        assert torch.equal(first, again)
        assert seen == [2]
        model.test_step(pairs(2, seed=1))
        assert seen == [2, 2]
        # Another timestep is another map.
        model.backbone._frozen.timesteps = (700.0,)
        model.test_step(data)
        assert seen == [2, 2, 2]
        assert len(model._remembered) == 3


def test_the_contrastive_loss_by_hand():
    head = MODELS.build(dict(type='AggregationHead', in_channels=[2, 3], out_channels=4, size=6, temperature=0.5))
    generator = torch.Generator().manual_seed(0)
    maps = [[torch.randn(1, 2, 6, 6, generator=generator), torch.randn(1, 3, 3, 3, generator=generator)] for _ in 'st']
    cells = [torch.tensor([[1, 4], [5, 0]]), torch.tensor([[2, 2], [0, 3]])]
    places = [[(one + 0.5) / 6 for one in cells]]
    loss = head.loss(*maps, places)['loss_contrastive']
    first, second = (head(one)[0].flatten(1) for one in maps)
    cosine = torch.nn.functional.normalize(first, dim=0).T @ torch.nn.functional.normalize(second, dim=0)
    index = [one[:, 1] * 6 + one[:, 0] for one in cells]
    expected = []
    for rows, mine, partner in ((cosine, *index), (cosine.T, *index[::-1])):
        expected += [(-torch.log_softmax(rows[mine] / 0.5, 1)[range(2), partner]).mean()]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert head(maps[0]).shape == (1, 4, 6, 6)


def test_the_head_learns(data):
    """What belongs together comes together: the loss falls far below that of guessing."""
    torch.manual_seed(0)
    model = build(head=dict(type='AggregationHead', in_channels=[16, 16], size=8)).train()
    model.backbone.noise = 'fixed'
    batch = pairs(2, (16, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(90):
        prepared = model.data_preprocessor(copy.deepcopy(batch), True)
        loss = model(**prepared, mode='loss')['loss_contrastive']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.2


def test_pck_counts_equality_and_each_average():
    metric = METRICS.build(dict(type='PCK', thresholds=(0.1,)))
    samples = []
    for category, distances, box in (('cat', [4, 4.01], [0, 0, 40, 10]), ('dog', [0], [5, 5, 10, 10]),
                                     ('cat', [9, 9, 9, 1], [0, 0, 20, 30])):  # fmt: skip
        points = torch.zeros(len(distances), 2)
        moved = points + torch.tensor(distances)[:, None] * torch.tensor([0.0, 1.0])
        samples.append(dict(name='x', category=category, target_box=box, target_size=(100, 50), pred_points=moved,
                            target_points=points, discarded=[[3], []]))  # fmt: skip
    metric.process(None, samples)
    found = metric.evaluate(3)
    assert found['PCK/bbox_0.1/point'] == pytest.approx(100 * 3 / 7)
    assert found['PCK/bbox_0.1/image'] == pytest.approx(100 * (1 / 2 + 1 + 1 / 4) / 3)
    assert found['PCK/bbox_0.1/category'] == pytest.approx(100 * (2 / 6 + 1) / 2)
    assert found['PCK/img_0.1/point'] == 100
    with pytest.raises(InputError, match=r"x has no target_box: set by=\('img',\) of the metric PCK"):
        metric.process(None, [dict(samples[0], target_box=None)])


@pytest.mark.parametrize(
    'kind,fields,message',
    [
        ('PCK', dict(thresholds=0.1), 'thresholds=0.1 is not valid: give a list'),
        ('PCK', dict(thresholds=[2]), 'thresholds=2 is not valid'),
        ('PCK', dict(by=('box',)), "by='box' is not known; choose from: bbox, img"),
        ('AggregationHead', dict(in_channels=[]), r'in_channels=\[\] is not valid: give the channels of each map'),
        ('AggregationHead', dict(in_channels=[4], temperature=0), 'temperature=0 is not valid'),
        ('FeatureMatcher', dict(ensemble=0), 'ensemble=0 is not valid'),
        ('FeatureMatcher', dict(discard=0.5), 'discard=0.5 is not valid'),
    ],
)
def test_one_line_for_what_is_wrong(kind, fields, message):
    with pytest.raises(InputError, match=message):
        build(**fields) if kind == 'FeatureMatcher' else (METRICS if kind == 'PCK' else MODELS).build(
            dict(type=kind, **fields)
        )
    with pytest.raises(InputError, match=r'in_channels=\(4, 4\) of the head, but maps of \(4,\) channels came in'):
        MODELS.build(dict(type='AggregationHead', in_channels=[4, 4]))([torch.zeros(1, 4, 2, 2)])


NANO = ROOT / 'configs/correspondence/dit-nano_zero-shot_warped-digits-16px.py'


def options(folder, **more):
    values = {f'{split}_dataloader.dataset.data_root': folder for split in ('train', 'val', 'test')}
    values |= {'custom_hooks.0.timesteps': '[0,900]', 'custom_hooks.0.num_images': 8, 'custom_hooks.0.batch_size': 8}
    values |= {'test_dataloader.dataset.indices': 13, 'test_dataloader.batch_size': 4, **more}
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


def test_tools_test_none_and_matches(digits, tmp_path):
    """Zero-shot by tools/test.py: the timestep is selected, the run stands on a leaderboard, the picture is drawn."""
    done = run_tool('test.py', NANO, 'none', '--work-dir', tmp_path, *options(digits / 'test'))
    assert done.returncode == 0, done.stderr[-3000:]
    (printed,) = re.findall(r'Iter\(test\).*PCK/img_0.1/point: ([\d.]+)', done.stdout)
    run, selection = read_run(tmp_path), json.loads((tmp_path / 'selection.json').read_text())
    assert run.value == pytest.approx(float(printed), abs=1e-3)
    assert run.timesteps == (selection['timestep'],) == (0,)
    assert (run.task.images, run.task.image_size, run.taps) == (13, '16x16', '2 output')
    assert run.task.metric == 'PCK@0.1 of the image, per point (%)'
    # Of nine points on 16 pixels, guessing has some four in a hundred.
    assert run.value > 40
    # 13 pairs by two processes, each with batches of its own: every average to the last digit.
    ranks = start_ranks(2, 'test.py', NANO, 'none', '--work-dir', tmp_path / 'ranks', *options(digits / 'test'))
    printed = [''.join(process.communicate()) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed[0][-3000:]
    alone, together = (json.loads((tmp_path / name / 'evaluation.json').read_text()) for name in ('', 'ranks'))
    assert len(alone['metrics']) == 6
    for key in ('metrics', 'images', 'timesteps', 'recipe'):
        assert together[key] == alone[key]
    noisy = tmp_path / 'noisy'
    done = run_tool(
        'test.py', NANO, 'none', '--work-dir', noisy, *options(digits / 'test', **{'model.backbone.timestep': 900})
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_run(noisy).value < run.value - 10
    assert not (noisy / 'selection.json').exists()
    table = run_tool('leaderboard.py', tmp_path, '--format', 'json')
    (entries,) = [table['entries'] for table in json.loads(table.stdout)]
    assert [entry['timestep'] for entry in entries] == ['0', '900']

    done = run_tool('analysis_tools/figures.py', 'matches', NANO, '--at', 0, '--images', 0, 5, '--work-dir', tmp_path,
                    *options(digits / 'test'))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pixels = np.asarray(Image.open(tmp_path / 'figure_matches.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    lines = (tmp_path / 'figure_matches.csv').read_text().splitlines()
    assert lines[0] == 'pair,x,y,found x,found y,true x,true y,distance (share)'
    assert len(lines) > 4


def test_tools_refuse_what_does_not_fit(digits, tmp_path, call_tool):
    done = call_tool('test.py', NANO, '/none', '--work-dir', tmp_path, *options(digits))
    assert "checkpoint='/none' is not a file, or 'none'" in error_line(done)
    head = {'model.head.type': 'AggregationHead', 'model.head.in_channels': '[128]', 'model.backbone.timestep': 0}
    done = call_tool('test.py', NANO, 'none', '--work-dir', tmp_path, *options(digits, **head))
    assert "checkpoint='none' is for models without weights of their own; this one has head.conv.weight" in error_line(
        done
    )
    done = call_tool('analysis_tools/figures.py', 'matches', NANO, '--at', 0, '--images', 99, '--work-dir', tmp_path,
                     *options(digits / 'test'))  # fmt: skip
    assert '--images 99: the test data has pairs 0 to 12' in error_line(done)
    done = call_tool('test.py', SPAIR[0], 'none', '--work-dir', tmp_path)
    assert "SPair71k: data_root='data/SPair-71k' is not a folder; expected there: JPEGImages/" in error_line(done)
    assert COUNT
