"""Collects finished runs into a leaderboard, beside published results."""

import argparse
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.files import atomic_path

PUBLISHED = Path(__file__).resolve().parents[1] / 'configs' / 'published.yml'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dirs', nargs='+', help='work directories of tools/train.py, or folders that hold some')
    parser.add_argument('--published', default=PUBLISHED, help=f'YAML of published results; default: {PUBLISHED.name}')
    parser.add_argument('--no-published', action='store_true', help='our runs alone')
    parser.add_argument('--format', choices=('csv', 'html', 'json', 'markdown', 'table'), default='table')
    parser.add_argument('--out', help='file to write to, instead of printing')
    args = parser.parse_args()
    from mmaselect.evaluation.leaderboard import FORMATS, make_leaderboard
    from mmaselect.pages.leaderboard import to_html

    formats = {**FORMATS, 'html': lambda tables: to_html(tables, Path(args.out or '.').parent)}
    tables = make_leaderboard(args.work_dirs, None if args.no_published else args.published)
    text = formats[args.format](tables)
    if args.out is None:
        print(text)
        return
    with atomic_path(args.out) as temporary:
        temporary.write_text(text, encoding='utf-8')
    print(args.out)


if __name__ == '__main__':
    cli.run(main)
