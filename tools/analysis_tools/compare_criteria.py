"""What a criterion is worth: correlation with probe accuracy over timesteps, accuracy where it decides, cost.

Trains a linear probe at every timestep (the oracle), scores the same timesteps by every criterion on training images,
and prints one table, and the same as CSV and as a figure.
"""

import time
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

#: Searched group by group: a criterion costs the passes of its group, and further ones of a group next to nothing.
CRITERIA = (
    (
        dict(type='HighFrequencyRatio', sigma=0.1),
        dict(type='HighFrequencyRatio', sigma=0.25),
        dict(type='HighFrequencyRatio', sigma=0.4),
    ),
    (dict(type='FisherScore'),),
    (
        dict(type='NoiseConsistentHFR', sigma=0.1),
        dict(type='NoiseConsistentHFR', sigma=0.25),
        dict(type='NoiseConsistentHFR', sigma=0.4),
        dict(type='NoiseConsistentHFR', sigma=0.25, centred=False),
    ),
)


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--blocks', type=int, nargs='+', help='blocks to compare; default: that of the config')
    parser.add_argument('--shared', action='store_true', help='also probe with one noise for all images')
    cli.add_selection(parser)
    return parser.parse_args()


def score_all(cfg, args):
    """Scores of every criterion: the selection, by label, with the seconds and passes of its search."""
    found, runner, hook = {}, None, None
    for criteria in CRITERIA:
        overrides = dict(criterion=criteria[0], compare=criteria[1:])
        if runner is None:
            runner, hook = cli.build_selection(cfg, args, **overrides)
        else:
            hook = type(hook)(**{**hook_arguments(hook), **overrides})
        started = time.perf_counter()
        selection, _ = hook.score(runner, [(tap,) for tap in all_taps(runner)])
        seconds = time.perf_counter() - started
        for label in selection.sweep.scores:
            found[label] = (selection.sweep, seconds)
    return runner, hook, found


def hook_arguments(hook):
    names = ('timesteps', 'num_images', 'batch_size', 'pipeline', 'seed')
    return {name: getattr(hook, name) for name in names}


def all_taps(runner):
    from mmaselect.hooks.images import find_backbone

    return find_backbone(runner).diffusion.family.taps


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    if args.blocks:
        cfg.model.backbone.block = args.blocks
    from mmaselect.evaluation.figures import correlation, draw_correlations
    from mmaselect.evaluation.probe import probe

    runner, hook, found = score_all(cfg, args)
    taps, store = all_taps(runner), Path(runner.work_dir) / 'probes.json'
    timesteps = hook.timesteps
    noises = ('fresh', 'fixed') if args.shared else ('fresh',)
    probes = {noise: probe(runner, timesteps, taps, noise, hook.seed, store) for noise in noises}
    rows = []
    for tap in taps:
        accuracy = probes['fresh'].accuracy[tap]
        entries = [
            (label, sweep.curve(label, [tap]), sweep.block_evaluations, seconds)
            for label, (sweep, seconds) in found.items()
        ]
        entries.append(('no criterion: always 0', [float(timestep == 0) for timestep in timesteps], 0, 0.0))
        for label, curve, evaluations, seconds in entries:
            position = curve.index(max(curve))
            row = {
                'block': tap.block, 'component': tap.component, 'criterion': label,
                'correlation': correlation(curve, accuracy), 'selected': timesteps[position],
                'accuracy (%)': accuracy[position], 'oracle (%)': max(accuracy),
                'oracle timestep': timesteps[accuracy.index(max(accuracy))],
                'block evaluations': evaluations, 'seconds': round(seconds, 1),
            }  # fmt: skip
            if args.shared:
                row['accuracy, shared noise (%)'] = probes['fixed'].accuracy[tap][position]
                row['oracle, shared noise (%)'] = max(probes['fixed'].accuracy[tap])
            if label.startswith('no criterion'):
                row['correlation'] = float('nan')
            rows.append(row)
    print(tables(rows, taps, len(timesteps)))
    path = Path(runner.work_dir) / 'criteria.png'
    draw_correlations(rows, path)
    own = probes['fresh']
    print(
        f'probes: {own.block_evaluations} block evaluations, {own.feature_seconds:.0f} s for features and '
        f'{own.probe_seconds:.0f} s for training'
    )
    print(f'{path}, {path.with_suffix(".csv").name}')


def tables(rows, taps, num_timesteps):
    """One Markdown table per block: it goes into the documentation as it is."""
    lines = []
    hidden = ('block', 'component', 'oracle timestep')
    names = [name for name in rows[0] if name not in hidden]
    for tap in taps:
        mine = [row for row in rows if (row['block'], row['component']) == tap]
        lines += ['', f'block {tap.block}, {tap.component}, {num_timesteps} timesteps', '']
        lines += [
            f'| {" | ".join(names)} |',
            f'|{"|".join("---" if name == "criterion" else "---:" for name in names)}|',
        ]
        lines += [f'| {" | ".join(form(name, row[name]) for name in names)} |' for row in mine]
    return '\n'.join([*lines, ''])


def form(name, value):
    if isinstance(value, str):
        return value
    if name == 'correlation':
        return '-' if value != value else f'{value:+.2f}'
    return f'{value:.1f}' if '%' in name or name == 'seconds' else f'{value:g}' if name == 'selected' else str(value)


if __name__ == '__main__':
    cli.run(main)
