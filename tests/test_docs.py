"""The documentation: what can be run is run, and every command names tools, options and configs that there are."""

from __future__ import annotations

import re

import mmengine
import pytest
import torch
from conftest import ROOT
from miniatures import write_image
from mmengine.config import Config

from mmaselect.__main__ import COMMANDS

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs/en').glob('*.md'))]
DIGITS = "dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels')"


def blocks(page, language='python'):
    """The code blocks of a page."""
    text = (ROOT / 'docs/en' / page).read_text(encoding='utf-8')
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def run(code, **names):
    """Runs a block with names that it expects, and gives all that it has defined."""
    exec(compile(code, 'block', 'exec'), names)
    return names


def test_points_are_matched_as_shown(tmp_path, monkeypatch, capsys):
    """The page's U-Net is a gigabyte: its line is replaced by the model of digits."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(('cat.jpg', 'another_cat.jpg')):
        write_image(tmp_path / name, index, size=(256, 256))
    (code,) = blocks('match.md')
    code, changed = re.subn(r'unet = dict\(.*\)', f'unet = {DIGITS}', code.replace(", taps='gdf-sd15'", ', block=2'))
    assert changed == 1
    found = run(code)['found']
    assert found.points.shape == (2, 2)
    assert ((found.points >= 0) & (found.points <= 256)).all()
    assert 'tensor' in capsys.readouterr().out


def test_thirty_images_are_fitted_as_shown():
    (code,) = (block for block in blocks('segment.md') if 'PixelEnsemble' in block)
    assert 'PixelEnsemble(3520, 21)' in code
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[:, 4:] = 1
    maps = [torch.randn(2, 5, size, size) + torch.linspace(-3, 3, size)[:, None] for size in (4, 8)]
    names = run(
        code.replace('PixelEnsemble(3520, 21)', 'PixelEnsemble(10, 2, members=1)').replace('(256, 256)', '(8, 8)'),
        maps=maps, labels=labels, test_maps=maps,
    )  # fmt: skip
    assert (names['classes'] == labels).double().mean() > 0.9


def test_a_config_with_our_default_criterion(tmp_path, monkeypatch):
    """As mmengine finds it in an installed wheel, whose ``.mim`` has the configs."""
    (tmp_path / '.mim').mkdir()
    for name in ('configs', 'model-index.yml'):
        (tmp_path / '.mim' / name).symlink_to(ROOT / name)
    find = mmengine.config.config.get_installed_path
    monkeypatch.setattr(
        'mmengine.config.config.get_installed_path',
        lambda package: str(tmp_path) if package == 'mmaselect' else find(package),
    )
    code = next(block for block in blocks('classify.md') if '_base_' in block)
    (tmp_path / 'mine.py').write_text(code)
    config = Config.fromfile(tmp_path / 'mine.py')
    assert config.custom_hooks[0].criterion.type == 'InstanceInformation'
    assert config.model.backbone.diffusion.type == 'SD3'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_commands_name_what_there_is(page):
    text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
    for name in re.findall(r'configs/[\w/.-]+\.(?:py|yml)', text):
        # A word in capitals stands for a part of the name.
        assert re.search('[A-Z]{4}', name) or (ROOT / name).is_file(), name
    shared = (ROOT / 'mmaselect/cli.py').read_text(encoding='utf-8')
    for tool, command, rest in re.findall(
        r'(?:python (tools/[\w/]+\.py)|mmaselect (?!COMMAND|--)([a-z-]+)) ?([^`\n#]*)(?=[`\n#])', text
    ):
        if command and command not in COMMANDS:
            # A sentence, no command.
            assert not rest.lstrip().startswith(('-', 'CONFIG')), command
            continue
        file = ROOT / (tool or f'tools/{COMMANDS[command]}')
        known = file.read_text(encoding='utf-8') + shared
        for option in re.findall(r'(?<!\S)--[a-z][a-z-]*', rest.split('--cfg-options')[0]):
            assert f"'{option}'" in known, (file.name, option)
