"""What the tests of pages render, and a reader of HTML."""

from __future__ import annotations

from html.parser import HTMLParser

from mmaselect.diffusion.taps import Tap
from mmaselect.evaluation.leaderboard import Entry, Evidence, Table
from mmaselect.evaluation.runs import Task
from mmaselect.selection.report import Selection
from mmaselect.selection.search import Choice, SearchResult

#: As a class, a file or a criterion may be called.
HOSTILE = '"><script>document.title = "taken"</script>'
INFORMATION, HFR = 'instance information (2 views)', 'HFR (sigma 0.25)'
TIMESTEPS = [0.0, 250.0, 500.0, 750.0, 1000.0]


def make_selection(**extra) -> dict:
    """Two criteria that disagree, over five timesteps, two blocks and two components."""
    taps = [Tap(block, component) for block in (2, 3) for component in ('query', 'output')]
    curves = {
        INFORMATION: [[1, 2, 3, 2, 0], [2, 3, 4, 3, 0], [3, 4, 5, 4, 0], [11, 12.5, 20.25, 13, 0]],
        HFR: [[0.9, 0.1, 0.1, 0.1, 0.1], [0.2] * 5, [0.2] * 5, [0.05, 0.06, 0.07, 0.08, 0.09]],
    }
    scores = {
        label: {tap: [float(one) for one in rows[at]] for at, tap in enumerate(taps)} for label, rows in curves.items()
    }
    bounds = {tap: [[value - 0.5, value + 0.75] for value in curve] for tap, curve in scores[INFORMATION].items()}
    choices = {
        INFORMATION: Choice([500.0], [taps[3]], 0.846, {500.0: 0.846, 750.0: 0.154}),
        HFR: Choice([0.0], [taps[0]], 1.0, {0.0: 1.0}),
    }
    sweep = SearchResult(TIMESTEPS, scores, choices, {INFORMATION: bounds}, num_images=256, seconds=12.5)
    return Selection(sweep, INFORMATION, {'type': 'InstanceInformation'}).to_dict(
        command='python tools/train.py config.py', seed=7, versions={'torch': '2.9.9'}, request={'recipe': 'ab' * 32},
        recipe={'family': 'SiT', 'encoder': {'scaling_factor': 0.25}}, data={'name': HOSTILE},
        unreadable=[[HOSTILE, 'cut off']], **extra,
    )  # fmt: skip


def make_tables(folder: str = 'work_dirs') -> list[Table]:
    """Digits with runs of ours beside a published row, ADE20K published alone, and a run without a result."""
    digits = Task(f'digits {HOSTILE}', 'test', 597, '16x16', 'top-1 accuracy (%)')
    ade = Task('ADE20K', 'validation', 2000, '512x512', 'mIoU (%)', 'the mean of five random splits')
    runs = [
        Evidence(f'seed {seed}', value, f'{folder}/run #{seed}/log/scalars.json', f'{folder}/run #{seed}/report.html')
        for seed, value in ((0, 96.0), (1, 98.0))
    ]
    ours = dict(seeds='0, 1', timestep='500', taps='3 output', criterion=INFORMATION,
                cost='selection 43008 blocks, 22 s; training 37 s', recipe='513a30a0a64e', family='SiT')  # fmt: skip
    paper = [Evidence('A paper', 91.5, 'https://arxiv.org/abs/2603.25758')]
    return [
        Table(
            'digits',
            [
                Entry('ours', digits, 97.0, 1.41, **ours, source=f'ours: {folder}', evidence=runs),
                Entry(HOSTILE, digits, 91.5, source='published: A paper, https://', family='SD3', evidence=paper),
                Entry('also ours', digits, 9.25, **{**ours, 'seeds': '0', 'timestep': '50'}, evidence=runs[:1]),
            ],
        ),
        Table('ADE20K', [Entry('theirs', ade, 45.0, source='published: A paper, https://', evidence=paper)]),
        Table('incomplete: no result', [Entry('cut', None, source=f'{folder}/cut', note='stopped at epoch 2 of 3')]),
    ]


class Page(HTMLParser):
    """A page as lists: ``tables``, each rows of texts, ``links`` by their text, ``sources`` and ``scripts``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[tuple[str, str]] = []
        self.sources: list[str] = []
        self.scripts, self.attributes, self._open = 0, [], []
        self.text = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.scripts += tag == 'script'
        if 'src' in found:
            self.sources.append(found['src'])
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
            self._open.append('cell')
        elif tag == 'a':
            self.links.append(('', found['href']))
            self._open.append('link')

    def handle_endtag(self, tag):
        if tag in ('td', 'th', 'a'):
            self._open.pop()

    def handle_data(self, data):
        self.text += data
        if 'cell' in self._open:
            self.tables[-1][-1][-1] += data
        if 'link' in self._open:
            self.links[-1] = (self.links[-1][0] + data, self.links[-1][1])
