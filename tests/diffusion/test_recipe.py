"""Everything that changes features changes the recipe, and nothing else does: field by field."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
from conftest import TINY, make_tiny

from mmaselect.backbones import ASelectDiT
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.recipe import difference, digest
from mmaselect.errors import InputError
from mmaselect.selection.criteria import CRITERIA, build_criteria

ARCH = dict(TINY['SiT'], in_channels=3, out_channels=3)
SIT = dict(type='SiT', arch=ARCH, latent='pixels')
LATENT = dict(type='SiT', arch=TINY['SiT'], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
#: A config and another value of the field.
FIELDS = {
    'type': (SIT, 'DiT'),
    'arch': (SIT, dict(ARCH, norm_eps=1e-3)),
    'latents_mean': (LATENT, [0.5] * 4),
    'latents_std': (LATENT, [2.0] * 4),
    'shift': (SIT, 3.0),
    'normalised_qk': (SIT, True),
    'dtype': (SIT, 'bfloat16'),
    'seed': (SIT, 1),
    'timestep_freq_shift': (SIT, 0),
}
#: How fast it runs, where, and how files are fetched;
#: tests/diffusion/test_acceleration.py shows that features stay as they are.
NOTHING = {
    'attention': 'math', 'compile': True, 'device': 'cpu', 'token': 'hf_x', 'cache_dir': '/x', 'local_files_only': True,
}  # fmt: skip
#: Names of what is read: its content counts, see below.
NAMES = ('pretrained', 'vae', 'latent', 'prompt', 'variant', 'revision', 'subfolder')


def backbone(diffusion=SIT, **fields):
    return ASelectDiT(diffusion, **{'block': 1, 'timestep': 100, **fields})


def test_the_tables_name_every_field():
    known = set(inspect.signature(DiffusionSpec.__init__).parameters) - {'self'}
    assert {*FIELDS, *NOTHING, *NAMES} == known


@pytest.mark.parametrize('field', FIELDS)
def test_every_field_of_the_model_counts(field):
    base, value = FIELDS[field]
    one, other = (backbone(config).recipe for config in (base, {**base, field: value}))
    assert digest(one) != digest(other)
    assert difference(one, other) is not None
    assert digest(backbone(base).recipe) == digest(one)


@pytest.mark.parametrize('value', [dict(data_time=0), dict(path_type='GVP'), dict(path_type='VP')])
def test_time_and_path_of_a_sit_count(value):
    one, other = (backbone(dict(SIT, arch=dict(ARCH, **more))).recipe for more in ({}, value))
    assert difference(one, other) is not None
    if 'path_type' in value:
        assert other['process'] == {'type': 'Interpolant', 'path': value['path_type']}
    # As the defaults say, in words.
    named = backbone(dict(SIT, arch=dict(ARCH, data_time=1, path_type='linear'))).recipe
    assert named == one


@pytest.mark.parametrize('field', NOTHING)
def test_what_changes_nothing_does_not_count(field):
    assert backbone(dict(SIT, **{field: NOTHING[field]})).recipe == backbone().recipe


@pytest.mark.parametrize(
    'change,named',
    [
        (dict(noise='fresh'), 'noise=fresh in the config, fixed in training'),
        (dict(noise_seed=1), 'noise_seed=1 in the config, 0 in training'),
        (dict(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]), 'mean='),
        (dict(mean=[123.675, 116.28, 103.53], std=[1.0, 1.0, 1.0]), 'std='),
        (dict(diffusion=dict(SIT, type='DiT')), 'family=DiT in the config, SiT in training'),
        (dict(diffusion=dict(SIT, shift=3.0)), 'process.shift=3.0 in the config, 1.0 in training'),
        (dict(diffusion=dict(SIT, dtype='float16')), 'dtype=float16 in the config, float32 in training'),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_by_name(change, named):
    state = backbone(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]).state_dict()
    other = backbone(**change)
    with pytest.raises(InputError, match=f'the checkpoint was trained on other features: {named}'):
        other.load_state_dict(state)
    backbone().load_state_dict(state)
    assert json.loads(bytes(state['recipe'].tolist())) == backbone().recipe


def test_names_do_not_count_but_what_is_there_does(model_folder, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(model_folder('DiT'), copy)
    config = dict(type='DiT', pretrained=str(model_folder('DiT')))
    one = backbone(config).recipe
    assert backbone(dict(config, pretrained=str(copy))).recipe == one
    assert backbone(dict(config, vae=str(make_tiny(tmp_path / 'tiny')))).recipe != one
    for file, change, named in (
        (
            'transformer/config.json',
            {'timestep_freq_shift': 0},
            'architecture.timestep_freq_shift=None in the config',
        ),
        ('scheduler/scheduler_config.json', {'beta_end': 0.02}, 'process.alphas_cumprod='),
        ('vae/config.json', {'scaling_factor': 0.25}, 'encoder.scaling_factor=0.5 in the config, 0.25 in training'),
    ):
        before = (copy / file).read_text()
        (copy / file).write_text(json.dumps({**json.loads(before), **change}))
        assert difference(one, backbone(dict(config, pretrained=str(copy))).recipe).startswith(named)
        (copy / file).write_text(before)


def test_another_prompt_counts(model_folder):
    config = dict(type='SD3', pretrained=str(model_folder('SD3.5-medium')))
    line = difference(backbone(config).recipe, backbone(dict(config, prompt='zeros')).recipe)
    assert line.startswith('weights=')


def test_a_checkpoint_without_a_recipe_is_refused():
    state = backbone().state_dict()
    state['frozen_id'] = torch.zeros(32, dtype=torch.uint8)
    del state['recipe']
    with pytest.raises(InputError, match='of an earlier revision of mmaselect and holds no recipe: train it again'):
        backbone().load_state_dict(state)


#: Another value of every argument of every criterion.
ARGUMENTS = dict(
    sigma=0.1, norm=1, centred=False, min_consistency=0.5, pool=3, ignore_index=3, num_views=3, views=dict(crop=0.5),
    max_channels=7, shrinkage=0.3,
)  # fmt: skip


@pytest.mark.parametrize(
    'name,field', [(name, field) for name, cls in CRITERIA.items() for field in inspect.signature(cls).parameters]
)
def test_every_argument_of_every_criterion_counts(name, field):
    configs = [dict(type=name), {'type': name, field: ARGUMENTS[field]}]
    criteria = build_criteria([*configs, *configs], ['criterion'] * 4)
    assert len(criteria) == 2
    one, other = (criterion.parameters for criterion in criteria.values())
    assert {key for key in one if one[key] != other[key]} == {field}
    assert json.loads(json.dumps([one, other])) == [one, other]
