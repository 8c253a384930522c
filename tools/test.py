"""Tests a model, with the arguments of every OpenMMLab toolbox."""

from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.toolboxes import scope_of, type_name

NONE = 'none'
#: What mmengine writes.
PREDICTIONS_FILES = ('.pkl', '.pickle')
METRICS_FILES = ('.json', '.yaml', '.yml', '.pkl', '.pickle')
TTA_MODELS = {'mmpretrain': 'mmpretrain.AverageClsScoreTTA', 'mmseg': 'mmseg.SegTTAModel'}


def parse_args():
    parser = cli.base_parser('Test (and evaluate) a model')
    parser.add_argument('checkpoint', help="checkpoint file; 'none' for a model without weights of its own (zero-shot)")
    parser.add_argument(
        '--out',
        help='where to write results: predictions to a .pkl file, in segmentation also as label maps to a folder; '
        'metrics to a .json, .yaml or .pkl file',
    )
    parser.add_argument(
        '--out-item', choices=['metrics', 'pred'], help='what to write: predictions (the default) or metrics'
    )
    parser.add_argument('--amp', action='store_true', help='enable automatic mixed precision test')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the config, or the image and its mirror image',
    )
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
        if 'Seg' in type_name(hook):
            settings['draw'] = True
            if args.show_dir is not None:
                cfg.visualizer.save_dir = args.show_dir
        else:
            settings.update(enable=True, out_dir=args.show_dir)
        hook.update(settings)
    cfg = cli.finish_config(cfg, args)
    if args.checkpoint == NONE:
        # DistributedDataParallel refuses a model that has nothing to train; this one leaves out what has nothing.
        cfg.model_wrapper_cfg = dict(type='MMSeparateDistributedDataParallel')
    if args.out:
        merge_out(cfg, args)
    # Last: what else there is to say of the model is said of the one inside.
    if args.tta:
        if scope_of(cfg) == 'mmpretrain' and (args.show or args.show_dir is not None):
            raise cli.InputError(
                "--tta goes without --show and --show-dir: mmpretrain's hook paints one view of an image"
            )
        merge_tta(cfg)
    return cfg


def merge_out(cfg, args):
    """Checks where results go, before anything is computed; a folder gets mmseg's label maps."""
    suffix = Path(args.out).suffix
    if args.out_item == 'metrics':
        if suffix not in METRICS_FILES:
            raise cli.InputError(f'--out {args.out!r} --out-item metrics: give a file {", ".join(METRICS_FILES)}')
    elif suffix not in PREDICTIONS_FILES:
        if scope_of(cfg) != 'mmseg' or suffix in METRICS_FILES:
            folder = ', or a folder' if scope_of(cfg) == 'mmseg' else ''
            raise cli.InputError(f'--out {args.out!r}: predictions go to a file {", ".join(PREDICTIONS_FILES)}{folder}')
        metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for metric in metrics:
            if type_name(metric) == 'IoUMetric':
                metric.output_dir = args.out


def merge_tta(cfg):
    """Wraps the model for test-time augmentation, as both toolboxes' own tools do."""
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        if scope_of(cfg) not in TTA_MODELS:
            raise cli.InputError('--tta needs tta_model and tta_pipeline in the config')
        cfg.tta_model = dict(type=TTA_MODELS[scope_of(cfg)])
    if 'tta_pipeline' not in cfg:
        *steps, pack = dataset.pipeline
        flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
        # mmseg evaluates on the labels of the first: that of the image as it is.
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    from mmengine.config import ConfigDict

    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def main():
    args = parse_args()
    cfg = merge_args(cli.load_config(args), args)
    runner = cli.build_runner(cfg, 'test_dataloader')
    from mmaselect.hooks.images import unwrap

    model = unwrap(runner)
    if args.checkpoint != NONE:
        cli.check_weights(model, args.checkpoint)
    elif any(True for _ in model.parameters()):
        first = next(name for name, _ in model.named_parameters())
        raise cli.InputError(f"checkpoint='none' is for models without weights of their own; this one has {first}")
    if args.out and args.out_item != 'metrics' and Path(args.out).suffix in PREDICTIONS_FILES:
        from mmengine.evaluator import DumpResults

        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.checkpoint == NONE and runner.rank == 0:
        from mmaselect.evaluation.runs import write_evaluation

        write_evaluation(runner, metrics)
    if args.out and args.out_item == 'metrics' and runner.rank == 0:
        import mmengine

        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    cli.run(main)
