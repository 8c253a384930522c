"""Bad input at the command line: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
from conftest import ROOT, error_line
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from safetensors.torch import load_file, save_file

CONFIG = ROOT / 'configs/demo/dit-nano_linear_bs64-20e_digits-16px.py'
ASSETS = ROOT / 'mmaselect/assets/dit-nano_digits'


@pytest.fixture(autouse=True)
def clean_globals():
    """A runner that fails leaves its scope behind."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def data(tmp_path):
    """Four grey squares in two classes."""
    for split in ('train', 'test'):
        for label in ('dark', 'light'):
            folder = tmp_path / 'data' / split / label
            folder.mkdir(parents=True)
            for index in range(2):
                image = np.random.default_rng(index).integers(0, 100, (8, 8)) + 100 * (label == 'light')
                cv2.imwrite(str(folder / f'{index}.png'), image.astype(np.uint8))
    return tmp_path / 'data'


@pytest.fixture
def attempt(call_tool, data, tmp_path):
    """Runs tools/train.py on the demo's config with some settings changed; returns the error line."""

    def run(tool='train.py', arguments=(), **settings):
        values = {f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')}
        values |= {'train_dataloader.batch_size': 2, 'custom_hooks.0.timesteps': '[0,500]'}
        values |= {key.replace('__', '.'): value for key, value in settings.items()}
        done = call_tool(
            tool, CONFIG, *arguments, '--work-dir', tmp_path / 'out', '--cfg-options',
            *(f'{key}={value}' for key, value in values.items()),
        )  # fmt: skip
        left = {path.name for path in (tmp_path / 'out').rglob('*') if path.suffix in ('.pth', '.json', '.png')}
        assert left - {'scalars.json'} == set()
        return error_line(done)

    return run


@pytest.mark.parametrize(
    'settings,message',
    [
        (
            dict(model__backbone__diffusion__type='Imagen'),
            "diffusion.type='Imagen' is not known; choose from: SD3, DiT, SiT",
        ),
        (dict(model__backbone__component='queries'), "component='queries' is not known; choose from: modulated, query"),
        (dict(model__backbone__block=5), 'block=5 is out of range: the model has 5 blocks, 0 to 4'),
        (dict(model__backbone__timestep=1200), 'timestep=1200 is not a timestep: give a number from 0 (clean) to 1000'),
        (dict(model__backbone__diffusion__pretrained='/none'), "pretrained='/none' is not a folder"),
        (dict(model__backbone__diffusion__type='SD3'), 'which is not of family SD3'),
        (
            dict(model__backbone__mean='[0,0,0]', model__backbone__std='[1,1,1]'),
            'set model.backbone.mean=[127.5, 127.5, 127.5]',
        ),
        (
            dict(custom_hooks='[]'),
            "timestep='auto', but nothing has chosen one: add dict(type='TimestepSelectionHook')",
        ),
        (
            dict(custom_hooks__0__criterion__type='Entropy'),
            "criterion.type='Entropy' is not known; choose from: InstanceInformation, HighFreq",
        ),
        (dict(custom_hooks__0__criterion__shrinkage=-1), 'shrinkage=-1 is not valid'),
        (dict(custom_hooks__0__criterion__views__crop=0), 'views.crop=0 is not valid: give a number above 0'),
        (dict(custom_hooks__0__criterion__num_views=1), 'num_views=1 is not valid: give a whole number of at least 2'),
        (
            dict(custom_hooks__0__num_images=1),
            'instance information (2 views, 1x1 and 2x2 cells) needs at least 2 images',
        ),
        (dict(custom_hooks__0__timesteps='[0,1001]'), 'timesteps=1001 is not a timestep'),
        (dict(custom_hooks__0__num_images=0), 'num_images=0 is not valid: give a whole number of at least 1'),
        (dict(custom_hooks__0__num_images='some'), "num_images='some' is not valid: give a whole number of at least 1"),
        (
            dict(custom_hooks__0__search='fast'),
            "search='fast' is not known; choose from: sweep, coarse-to-fine, racing",
        ),
        (dict(custom_hooks__0__stability=0), 'stability=0 is not valid: give a share in (0, 1]'),
        (
            dict(custom_hooks__0__blocks='[7]', model__backbone__block='auto'),
            'blocks=[7], components=None leave nothing to choose from: blocks are 0 to 4',
        ),
        (dict(model__backbone__num_timesteps=3), 'num_timesteps=3 is more than the 2 timesteps to choose from'),
        (
            dict(train_dataloader__batch_size=3),
            'the last batch of 4 images has one image, but the batch norm in neck.1.bn needs two: set train_dataloader.'
            'drop_last=True, or another batch_size',
        ),
        (
            dict(train_dataloader__batch_size=1),
            'batch_size=1, but the batch norm in neck.1.bn needs two images: set at ',
        ),
        (dict(model__backbone__num_timesteps=0), 'num_timesteps=0 is not valid: give a whole number of at least 1'),
        (dict(model__backbone__block='middle'), "block='middle' is not valid: give a number from 0 to 4, or 'auto'"),
        (dict(model__backbone__timestep='[5,5]'), 'timestep=[5, 5] is not valid: give at least one timestep, and each'),
        (dict(train_dataloader__dataset__data_root='/none'), 'a data set cannot be built'),
    ],
)
def test_training(attempt, settings, message):
    assert message in attempt(**settings)


def test_a_checkpoint_that_is_not_there(attempt):
    assert "load_from='nothing.pth' is not a file" in attempt(load_from='nothing.pth')


@pytest.mark.skipif(get_device() != 'cpu', reason='this machine has an accelerator')
def test_mixed_precision_without_an_accelerator(attempt):
    assert "--amp, or optim_wrapper.type='AmpOptimWrapper', needs an accelerator" in attempt(arguments=('--amp',))


def test_swapped_colours(attempt):
    line = attempt(data_preprocessor__to_rgb=False)
    assert 'the images of train_dataloader are read as BGR and never turned to RGB' in line
    assert 'set data_preprocessor.to_rgb=True' in line


def test_images_of_four_channels(attempt, data):
    for file in data.glob('*/*/*.png'):
        cv2.imwrite(str(file), np.zeros((8, 8, 4), np.uint8))
    line = attempt(
        train_dataloader__dataset__pipeline__0__color_type='unchanged',
        val_dataloader__dataset__pipeline__0__color_type='unchanged',
    )
    assert '.png is read with 4 channels: the model sees RGB' in line


@pytest.mark.parametrize('tool', ('train.py', 'select_timestep.py'))
def test_an_empty_data_set(attempt, data, tool):
    for file in data.glob('train/*/*.png'):
        file.unlink()
    line = attempt(tool)
    assert 'a data set cannot be built: Found 0 files in subfolders of' in line


def test_images_smaller_than_a_patch(attempt):
    line = attempt(
        train_dataloader__dataset__pipeline__1__scale='(1,1)', val_dataloader__dataset__pipeline__1__scale='(1,1)'
    )
    assert 'an image of 1x1 is smaller than one patch: this model needs at least 2x2 pixels' in line


@pytest.fixture
def damaged(tmp_path):
    """A copy of the embedded model and a function that rewrites its tensors."""
    folder = tmp_path / 'model'
    shutil.copytree(ASSETS, folder)
    file = folder / 'transformer/diffusion_pytorch_model.safetensors'

    def change(edit):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)
        return folder

    return file, change


def test_features_that_are_not_finite(attempt, damaged):
    _, change = damaged
    folder = change(lambda tensors: tensors['transformer_blocks.2.attn1.to_q.bias'].fill_(float('nan')))
    line = attempt(model__backbone__diffusion__pretrained=folder)
    assert 'features are not finite at timestep 0, block 2, query' in line


def test_weights_that_are_truncated_or_incomplete(attempt, damaged):
    file, change = damaged
    folder = change(lambda tensors: tensors.pop('transformer_blocks.2.attn1.to_q.bias'))
    line = attempt(model__backbone__diffusion__pretrained=folder)
    assert 'lacks 1 of' in line
    assert "the first is 'transformer_blocks.2.attn1.to_q.bias'" in line
    file.write_bytes(file.read_bytes()[:1000])
    assert 'is not a readable safetensors file' in attempt(model__backbone__diffusion__pretrained=folder)


def test_files_that_are_not_there(call_tool, tmp_path):
    assert "config='nothing.py' is not a file" in error_line(call_tool('train.py', 'nothing.py'))
    assert "checkpoint='nothing.pth' is not a file" in error_line(call_tool('test.py', CONFIG, 'nothing.pth'))
    line = error_line(call_tool('train.py', CONFIG, '--work-dir', tmp_path, '--resume', 'nothing.pth'))
    assert "--resume 'nothing.pth' is not a file" in line


@pytest.mark.parametrize(
    'arguments,message',
    [
        (('--out', 'folder'), "--out 'folder': predictions go to a file .pkl, .pickle"),
        (('--out', 'a.json'), "--out 'a.json': predictions go to a file .pkl, .pickle"),
        (('--out', 'folder', '--out-item', 'metrics'), "--out 'folder' --out-item metrics: give a file .json, .yaml"),
        (('--tta', '--show-dir', 'folder'), '--tta goes without --show and --show-dir'),
    ],
)
def test_where_test_py_writes(attempt, arguments, message):
    assert message in attempt('test.py', ('none', *arguments))
