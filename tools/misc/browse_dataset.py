"""Shows what a config feeds its model: images after the pipeline, with their labels, by the toolbox's own visualizer.

mmpretrain's own browser stops at configs that inherit from another package, mmseg's at OpenCV 5.
"""

import argparse
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument('--output-dir', '-o', help='where to save the pictures')
    parser.add_argument('--not-show', action='store_true', help='open no window')
    parser.add_argument('--phase', '-p', default='train', choices=['train', 'val', 'test'])
    parser.add_argument('--show-number', '-n', type=int, help='how many; default: all')
    parser.add_argument('--show-interval', '-i', type=float, default=2, help='seconds for which each is shown')
    cli.add_cfg_options(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.show_number is not None and args.show_number < 1:
        raise cli.InputError(f'--show-number {args.show_number} is not valid: give a whole number of at least 1')
    if args.output_dir is None and args.not_show:
        raise cli.InputError('--not-show without --output-dir leaves nothing to do: give a folder')
    cfg = cli.read_config(args.config, args.cfg_options)
    import numpy as np
    from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope

    from mmaselect.progress import progress_bar
    from mmaselect.toolboxes import scope_of

    scope = scope_of(cfg)
    segmentation = scope == 'mmseg'
    if segmentation:
        from mmseg.utils import register_all_modules

        register_all_modules(init_default_scope=False)
    init_default_scope(scope)
    field = f'{args.phase}_dataloader'
    if cfg.get(field) is None:
        raise cli.InputError(f'{args.config} has no {field}')
    cli.check_data(cfg, field)
    dataset = DATASETS.build(cfg[field].dataset)
    visualizer = VISUALIZERS.build({'name': 'browse', **cfg.visualizer, 'save_dir': args.output_dir})
    visualizer.dataset_meta = dataset.metainfo
    total = min(args.show_number or len(dataset), len(dataset))
    for index in progress_bar(iterable=range(total), desc='pictures', unit='images'):
        item = dataset[index]
        sample = item['data_samples']
        # Both toolboxes read BGR; OpenCV 5 draws on contiguous arrays only.
        image = np.ascontiguousarray(item['inputs'].permute(1, 2, 0).numpy()[..., ::-1])
        name = Path(sample.img_path).stem
        out_file = None if args.output_dir is None else str(Path(args.output_dir) / f'{index:06d}_{name}.png')
        shown = {'show': not args.not_show, 'wait_time': args.show_interval, 'name': name, 'out_file': out_file}
        if segmentation:
            visualizer.add_datasample(image=image, data_sample=sample.numpy(), draw_pred=False, **shown)
        else:
            visualizer.visualize_cls(image, sample.numpy(), **shown)
    if args.output_dir is not None:
        print(f'{args.output_dir}: {total} pictures')


if __name__ == '__main__':
    cli.run(main)
