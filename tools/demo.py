"""The demo: digits, a frozen DiT, a selected timestep, a trained head, and what other timesteps would have given.

It runs the project's own tools one after the other and prints one table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'demo' / 'dit-nano_linear_bs64-20e_digits-16px.py'


def run_tool(name, *args):
    print(f'\n$ python tools/{name} {" ".join(map(str, args))}', flush=True)
    status = subprocess.run([sys.executable, str(TOOLS / name), *map(str, args)], check=False).returncode
    if status:
        # The tool has said why.
        sys.exit(status)


def print_table(selection, fixed, fresh, head_accuracy):
    from rich.table import Table

    from mmaselect.selection.report import render

    sweep = selection.sweep
    hfr = next(label for label in sweep.scores if label.startswith('HFR'))
    table = Table(title='scikit-learn digits, frozen nano DiT, 597 test images', title_justify='left')
    for name in ('timestep', 'HFR', 'instance\ninformation', 'probe accuracy,\nfixed noise',
                 'probe accuracy,\nfresh noise', ''):  # fmt: skip
        table.add_column(name, justify='left' if not name else 'right')
    for row, timestep in enumerate(sweep.timesteps):
        notes = []
        if timestep == selection.timestep:
            notes.append('<- selected')
        if timestep == selection.choices[hfr]:
            notes.append('<- plain HFR')
        if fixed[row] == max(fixed):
            notes.append('<- best')
        scores = [f'{sweep.curve(label)[row]:.4f}' for label in (hfr, selection.criterion)]
        table.add_row(f'{timestep:g}', *scores, f'{fixed[row]:.1f} %', f'{fresh[row]:.1f} %', ' '.join(notes))
    print(render(table))
    print(f'linear head trained at the selected timestep {selection.timestep:g}: {head_accuracy:.1f} % test accuracy')
    selected, plain = (sweep.timesteps.index(choice) for choice in (selection.timestep, selection.choices[hfr]))
    for name, accuracies in (('fixed noise', fixed), ('fresh noise', fresh)):
        print(
            f'linear probe, {name}: {accuracies[selected]:.1f} % at the selected timestep {selection.timestep:g}, '
            f'{accuracies[plain]:.1f} % at {sweep.timesteps[plain]:g} that plain HFR would have chosen, '
            f'{min(accuracies):.1f} to {max(accuracies):.1f} % over all {len(accuracies)}'
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', default='work_dirs/demo')
    args = parser.parse_args()
    from mmengine.config import Config

    from mmaselect.evaluation.probe import probe
    from mmaselect.selection.report import Selection, plot, read_selection

    work_dir = Path(args.work_dir)
    data = work_dir / 'digits'
    # At this tap the best timestep lies inside.
    changes = {'model.backbone.block': 3, 'model.backbone.component': 'output'}
    changes.update({f'{split}_dataloader.dataset.data_root': str(data) for split in ('train', 'val', 'test')})
    options = [f'{name}={value}' for name, value in changes.items()]
    run_tool('dataset_converters/prepare_digits.py', data)
    run_tool('train.py', CONFIG, '--work-dir', work_dir, '--cfg-options', *options)
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    metrics = work_dir / 'test.json'
    run_tool('test.py', CONFIG, checkpoint, '--work-dir', work_dir, '--out', metrics, '--out-item', 'metrics',
             '--cfg-options', *options)  # fmt: skip

    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(changes)
    cfg.work_dir = str(work_dir / 'probes')
    runner = cli.build_runner(cli.finish_config(cfg, argparse.Namespace(cfg_options=None, no_pin_memory=False)))
    selection = Selection.from_dict(read_selection(work_dir / 'selection.json'))
    fixed, fresh = (
        probe(runner, selection.sweep.timesteps, selection.taps, noise).accuracy[selection.taps[0]]
        for noise in ('fixed', 'fresh')
    )
    curve = work_dir / 'demo.png'
    plot(selection, curve, fixed)
    print()
    print_table(selection, fixed, fresh, json.loads(metrics.read_text())['accuracy/top1'])
    print(f'curves: {curve}')


if __name__ == '__main__':
    cli.run(main)
