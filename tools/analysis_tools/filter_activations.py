"""Scores every activation of a config's network, without labels, and keeps a short list.

Every activation is read in one pass per timestep, noise and view. Dropped is what is dominated by the noise, by
position (what all images have in common) or by massive channels; what is left is ranked by the criterion of the
config's hook.
Writes activations.csv (all, at every timestep), activations.json (the short list, as `taps` of a backbone takes it) and
a picture of the first principal components.
"""

from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.errors import check_count, check_number

TIMESTEPS = (0.0, 50.0, 100.0, 250.0, 500.0)


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--keep', type=int, default=8, help='length of the short list')
    parser.add_argument('--max-noise', type=float, default=0.5, help='largest share of the energy that is noise')
    parser.add_argument('--max-position', type=float, default=0.9, help='that all images have in common')
    parser.add_argument('--max-massive', type=float, default=0.5, help='that lies in massive channels')
    parser.add_argument('--massive', type=float, default=10.0, help='a channel is massive above so many medians')
    parser.add_argument('--at', type=float, help="timestep that decides; default: the config's, or the best one")
    parser.add_argument('--images', type=int, default=3, help='images to draw')
    parser.add_argument('--probe', action='store_true', help='compare kept and dropped by a linear probe (labels)')
    cli.add_selection(parser)
    args = parser.parse_args()
    check_count(args.keep, '--keep')
    check_count(args.images, '--images')
    for name in ('noise', 'position', 'massive'):
        check_number(getattr(args, f'max_{name}'), f'--max-{name}', 0, 1)
    check_number(args.massive, '--massive', 1, open_low=True)
    return args


def load_all(runner):
    """Lets the backbone read every activation; gives their names."""
    from mmaselect.hooks.images import find_backbone

    backbone = find_backbone(runner)
    names = backbone.spec.family.tap_names(backbone.spec.config)
    backbone.load_taps(list(names.values()))
    return backbone, {tap: name for name, tap in names.items()}


def score(runner, hook, args, names, backbone):
    """Verdicts of all activations at every timestep, not yet judged."""
    from mmaselect.evaluation.activations import LIMITS, MassiveShare, NoiseShare, PositionShare, Verdict

    shares = [kind(args.massive) for kind in (NoiseShare, PositionShare, MassiveShare)]
    hook.criteria = {hook.criterion.label: hook.criterion, **{one.label: one for one in shares}}
    selection, _ = hook.score(runner, [(tap,) for tap in names])
    sweep, model = selection.sweep, backbone.diffusion
    return sweep, {
        timestep: [
            Verdict(
                name, tap, model.family.shapes[tap][0], model.strides[tap], timestep,
                {fault: sweep.scores[fault][tap][place] for fault in LIMITS},
                sweep.scores[hook.criterion.label][tap][place],
            )
            for tap, name in names.items()
        ]
        for place, timestep in enumerate(sweep.timesteps)
    }  # fmt: skip


def draw(runner, hook, args, backbone, verdicts, at, path):
    from mmaselect.diffusion.noise import policy_noise
    from mmaselect.evaluation.activations import draw_activations
    from mmaselect.hooks.images import RunnerImages

    images = RunnerImages(runner, runner.train_dataloader.dataset, hook.pipeline, args.images, hook.seed)
    step = max(1, len(images) // args.images)
    batch = next(images.batches(range(0, len(images), step)[: args.images]))
    noise = policy_noise(backbone.noise, backbone.noise_seed)
    maps = backbone.diffusion.maps_of(batch.images, [at], noise, 'cpu')
    draw_activations(verdicts, batch.images, {tap: value for (_, tap), value in maps.items()}, path)


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    own = cfg.model.backbone.get('timestep')
    at = args.at if args.at is not None else own if isinstance(own, (int, float)) else None
    if args.timesteps is None:
        args.timesteps = sorted({*TIMESTEPS, *([] if at is None else [at])})
    elif at is not None:
        args.timesteps = sorted({*args.timesteps, at})
    args.num_images = args.num_images or 32
    from mmaselect.evaluation.activations import judge
    from mmaselect.evaluation.figures import write_csv
    from mmaselect.files import write_json

    # A number of the config would fix what may be chosen from.
    runner, hook = cli.build_selection(cfg, args)
    backbone, names = load_all(runner)
    sweep, found = score(runner, hook, args, names, backbone)
    limits = {'massive channels': args.max_massive, 'noise': args.max_noise, 'position': args.max_position}
    judged = {timestep: judge(verdicts, args.keep, limits) for timestep, verdicts in found.items()}
    if at is None:
        # Where the short list scores highest.
        at = max(judged, key=lambda timestep: sum(one.score for one in judged[timestep] if not one.why))
    kept = [one for one in judged[at] if not one.why]
    folder = Path(runner.work_dir)
    write_csv(folder / 'activations.csv', [one.row() for verdicts in judged.values() for one in verdicts])
    write_json(folder / 'activations.json', {'timestep': at, 'taps': [one.name for one in kept]})
    draw(runner, hook, args, backbone, judged[at], at, folder / 'figure_activations.png')
    print_table(judged[at], hook.criterion.label, sweep)
    if args.probe:
        print_probe(runner, hook, backbone, judged[at], at)
    print(', '.join(str(folder / name) for name in ('activations.csv', 'activations.json', 'figure_activations.png')))


def print_table(verdicts, label, sweep):
    kept = [one for one in verdicts if not one.why]
    print(
        f'\n{len(verdicts)} activations at timestep {verdicts[0].timestep:g}, {sweep.num_images} images, by {label}\n'
    )
    print(f'kept {len(kept)}: {", ".join(one.name for one in kept) or "none"}\n')
    print('| activation | channels | stride | score | noise | position | massive | dropped, because |')
    print('|---|---:|---:|---:|---:|---:|---:|---|')
    for one in verdicts:
        shares = ' | '.join(f'{100 * one.shares[name]:.0f} %' for name in ('noise', 'position', 'massive channels'))
        print(f'| {one.name} | {one.channels} | {one.stride} | {one.score:.4g} | {shares} | {one.why} |')
    print()


def print_probe(runner, hook, backbone, verdicts, at):
    from mmaselect.evaluation.probe import probe

    taps = [one.tap for one in verdicts]
    accuracy = probe(runner, [at], taps, backbone.noise, hook.seed, Path(runner.work_dir) / 'probes.json').accuracy
    groups = {'kept': [one for one in verdicts if not one.why], 'dropped': [one for one in verdicts if one.why]}
    for name, group in groups.items():
        values = sorted(accuracy[one.tap][0] for one in group)
        if values:
            middle = values[len(values) // 2]
            mean = sum(values) / len(values)
            print(f'linear probe, {name} ({len(values)}): mean {mean:.1f} %, median {middle:.1f} %, '
                  f'{values[0]:.1f} to {values[-1]:.1f} %')  # fmt: skip


if __name__ == '__main__':
    cli.run(main)
