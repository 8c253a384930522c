"""Every config: at its true size on the meta device, and each of its parts for two iterations in miniature."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import re

import pytest
import torch
from conftest import ROOT, make_tiny
from miniatures import COUNT, make
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from mmaselect.datasets import LAYOUTS

CONFIGS = sorted(
    path
    for folder in ('classification', 'segmentation', 'demo')
    for path in ROOT.glob(f'configs/{folder}/*.py')
    # U-Nets: tests/necks/test_activation_aggregation.py.
    if '_gdf-' not in path.stem
)
STANDARD = [path for path in CONFIGS if path.stem.startswith(('sd35-medium', 'dit-xl-2', 'sit-xl-2'))]
#: The architecture that each name stands for, and the transformer's own numbers: width, blocks.
TRUE = {
    'sd35-medium': ('sd3.5-medium', 1536, 24),
    'dit-xl-2': ('dit-xl/2-256', 1152, 28),
    'sit-xl-2': ('sit-xl/2-256', 1152, 28),
    'dit-mini': (ROOT / 'configs/pretrain/dit-mini_cub-64px.py', 192, 6),
    'dit-micro': (ROOT / 'configs/pretrain/dit-micro_cub-32px.py', 144, 6),
    'dit-nano': (ROOT / 'configs/pretrain/dit-nano_digits.py', 128, 5),
    'sit-latent-6b': (ROOT / 'configs/pretrain/sit-latent-6b_cub-camvid-128px.py', 192, 6),
    'sit-latent-12b': (ROOT / 'configs/pretrain/sit-latent-12b_cub-camvid-128px.py', 192, 12),
    'dit-latent-6b': (ROOT / 'configs/pretrain/dit-latent-6b_cub-camvid-128px.py', 192, 6),
    'sd15': ('sd1.5', 1280, 30),
    'sdxl': ('sdxl', 1280, 23),
    'pixart-sigma': ('pixart-sigma-512', 1152, 28),
    'flux-dev': ('flux.1-dev', 3072, 57),
    'sana': ('sana-1600m-512', 2240, 20),
}
#: Miniatures of families without a folder of weights in conftest: in pixel space, without a prompt, 32 wide.
UNET = dict(
    sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 32, 32), layers_per_block=1,
    norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
    down_block_types=('DownBlock2D', *['CrossAttnDownBlock2D'] * 2),
    up_block_types=(*['CrossAttnUpBlock2D'] * 2, 'UpBlock2D'),
)  # fmt: skip
FURTHER = {
    'sd15': UNET,
    'sdxl': dict(
        UNET, transformer_layers_per_block=(1, 1, 8), addition_embed_type='text_time', addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    ),
    'pixart-sigma': dict(
        num_layers=3, attention_head_dim=8, num_attention_heads=4, cross_attention_dim=32, sample_size=16,
        in_channels=3, out_channels=6, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    ),
    'flux-dev': dict(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), in_channels=12, guidance_embeds=True,
    ),
    'sana': dict(
        num_layers=3, attention_head_dim=8, num_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=32,
        num_cross_attention_heads=2, caption_channels=12, in_channels=3, out_channels=3, sample_size=16,
    ),
}  # fmt: skip


@functools.cache
def read_once(path):
    return Config.fromfile(path)


def read(path):
    """A config of a test's own: to inherit from mmseg, mmengine reads all of mmseg's metafiles, for half a second."""
    return copy.deepcopy(read_once(path))


def model_of(path):
    return path.stem.split('_')[0]


@pytest.fixture
def scope():
    """Leaves no default scope behind."""
    yield init_default_scope
    DefaultScope._instance_dict.clear()


MODELS_AND_HEADS = list(
    itertools.product(('sd35-medium', 'dit-xl-2', 'sit-xl-2'), ('linear_4xb32-100e', 'attention_4xb32-28e'))
)
SETS = ('cub', 'flowers102', 'stanford-cars', 'fgvc-aircraft', 'nabirds', 'stanford-dogs')
#: Of the standard configs those that are trained: each model with each head, each data set and each schedule once.
TRAINED = {f'{model}_{head}_{data}-256px' for (model, head), data in zip(MODELS_AND_HEADS, SETS)} | {
    f'{model}_upernet_4xb4-{schedule}_ade20k-512x512'
    for model, schedule in (('sd35-medium', '80k'), ('dit-xl-2', '160k'), ('sit-xl-2', '80k'))
}
LEFT_OUT = [path for path in STANDARD if path.stem not in TRAINED]


def test_there_is_a_config_for_every_model_head_and_data_set():
    """OpenMMLab's rule: model_head_{gpus}xb{batch}-{schedule}_data-size."""
    stems = {path.stem for path in STANDARD}
    expected = {f'{model}_{head}_{data}-256px' for model, head in MODELS_AND_HEADS for data in SETS}
    expected |= {
        f'{model}_upernet_4xb4-{schedule}_ade20k-512x512'
        for model in ('sd35-medium', 'dit-xl-2', 'sit-xl-2')
        for schedule in ('80k', '160k')
    }
    assert stems == expected
    assert stems >= TRAINED


@functools.cache
def parts(path):
    """The values of a config by name, without the number of classes, which the test of its architecture checks."""
    config = read(path).to_dict()
    config['model'].get('head', {}).pop('num_classes', None)
    return config


@pytest.mark.parametrize('path', LEFT_OUT, ids=lambda path: path.stem)
def test_what_is_not_trained_consists_of_parts_that_are(path):
    trained = [parts(other) for other in STANDARD if other.stem in TRAINED]
    missing = [name for name, value in parts(path).items() if all(value != other.get(name) for other in trained)]
    assert missing == []


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_true_architecture_fits(path, scope):
    """Channels, levels and classes, with every tensor on the meta device."""
    config = read(path)
    segmentation = config.default_scope == 'mmseg'
    __import__('mmseg.models' if segmentation else 'mmpretrain.models')
    arch, width, blocks = TRUE[model_of(path)]
    old = config.model.backbone.diffusion
    if isinstance(arch, str):
        config.model.backbone.diffusion = dict(type=old.type, arch=arch)
    else:
        config.model.backbone.diffusion = dict(type=old.type, arch=dict(read(arch).model.transformer), latent='pixels')
    scope(config.default_scope)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    backbone = model.backbone
    assert (backbone.out_channels[0], backbone.spec.num_blocks) == (width, blocks)
    assert backbone.component == ('output' if 'latent' in path.stem else 'query')
    # Fusing several timesteps, a config chooses as many.
    assert len(backbone.out_channels) == (4 if segmentation else backbone.num_timesteps)
    batch = config.train_dataloader.batch_size
    in_name = re.search(r'-(\d+)px', path.stem)
    size = [int(in_name[1])] * 2 if in_name else config.model.data_preprocessor.size
    assert all(side % backbone.multiple == 0 for side in size)
    cells = [side // backbone.strides[0] for side in size]
    # As the backbone hands them over; the frozen part itself has no shapes to check without its weights.
    maps = tuple(torch.empty(batch, channels, *cells, device='meta') for channels in backbone.out_channels)
    model = revert_sync_batchnorm(model.to('meta'))
    features = model.neck(maps)
    dataset = config.train_dataloader.dataset.type
    if dataset in LAYOUTS:
        classes = LAYOUTS[dataset].num_classes
    else:
        classes = {'CustomDataset': 10, 'BaseSegDataset': 11}[dataset]
    if segmentation:
        levels = [[round(side * rescale) for side in cells] for rescale in config.model.neck.rescales]
        assert [list(level.shape[2:]) for level in features] == levels
        assert levels[0] == [128, 128] or path not in STANDARD
        assert model.decode_head(features).shape == (batch, classes, *levels[0])
        assert model.auxiliary_head(features).shape[:2] == (batch, classes)
    else:
        assert model.head(features).shape == (batch, classes)
        evaluator = config.val_evaluator
        assert evaluator.type == 'Accuracy'
        assert config.data_preprocessor.num_classes == classes
    # The head is all that learns.
    assert not [name for name, _ in model.backbone.named_parameters()]


@pytest.mark.parametrize('path', STANDARD, ids=lambda path: path.stem)
def test_choices_follow_the_paper(path):
    config = read(path)
    backbone, (hook,) = config.model.backbone, config.custom_hooks
    assert backbone.timestep == 'auto'
    assert hook.type == 'TimestepSelectionHook'
    assert hook.criterion == dict(type='HighFrequencyRatio', sigma=0.25)
    middle = {'sd35-medium': 12, 'dit-xl-2': 14, 'sit-xl-2': 14}[model_of(path)]
    assert backbone.block in (middle, [middle] * 4)
    assert backbone.diffusion.type == {'sd': 'SD3', 'di': 'DiT', 'si': 'SiT'}[path.stem[:2]]
    # The prompt is empty by default; class-conditional families take none and run under the null class.
    assert 'prompt' not in backbone.diffusion
    gpus, batch = re.search(r'_(\d+)xb(\d+)-', path.stem).groups()
    assert config.train_dataloader.batch_size == int(batch)
    if config.default_scope == 'mmpretrain':
        epochs = int(re.search(r'-(\d+)e_', path.stem)[1])
        assert config.train_cfg.max_epochs == epochs
        assert epochs % config.train_cfg.val_interval == 0
        assert config.auto_scale_lr.base_batch_size == int(gpus) * int(batch)
        splits = {config[f'{split}_dataloader'].dataset.split for split in ('val', 'test')}
        assert splits == {'test'}
        assert config.train_dataloader.dataset.split.startswith('train')
    else:
        assert config.train_cfg.max_iters == int(re.search(r'-(\d+)k_', path.stem)[1]) * 1000


#: A few blocks of each small model in pixel space; its width is 16.
SMALL = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=16)
#: Size of a training crop in segmentation. SD3's positions end at 16 cells in the miniature, which is 256 pixels.
CROP = 128


def replace(node, changes):
    """Replaces values of a config in place, wherever ``(key, value)`` is among ``changes``."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and (key, first) in changes:
            new = changes[key, first]
            node[key] = [new] * len(value) if isinstance(value, list) else new
        elif isinstance(value, (dict, list)):
            replace(value, changes)


def shrink(config, path, model_folder, root):
    """Puts a miniature of the model and of the data into a config; all else stays, pipelines and schedules too."""
    name = model_of(path)
    _, width, _ = TRUE[name]
    backbone, diffusion = config.model.backbone, config.model.backbone.diffusion
    if name in FURTHER:
        backbone.diffusion = dict(type=diffusion.type, arch=FURTHER[name], latent='pixels', prompt='zeros')
        narrow = 32
    elif path in STANDARD:
        variant = {'sd35-medium': 'SD3.5-medium', 'dit-xl-2': 'DiT', 'sit-xl-2': 'SiT'}[name]
        diffusion.pretrained, narrow = str(model_folder(variant)), 64
        diffusion.pop('vae', None)
    else:
        channels = 1 if name == 'dit-nano' else 3
        arch = dict(SMALL, in_channels=channels, patch_size=2 if name == 'dit-nano' else 4)
        backbone.diffusion, narrow = dict(type=diffusion.type, arch=arch, latent='pixels'), 16
    if 'taps' not in backbone:
        backbone.block = [2] * 4 if isinstance(backbone.block, list) else 2
    changes = {(key, width): narrow for key in ('in_channels', 'input_features', 'embed_dim')}
    changes |= {('embed_dims', width): narrow, ('channels', 512): 8, ('channels', 256): 8, ('channels', 64): 8}
    replace(config.model, changes)
    necks = config.model.neck if isinstance(config.model.neck, list) else [config.model.neck]
    for neck in necks:
        if neck['type'] == 'AttentionPooling':
            neck.embed_dims = config.model.head.in_channels = narrow
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=COUNT // 2 if split == 'train' else 1)
        loader.dataset.data_root = str(root)
    (hook,) = config.custom_hooks
    hook.update(num_images=4, timesteps=[0, 500, 900], batch_size=4)
    if hook.criterion.type == 'InstanceInformation' and hook.criterion.views.crop < 1:
        # Of blurred noise, as the miniatures are, half of the area shows something else than the other half.
        hook.criterion.views = dict(crop=0.95)
    if config.default_scope == 'mmseg':
        config.train_cfg.update(max_iters=2, val_interval=2)
        size = list(config.model.data_preprocessor.size)
        crop = CROP // 2 if name in FURTHER else CROP
        changes = {('scale', 2048): (4 * crop, crop)}
        changes |= {(key, side): (crop, crop) for key in ('crop_size', 'size') for side in (512, 1024)}
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            for transform in loader.dataset.pipeline:
                for key in ('scale', 'crop_size'):
                    if transform.get(key) and (key, transform[key][0]) in changes:
                        transform[key] = changes[key, transform[key][0]]
        config.model.data_preprocessor.size = changes.get(('size', size[0]), size)
    else:
        # An epoch of two iterations.
        config.train_cfg.update(max_epochs=1, val_interval=1)
        # The pixels of these are latents, and a latent has an eighth of the side.
        for split in ('train', 'val', 'test') if name in FURTHER else ():
            for transform in config[f'{split}_dataloader'].dataset.pipeline:
                for key in transform.keys() & {'scale', 'crop_size'}:
                    transform[key] //= 8
    config.default_hooks.logger.interval = 1


@pytest.fixture(scope='session')
def data_of(tmp_path_factory):
    """Returns a function that makes a miniature of a data set, once, and gives its folder."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize('path', [path for path in CONFIGS if path not in LEFT_OUT], ids=lambda path: path.stem)
def test_two_iterations(path, model_folder, data_of, scope, tmp_path):
    from mmengine.runner import Runner

    config = read(path)
    shrink(config, path, model_folder, data_of(config.train_dataloader.dataset.type))
    config.work_dir = str(tmp_path)
    # Loggers and visualizers are kept by name for the life of a process.
    config.experiment_name = config.visualizer.name = path.stem
    if config.default_scope == 'mmpretrain':
        for split in ('train', 'val', 'test'):
            config[f'{split}_dataloader'].collate_fn = dict(type='default_collate')
    Runner.from_cfg(config).train()
    selection = json.loads((tmp_path / 'selection.json').read_text())
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    metrics = [line for line in lines if 'accuracy/top1' in line or 'mIoU' in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert len(metrics) == 1
    assert selection['num_images'] == 4
    decides = [value for label, value in selection['scores'].items() if label == selection['criterion_label']]
    assert any(score > 0 for score in decides[0])
    checkpoint = torch.load(next(tmp_path.glob('*.pth')), weights_only=True)
    timestep = selection['timestep']
    assert checkpoint['state_dict']['backbone.timestep'].tolist() == timestep
    # Head, neck and the choice; nothing of the frozen model.
    assert not [key for key in checkpoint['state_dict'] if 'transformer' in key or 'encoder' in key]


PRETRAINING = sorted(ROOT.glob('configs/pretrain/*.py'))


@pytest.mark.parametrize('path', PRETRAINING, ids=lambda path: path.stem)
def test_pretraining_fits_and_runs(path, data_of, scope, tmp_path):
    """The true size on the meta device, then two iterations of two blocks."""
    from mmengine.runner import Runner

    import mmaselect.pretraining  # noqa: F401

    config = read(path)
    scope(config.default_scope)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    arch, width, blocks = TRUE[path.stem.split('_')[0]]
    assert arch == path
    assert (model.transformer.inner_dim, len(model.transformer.transformer_blocks)) == (width, blocks)
    config.model.transformer.num_layers = 2
    config.train_cfg.max_iters = 2
    config.train_dataloader.update(batch_size=COUNT // 2)
    dataset = config.train_dataloader.dataset
    if dataset.type == 'LatentDataset':
        dataset.update(vae=str(make_tiny(tmp_path / 'vae', 32)), cache=str(tmp_path / 'latents.safetensors'))
        dataset.datasets[0].data_root = str(data_of('CUB'))
        dataset.datasets[1].dataset.data_root = str(data_of('BaseSegDataset'))
    else:
        dataset.data_root = str(data_of(dataset.type))
    config.train_dataloader.collate_fn = dict(type='default_collate')
    config.default_hooks.logger.interval = 1
    config.work_dir, config.experiment_name = str(tmp_path), path.stem
    Runner.from_cfg(config).train()
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    losses = [json.loads(line)['loss'] for line in log.read_text().splitlines()]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
