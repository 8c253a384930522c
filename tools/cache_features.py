"""Computes the features of the training images once, for training runs with FeatureCacheHook."""

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = cli.base_parser('Compute the features of the training images; a timestep that is open is selected first')
    parser.add_argument('--dir', help='folder of the cache; default: model.backbone.cache.dir of the config')
    parser.add_argument('--dtype', help='bfloat16, float16 or float32')
    parser.add_argument('--views', type=int, help='augmented views of each image')
    parser.add_argument('--max-gb', type=float, help='refuse, before anything is computed, to write more than this')
    parser.add_argument('--verify-all', action='store_true', help='read what has not changed since, too')
    return parser.parse_args()


def merge_args(cfg, args):
    cfg = cli.finish_config(cfg, args)
    settings = dict(cfg.model.backbone.get('cache') or {})
    for name in ('dir', 'dtype', 'views', 'max_gb'):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if not settings.get('dir'):
        raise cli.InputError("give --dir, or model.backbone.cache=dict(dir='...') in the config")
    cfg.model.backbone.cache = settings
    return cfg


def main():
    args = parse_args()
    cfg = merge_args(cli.load_config(args), args)
    from mmaselect.cache.hook import make_cache, read_settings
    from mmaselect.hooks import TimestepSelectionHook
    from mmaselect.hooks.images import find_backbone

    settings = read_settings(cfg.model.backbone.cache)
    load_from, cfg.resume = cfg.get('load_from'), False
    runner = cli.build_runner(cfg, 'train_dataloader')
    backbone = find_backbone(runner)
    if load_from:
        runner.load_checkpoint(load_from)
    if not backbone.decided:
        # What the work directory already holds of this very selection is not searched again.
        runner._resume = True
        for hook in runner.hooks:
            if isinstance(hook, TimestepSelectionHook):
                hook.before_train(runner)
    features = make_cache(runner, settings).build(args.verify_all)
    if runner.rank == 0:
        taken = sum(path.stat().st_size for path in features.store.folder.glob('*.safetensors'))
        print(
            f'{len(features)} images, {features.keys.shape[1]} view(s) of each, at timestep '
            f'{", ".join(f"{one:g}" for one in backbone.timesteps)}: {taken / 1e9:.3g} GB in {features.store.folder}'
        )


if __name__ == '__main__':
    cli.run(main)
