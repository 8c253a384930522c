"""``mmaselect COMMAND``: the tools, also where there is no checkout, as after ``pip install``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

#: Tool of each command, below ``tools/``.
COMMANDS = {
    'select': 'select_timestep.py',
    'extract': 'extract.py',
    'train': 'train.py',
    'test': 'test.py',
    'cache': 'cache_features.py',
    'leaderboard': 'leaderboard.py',
    'report': 'report.py',
    'doctor': 'doctor.py',
    'pretrain': 'pretrain.py',
    'encode-prompt': 'encode_prompt.py',
    'figures': 'analysis_tools/figures.py',
    'filter-activations': 'analysis_tools/filter_activations.py',
    'compare-criteria': 'analysis_tools/compare_criteria.py',
    'traversal-search': 'analysis_tools/traversal_search.py',
}
TOOLS = Path(__file__).parent / '.mim' / 'tools'


def main() -> None:
    """Runs the tool that the first argument names, with the other arguments."""
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('-h', '--help'):
        print(f'usage: mmaselect {{{",".join(COMMANDS)}}} ...\n\nmmaselect COMMAND --help says more.')
        return
    if command not in COMMANDS:
        sys.stderr.write(f'error: mmaselect {command}: there is no such command; choose from: {", ".join(COMMANDS)}\n')
        sys.exit(2)
    sys.argv = [f'mmaselect {command}', *sys.argv[2:]]
    runpy.run_path(str(TOOLS / COMMANDS[command]), run_name='__main__')


if __name__ == '__main__':
    main()
