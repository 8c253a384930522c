"""``report.html``: its numbers are those of ``selection.json``, and nothing in it runs or is requested."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re

import pytest
import torch
from page_samples import HFR, HOSTILE, INFORMATION, Page, make_selection
from PIL import Image

from mmaselect.errors import InputError
from mmaselect.pages import write_report
from mmaselect.pages.pictures import FILE, SIDE, _digest, decompose_images, read_pictures


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'selection.json').write_text(json.dumps(make_selection()))
    return tmp_path


def test_the_numbers_are_those_of_the_selection(folder):
    assert write_report(folder) == write_report(folder / 'selection.json') == folder / 'report.html'
    page = Page((folder / 'report.html').read_text())
    scores, decisions, information, hfr, recipe, settings = page.tables
    assert scores[0] == ['timestep', INFORMATION, HFR]
    # At what was chosen, block 3 output, with intervals where there are any.
    assert scores[3] == ['500', '20.25 (19.75 to 21)\xa0*', '0.07']
    assert scores[1] == ['0', '11 (10.5 to 11.75)', '0.05\xa0*']
    assert [row[0] for row in scores[1:]] == ['0', '250', '500', '750', '1000']
    assert [re.split(r' \(|  ', row[0])[0] for row in decisions[1:]] == ['instance information', 'HFR']
    assert decisions[1][1:5] == ['500', 'block 3 output', '20.25 (19.75 to 21)', '84.6 %']
    assert decisions[1][5] == '500 in 84.6 %750 in 15.4 %'
    # Each criterion's own choice, where it is.
    assert decisions[2][1:5] == ['0', 'block 2 query', '0.9', '100.0 %']
    assert 'Instance information asks' in decisions[1][0]
    assert 'The criteria DISAGREE: ' in page.text
    assert 'Trust instance information most.' in page.text
    assert information == [['block', '2', '3'], ['query', '3500', '5500'], ['output', '4500', '20.25500']]
    assert hfr[1] == ['query', '0.90', '0.20']
    assert recipe == [['family', 'SiT'], ['encoder.scaling_factor', '0.25']]
    assert ['seed', '7'] in settings
    assert ['versions.torch', '2.9.9'] in settings
    assert ['seconds', '12.5'] in settings
    assert 'python tools/train.py config.py' in page.text
    assert 'Timestep 500, block 3 output' in page.text


def test_the_curve_is_where_its_values_are(folder):
    text = write_report(folder).read_text()
    curve = re.search(r'<path d="M([^"]*)" stroke="#0072B2" stroke-width="2">', text).group(1)
    points = [tuple(map(float, point.split(','))) for point in curve.split(' L')]
    panel = text.split('<div class="plot">')[1]
    ticks = [float(value) for value in re.findall(r'style="top: [\d.]+%">([\d.-]+)<', panel)]
    low, high = min(ticks), max(ticks)
    assert low <= -0.5 < 21 <= high
    assert [x for x, _ in points] == [0, 25, 50, 75, 100]
    expected = [100 - 100 * (value - low) / (high - low) for value in (11, 12.5, 20.25, 13, 0)]
    assert [y for _, y in points] == pytest.approx(expected, abs=0.01)
    # HFR chooses another block: there is no ring on its curve here.
    assert text.count('stroke-width="15"') == 1


def test_names_are_text_and_nothing_is_requested(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.text.count(HOSTILE) == 2
    assert page.scripts == 1
    assert not [one for one in page.attributes if one[1].startswith('on')]
    assert 'http' not in text.replace('http-equiv', '')
    # The page runs the script of this digest alone.
    script = re.search(r'<script>(.*)</script>\n</body>', text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_one_tap_one_criterion_and_several_timesteps(folder):
    content = make_selection()
    name = 'block 3 output'
    for key in ('scores', 'choices', 'decisions'):
        content[key].pop(HFR)
    content['scores_per_tap'] = {INFORMATION: {name: content['scores_per_tap'][INFORMATION][name]}}
    content['intervals_per_tap'] = {}
    content['decisions'][INFORMATION].update(timesteps=[500.0, 0.0], agreement=None, resamples={})
    for key in ('command', 'recipe', 'request', 'unreadable'):
        content.pop(key)
    (folder / 'selection.json').write_text(json.dumps({**content, 'disagreement': None}))
    page = Page(write_report(folder).read_text())
    assert 'Timesteps 500, 0, block 3 output' in page.text
    assert 'Only block 3 output was scored.' in page.text
    assert 'No other criterion was computed.' in page.text
    assert page.tables[1][1][4:] == ['not resampled', '']
    assert page.tables[0][3] == ['500', '20.25\xa0*']
    assert 'does not hold the command' in page.text


def test_what_is_no_selection(tmp_path):
    with pytest.raises(InputError, match=r"selection='.*selection.json' is not there"):
        write_report(tmp_path)
    (tmp_path / 'selection.json').write_text('{"timestep": 3}')
    with pytest.raises(InputError, match=r"selection.json is not a selection.json of this revision: KeyError\('dec"):
        write_report(tmp_path)
    assert not (tmp_path / 'report.html').exists()


def test_pictures_split_what_they_show(folder):
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing='ij')
    board = (1 - 2 * ((rows + columns) % 2)).float()
    # A constant has no high frequencies; a board of chequers, at 0.5 cycles in both directions, has nothing else.
    maps = torch.stack([torch.ones(4, 8, 8), board.expand(4, 8, 8)])
    images = torch.stack([torch.full((3, 200, 100), 1.0), torch.full((3, 200, 100), -1.0)])
    found = decompose_images(images, maps, ['one', HOSTILE])
    assert found[0]['hfr'] == pytest.approx(0, abs=1e-6)
    passed = 1 - torch.exp(torch.tensor(-(0.5**2 + 0.5**2) / (2 * 0.25**2)))
    assert found[1]['hfr'] == pytest.approx(passed.item() ** 2, rel=1e-4)
    assert list(found[0]['pictures']) == ['image', 'features', 'low frequencies', 'high frequencies']
    shown = [Image.open(io.BytesIO(base64.b64decode(one['pictures']['image']))) for one in found]
    assert [(one.size, one.getpixel((0, 0))) for one in shown] == [
        ((SIDE // 2, SIDE), (255, 255, 255)),
        ((SIDE // 2, SIDE), (0, 0, 0)),
    ]
    content = json.loads((folder / 'selection.json').read_text())
    head = {'selection': _digest(content), 'timestep': 500.0, 'tap': 'block 3 output', 'sigma': 0.25}
    (folder / FILE).write_text(json.dumps({**head, 'images': found}))
    page = Page(write_report(folder).read_text())
    assert len(page.sources) == 8
    assert all(source.startswith('data:image/png;base64,iVBOR') for source in page.sources)
    assert f'{HOSTILE}: {100 * passed**2:.1f} % of the energy' in page.text
    # Pictures of another selection of the same work directory are not shown.
    assert read_pictures(folder, content)['images'] == found
    assert read_pictures(folder, {**content, 'seed': 8}) is None
    (folder / FILE).write_text('[')
    assert read_pictures(folder, content) is None
