"""Both pages in Chromium: sorting, filtering, values under the pointer, keyboard; no errors, no requests."""

from __future__ import annotations

import json
import shutil

import pytest
from page_samples import HOSTILE, make_selection, make_tables

from mmaselect.pages import write_report
from mmaselect.pages.leaderboard import to_html

pytestmark = pytest.mark.skipif(
    not (shutil.which('chromium') and shutil.which('chromedriver')),
    reason='needs chromium and chromedriver: apt-get install chromium chromium-driver',
)
FLAGS = (
    'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
    'disable-component-update', 'disable-sync', 'window-size=1000,900',
)  # fmt: skip
#: What reaches beyond a screen of 390 pixels, but for the maps, which scroll by themselves.
WIDE = """
const wide = element => element.checkVisibility() && element.getBoundingClientRect().right > 391;
return [...document.querySelectorAll('main *')].filter(one => wide(one) && !one.closest('details'));
"""
#: The smallest contrast of a text with what is behind it (WCAG), and the text.
CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = colour => {
  const [r, g, b] = colour.map(part => part / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (let one = element; one; one = one.parentElement) {
    const colour = parse(getComputedStyle(one).backgroundColor);
    if (colour.length === 3) return colour;
  }
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let worst = [99, ''];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  const [one, other] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (ratio < worst[0]) worst = [ratio, element.textContent];
}
return worst;
"""


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for flag in (*FLAGS, f'user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, Service(shutil.which('chromedriver')))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end of the test looks for errors and requests."""
    opened = []
    browser.get('about:blank')
    # What the browser asked for by itself, such as its first tab.
    browser.get_log('performance')

    def go(path):
        opened.append(path.as_uri())
        browser.get(path.as_uri())
        return browser

    yield go
    assert browser.title != 'taken'
    assert browser.get_log('browser') == []
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']
    assert opened[0] in asked
    assert [url for url in asked if url not in opened and not url.startswith('data:')] == []


@pytest.fixture
def report(tmp_path, open_page):
    (tmp_path / 'selection.json').write_text(json.dumps(make_selection()))
    return open_page(write_report(tmp_path))


@pytest.fixture
def board(tmp_path, open_page):
    path = tmp_path / 'leaderboard.html'
    path.write_text(to_html(make_tables(str(tmp_path / 'work_dirs')), tmp_path))
    return open_page(path)


def find(browser, selector):
    return browser.find_elements('css selector', selector)


def texts(browser, selector):
    return [element.text for element in find(browser, selector) if element.is_displayed()]


def press(browser, *keys):
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        browser.switch_to.active_element.send_keys(getattr(Keys, key))


def test_a_curve_shows_its_values_under_the_pointer(report):
    from selenium.webdriver.common.action_chains import ActionChains

    plot = find(report, '.plot')[0]
    assert texts(report, '.tip') == []
    width = plot.rect['width']
    # From the middle, where 500 is, to 770, whose nearest timestep is 750.
    ActionChains(report).move_to_element_with_offset(plot, round(0.27 * width), 0).perform()
    assert texts(report, '.tip') == ['750: 13 (12.5 to 13.75)', '750: 0.08']
    ActionChains(report).move_to_element(plot).perform()
    assert texts(report, '.tip') == ['500: 20.25 (19.75 to 21) *', '500: 0.07']
    ActionChains(report).move_to_element(find(report, 'h1')[0]).perform()
    assert texts(report, '.tip') == []


def test_a_curve_is_read_with_the_keyboard(report):
    press(report, 'TAB')
    slider = report.switch_to.active_element
    assert slider.get_attribute('aria-label') == 'Timestep to read the scores at'
    assert texts(report, '.tip')[1] == '500: 0.07'
    press(report, 'ARROW_RIGHT')
    assert texts(report, '.tip') == ['750: 13 (12.5 to 13.75)', '750: 0.08']
    assert 'timestep 750; instance information (2 views) 13' in slider.get_attribute('aria-valuetext')
    press(report, 'HOME')
    assert texts(report, '.tip')[1] == '0: 0.05 *'
    press(report, 'ARROW_RIGHT', 'ARROW_RIGHT', 'ARROW_RIGHT', 'ARROW_RIGHT', 'ARROW_RIGHT')
    assert texts(report, '.tip')[1] == '1000: 0.09'
    press(report, 'ESCAPE')
    assert texts(report, '.tip') == []


def names(board):
    return [text.split('\n')[0].replace(' published', '') for text in texts(board, 'tbody th')]


def test_sorting(board):
    heads = find(board, 'section:first-of-type thead th')
    assert heads[1].get_attribute('aria-sort') == 'descending'
    assert names(board)[:3] == ['ours', HOSTILE, 'also ours']
    find(board, 'thead button')[1].click()
    # 9.25 is less than 91.5, which it would not be as text.
    assert names(board)[:3] == ['also ours', HOSTILE, 'ours']
    assert heads[1].get_attribute('aria-sort') == 'ascending'
    # By keyboard; what has no timestep is last both ways.
    board.execute_script('arguments[0].focus()', find(board, 'thead button')[4])
    press(board, 'ENTER')
    assert (heads[1].get_attribute('aria-sort'), heads[4].get_attribute('aria-sort')) == (None, 'ascending')
    assert names(board)[:3] == ['also ours', 'ours', HOSTILE]
    press(board, 'SPACE')
    assert heads[4].get_attribute('aria-sort') == 'descending'
    assert names(board)[:3] == ['ours', 'also ours', HOSTILE]


def test_filtering(board):
    from selenium.webdriver.support.ui import Select

    dataset, family, protocol = (Select(element) for element in find(board, 'select'))
    assert texts(board, 'output') == ['5 of 5 entries']
    assert [option.text for option in family.options] == ['all', 'SD3', 'SiT']
    family.select_by_visible_text('SiT')
    assert names(board) == ['ours', 'also ours']
    assert texts(board, 'h2') == ['digits']
    assert texts(board, 'output') == ['2 of 5 entries']
    protocol.select_by_visible_text('the mean of five random splits')
    assert names(board) == []
    family.select_by_visible_text('all')
    assert names(board) == ['theirs']
    find(board, 'button[type=reset]')[0].click()
    assert len(names(board)) == 5
    dataset.select_by_index([option.text for option in dataset.options].index(f'digits {HOSTILE}'))
    assert names(board) == ['ours', HOSTILE, 'also ours']


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', ['report', 'board'])
def test_on_a_phone_and_in_the_dark(page, scheme, request):
    browser = request.getfixturevalue(page)
    media = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
    ground = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    assert ground == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(19, 22, 25)'}[scheme]
    ratio, text = browser.execute_script(CONTRAST)
    assert ratio >= 4.5, text
    phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', phone)
    try:
        assert browser.execute_script('return document.documentElement.scrollWidth') == 390
        # Nothing but what scrolls by itself is wider than the screen.
        wide = browser.execute_script(WIDE)
        assert wide == []
    finally:
        browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
