"""Says what works on this machine (ok), what is not there (--), what is broken (NO), and what mends it."""

import argparse
import sys

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    from mmaselect.doctor import examine

    broken = 0
    for finding in examine():
        print(finding, flush=True)
        broken += finding.state == 'broken'
    if broken:
        sys.exit(f'{broken} of these must be mended')


if __name__ == '__main__':
    cli.run(main)
