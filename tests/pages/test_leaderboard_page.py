"""``leaderboard.html``: every number, and where it is from."""

from __future__ import annotations

from page_samples import HOSTILE, INFORMATION, Page, make_tables

from mmaselect.pages.leaderboard import to_html


def test_every_number_is_linked_to_its_evidence(tmp_path):
    page = Page(to_html(make_tables(str(tmp_path / 'work_dirs')), tmp_path / 'pages'))
    place = '../work_dirs/run%20%230'
    expected = {
        '96.00': f'{place}/log/scalars.json',
        '98.00': '../work_dirs/run%20%231/log/scalars.json',
        '9.25': f'{place}/log/scalars.json',
        '91.50': 'https://arxiv.org/abs/2603.25758',
        '45.00': 'https://arxiv.org/abs/2603.25758',
        '500': f'{place}/report.html',
        'selection 43008 blocks, 22 s': f'{place}/report.html',
        'training 37 s': f'{place}/log/scalars.json',
        '513a30a0a64e': f'{place}/report.html',
        INFORMATION: f'{place}/report.html',
    }
    links = dict(page.links)
    assert {text: links[text] for text in expected} == expected
    digits, ade, incomplete = page.tables
    assert [row[1].split()[0] for row in digits[1:]] == ['97.00', '91.50', '9.25']
    assert '97.00 ± 1.41' in digits[1][1]
    assert digits[0] == ['entry', 'result', 'family', 'seeds', 'timestep', 'block', 'selected by', 'cost', 'recipe']
    assert 'published' in digits[2][0]
    assert 'published' not in digits[1][0]
    assert 'published' in ade[1][0]
    assert 'stopped at epoch 2 of 3' in incomplete[1][0]


def test_names_are_text_and_addresses_run_nothing():
    tables = make_tables()
    tables[0].entries[1].evidence[0].log = 'javascript:alert(1)'
    text = to_html(tables)
    page = Page(text)
    # As an entry, as a data set in the filter; in attributes besides.
    assert page.text.count(HOSTILE) == 2
    assert page.scripts == 1
    assert dict(page.links)['91.50'] == 'javascript%3Aalert%281%29'
    options = [value for tag, name, value in page.attributes if name == 'data-family']
    assert options == ['SiT', 'SD3', 'SiT', '', '']
    assert {value for tag, name, value in page.attributes if name == 'data-protocol'} == {
        'the last checkpoint, once', 'the mean of five random splits', '',
    }  # fmt: skip
