"""One broken image ends no run unless it is asked to; it is counted and listed."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import DEMO, error_line, needs_torch, options, run_tool
from mmengine.dataset import BaseDataset
from PIL import Image

import mmaselect
from mmaselect.cli import find_input_error
from mmaselect.datasets.readable import LoadReadableImage, name_broken_files
from mmaselect.errors import InputError
from mmaselect.unreadable import Unreadable


def write_images(folder, count):
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).resize((70, 64)).save(folder / f'{index:02d}.png')
    return folder


def test_one_always_may_and_more_by_their_share():
    few = Unreadable(0.01)
    few.total = 10
    few.add('a.png', InputError('a.png cannot be read: cut off'))
    with pytest.raises(InputError, match=r'2 of 10 images .* more than max_unreadable=0.01 allows; .* a\.png: cut off'):
        few.add('b.png', OSError(''))
    assert few.found == [('a.png', 'cut off'), ('b.png', 'OSError')]
    many = Unreadable(0.01)
    many.total = 10**6
    for index in range(10**4):
        many.add(index, OSError('gone'))
    with pytest.raises(InputError, match='10001 of 1000000 images cannot be read'):
        many.add('last', OSError('gone'))
    none = Unreadable(0)
    none.total = 10**6
    with pytest.raises(InputError, match='1 of 1000000'):
        none.add('a.png', OSError('gone'))


class Pictures(torch.utils.data.Dataset):
    def __init__(self, folder, count, **options):
        self.paths = [str(folder / f'{index:02d}.png') for index in range(count)]
        self.load = LoadReadableImage(**options)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.load(dict(img_path=self.paths[index])) is not None


def test_a_training_ends_at_one_too_many(tmp_path):
    """Each worker counts: of the first thousand images ten may be broken, however early they come."""
    write_images(tmp_path, 2)
    pictures = Pictures(tmp_path, 12)
    found = [pictures[index] for index in range(12)]
    assert found == [True, True, *[False] * 10]
    # Again and again in each epoch: the same ones.
    assert not any(pictures[index] for index in range(2, 12))
    pictures.paths.append('12.png')
    with pytest.raises(InputError, match=r'11 of 23 images cannot be read, more than max_unreadable=0.01 allows'):
        pictures[12]
    # From a worker's process, the line arrives as a line.
    strict = torch.utils.data.DataLoader(Pictures(tmp_path, 3, max_unreadable=0), batch_size=None, num_workers=1)
    with pytest.raises(Exception, match='1 of 3 images cannot be read') as caught:
        list(strict)
    assert str(find_input_error(caught.value)).startswith('1 of 3 images cannot be read, more than max_unreadable=0')


CHANNELS = [
    ('00.png', np.zeros((8, 8, 4), np.uint8), r'00\.png is read with 4 channels: the model sees RGB'),
    ('00.png', np.zeros((8, 8, 2), np.uint8), r'00\.png is read with 2 channels'),
    pytest.param(
        '00.tiff',
        np.full((8, 8, 3), 40000, np.uint16),
        r'00\.tiff is read as torch\.uint16 from 40000 to 40000: expected 0',
        marks=needs_torch('2.3', 'a tensor of uint16'),
    ),
    (
        '00.tiff',
        np.full((8, 8, 3), 0.5, np.float32),
        r'00\.tiff is read as torch\.float32 from 0\.5 to 0\.5: expected 0',
    ),
    ('00.tiff', np.full((8, 8, 3), 128.5, np.float32), None),
]


@pytest.mark.parametrize('name,pixels,message', CHANNELS)
def test_images_that_are_not_rgb_of_256_levels_are_named(tmp_path, monkeypatch, name, pixels, message):
    from mmengine.dataset import BaseDataset
    from mmpretrain.datasets.transforms import PackInputs

    monkeypatch.setattr(BaseDataset, 'prepare_data', BaseDataset.prepare_data)
    name_broken_files()
    monkeypatch.setattr(BaseDataset, 'load_data_list', lambda self: [dict(img_path=str(tmp_path / name), img=pixels)])
    dataset = BaseDataset(pipeline=[PackInputs()])
    if message is None:
        assert dataset[0]['inputs'].shape == (3, 8, 8)
        return
    with pytest.raises(InputError, match=message):
        dataset[0]


def test_colours_in_place_of_a_label_map_are_named(tmp_path, monkeypatch):
    from mmcv.transforms import LoadImageFromFile
    from mmengine.dataset import BaseDataset
    from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs, RandomCrop

    monkeypatch.setattr(BaseDataset, 'prepare_data', BaseDataset.prepare_data)
    name_broken_files()
    write_images(tmp_path, 1)
    Image.new('RGB', (70, 64)).save(tmp_path / 'map.png')
    sample = dict(img_path=str(tmp_path / '00.png'), seg_map_path=str(tmp_path / 'map.png'))
    sample |= dict(seg_fields=[], reduce_zero_label=False, label_map=None)
    monkeypatch.setattr(BaseDataset, 'load_data_list', lambda self: [sample])
    steps = [LoadImageFromFile(), LoadAnnotations(), RandomCrop((32, 32), cat_max_ratio=0.75), PackSegInputs()]
    said = r'map\.png is read as a label map of \(32, 32, 3\): expected one channel of class numbers, not colours'
    with pytest.warns(UserWarning, match='ground truth segmentation'), pytest.raises(InputError, match=said):
        BaseDataset(pipeline=steps)[0]


class Spawned(BaseDataset):
    """Its workers know nothing of this process but what is pickled."""

    def load_data_list(self):
        return [dict(img_path=self.data_root)]


def test_a_worker_that_is_spawned_says_the_same(tmp_path, monkeypatch):
    from mmcv.transforms import LoadImageFromFile

    monkeypatch.setattr(BaseDataset, 'prepare_data', BaseDataset.prepare_data)
    name_broken_files()
    (tmp_path / 'cut.png').write_bytes(b'cut off')
    dataset = Spawned(data_root=str(tmp_path / 'cut.png'), pipeline=[LoadImageFromFile()])
    lines = []
    for method in ('fork', 'spawn'):
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=method)
        with pytest.raises(InputError) as caught:
            list(loader)
        lines.append(str(caught.value))
    assert lines[0].startswith(f'{tmp_path}/cut.png cannot be read: ')
    assert lines[1] == lines[0]


class Faulty:
    def __call__(self, results):
        raise OSError('of its own')


@pytest.mark.parametrize(
    'broken,content,workers,message',
    [
        ('img_path', b'', 0, r'00\.png cannot be read: .*empty'),
        ('img_path', b'cut off', 1, r'00\.png cannot be read: .'),
        ('img_path', None, 0, r'00\.png cannot be read: .*No such file'),
        ('seg_map_path', b'cut off', 0, r'map\.png cannot be read: cannot identify image file'),
        ('seg_map_path', b'', 1, r'map\.png cannot be read: cannot identify image file'),
        (None, None, 0, None),
    ],
)
def test_what_ends_a_run_is_named(tmp_path, monkeypatch, broken, content, workers, message):
    """An image in evaluation, or a label map: what reads them does not always say which."""
    from mmcv.transforms import LoadImageFromFile
    from mmengine.dataset import BaseDataset
    from mmseg.datasets.transforms import LoadAnnotations

    monkeypatch.setattr(BaseDataset, 'prepare_data', BaseDataset.prepare_data)
    name_broken_files()
    write_images(tmp_path, 1)
    Image.new('L', (70, 64)).save(tmp_path / 'map.png')
    sample = dict(img_path=str(tmp_path / '00.png'), seg_map_path=str(tmp_path / 'map.png'))
    sample |= dict(seg_fields=[], reduce_zero_label=False, label_map=None)
    if broken is not None:
        tmp_path.joinpath(sample[broken]).unlink()
        if content is not None:
            tmp_path.joinpath(sample[broken]).write_bytes(content)
    monkeypatch.setattr(BaseDataset, 'load_data_list', lambda self: [sample])
    # A fault of somebody's own transform is told in full.
    steps = [LoadImageFromFile(), LoadAnnotations(), Faulty()]
    loader = torch.utils.data.DataLoader(BaseDataset(pipeline=steps), batch_size=None, num_workers=workers)
    with pytest.raises(Exception, match=message or 'of its own') as caught:
        list(loader)
    line = find_input_error(caught.value)
    assert (line is None) == (message is None)
    assert line is None or str(line).startswith(sample[broken])


def test_a_broken_image_ends_an_evaluation_in_a_line(digits, tmp_path, call_tool):
    data = tmp_path / 'digits'
    shutil.copytree(digits, data)
    broken = sorted(data.glob('test/5/*'))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    settings = [value for value in options(data) if not value.startswith('custom_hooks')]
    done = call_tool('train.py', DEMO, '--work-dir', tmp_path / 'out', *settings, 'model.backbone.timestep=0')
    assert error_line(done).startswith(f'error: {broken} cannot be read: ')


@pytest.mark.parametrize('share', [-0.1, 1.1, True, 'few'])
def test_a_share_is_a_share(share):
    with pytest.raises(InputError, match=r'max_unreadable=.* is not valid: give a share of the images, 0 to 1'):
        Unreadable(share)
    with pytest.raises(InputError, match=r'max_unreadable=.* is not valid: give a share of the images, 0 to 1'):
        LoadReadableImage(max_unreadable=share)


def test_selection_from_python(tmp_path, caplog, model_folder):
    model = dict(type='DiT', pretrained=str(model_folder('DiT')))
    write_images(tmp_path, 20)
    (tmp_path / '07.png').write_bytes(b'\x89PNG cut off')
    settings = dict(timesteps=[0, 500], batch_size=4, criterion=dict(type='HighFrequencyRatio'))
    with caplog.at_level(logging.WARNING, 'mmaselect'):
        selection = mmaselect.select(model, tmp_path, num_images=None, size=64, **settings)
    assert selection.sweep.num_images == 19
    assert f'1 of 20 images cannot be read, they are passed over: {tmp_path}/07.png' in caplog.text
    # What is left is scored as if it had never been there: noise is by number, groups are by position.
    kept = [path for path in sorted(tmp_path.iterdir()) if path.name != '07.png']
    assert mmaselect.select(model, kept, num_images=None, size=64, **settings).sweep.num_images == 19
    with pytest.raises(InputError, match=r'1 of .* images cannot be read, more than max_unreadable=0 allows'):
        mmaselect.select(model, tmp_path, num_images=None, size=64, max_unreadable=0, **settings)
    # Rows of features are the images: none may be missing.
    with pytest.raises(InputError, match=r'07\.png cannot be read as an image'):
        mmaselect.extract(model, tmp_path, 0, size=64)
    for path in tmp_path.iterdir():
        path.write_bytes(b'')
    with pytest.raises(InputError, match=r'2 of 2 images cannot be read|2 of \d+ images cannot be read'):
        mmaselect.select(model, tmp_path, num_images=None, size=64, **settings)


def test_a_training_with_a_broken_image(digits, tmp_path):
    """By the selection, the cache and mmpretrain's data set; the metric, over all test images, is that of any run."""
    data = tmp_path / 'digits'
    shutil.copytree(digits, data)
    broken = sorted(data.glob('train/5/*'))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    settings = options(data, **{'custom_hooks.0.num_images': 150, 'train_cfg.max_epochs': 1})
    done = run_tool('train.py', DEMO, '--work-dir', tmp_path / 'out', *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'1 of 150 images cannot be read, they are passed over: {broken}' in done.stdout
    assert f'{broken} cannot be read, another image takes its place (no. 1 of this process)' in done.stdout
    selection = json.loads((tmp_path / 'out/selection.json').read_text())
    assert selection['num_images'] == 149
    assert [name for name, _ in selection['unreadable']] == [str(broken)]

    config = tmp_path / 'cached.py'
    config.write_text(
        f"_base_ = ['{DEMO}']\n"
        f"model = dict(backbone=dict(timestep=0, cache=dict(dir='{tmp_path}/cache')))\n"
        "custom_hooks = [dict(type='FeatureCacheHook')]\n"
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Resize', scale=(16, 16)), dict(type='PackInputs')]))\n"
    )
    settings = [value for value in settings if not value.startswith('custom_hooks')]
    done = run_tool('train.py', config, '--work-dir', tmp_path / 'out', *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'1 of 150 images cannot be read, the next readable one takes their place: {broken}' in done.stdout
    done = run_tool(
        'train.py', config, '--work-dir', tmp_path / 'out', *settings, 'model.backbone.cache.max_unreadable=0'
    )
    assert done.returncode == 2
    assert 'images cannot be read, more than max_unreadable=0 allows' in done.stderr


def test_the_next_readable_one_takes_its_place():
    from mmaselect.cache.build import _following

    assert _following(np.array([True, False, True, False, False])).tolist() == [0, 2, 2, 0, 0]
    assert _following(np.array([False, True])).tolist() == [1, 1]


def test_sixteen_bits_are_not_cut_off(tmp_path):
    """Pillow's own conversion would make all of it white."""
    from mmaselect.images import Images

    Image.fromarray(np.full((16, 16), 0x4000, np.uint16)).save(tmp_path / 'deep.png')
    assert torch.allclose(Images(tmp_path, 16).load(0)[0], torch.tensor(0x40 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize(
    'save,expected',
    [
        (lambda path: Image.new('L', (20, 20), 100).save(path / 'grey.png'), [100, 100, 100]),
        (lambda path: Image.new('CMYK', (20, 20), (0, 255, 255, 0)).save(path / 'print.jpg'), [254, 0, 0]),
        (lambda path: Image.new('RGBA', (20, 20), (10, 20, 30, 0)).save(path / 'clear.png'), [10, 20, 30]),
        (lambda path: Image.new('P', (20, 20), 0).save(path / 'palette.png'), [0, 0, 0]),
        (lambda path: Image.new('1', (20, 20), 1).save(path / 'bits.png'), [255, 255, 255]),
        (lambda path: Image.new('RGB', (1, 1), (9, 8, 7)).save(path / 'dot.png'), [9, 8, 7]),
        (
            lambda path: Image.new('RGB', (20, 20), (1, 2, 3)).save(
                path / 'film.webp',
                save_all=True,
                lossless=True,
                append_images=[Image.new('RGB', (20, 20), (200, 2, 3))],
            ),
            [1, 2, 3],
        ),
        (lambda path: Image.new('RGB', (5000, 16), (50, 60, 70)).save(path / 'wide.png'), [50, 60, 70]),
    ],
    ids=['grey', 'cmyk', 'alpha', 'palette', 'bits', 'dot', 'animated', 'wide'],
)
def test_images_of_every_kind(tmp_path, save, expected):
    from mmaselect.images import Images

    save(tmp_path)
    image = Images(tmp_path, 16).load(0)[0]
    assert image.shape == (3, 16, 16)
    found = ((image.mean((1, 2)) + 1) * 127.5).tolist()
    assert found == pytest.approx(expected, abs=3)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    from mmaselect.images import Images

    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255
    lying = Image.fromarray(np.rot90(upright))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / 'turned.png', exif=exif)
    assert Images(tmp_path, 16).load(0)[0][:, :8].min() == 1


@pytest.mark.parametrize(
    'name,content',
    [
        ('empty.png', b''), ('text.jpg', b'this is no image'), ('cut.png', b'\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR'),
        ('noise.webp', bytes(range(256)) * 4), ('bomb.ppm', b'P6 100000 100000 255\n'), ('zero.ppm', b'P6 0 0 255\n'),
        ('half.bmp', b'BM' + bytes(60)), ('page.tiff', b'II*\x00' + bytes(20)),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(tmp_path, name, content):
    from mmaselect.images import Images

    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f'{name} cannot be read as an image: '):
        Images(tmp_path, 16).load(0)[0]
