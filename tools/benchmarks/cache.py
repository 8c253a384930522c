"""Rows on the feature cache, by the demo's head."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import Row, interleave
from mmaselect import cli


def demo_runners(folder, caches):
    """Runners of the demo's config, ready to train: their epochs are then run one by one.

    Args:
        folder: For data and what is written.
        caches: Settings of the cache by name of the runner; None for one without.
    """
    from mmengine.config import Config
    from mmengine.registry import LOOPS
    from mmengine.runner import EpochBasedTrainLoop

    from mmaselect.cache.hook import FeatureCacheHook

    class Steps(EpochBasedTrainLoop):
        """Prepares a training, whose epochs are then run one by one."""

        def run(self):
            self.runner.call_hook('before_train')
            for hook in self.runner.hooks:
                # The epochs are yet to come: what the cache has replaced is not put back.
                if isinstance(hook, FeatureCacheHook):
                    hook._replaced.pop_all()

    LOOPS.register_module(module=Steps, force=True)
    data = folder / 'digits'
    root = Path(__file__).parents[2]
    tool = root / 'tools/dataset_converters/prepare_digits.py'
    subprocess.run([sys.executable, str(tool), str(data)], check=True, stdout=subprocess.DEVNULL)
    config = root / 'configs/demo/dit-nano_linear_bs64-20e_digits-16px.py'
    runners = []
    for name, cache in caches.items():
        cfg = Config.fromfile(config)
        cfg.work_dir = str(folder / name)
        cfg.experiment_name = cfg.visualizer.name = f'benchmark {folder} {name}'
        cfg.model.backbone.update(timestep=0, cache=cache)
        cfg.custom_hooks = [dict(type='FeatureCacheHook')] if cache else []
        cfg.train_cfg = dict(type='Steps', max_epochs=10**6)
        cfg.param_scheduler, cfg.log_level = [], 'WARNING'
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = str(data)
        cfg.default_hooks.logger.interval = 10**6
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=10**6)
        cfg = cli.finish_config(cfg, argparse.Namespace(cfg_options=None, no_pin_memory=False))
        runners.append(cli.build_runner(cfg))
        runners[-1].train()
    return runners


def size_of(folder):
    """Bytes of the shards below a folder."""
    return sum(path.stat().st_size for path in folder.rglob('*.safetensors'))


def bench_cache(args, folder):
    """Epochs of the demo's head, with and without the cache, through mmengine's own loop."""
    from mmaselect.hooks.images import find_backbone, unwrap

    cache = dict(dir=str(folder / 'features'), pool=False)
    runners = demo_runners(folder, dict(cached=cache, plain=None))
    cached, plain = runners
    backbone, preprocessor = find_backbone(plain), unwrap(plain).data_preprocessor
    images = plain.train_dataloader.dataset
    sample = plain.train_dataloader.collate_fn([images[index] for index in range(64)])
    (expected,) = backbone(preprocessor(sample, True)['inputs'])
    features = cached.train_dataloader.dataset
    found = torch.stack([features[index]['maps.0'] for index in range(64)]).to(expected)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if difference > 2**-8:
        raise cli.InputError(f'cached features differ by {difference:.2g} of the largest: nothing was timed')
    mine, other = interleave(args.repeats, cached.train_loop.run_epoch, plain.train_loop.run_epoch)
    size = size_of(folder / 'features')
    return [
        Row(
            "an epoch of the demo's head from the cache", 'the same epoch, features computed', f'{1e3 * mine:.0f} ms',
            f'{1e3 * other:.0f} ms', other / mine, 20.0,
            f'{len(images)} images, {size / 1e6:.0f} MB of bfloat16; largest relative difference {difference:.1g}',
        )
    ]  # fmt: skip


def bench_pooled(args, folder):
    """Epochs of the demo's head from vectors, and from the maps that they are pooled of."""
    names = ('vectors', 'maps')
    caches = {name: dict(dir=str(folder / name / 'cache'), dtype='float32', pool=name == 'vectors') for name in names}
    vectors, maps = demo_runners(folder, caches)
    # Epochs of milliseconds: by CPU time, so that other processes of the machine do not count.
    epochs = [runner.train_loop.run_epoch for runner in (vectors, maps)]
    mine, other = interleave(args.repeats, *epochs, clock=time.process_time)
    heads = [runner.model.head.state_dict() for runner in (vectors, maps)]
    found = [runner.val_loop.run()['accuracy/top1'] for runner in (vectors, maps)]
    if found[0] != found[1] or not all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0]):
        raise cli.InputError(f'from vectors the accuracy is {found[0]}, from maps {found[1]}')
    small, large = (size_of(folder / name) for name in names)
    return [
        Row(
            'cache of vectors, demo: bytes', 'cache of maps', f'{small / 1e6:.2f} MB', f'{large / 1e6:.2f} MB',
            large / small, 50.0, f'float32, labels and keys included; of bfloat16 maps {large / small / 2:.0f}x',
        ),
        Row(
            "an epoch of the demo's head from vectors", 'from maps', f'{1e3 * mine:.0f} ms', f'{1e3 * other:.0f} ms',
            other / mine, 5.0,
            f'CPU time; after {args.repeats + 1} epochs the heads are equal to the bit, with {found[0]:.2f} % accuracy',
        ),
    ]  # fmt: skip
