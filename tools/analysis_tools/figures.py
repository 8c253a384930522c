"""The figures of the paper for any config: each a PNG, and a CSV with its numbers.

figures.py timesteps      scores and probe accuracy over timesteps (Fig. 1)
figures.py decomposition  low and high frequencies of features beside the image (Fig. 3)
figures.py fisher         scores against the Fisher Score (Fig. 4)
figures.py blocks         component and block heat map (Fig. 5)
figures.py energy         how much of the features is noise, and what HFR is made of (docs/en/hfr.md)
figures.py matches        pairs of test images, and where points of the one are found in the other
"""

import sys
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

KINDS = ('timesteps', 'decomposition', 'fisher', 'blocks', 'energy', 'matches')


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--out', help='a PNG file; default: WORK_DIR/figure_KIND.png')
    parser.add_argument('--noise', choices=('fixed', 'fresh'), help='of the probes; default: that of the backbone')
    parser.add_argument('--at', type=float, help='timestep of decomposition, blocks and matches; default: selected')
    parser.add_argument(
        '--images', type=int, nargs='+', default=[0, 1, 2], help='validation images to decompose, or test pairs'
    )
    parser.add_argument('--checkpoint', help='of a trained head, for matches')
    cli.add_selection(parser)
    if len(sys.argv) < 2 or sys.argv[1] not in (*KINDS, '-h', '--help'):
        raise cli.InputError(f'figure={sys.argv[1:2]!r} is not known; choose from: {", ".join(KINDS)}')
    kind = sys.argv[1] if sys.argv[1] in KINDS else None
    return kind, parser.parse_args(sys.argv[2:] if kind else None)


def timesteps(runner, hook, args, path):
    from mmaselect.evaluation.figures import draw_timesteps
    from mmaselect.evaluation.probe import probe

    selection, _ = hook.score(runner)
    taps = selection.taps
    store = Path(runner.work_dir) / 'probes.json'
    found = probe(runner, selection.sweep.timesteps, taps, args.noise, hook.seed, store)
    draw_timesteps(selection, found.mean(taps), path)


def decomposition(runner, hook, args, path):
    from mmaselect.diffusion.noise import policy_noise
    from mmaselect.evaluation.figures import draw_decomposition
    from mmaselect.hooks.images import RunnerImages
    from mmaselect.selection.report import name_taps

    at, taps = chosen(runner, hook, args)
    images = RunnerImages(runner, runner.val_dataloader.dataset, 'val', len(args.images), hook.seed)
    outside = [index for index in args.images if not 0 <= index < len(images)]
    if outside:
        raise cli.InputError(f'--images {outside[0]}: the validation data has images 0 to {len(images) - 1}')
    batch = next(images.batches(args.images))
    maps = images.backbone.diffusion.maps_of(batch.images, [at], policy_noise('fresh', hook.seed))
    names = [f'image {index}' for index in batch.indices]
    sigma = getattr(hook.criterion, 'sigma', 0.25)
    draw_decomposition(batch.images, maps[at, taps[0]], names, f'Timestep {at:g}, {name_taps(taps[:1])}', path, sigma)


def fisher(runner, hook, args, path):
    from mmaselect.evaluation.figures import draw_fisher

    selection, _ = hook.score(runner)
    draw_fisher(selection, next(label for label in selection.sweep.scores if label.startswith('Fisher')), path)


def blocks(runner, hook, args, path):
    import numpy as np

    from mmaselect.evaluation.figures import draw_blocks
    from mmaselect.evaluation.probe import probe

    selection, images = hook.score(runner)
    at = selection.timestep if args.at is None else args.at
    taps = [taps[0] for taps in images.backbone.alternatives]
    found = probe(runner, [at], taps, args.noise, hook.seed, Path(runner.work_dir) / 'probes.json')
    position = selection.sweep.timesteps.index(at)
    scores = selection.sweep.scores[hook.criterion.label]
    names, numbers = (list(dict.fromkeys(tap[part] for tap in taps)) for part in (1, 0))

    def table(values):
        return np.array([[values[number, name][0] for number in numbers] for name in names])

    draw_blocks(
        table({tap: [scores[tap][position]] for tap in taps}), table(found.accuracy), numbers, names,
        hook.criterion.label, at, path,
    )  # fmt: skip


def energy(runner, hook, args, path):
    from mmaselect.evaluation.energy import draw_energy, energy_parts
    from mmaselect.evaluation.probe import probe
    from mmaselect.hooks.images import RunnerImages
    from mmaselect.images import draw_portions

    images = RunnerImages(runner, runner.train_dataloader.dataset, hook.pipeline, hook.batch_size, hook.seed, passes=2)
    model = images.backbone.diffusion
    (drawn,) = draw_portions(len(images), hook.num_images, hook.seed)
    rows = energy_parts(model, images.batches(drawn), hook.timesteps, seed=hook.seed)
    store = Path(runner.work_dir) / 'probes.json'
    draw_energy(rows, path, probe(runner, hook.timesteps, model.family.taps, args.noise, hook.seed, store).accuracy)


def matches(runner, hook, args, path):
    import numpy as np
    import torch
    from mmengine.dataset import pseudo_collate

    from mmaselect.evaluation.figures import draw_matches
    from mmaselect.hooks.images import find_backbone, unwrap
    from mmaselect.selection.report import name_taps

    dataset, model = runner.test_dataloader.dataset, unwrap(runner).eval()
    if not hasattr(dataset, 'single_images'):
        raise cli.InputError(f'matches needs pairs as test data; this config has {type(dataset).__name__}')
    outside = [index for index in args.images if not 0 <= index < len(dataset)]
    if outside:
        raise cli.InputError(f'--images {outside[0]}: the test data has pairs 0 to {len(dataset) - 1}')
    if args.checkpoint is not None:
        cli.check_checkpoint(args.checkpoint)
        cli.check_weights(model, args.checkpoint)
        runner.load_checkpoint(args.checkpoint)
    backbone = find_backbone(runner)
    if not backbone.decided:
        backbone.set_choice(*chosen(runner, hook, args))
    pictures, points, distances, names = [], [], [], []
    for index in args.images:
        data = pseudo_collate([dataset[index]])
        pictures.append([data['inputs'][side][0].flip(0).permute(1, 2, 0).numpy() for side in ('source', 'target')])
        with torch.no_grad():
            (sample,) = model.test_step(data)
        width, height = sample.target_size
        box = sample.target_box or [0, 0, width, height]
        gone = (sample.pred_points - sample.target_points.cpu()).norm(dim=1)
        distances.append((gone / max(box[2] - box[0], box[3] - box[1])).numpy())
        there = []
        for side, values in (
            ('source', sample.source_points), ('target', sample.pred_points), ('target', sample.target_points),
        ):  # fmt: skip
            matrix = np.asarray(sample.get(f'{side}_matrix').cpu())
            there.append(values.cpu().numpy() @ matrix[:, :2].T + matrix[:, 2])
        points.append(there)
        names.append(sample.name)
    title = f'timestep {", ".join(f"{one:g}" for one in backbone.timesteps)}, {name_taps(backbone.taps)}'
    draw_matches(pictures, points, distances, names, title, path)


def chosen(runner, hook, args):
    """Timestep and taps: as asked for, or as selected."""
    from mmaselect.hooks.images import find_backbone

    backbone = find_backbone(runner)
    if args.at is not None and backbone.taps is not None:
        return args.at, backbone.taps
    selection, _ = hook.score(runner)
    return (selection.timestep if args.at is None else args.at), selection.taps


def main():
    kind, args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    from mmaselect.hooks.images import find_backbone

    overrides = {}
    if kind == 'blocks':
        cfg.model.backbone.update(block='auto', component='auto')
        # One timestep is all that is shown, but the selected one is not known before.
        if args.at is not None:
            args.timesteps = [args.at]
    if kind == 'fisher':
        overrides['compare'] = [
            dict(type='HighFrequencyRatio'), dict(type='NoiseConsistentHFR', centred=False),
            dict(type='NoiseConsistentHFR'), dict(type='FisherScore'),
        ]  # fmt: skip
    if kind == 'matches' and args.at is None and isinstance(cfg.model.backbone.get('timestep'), (int, float)):
        args.at = cfg.model.backbone.timestep
    runner, hook = cli.build_selection(cfg, args, **overrides)
    args.noise = args.noise or find_backbone(runner).noise
    path = Path(args.out or Path(runner.work_dir) / f'figure_{kind}.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = {
        'timesteps': timesteps, 'decomposition': decomposition, 'fisher': fisher, 'blocks': blocks, 'energy': energy,
        'matches': matches,
    }[kind]  # fmt: skip
    draw(runner, hook, args, path)
    print(f'{path}, {path.with_suffix(".csv").name}')


if __name__ == '__main__':
    cli.run(main)
