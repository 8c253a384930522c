"""Heads trained on cached features, in real runs of the demo's config on a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, error_line, options
from miniatures import make
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from safetensors import safe_open
from test_configs import shrink

from mmaselect.cache import FeatureCacheHook
from mmaselect.cache.build import FeatureCache
from mmaselect.cache.hook import make_cache, read_settings
from mmaselect.cache.store import FeatureStore
from mmaselect.errors import InputError
from mmaselect.hooks.images import find_backbone

FLIPPED = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=20),
    dict(type='RandomCrop', crop_size=16),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]


@pytest.fixture
def train(digits, tmp_path):
    """Returns a function that trains and gives the runner, which has its losses and what it computed."""
    number = iter(range(100))

    def run(cache=None, build_only=False, **changes):
        config = Config.fromfile(DEMO)
        for split in ('train', 'val', 'test'):
            config[f'{split}_dataloader'].dataset.data_root = str(digits)
            config[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
            config[f'{split}_dataloader'].collate_fn = dict(type='default_collate')
        config.custom_hooks = []
        # Without a hook nobody asks the data preprocessor.
        config.model.backbone.update(timestep=100, mean=[127.5] * 3, std=[127.5] * 3)
        config.train_cfg.update(max_epochs=2, val_interval=2)
        config.train_dataloader.batch_size = 16
        config.default_hooks.logger.interval = 1
        config.randomness = dict(seed=0)
        if cache is not None:
            # Maps, unless a test asks for vectors.
            settings = dict(dir=str(tmp_path / 'cache'), dtype='float32', pool=False)
            config.model.backbone.cache = {**settings, **cache}
            config.custom_hooks = [dict(type='FeatureCacheHook')]
        config.merge_from_dict(changes)
        config.work_dir = str(tmp_path / f'run{next(number)}')
        config.experiment_name = config.visualizer.name = f'{tmp_path.name} {config.work_dir}'
        runner = Runner.from_cfg(config)
        if not build_only:
            runner.train()
            (log,) = list(tmp_path.glob(f'{runner.work_dir.split("/")[-1]}/*/vis_data/scalars.json'))
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            runner.losses = [line['loss'] for line in lines if 'loss' in line]
            runner.metrics = [line['accuracy/top1'] for line in lines if 'accuracy/top1' in line]
        return runner

    yield run
    DefaultScope._instance_dict.clear()


@pytest.fixture
def computed(monkeypatch):
    """Numbers of views that are computed by each run."""
    counts, compute = [], FeatureCache._compute

    def counted(self, work, show):
        counts.append(len(work))
        compute(self, work, show)

    monkeypatch.setattr(FeatureCache, '_compute', counted)
    return counts


def test_the_loss_curve_is_that_without_a_cache(train, computed):
    plain, cached, again = train(), train(cache={}), train(cache={})
    assert len(plain.losses) == 2 * -(-150 // 16)
    # The first and the last run differ in what they compute, and in nothing else, to the last bit.
    assert cached.losses == plain.losses
    assert cached.metrics == plain.metrics
    assert again.losses == plain.losses
    assert computed == [150, 0]
    # The head is the same, and nothing of the features went into the checkpoint.
    states = [
        torch.load(f'{runner.work_dir}/epoch_2.pth', weights_only=True)['state_dict'] for runner in (plain, cached)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_vectors_train_as_maps_do_and_are_fifty_times_smaller(train, computed, tmp_path):
    plain, maps, vectors = train(), train(cache={}), train(cache=dict(pool=True, dtype=None))
    again = train(cache=dict(pool=True, dtype=None))
    for runner in (vectors, again):
        # The dtype is float32 here: nothing is rounded.
        assert runner.losses == plain.losses
        assert runner.metrics == plain.metrics
    assert computed == [150, 150, 0]
    folders = [features_of(runner).store.folder for runner in (maps, vectors)]
    large, small = (sum(path.stat().st_size for path in folder.glob('*.safetensors')) for folder in folders)
    assert 50 < large / small < 64
    (log,) = Path(vectors.work_dir).glob('*/*.log')
    assert 'vectors are kept, as GlobalAveragePooling makes them of the maps, in float32' in log.read_text()
    (shard,) = folders[1].glob('*.safetensors')
    with safe_open(str(shard), 'pt') as file:
        assert file.get_tensor('maps.0').shape == (150, 128, 1, 1)
    # A neck that attends needs the maps.
    neck = dict(_delete_=True, type='AttentionPooling', in_channels=128, embed_dims=8, num_layers=1)
    attending = train(cache=dict(pool=True), build_only=True, **{'model.neck': neck, 'model.head.in_channels': 8})
    cache = make_cache(attending, read_settings(find_backbone(attending).cache))
    assert cache.description['pooling'] is None


def test_half_precision_is_near(train):
    plain = train().losses
    for dtype, error in (('bfloat16', 2**-8), ('float16', 2**-11)):
        losses = train(cache={}, **{'model.backbone.cache.dtype': dtype}).losses
        assert losses != plain
        assert losses == pytest.approx(plain, rel=4 * error)


def test_the_frozen_model_does_not_run_in_training(train, monkeypatch):
    from mmaselect.diffusion.reader import FrozenDiffusion

    runs, read = [], FrozenDiffusion.read

    def counted(self, latent, *rest):
        runs.append(len(latent))
        return read(self, latent, *rest)

    monkeypatch.setattr(FrozenDiffusion, 'read', counted)
    train(cache={})
    # 150 training images once, 60 for validation.
    assert sum(runs) == 210


def test_only_what_changed_is_computed_again(train, computed, digits, tmp_path):
    import shutil

    copy = tmp_path / 'digits'
    shutil.copytree(digits, copy)
    root = {'train_dataloader.dataset.data_root': str(copy)}
    train(cache={})
    # Moved data is the same data, in whatever order.
    train(cache={}, **root)
    image = next((copy / 'train/3').iterdir())
    pixels = cv2.imread(str(image))
    cv2.imwrite(str(image), 255 - pixels)
    train(cache={}, **root)
    # The same image under another label is another sample.
    image.rename(copy / 'train/4' / f'moved_{image.name}')
    train(cache={}, **root)
    assert computed == [150, 0, 1, 1]
    assert len(list((tmp_path / 'cache').iterdir())) == 1


@pytest.mark.parametrize(
    'change',
    [
        {'model.backbone.timestep': 300},
        {'model.backbone.block': 1},
        {'model.backbone.component': 'key'},
        {'model.backbone.noise': 'fresh'},
        {'model.backbone.noise_seed': 1},
        {'model.backbone.diffusion.shift': 2.0},
        {'model.backbone.diffusion.normalised_qk': True},
        {'model.backbone.cache.dtype': 'bfloat16'},
        {'model.backbone.cache.pool': True},
        {'train_dataloader.dataset.pipeline.1.scale': 24},
        {'model.backbone.mean': [120.0] * 3, 'data_preprocessor.mean': [120.0] * 3},
    ],
    ids=str,
)
def test_another_setting_is_another_cache(train, change):
    """Seen from the folder, which the settings name; nothing needs to be computed for that."""
    plain, changed = describe(train, {}), describe(train, change)
    assert changed != plain
    # And in what description.json says.
    assert any(plain[key] != changed[key] for key in plain)


def features_of(runner):
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, FeatureCacheHook)]
    return hook._features


def describe(train, changes):
    runner = train(cache={}, build_only=True, **changes)
    return make_cache(runner, read_settings(find_backbone(runner).cache)).description


def test_what_does_not_matter_is_in_no_key(train):
    changes = {'train_dataloader.batch_size': 4, 'train_cfg.max_epochs': 9, 'model.backbone.cache.views': 3}
    assert describe(train, changes) == describe(train, {})


def test_an_interrupted_cache_is_taken_up_again(train, computed, monkeypatch):
    monkeypatch.setattr('mmaselect.cache.build.SHARD_BYTES', 32 * 128 * 8 * 8 * 4)
    write, written = FeatureStore.write, []

    def interrupted(self, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(rows))
        return write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, 'write', interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(cache={})
    assert written == [32, 32]
    resumed = train(cache={})
    assert computed == [150, 150 - 64]
    assert resumed.losses == train().losses


def test_a_damaged_shard_is_computed_again(train, computed, tmp_path):
    losses = train(cache={}).losses
    (shard,) = (tmp_path / 'cache').glob('*/*.safetensors')
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(content)
    assert train(cache={}).losses == losses
    assert computed == [150, 150]


def test_epochs_take_turns_with_the_views(train, computed):
    runner = train(
        cache=dict(views=3, pool=True), **{'train_dataloader.dataset.pipeline': FLIPPED, 'train_cfg.max_epochs': 4}
    )
    assert computed == [450]
    features = features_of(runner)
    seen = []
    for epoch in range(4):
        features.epoch = epoch
        seen.append(features.keys_of(range(150)).tolist())
    assert all(len(set(views)) == 3 for views in zip(*seen[:3]))
    assert seen[3] == seen[0]
    # In one epoch some images show their first view, others their second.
    assert {views.index(key) for views, key in zip(features.keys.tolist(), seen[0])} == {0, 1, 2}
    maps = features.store.read(features.keys[0])['maps.0']
    assert not torch.equal(maps[0], maps[1])
    assert features.epoch == 3


def test_views_are_the_same_whoever_computes_them(train, tmp_path):
    """Which crop a view is depends on its key alone: a lost view comes back as it was."""
    changes = {'train_dataloader.dataset.pipeline': FLIPPED}
    first = train(cache=dict(views=2), **changes)
    shards = {path.name for path in (tmp_path / 'cache').glob('*/*.safetensors')}
    for path in (tmp_path / 'cache').glob('*/*.safetensors'):
        path.unlink()
    second = train(cache=dict(views=2), **changes)
    assert {path.name for path in (tmp_path / 'cache').glob('*/*.safetensors')} == shards
    assert second.losses == first.losses


def test_one_view_of_a_random_pipeline_is_warned_about(train):
    runner = train(cache={}, **{'train_dataloader.dataset.pipeline': FLIPPED, 'train_cfg.max_epochs': 1})
    (log,) = Path(runner.work_dir).glob('*/*.log')
    assert 'every epoch will see the same; set cache.views' in log.read_text()


def test_views_of_a_fixed_pipeline_are_one(train, computed):
    train(cache=dict(views=4), **{'train_cfg.max_epochs': 1})
    assert computed == [150]


def test_schedules_of_iterations_take_turns_too(train):
    loop = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=25, val_interval=100)
    runner = train(
        cache=dict(views=2),
        train_cfg=loop,
        **{
            'train_dataloader.dataset.pipeline': FLIPPED,
            'train_dataloader.sampler.type': 'InfiniteSampler',
            'param_scheduler': [],
            'default_hooks.checkpoint': dict(type='CheckpointHook', by_epoch=False, interval=25),
        },
    )
    assert len(runner.losses) == 25
    # 10 iterations are an epoch.
    assert features_of(runner).epoch == 2


def test_repeated_images_are_computed_once(train, computed):
    runner = train(
        cache={},
        train_dataloader=dict(
            dataset=dict(
                _delete_=True,
                type='RepeatDataset',
                times=2,
                dataset=train(build_only=True).cfg.train_dataloader.dataset,
            )
        ),
        **{'train_cfg.max_epochs': 1},
    )
    assert computed == [150]
    assert len(features_of(runner)) == 300


@pytest.mark.parametrize(
    'cache,changes,message',
    [
        ({}, {'model.backbone.cache': None}, r"needs model\.backbone\.cache=dict\(dir='\.\.\.'\)"),
        (dict(view=2), {}, "field of cache='view' is not known; choose from: dir, dtype, pool, views, max_gb"),
        (dict(views=0), {}, r'cache\.views=0 is not valid: give a whole number of at least 1'),
        ({}, {'model.backbone.cache.dtype': 'int8'}, "dtype='int8' is not known; choose from: float32, bfloat16"),
        (dict(pool=1), {}, r'cache\.pool=1 is not valid: give True or False'),
        (dict(max_gb=0), {}, r'cache\.max_gb=0 is not valid: give a number above 0'),
        (dict(max_gb=0.001), {}, r'max_gb=0\.001 is less than the 0\.00492 GB that the features would take'),
        ({}, {'model.backbone.timestep': 'auto'}, r'a cache needs a timestep: add .*TimestepSelectionHook'),
        (
            {},
            {'model.data_preprocessor': dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3,
             to_rgb=True, num_classes=10, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8)]))},
            r'data_preprocessor\.batch_augments mixes images of a batch',
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_said_in_a_line(train, tmp_path, cache, changes, message):
    with pytest.raises(InputError, match=message):
        train(cache=cache, **changes)
    assert not list(tmp_path.glob('cache/*/*.safetensors'))


def test_a_cache_without_its_hook_is_said_in_a_line(train):
    with pytest.raises(InputError, match=r"cache is set, but nothing fills it: add dict\(type='FeatureCacheHook'\)"):
        train(cache={}, custom_hooks=[])


def test_images_of_several_sizes_are_said_in_a_line(train):
    pipeline = [FLIPPED[0], dict(type='RandomResize', scale=(16, 16), ratio_range=(1, 2)), FLIPPED[-1]]
    changes = {'train_dataloader.dataset.pipeline': pipeline, 'model.backbone.cache.batch_size': 1}
    with pytest.raises(InputError, match='cannot be cached together: the pipeline must give one size'):
        train(cache=dict(), **changes)


@TRANSFORMS.register_module(force=True)
class OwnNumbers:
    """Flips at random, by a generator of its own, as the transforms of Albumentations 2 do."""

    generator = np.random.default_rng(0)

    def __call__(self, results):
        if self.generator.random() < 0.5:
            results['img'] = results['img'][:, ::-1].copy()
        return results


def test_random_numbers_that_no_seed_reaches_are_refused_before_anything_is_computed(train, computed):
    pipeline = [FLIPPED[0], dict(type='OwnNumbers'), FLIPPED[-1]]
    with pytest.raises(InputError, match='the pipeline gives two images under one seed: a transform has random'):
        train(cache={}, **{'train_dataloader.dataset.pipeline': pipeline})
    assert computed == []


def test_samples_of_several_images_are_refused_before_anything_is_computed(train, computed):
    """A mosaic: its rows would be stale once another of its images changes."""
    plain = train(build_only=True).cfg.train_dataloader.dataset
    plain.pipeline = [FLIPPED[0]]
    mixed = dict(
        _delete_=True,
        type='mmseg.MultiImageMixDataset',
        dataset=dict(plain, _scope_='mmpretrain'),
        pipeline=[dict(type='mmseg.RandomMosaic', prob=0.5), FLIPPED[-1]],
    )
    with pytest.raises(InputError, match='RandomMosaic mixes several images in a sample: features cannot be cached'):
        train(cache={}, train_dataloader=dict(dataset=mixed))
    assert computed == []


def test_samples_of_several_labels_are_refused_before_anything_is_computed(train, computed, digits, tmp_path):
    files = sorted(digits.glob('train/*/*.png'))[:20]
    labels = [dict(img_path=str(file), gt_label=[1, 2] if number == 17 else [1]) for number, file in enumerate(files)]
    content = dict(metainfo=dict(classes=[str(digit) for digit in range(10)]), data_list=labels)
    (tmp_path / 'labels.json').write_text(json.dumps(content))
    file, steps = str(tmp_path / 'labels.json'), [FLIPPED[0], FLIPPED[-1]]
    several = dict(_delete_=True, type='MultiLabelDataset', ann_file=file, pipeline=steps)
    with pytest.raises(InputError, match=rf'{files[17]} has 2 labels: what is cached has one class, or a label map'):
        train(cache={}, train_dataloader=dict(dataset=several))
    assert computed == []


class Bucket(LocalBackend):
    """Stands for LMDB and Petrel: keys are no files, and one that is missing is no OSError."""

    folder = Path()

    def get(self, filepath):
        key = Path(str(filepath))
        if (self.folder / key.parent.name / f'{key.name}.stored') not in self.folder.glob('*/*.stored'):
            raise KeyError(f'no {key.name}')
        return (self.folder / key.parent.name / f'{key.name}.stored').read_bytes()


def test_files_are_read_as_the_transforms_read_them(train, computed, digits, tmp_path, monkeypatch):
    register_backend('bucket', Bucket, force=True)
    monkeypatch.setattr(Bucket, 'folder', tmp_path / 'bucket')
    for file in digits.glob('train/*/*.png'):
        (tmp_path / 'bucket' / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'bucket' / file.parent.name / f'{file.name}.stored').write_bytes(file.read_bytes())
    loads = dict(type='LoadImageFromFile', backend_args=dict(backend='bucket'))
    pipeline = {'train_dataloader.dataset.pipeline': [loads, FLIPPED[-1]], 'train_cfg.max_epochs': 1}
    first = train(cache={}, **pipeline)
    assert first.losses == train(**pipeline).losses
    stored = sorted((tmp_path / 'bucket').glob('3/*'))
    stored[0].write_bytes(stored[1].read_bytes())
    stored[2].unlink()
    broken = train(cache={}, **pipeline)
    # The one that was overwritten is now another's twin; the one that is gone is counted and listed.
    assert computed == [150, 0]
    (log,) = Path(broken.work_dir).glob('*/*.log')
    assert '1 of 150 images cannot be read' in log.read_text()
    pipeline['train_dataloader.dataset.pipeline'] = [loads, dict(type='LoadImageFromFile'), FLIPPED[-1]]
    with pytest.raises(
        InputError, match=r"img_path is read by \{'backend': 'bucket'\} and by None: give one backend_args"
    ):
        train(cache={}, **pipeline)


class Stop(Hook):
    """Ctrl-C in the second iteration, once."""

    def __init__(self):
        self.stopped = False

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 1 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


def test_what_the_hook_replaces_is_put_back_after_an_interruption(train, computed):
    runner = train(cache={}, build_only=True)
    runner.register_hook(Stop())
    dataset, preprocessor = runner.train_dataloader.dataset, runner.model.data_preprocessor
    for _ in range(2):
        if computed:
            runner.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                runner.train()
        assert runner.train_loop.dataloader.dataset is dataset
        assert 'forward' not in vars(preprocessor)
        assert 'run' not in vars(runner.train_loop)
    assert computed == [150, 0]
    assert runner.epoch == 2


def test_an_image_whose_features_are_not_finite_is_named(train, digits, monkeypatch):
    from mmaselect.backbones import ASelectDiT

    forward, seen = ASelectDiT.forward, []

    def overflowing(self, images):
        (maps,) = forward(self, images)
        # One value that only float16 cannot hold, in the second image of the third batch.
        seen.append(len(maps))
        return (maps.index_fill(0, torch.tensor([1]), 1e6) if len(seen) == 3 else maps,)

    monkeypatch.setattr(ASelectDiT, 'forward', overflowing)
    name = sorted(digits.glob('train/*/*.png'))[2 * 16 + 1]
    with pytest.raises(InputError, match=rf"{name}: cache\.dtype='float16' overflows: bfloat16 has float32's range"):
        train(cache={}, **{'model.backbone.cache.dtype': 'float16'})


def test_segmentation_trains_on_cached_images_with_their_label_maps(model_folder, tmp_path):
    path = ROOT / 'configs/segmentation/dit-micro_upernet_bs8-200_camvid-192x256.py'
    config = Config.fromfile(path)
    shrink(config, path, model_folder, make(config.train_dataloader.dataset.type, tmp_path / 'data'))
    config.model.backbone.update(timestep=100, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    # Fresh noise is drawn anew in every iteration, but for a cache once.
    config.model.backbone.noise = 'fixed'
    steps = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in steps if not step['type'].startswith('Random')]
    losses = []
    for number, cache in enumerate((None, dict(dir=str(tmp_path / 'cache'), dtype='float32'))):
        once = config.copy()
        once.model.backbone.cache = cache
        once.custom_hooks = [] if cache is None else [dict(type='FeatureCacheHook')]
        once.work_dir, once.randomness = str(tmp_path / f'run{number}'), dict(seed=0)
        once.experiment_name = once.visualizer.name = f'{tmp_path.name} {number}'
        Runner.from_cfg(once).train()
        (log,) = (tmp_path / f'run{number}').glob('*/vis_data/scalars.json')
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        # Of both heads; the segmentation heads have a dropout, which draws the same numbers.
        losses.append([[line[name] for name in line if 'loss' in name] for line in lines if 'loss' in line])
    DefaultScope._instance_dict.clear()
    assert [len(line) for line in losses[0]] == [3, 3]
    assert losses[1] == losses[0]
    (shard,) = (tmp_path / 'cache').glob('*/*.safetensors')
    with safe_open(str(shard), 'pt') as file:
        assert file.get_tensor('gt_sem_seg').shape == (6, 1, 192, 256)
        assert [file.get_tensor(f'maps.{n}').shape for n in range(4)] == [(6, 16, 48, 64)] * 4


def test_the_tool_selects_computes_and_says_how_much(digits, tmp_path, call_tool):
    arguments = ['cache_features.py', DEMO, '--work-dir', tmp_path / 'work', '--dir', tmp_path / 'cache']
    done = call_tool(*arguments, *options(digits))
    assert done.returncode == 0, done.stderr[-3000:]
    selection = json.loads((tmp_path / 'work/selection.json').read_text())
    size = 150 * (128 * 4 + 8)
    where = f'150 images, 1 view(s) of each, at timestep {selection["timestep"]:g}: '
    said = done.stdout.splitlines()[-1]
    assert said.startswith(where)
    assert f' GB in {tmp_path}/cache/' in said
    # Features and labels, and sizes and a header of a few dozen bytes per image.
    assert 1 < float(said.removeprefix(where).split()[0]) * 1e9 / size < 1.2
    line = error_line(call_tool('cache_features.py', DEMO, *options(digits)))
    assert "give --dir, or model.backbone.cache=dict(dir='...')" in line
    line = error_line(call_tool(*arguments, '--max-gb', '0.00001', '--dtype', 'bfloat16', *options(digits)))
    assert 'max_gb=1e-05 is less than' in line


def test_verify_all_reads_what_a_disk_has_lost_without_a_write(digits, tmp_path, call_tool):
    arguments = ['cache_features.py', DEMO, '--work-dir', tmp_path / 'work', '--dir', tmp_path / 'cache']
    settings = options(digits, **{'model.backbone.timestep': 0})
    assert call_tool(*arguments, *settings).returncode == 0
    (shard,) = (tmp_path / 'cache').glob('*/*.safetensors')
    sound = shard.read_bytes()
    damaged = bytearray(sound)
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    # A disk that loses a bit leaves the times of the file as they are: here it was verified later than it was changed.
    (shard.parent / 'verified.json').write_text(json.dumps({'verified_until': shard.stat().st_ctime_ns + 10**12}))
    store = FeatureStore(shard.parent)
    assert store.verify(store.shards(), since=store.verified_until()) == []
    done = call_tool(*arguments, '--verify-all', *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert shard.read_bytes() == sound
