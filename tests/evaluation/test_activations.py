"""The filter of activations: shares against maps of known parts, verdicts, and the tool on a trained model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from conftest import DEMO, error_line, options, run_tool
from PIL import Image

from mmaselect.diffusion.taps import Tap
from mmaselect.evaluation.activations import MassiveShare, NoiseShare, PositionShare, Verdict, judge
from mmaselect.selection.criterion import add_sums
from mmaselect.selection.features import Features


def parts(position, image, noise, constant=0.0, massive=0.0, images=256, channels=6, side=8):
    """Shares of maps that are made of these parts, each of the given standard deviation, in two batches."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    where = position * draw(1, channels, side, side)
    where = where - where.mean((2, 3), keepdim=True)
    criteria, sums = [kind(10.0) for kind in (NoiseShare, PositionShare, MassiveShare)], {}
    for _ in range(2):
        content = image * draw(images // 2, channels, side, side) + where + constant
        if massive:
            content[:, 2] = massive + draw(images // 2, side, side)
        maps = [content + noise * draw(*content.shape) for _ in range(2)]
        groups = torch.arange(images // 2) // 8
        sums = add_sums(sums, criteria[0].sums(Features(maps, groups)))
    return [criterion.score(sums).item() for criterion in criteria]


@pytest.mark.parametrize(
    'stds', [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 1), (1, 3, 2)], ids=['position', 'image', 'noise', 'mix', 'more']
)
@pytest.mark.parametrize('constant', [0, 5])
def test_shares_are_those_of_the_parts(stds, constant):
    noise, position, massive = parts(*stds, constant=constant)
    total = sum(value**2 for value in stds)
    assert position == pytest.approx(stds[0] ** 2 / total, abs=0.06)
    assert noise == pytest.approx(stds[2] ** 2 / total, abs=0.03)
    assert massive == 0


def test_massive_channels_count_by_themselves():
    """Beside a channel of a thousand, the others are what they are."""
    noise, position, massive = parts(1, 1, 1, constant=1, massive=1000)
    assert massive > 0.99
    assert noise == pytest.approx(1 / 3, abs=0.03)
    assert position == pytest.approx(1 / 3, abs=0.06)


def verdict(name, score, noise=0.1, position=0.1, massive=0.0):
    shares = {'noise': noise, 'position': position, 'massive channels': massive}
    return Verdict(name, Tap(0, name), 4, 8, 50.0, shares, score)


def test_each_is_dropped_for_a_reason():
    judged = judge(
        [verdict('a', 3.0), verdict('b', 9.0, noise=0.6), verdict('c', 5.0), verdict('d', 8.0, 0.6, 0.95, 0.7),
         verdict('e', 4.0, position=0.92), verdict('f', 2.0), verdict('g', 0.0)],
        keep=2,
    )  # fmt: skip
    assert [(one.name, one.why) for one in judged] == [
        ('b', '60 % of the energy change with the noise'),
        ('d', '70 % of the energy lie in massive channels'),
        ('c', ''),
        ('e', '92 % of the energy are position, the same in all images'),
        ('a', ''),
        ('f', 'number 3 by its score'),
        ('g', 'tells nothing of the image'),
    ]
    assert judged[0].row()['share of noise'] == 0.6
    assert [one.name for one in judge(judged, 9, {'noise': 1.0, 'position': 1.0, 'massive channels': 1.0})
            if not one.why] == ['b', 'd', 'c', 'e', 'a', 'f']  # fmt: skip


def test_the_tool_on_a_trained_model(digits, tmp_path):
    """Every activation of the demo's model; what is kept is read better than what is dropped."""
    done = run_tool(
        'analysis_tools/filter_activations.py', DEMO, '--work-dir', tmp_path, '--timesteps', 0, 600, '--at', 600,
        '--keep', 5, '--num-images', 24, '--probe', '--images', 2,
        *options(digits, **{'model.backbone.noise': 'fresh', 'custom_hooks.0.batch_size': 24}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((tmp_path / 'activations.json').read_text())
    assert kept['timestep'] == 600
    assert len(kept['taps']) == 5
    rows = list(csv.DictReader((tmp_path / 'activations.csv').open()))
    # Six components of five blocks, at two timesteps; all are named as a config names them.
    assert len(rows) == 2 * 30
    at = {row['name']: row for row in rows if row['timestep'] == '600.0'}
    assert {name for name, row in at.items() if not row['why']} == set(kept['taps'])
    # More noise in, more noise out.
    clean = {row['name']: float(row['share of noise']) for row in rows if row['timestep'] == '0.0'}
    assert all(abs(share) < 1e-6 for share in clean.values())
    assert all(float(row['share of noise']) > 0.02 for row in at.values())
    accuracy = {}
    for line in done.stdout.splitlines():
        if line.startswith('linear probe, '):
            accuracy[line.split()[2]] = float(line.split('mean ')[1].split()[0])
    assert accuracy['kept'] > accuracy['dropped'] + 5
    pixels = np.asarray(Image.open(tmp_path / 'figure_activations.png').convert('RGB'))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # The names are taps of a config.
    from mmaselect.backbones import ASelectDiT

    backbone = ASelectDiT(
        dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels'), taps=kept['taps'], timestep=600
    )
    assert len(backbone.out_channels) == 5


def test_the_tool_on_a_unet(digits, tmp_path):
    """By GDF's names; keys and values of the cross-attention are the prompt's and no candidates."""
    from gdf_miniatures import ARCHS

    config = tmp_path / 'unet.py'
    diffusion = dict(type='UNet', arch=ARCHS['sd15'], latent='pixels')
    config.write_text(
        f"_base_ = ['{DEMO}']\nmodel = dict(backbone=dict(_delete_=True, type='ASelectDiT', timestep=50, "
        f"taps='gdf-sd15', diffusion={diffusion!r}))\n"
    )
    done = run_tool(
        'analysis_tools/filter_activations.py', config, '--work-dir', tmp_path, '--timesteps', 50, '--num-images', 4,
        *options(digits, **{'custom_hooks.0.batch_size': 4}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / 'activations.csv').open()))
    assert len(rows) == 197
    assert {'unet-in', 'mid-repeat0-res-out', 'up-level3-repeat2-vit-block0-ffn-inner'} <= {row['name'] for row in rows}
    assert {row['stride'] for row in rows} == {'1', '2', '4', '8'}


def test_one_line_for_what_is_wrong(digits, tmp_path, call_tool):
    for args, message in (
        (['--keep', 0], '--keep=0 is not valid'),
        (['--max-noise', 2], '--max-noise=2.0 is not valid'),
        (['--massive', 1], '--massive=1.0 is not valid'),
    ):
        done = call_tool('analysis_tools/filter_activations.py', DEMO, '--work-dir', tmp_path, *args)
        assert message in error_line(done)
