"""Every field of ours, and what it may not be: one line each, which names the field and what was given."""

from __future__ import annotations

import math

import pytest
from conftest import TINY
from mmengine.registry import HOOKS, MODELS

import mmaselect  # noqa: F401
from mmaselect.cache.settings import CacheSettings
from mmaselect.cli import describe_unknown_field, find_input_error
from mmaselect.selection.criteria import build_criterion

NOT_COUNTS = [0, -1, 1.5, 'many', None, True, [2]]
NOT_SEEDS = [-1, 1.5, 'x', True, [1]]

BACKBONE = {
    'diffusion': [None, 'SD3', [], 3],
    'block': [-1, 4, 1.5, 'middle', [], [0, 9], None, True, {}, [0, 'x']],
    'component': ['queries', [], None, 3, ['query', 'x'], {}],
    'timestep': [-1, 1000.5, 'best', [], [5, 5], None, True, {}, [1, 'a'], math.nan],
    'num_timesteps': NOT_COUNTS,
    'noise': ['loud', None, 3, []],
    'noise_seed': [*NOT_SEEDS, None],
    'mean': [3, [1, 2], 'abc', [1, 2, 'x'], [math.nan, 0, 0]],
    'std': [[0, 1, 1], [-1, 1, 1], [1, 2], 'abc', [math.inf, 1, 1]],
    'cache': ['folder', 3, ['dir']],
    'blocks': [3],
}
DIFFUSION = {
    'type': [None, 'Imagen', 3, []],
    'pretrained': ['', 3, '/none', 'two words', [], {}, '../../../etc'],
    'arch': ['dit-z', 3, [], dict(num_layers='x'), dict(num_layers=0), dict(num_layer=2), dict(sample_size=-1)],
    'latent': ['audio', None, 3, []],
    'vae': ['/none', 3, []],
    'latents_mean': [3, 'x', [0, 2], [0, 0, 0, math.nan], [0, 0, 0, 'x'], [0, 0, 0, True]],
    'latents_std': [3, 'x', [1, 2], [1, 1, 1, 0], [1, 1, 1, -2], [1, 1, 1, math.inf]],
    'prompt': [3, 'a cat', 'cat.safetensors'],
    'shift': [0, -1, 'x', None, math.nan, math.inf, True, [1]],
    'normalised_qk': ['yes', 3, None],
    'dtype': ['int8', None, 3, []],
    'attention': ['fast', None, 3, []],
    'compile': ['fast', 3, []],
    'device': ['gpu9', 3.5, 'cuda:x'],
    'seed': [*NOT_SEEDS, None],
    'weights': [1],
}
HOOK = {
    'criterion': ['HighFrequencyRatio', 3, dict(type='Entropy'), dict(type=None), dict(type='FisherScore', sigma=1)],
    'timesteps': [
        3,
        'all',
        [],
        [-1],
        [1001],
        dict(start=0),
        dict(start=0, stop=1000, num=0),
        dict(start=0, stop=1001, num=3),
        dict(start=0, stop=9, num=3, step=1),
        [math.nan],
        [True],
    ],
    'num_images': [0, -1, 1.5, 'some', True, []],
    'batch_size': [0, -1, 1.5, 'some', True, None, 1],
    'compare': [3, ['HighFrequencyRatio'], [dict(type='x')], 'all'],
    'pipeline': ['test', 3, {}],
    'seed': [*NOT_SEEDS, None],
    'search': ['fast', None, 3, []],
    'stability': [0, 1.1, -1, 'x', None, True, math.nan],
    'blocks': [3, 'all', ['x'], [-1], [True], []],
    'components': ['query', 3, [3], []],
    'max_unreadable': [-1, 2, 'few', None, True],
    'num_image': [3],
}
CRITERIA = {
    'HighFrequencyRatio': {'sigma': [0, -1, 'x', None, math.nan, math.inf, True], 'norm': [0, 3, 'x', None]},
    'NoiseConsistentHFR': {
        'sigma': [0, 'x'], 'centred': ['yes', 3, None], 'min_consistency': [-1, 1, 'x', None, math.nan]
    },
    'FisherScore': {'pool': [0, -1, 1.5, 'x', True], 'ignore_index': ['x', 1.5, None]},
    'InstanceInformation': {'shrinkage': [-1, 0.6, 'x', None, math.nan, True]},
}  # fmt: skip
#: Of all criteria on views.
VIEWS = {
    'num_views': [*NOT_COUNTS, 1],
    'views': ['x', '', 3, [], True, dict(foo=1), dict(crop=1)],
    # [2] is a list of scales.
    'pool': [value for value in NOT_COUNTS if value != [2]],
    'max_channels': NOT_COUNTS,
}
VIEWS |= {
    field: [{field.removeprefix('views.'): value} for value in values]
    for field, values in {
        'views.crop': [0, -1, 1.5, 'x', None, math.nan, True],
        'views.mirror': [1, 'yes', None],
        'views.rotate': [-1, 181, 'x', None, math.inf],
        'views.colour': [-1, 1, 'x', None],
        'views.blur': [-1, 'x', None, math.inf],
    }.items()
}
CACHE = {
    'dir': ['', None, 3, []],
    'dtype': ['int8', 3],
    'pool': ['yes', 3, None],
    'views': NOT_COUNTS,
    'max_gb': [0, -1, 'x', True, math.nan],
    'batch_size': [0, -1, 1.5, 'x', True],
    'seed': [*NOT_SEEDS, None],
    'max_unreadable': [-1, 2, 'few', None, True],
    'folder': ['x'],
}
NECKS = {
    'AttentionPooling': {
        'in_channels': NOT_COUNTS, 'embed_dims': [*NOT_COUNTS, 30], 'num_heads': NOT_COUNTS, 'num_layers': NOT_COUNTS,
        'mlp_ratio': [0, -1, 'x', None], 'dropout': [-1, 1.5, 'x', None],
    },
    'SoftmaxFusion': {'in_channels': NOT_COUNTS, 'num_maps': NOT_COUNTS, 'num_outputs': [*NOT_COUNTS, 2]},
}  # fmt: skip


def cases(table):
    return [pytest.param(field, value, id=f'{field}={value!r}') for field, values in table.items() for value in values]


def error_of(build):
    """The line that a tool would print."""
    with pytest.raises(Exception) as caught:
        build()
    line = find_input_error(caught.value) or describe_unknown_field(caught.value)
    assert line is not None, repr(caught.value)
    assert '\n' not in str(line)
    return str(line)


def check(build, field, value):
    line = error_of(build)
    # By its name, and what was given or a part of it.
    assert field in line, line
    shown = [repr(value), str(value)]
    if isinstance(value, dict):
        shown += [repr(item) for item in value.values()] + list(value)
    if isinstance(value, list):
        shown += [repr(item) for item in value]
    assert any(text in line for text in shown) or value in ([], {}, '') or 'is not known; choose from' in line, line


@pytest.mark.parametrize('field,value', cases(BACKBONE))
def test_backbone(field, value):
    config = dict(type='ASelectDiT', diffusion=dict(type='DiT', arch=TINY['DiT']), block=1, timestep=100)
    if field == 'num_timesteps':
        config['timestep'] = 'auto'
    check(lambda: MODELS.build({**config, field: value}), field, value)


@pytest.mark.parametrize('field,value', cases(DIFFUSION))
def test_diffusion(field, value):
    kind = 'SD3' if field == 'prompt' else 'SiT' if field == 'shift' else 'DiT'
    config = dict(type=kind, arch=TINY[kind])
    if field.startswith('latents'):
        config |= dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    if field == 'pretrained':
        del config['arch']
    if field == 'arch' and isinstance(value, dict):
        value = {**TINY['DiT'], **value}
    backbone = dict(type='ASelectDiT', block=1, timestep=100, diffusion={**config, field: value})
    if field == 'arch' and isinstance(value, dict):
        changed = next(key for key in value if TINY['DiT'].get(key) != value[key])
        check(lambda: MODELS.build(backbone), changed, value[changed])
    else:
        check(lambda: MODELS.build(backbone), field, value)


@pytest.mark.parametrize('field,value', cases(HOOK))
def test_hook(field, value):
    # A batch of one image is too small for what is centred alone.
    centred = dict(compare=[dict(type='NoiseConsistentHFR')]) if (field, value) == ('batch_size', 1) else {}
    check(lambda: HOOKS.build({'type': 'TimestepSelectionHook', **centred, field: value}), field, value)


def test_a_batch_of_one_image_is_enough_for_what_is_not_centred():
    assert HOOKS.build(dict(type='TimestepSelectionHook', batch_size=1)).batch_size == 1


@pytest.mark.parametrize(
    'name,field,value',
    [(name, *case.values) for name, table in CRITERIA.items() for case in cases(table)],
)
def test_criteria(name, field, value):
    check(lambda: build_criterion({'type': name, field: value}), field, value)


@pytest.mark.parametrize('field,value', cases(VIEWS))
def test_criteria_on_views(field, value):
    for name in ('InstanceInformation', 'ViewConsistency', 'RankMe', 'LiDAR'):
        check(lambda name=name: build_criterion({'type': name, field.partition('.')[0]: value}), field, value)


@pytest.mark.parametrize('field,value', cases(CACHE))
def test_cache(field, value, tmp_path):
    check(lambda: CacheSettings.from_dict({'dir': str(tmp_path), field: value}), field, value)


@pytest.mark.parametrize(
    'name,field,value', [(name, *case.values) for name, table in NECKS.items() for case in cases(table)]
)
def test_necks(name, field, value):
    config = dict(type=name, in_channels=16, num_heads=4) if name == 'AttentionPooling' else dict(
        type=name, in_channels=16, num_maps=3
    )  # fmt: skip
    check(lambda: MODELS.build({**config, field: value}), field, value)


def test_there_are_enough():
    tables = [BACKBONE, DIFFUSION, HOOK, CACHE, VIEWS, *CRITERIA.values(), *NECKS.values()]
    assert sum(len(values) for table in tables for values in table.values()) > 250
