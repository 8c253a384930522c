"""The baseline that selection replaces: a probe for every timestep, and the best one taken. Prints what each costs.

The paper's Table 5b compares the two and reports a factor of about 21. There the head is trained anew for every
timestep, and every epoch runs the frozen model again; a row with features that are read once per timestep is the
thriftiest traversal there can be.
"""

import time
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--noise', choices=('fixed', 'fresh'), help='of the probes; default: that of the backbone')
    parser.add_argument('--epochs', type=int, help='epochs of head training; default: those of the config')
    cli.add_selection(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    from rich.table import Table

    from mmaselect.evaluation.probe import probe
    from mmaselect.files import write_json
    from mmaselect.selection.report import name_taps, render

    runner, hook = cli.build_selection(cfg, args)
    epochs = args.epochs or cfg.train_cfg.get('max_epochs')
    if not epochs:
        raise cli.InputError('--epochs is missing: the config trains by iterations')
    started = time.perf_counter()
    selection, images = hook.score(runner)
    seconds = time.perf_counter() - started
    sweep, taps = selection.sweep, selection.taps
    # Not from the file that other tools keep: what it costs is to be measured here.
    found = probe(runner, hook.timesteps, taps, args.noise or images.backbone.noise, hook.seed)
    accuracy = found.mean(taps)
    best = accuracy.index(max(accuracy))
    sizes = [len(runner.train_dataloader.dataset), len(runner.val_dataloader.dataset)]
    blocks = images.backbone.diffusion.num_blocks
    once = found.block_evaluations
    again = len(hook.timesteps) * (epochs * sizes[0] + sizes[1]) * blocks
    feature_rate = found.feature_seconds / once
    rows = [
        ('selection', sweep.block_evaluations, seconds, selection.timestep),
        ('traversal, features read once', once, found.feature_seconds + found.probe_seconds, hook.timesteps[best]),
        (f'traversal, {epochs} epochs each *', again, feature_rate * again, hook.timesteps[best]),
    ]
    table = Table(title=f'{selection.criterion}, {name_taps(taps)}, {len(hook.timesteps)} timesteps, '
                  f'{sizes[0]} training and {sizes[1]} test images', title_justify='left')  # fmt: skip
    for name in ('', 'block evaluations', 'x', 'seconds', 'x', 'timestep', 'probe accuracy (%)'):
        table.add_column(name, justify='left' if not name else 'right')
    for name, evaluations, duration, timestep in rows:
        there = accuracy[hook.timesteps.index(timestep)]
        table.add_row(
            name, str(evaluations), f'{evaluations / rows[0][1]:.1f}', f'{duration:.1f}', f'{duration / seconds:.1f}',
            f'{timestep:g}', f'{there:.1f}',
        )  # fmt: skip
    print(render(table, 140))
    print('* seconds computed from the measured seconds per block evaluation, without the time of the head')
    path = Path(runner.work_dir) / 'traversal.json'
    write_json(
        path,
        {
            'timesteps': hook.timesteps,
            'accuracy': accuracy,
            'rows': [dict(zip(('name', 'block_evaluations', 'seconds', 'timestep'), row)) for row in rows],
        },
    )
    print(path)


if __name__ == '__main__':
    cli.run(main)
