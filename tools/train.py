"""Trains a model, with the arguments of every OpenMMLab toolbox."""

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = cli.base_parser('Train a model')
    cli.add_resume(parser)
    parser.add_argument('--amp', action='store_true', help='enable automatic mixed precision training')
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual over the original batch size (auto_scale_lr.base_batch_size)',
    )
    parser.add_argument('--no-persistent-workers', action='store_true', help='end dataloader workers after each epoch')
    return parser.parse_args()


def merge_args(cfg, args):
    cli.merge_resume(cfg, args.resume)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise cli.InputError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
        cfg.auto_scale_lr.enable = True
    cfg = cli.finish_config(cfg, args, persistent_workers=not args.no_persistent_workers)
    # After --cfg-options, which may name what is left out here.
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


def main():
    args = parse_args()
    from mmaselect.hooks import LastValidationHook

    cfg = merge_args(cli.load_config(args), args)
    runner = cli.build_runner(cfg, 'train_dataloader', 'val_dataloader')
    runner.register_hook(LastValidationHook())
    runner.train()


if __name__ == '__main__':
    cli.run(main)
