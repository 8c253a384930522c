"""Writes the page of a selection, report.html, beside its selection.json."""

import argparse

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('selection', nargs='+', help='a selection.json, or a work directory that holds one')
    args = parser.parse_args()
    from mmaselect.pages import write_report

    for selection in args.selection:
        print(write_report(selection))


if __name__ == '__main__':
    cli.run(main)
