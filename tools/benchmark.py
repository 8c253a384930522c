"""Times mmaselect against what one would write with diffusers alone, and prints one table.

Both sides of a ratio run in one process (of a row about memory: in one process each), interleaved, and the medians are
compared. Before anything is timed, their features are checked to be equal. Random weights of the real architectures,
scaled down to fit a CPU: nothing needs to be downloaded.
"""

import argparse
import gc
import importlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

#: Rows, and the module of ``benchmarks`` that has each as ``bench_ROW``.
ROWS = {
    'import': 'loading',
    'features': 'features',
    'words': 'features',
    'unet': 'features',
    'families': 'families',
    'settled': 'features',
    'racing': 'selection',
    'joint': 'selection',
    'scoring': 'selection',
    'accelerator': 'accelerator',
    'encoder': 'features',
    'load': 'loading',
    'sweep': 'selection',
    'ranks': 'selection',
    'coarse': 'selection',
    'cache': 'cache',
    'growth': 'selection',
    'pooled': 'cache',
    'millions': 'scale',
    'scale': 'scale',
    'processes': 'scale',
}
NEED_MODEL = {'features', 'words', 'settled', 'load', 'sweep', 'ranks', 'processes'}


def find_row(name):
    """The function behind a row: of the arguments and a folder to write to it makes ``benchmarks.common.Row``."""
    # Where Python does not add a script's folder by itself (PYTHONSAFEPATH).
    if str(Path(__file__).parent) not in sys.path:
        sys.path.insert(0, str(Path(__file__).parent))
    return getattr(importlib.import_module(f'benchmarks.{ROWS[name]}'), f'bench_{name}')


def run_rows(args):
    """Runs the rows, and says each as it comes: the table comes last, and some rows take minutes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            bench = find_row(name)
            if name in NEED_MODEL and not (Path(folder) / 'vae').exists():
                importlib.import_module('benchmarks.common').save_model(Path(folder))
            for row in bench(args, Path(folder)):
                rows.append(row)
                print(f'{row.work}: {row.ours}, {row.theirs}, {row.ratio:.2f}; {row.note}', file=sys.stderr, flush=True)
            gc.collect()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS))
    parser.add_argument('--device', help='the accelerator by default, where there is one')
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each side')
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--size', type=int, default=256, help='side of the images, in pixels')
    parser.add_argument('--images', type=int, default=4, help='images of the sweep')
    parser.add_argument('--timesteps', type=int, default=4, help='timesteps of the sweep')
    parser.add_argument('--json', help='also write the table here')
    args = parser.parse_args()
    for name in ('repeats', 'batch_size', 'images', 'timesteps'):
        if getattr(args, name) < 1:
            raise cli.InputError(f'--{name.replace("_", "-")} {getattr(args, name)} is not valid: give at least 1')
    import torch
    from rich.table import Table

    from mmaselect.files import write_json
    from mmaselect.selection.report import render

    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    rows = run_rows(args)
    title = f'{torch.get_num_threads()} threads' if args.device == 'cpu' else torch.cuda.get_device_name()
    table = Table(title=title, title_justify='left')
    for column in ('work', 'against', 'ours', 'theirs', 'ratio', 'target', ''):
        table.add_column(column, justify='right' if column in ('ours', 'theirs', 'ratio', 'target') else 'left')
    for row in rows:
        met = 'met' if row.met else 'MISSED'
        table.add_row(
            row.work, row.against, row.ours, row.theirs, f'{row.ratio:.2f}', f'{row.target:.2f}', f'{met}; {row.note}'
        )
    print(render(table, 180))
    if args.json:
        write_json(args.json, [asdict(row) | {'met': row.met} for row in rows])


if __name__ == '__main__':
    cli.run(main)
