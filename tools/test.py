"""Tests a model, with the arguments of every OpenMMLab toolbox."""

from pathlib import Path

import mmengine

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

NONE = 'none'


def parse_args():
    parser = cli.base_parser('Test (and evaluate) a model')
    parser.add_argument('checkpoint', help="checkpoint file; 'none' for a model without weights of its own (zero-shot)")
    parser.add_argument('--out', help='file to write results to (.pkl, .json or .yaml as mmengine.dump knows)')
    parser.add_argument(
        '--out-item', choices=['metrics', 'pred'], help='what to write: predictions (the default) or metrics'
    )
    parser.add_argument('--amp', action='store_true', help='enable automatic mixed precision test')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='directory to save painted predictions to')
    parser.add_argument('--interval', type=int, default=1, help='paint every n-th sample')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that a window is shown')
    args = parser.parse_args()
    if args.out is None and args.out_item is not None:
        parser.error('--out-item needs --out')
    return args


def merge_args(cfg, args):
    if args.checkpoint != NONE and not Path(args.checkpoint).is_file():
        raise cli.InputError(f"checkpoint={args.checkpoint!r} is not a file, or 'none'")
    if args.checkpoint == NONE and args.launcher != 'none':
        raise cli.InputError(f'--launcher {args.launcher}: a model without weights of its own is tested by one process')
    cfg.load_from = None if args.checkpoint == NONE else args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        hook = cfg.default_hooks.get('visualization')
        if hook is None:
            raise cli.InputError('--show and --show-dir need default_hooks.visualization in the config')
        # mmpretrain's hook is switched on by `enable`, mmseg's by `draw`.
        settings = dict(show=args.show, wait_time=args.wait_time, interval=args.interval)
        if 'Seg' in hook.type:
            settings['draw'] = True
            if args.show_dir is not None:
                cfg.visualizer.save_dir = args.show_dir
        else:
            settings.update(enable=True, out_dir=args.show_dir)
        hook.update(settings)
    return cli.finish_config(cfg, args)


def main():
    args = parse_args()
    cfg = merge_args(cli.load_config(args), args)
    runner = cli.build_runner(cfg, 'test_dataloader')
    model = runner.model.module if runner.distributed else runner.model
    if args.checkpoint != NONE:
        cli.check_weights(model, args.checkpoint)
    elif any(True for _ in model.parameters()):
        first = next(name for name, _ in model.named_parameters())
        raise cli.InputError(f"checkpoint='none' is for models without weights of their own; this one has {first}")
    if args.out and args.out_item != 'metrics':
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.checkpoint == NONE and runner.rank == 0:
        from mmaselect.evaluation.runs import write_evaluation

        write_evaluation(runner, metrics)
    if args.out and args.out_item == 'metrics' and runner.rank == 0:
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    cli.run(main)
