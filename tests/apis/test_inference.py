"""``load``, ``extract`` and ``select``: no config, no runner."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import run_code
from PIL import Image

import mmaselect
from mmaselect.backbones import ASelectDiT
from mmaselect.errors import InputError
from mmaselect.images import Batch, read_picture
from mmaselect.selection.search import sweep

MODEL = dict(
    type='SiT',
    arch=dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3),
    latent='pixels',
)
TIMESTEPS = [0, 200, 400]
PIXELS = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    for number, pixels in enumerate(PIXELS):
        sub = tmp_path / 'images' / ('a b' if number % 2 else 'ü')
        sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(sub / f'{number}.png')
    (tmp_path / 'images' / 'notes.txt').write_text('not an image')
    return tmp_path / 'images'


def test_features_are_those_of_the_backbone():
    backbone = ASelectDiT(MODEL, block=[1, 2], timestep=[200, 50], mean=(0, 0, 0), std=(1, 1, 1)).eval()
    expected = backbone(PIXELS.float())
    found = mmaselect.extract(MODEL, PIXELS, [200, 50], block=[1, 2], batch_size=4)
    assert list(found) == [(200, 1, 'query'), (200, 2, 'query'), (50, 1, 'query'), (50, 2, 'query')]
    for value, other in zip_longest(found.values(), expected):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    own = ASelectDiT(MODEL, block=1, timestep=200, noise='fresh', mean=(0, 0, 0), std=(1, 1, 1)).eval()
    value = mmaselect.extract(MODEL, PIXELS, 200, block=1, noise='fresh')
    torch.testing.assert_close(value, own(PIXELS.float())[0], rtol=1e-5, atol=1e-5)
    assert value.shape == (10, 16, 4, 4)
    pooled = mmaselect.extract(MODEL, PIXELS, 200, block=1, noise='fresh', pool=True)
    torch.testing.assert_close(pooled, value.mean((2, 3)))


def test_floats_bytes_and_files_give_the_same(folder):
    expected = mmaselect.extract(MODEL, PIXELS, 100, block=1)
    torch.testing.assert_close(mmaselect.extract(MODEL, PIXELS / 255, 100, block=1), expected, rtol=1e-4, atol=1e-5)
    files = sorted(folder.rglob('*.png'))
    order = [int(path.stem) for path in files]
    torch.testing.assert_close(mmaselect.extract(MODEL, folder, 100, block=1), expected[order])
    torch.testing.assert_close(mmaselect.extract(MODEL, files[:3], 100, block=1), expected[order[:3]])


def test_images_between_cells_are_padded_as_by_the_backbone():
    odd = PIXELS[..., :7, :5]
    backbone = ASelectDiT(MODEL, block=1, timestep=100, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    torch.testing.assert_close(mmaselect.extract(MODEL, odd, 100, block=1), backbone(odd.float())[0])


def test_files_are_cropped_in_the_middle(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 12:36] = 255
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    expected = mmaselect.extract(MODEL, torch.ones(1, 3, 8, 8), 0, block=1)
    torch.testing.assert_close(mmaselect.extract(MODEL, tmp_path, 0, block=1), expected)
    assert mmaselect.extract(MODEL, tmp_path, 0, block=1, size=12).shape == (1, 16, 6, 6)


@pytest.mark.parametrize('noise', ['fixed', 'fresh'])
def test_selection_is_that_of_the_sweep(folder, noise):
    compare = [dict(type='NoiseConsistentHFR'), dict(type='HighFrequencyRatio')]
    options = dict(block=1, timesteps=TIMESTEPS, num_images=None, batch_size=8, noise=noise, seed=3)
    selection = mmaselect.select(MODEL, PIXELS, compare=compare, **options)
    from mmaselect.images import draw_portions
    from mmaselect.selection.criteria import HighFrequencyRatio, InstanceInformation, NoiseConsistentHFR

    (order,) = draw_portions(10, None, 3)
    batches = [Batch(PIXELS[order] / 127.5 - 1, order)]
    model = mmaselect.load(MODEL, 1)
    criteria = [InstanceInformation(), NoiseConsistentHFR(), HighFrequencyRatio()]
    expected = sweep(model, batches, TIMESTEPS, criteria, seed=3, noise=noise, noise_seed=3)
    assert selection.criterion == criteria[0].label
    assert list(selection.sweep.scores) == list(expected.scores) == [criterion.label for criterion in criteria]
    for label in expected.scores:
        assert selection.curve(label) == pytest.approx(expected.curve(label), rel=1e-4)
    assert selection.timestep == expected.choice(selection.criterion)
    assert (selection.block, selection.component) == (1, 'query')
    assert selection.sweep.encoder_runs == 20
    # The paper's is beside it by default.
    default = mmaselect.select(MODEL, PIXELS, **options)
    assert list(default.sweep.scores) == [criteria[0].label, criteria[2].label]
    for label in default.sweep.scores:
        assert default.curve(label) == pytest.approx(expected.curve(label), rel=1e-4)
    from_folder = mmaselect.select(MODEL, folder, block=1, timesteps=TIMESTEPS, num_images=8)
    assert from_folder.sweep.num_images == 8


def test_the_noise_of_a_selection_is_that_of_the_features():
    """The fixed noise of a seed, and HFR of the features that come of it."""
    from mmaselect.selection.spectrum import high_frequency_ratio

    paper = dict(type='HighFrequencyRatio', sigma=0.25)
    options = dict(block=1, timesteps=TIMESTEPS, criterion=paper, compare=[], num_images=None)
    for seed in (0, 5):
        selection = mmaselect.select(MODEL, PIXELS, seed=seed, **options)
        features = mmaselect.extract(MODEL, PIXELS, TIMESTEPS, block=1, seed=seed)
        expected = [high_frequency_ratio(value, 0.25).mean().item() for value in features.values()]
        assert selection.curve(selection.criterion) == pytest.approx(expected, rel=1e-4)
    fresh = mmaselect.select(MODEL, PIXELS, noise='fresh', **options)
    assert fresh.sweep.noise == 'fresh'
    # Without noise the policy does not matter.
    fixed = mmaselect.select(MODEL, PIXELS, **options)
    assert fresh.curve(fresh.criterion)[0] == pytest.approx(fixed.curve(fixed.criterion)[0], rel=1e-4)
    assert fresh.curve(fresh.criterion)[1] != pytest.approx(fixed.curve(fixed.criterion)[1], rel=1e-4)
    for call in (mmaselect.select, mmaselect.extract):
        with pytest.raises(InputError, match=r"noise='own' is not known; choose from: fixed, fresh"):
            call(MODEL, PIXELS, **(dict(timestep=0) if call is mmaselect.extract else {}), noise='own')


def test_what_was_selected_can_be_extracted(tmp_path):
    selection = mmaselect.select(
        MODEL, PIXELS, block='auto', component='auto', timesteps=TIMESTEPS, criterion=dict(type='HighFrequencyRatio')
    )
    tap = (selection.block, selection.component)
    expected = mmaselect.extract(MODEL, PIXELS, selection.timestep, *tap)
    torch.testing.assert_close(mmaselect.extract(MODEL, PIXELS, selection), expected)
    whole = mmaselect.load(MODEL, 'auto', 'auto')
    torch.testing.assert_close(mmaselect.extract(whole, PIXELS, selection), expected)
    again = mmaselect.select(whole, PIXELS, 'auto', 'auto', TIMESTEPS, dict(type='HighFrequencyRatio'))
    assert (again.timestep, again.taps) == (selection.timestep, selection.taps)
    selection.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['report.html', 'selection.json', 'selection.png']
    several = mmaselect.select(MODEL, PIXELS, timesteps=TIMESTEPS, num_timesteps=2)
    assert [key[0] for key in mmaselect.extract(MODEL, PIXELS, several)] == several.timesteps
    other = mmaselect.load(MODEL, 0, 'key')
    with pytest.raises(InputError, match='was selected, but the model was not loaded for it'):
        mmaselect.extract(other, PIXELS, selection)


def test_labels_are_for_the_fisher_score_alone():
    fisher = dict(type='FisherScore')
    labels = [0, 1] * 5
    assert mmaselect.select(MODEL, PIXELS, timesteps=TIMESTEPS, criterion=fisher, labels=labels).timestep in TIMESTEPS
    with pytest.raises(InputError, match='needs labels; these images have none'):
        mmaselect.select(MODEL, PIXELS, timesteps=TIMESTEPS, criterion=fisher)
    with pytest.raises(InputError, match=r'labels of shape \(2,\) do not fit 10 images'):
        mmaselect.select(MODEL, PIXELS, timesteps=TIMESTEPS, criterion=fisher, labels=[0, 1])


def test_centring_needs_two_images_at_once():
    with pytest.raises(InputError, match=r'batch_size=1 is too small: centred noise-.* needs at least 2 images'):
        mmaselect.select(MODEL, PIXELS, timesteps=TIMESTEPS, criterion=dict(type='NoiseConsistentHFR'), batch_size=1)


def test_a_folder_of_weights_says_its_family(model_folder):
    images = torch.rand(2, 3, 64, 64)
    assert mmaselect.extract(model_folder('SD3.5-medium'), images, 100, block=1).shape == (2, 64, 4, 4)
    with pytest.raises(InputError, match=r'which does not tell its family: give one of DiT, SiT$'):
        mmaselect.extract(model_folder('DiT'), images, 100)


@pytest.mark.parametrize(
    'images,message',
    [
        (torch.rand(3, 8, 8), r'images of shape \(3, 8, 8\) are not valid: give \(N, 3, H, W\)'),
        (torch.rand(2, 3, 8, 8) * 2 - 1, r'images range from -[01].* to [01].*: floating ones must lie in \[0, 1\]'),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), 'images of torch.int64 are not valid'),
        (torch.zeros(0, 3, 8, 8), 'has none'),
        ('/nowhere', "images='/nowhere' is not a folder"),
        (torch.rand(1, 3, 1, 8), 'an image of 1x8 is smaller than one patch'),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(InputError, match=message):
        mmaselect.extract(MODEL, images, 0)


def test_an_unreadable_file_is_named(folder):
    (folder / 'broken.png').write_bytes(b'no image')
    with pytest.raises(InputError, match=r'broken.png cannot be read as an image'):
        mmaselect.extract(MODEL, folder, 0)


def test_no_toolbox_is_needed():
    code = (
        'import sys, torch, mmaselect\n'
        f'print(mmaselect.select({MODEL!r}, torch.rand(8, 3, 8, 8), timesteps=[0, 500]).timestep)\n'
        "print([name for name in ('mmpretrain', 'mmseg', 'mmcv') if name in sys.modules])\n"
    )
    done = run_code(code)
    assert done.stdout.splitlines()[1:] == ['[]'], done.stderr


def test_an_image_that_is_not_finite_is_named_by_extract_and_select(monkeypatch):
    """Also where memory made halves of its batch, and where a batch holds views of its images."""
    from mmaselect.diffusion.reader import FrozenDiffusion

    model, encode = mmaselect.load(MODEL, block=1), FrozenDiffusion.encode
    poison = PIXELS[7:8] / 127.5 - 1

    def broken(self, images):
        latent = encode(self, images)
        same = (images[:, :, :4, :4] - poison[:, :, :4, :4]).abs().amax((1, 2, 3)) < 1e-3
        return latent.masked_fill(same[:, None, None, None], torch.inf)

    def crowded(self, images, *rest):
        if len(images) > 4:
            raise torch.cuda.OutOfMemoryError
        return read_images(self, images, *rest)

    monkeypatch.setattr(FrozenDiffusion, 'encode', broken)
    said = 'number 7: features are not finite at timestep 200, block 1, query: the latent is not finite either'
    with pytest.raises(InputError, match=said):
        mmaselect.extract(model, PIXELS, [200, 400], batch_size=10)
    read_images = FrozenDiffusion.read_images
    monkeypatch.setattr(FrozenDiffusion, 'read_images', crowded)
    with pytest.raises(InputError, match=said):
        mmaselect.extract(model, PIXELS, [200, 400], batch_size=10)
    with pytest.raises(InputError, match='number 7: features are not finite at timestep 0, block 1, query'):
        mmaselect.select(model, PIXELS, timesteps=TIMESTEPS, batch_size=4)


def test_a_floating_picture_is_scaled_or_refused(tmp_path):
    """Pillow cuts floats off to whole numbers: a picture in [0, 1] would be black."""
    levels = PIXELS[0, 0].numpy()
    for name, pixels in (('levels', levels), ('unit', levels.astype(np.float32) / 255)):
        Image.fromarray(pixels).save(tmp_path / f'{name}.tiff')
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / 'wide.tiff')
    expected, *others = (read_picture(tmp_path / f'{name}.tiff') for name in ('levels', 'unit', 'wide'))
    assert expected.amax() > 0.9
    assert all(torch.equal(other, expected) for other in others)
    for value, said in ((-3.0, '-3 to 1'), (300.0, '0 to 300'), (np.nan, 'nan to nan')):
        Image.fromarray(np.array([[0, value, 1]], np.float32)).save(tmp_path / 'bad.tiff')
        with pytest.raises(InputError, match=rf'bad\.tiff cannot be read as an image: its pixels range from {said}'):
            read_picture(tmp_path / 'bad.tiff')
