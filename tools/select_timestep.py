"""Selects the timestep of any config with an ASelectDiT backbone, without training."""

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import TimestepSelectionHook, cli


def parse_args():
    parser = cli.base_parser('Select the timestep of a backbone; writes selection.json and selection.png')
    parser.add_argument('--num-images', type=int, help='training images to select on')
    parser.add_argument(
        '--timesteps', type=float, nargs='+', help='timesteps to try, 0-1000; default: those of the config'
    )
    parser.add_argument('--criterion', help='HighFrequencyRatio, NoiseConsistentHFR or FisherScore')
    parser.add_argument('--sigma', type=float, help='sigma of the criterion, in cycles per sample')
    parser.add_argument('--seed', type=int, help='seed of images and noises')
    return parser.parse_args()


def hook_settings(cfg, args):
    """The hook's entry in the config, if it has one, under what the command line says."""
    settings = {}
    for hook in cfg.get('custom_hooks') or []:
        if hook['type'] in ('TimestepSelectionHook', TimestepSelectionHook):
            settings = {key: value for key, value in hook.items() if key not in ('type', 'priority')}
    for key in ('num_images', 'timesteps', 'seed'):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.criterion is not None:
        settings['criterion'] = dict(type=args.criterion)
    if args.sigma is not None:
        settings['criterion'] = dict(settings.get('criterion') or dict(type='HighFrequencyRatio'), sigma=args.sigma)
    return settings


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    hook = TimestepSelectionHook(**hook_settings(cfg, args))
    cfg.load_from, cfg.resume = None, False
    # A timestep that the config sets is what the user wants to compare with, not a reason to stop.
    cfg.model.backbone.timestep = 'auto'
    runner = cli.build_runner(cfg)
    hook.before_run(runner)
    content = hook.select(runner)
    if runner.rank == 0:
        print(f'timestep {content["timestep"]:g} -> {runner.work_dir}/selection.json, selection.png')


if __name__ == '__main__':
    cli.run(main)
