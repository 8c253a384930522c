"""Metafiles and the model index, by the conventions of mim and of mmpretrain's hub."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import ROOT

from mmaselect.evaluation.leaderboard import read_published

FOLDERS = (
    'classification', 'segmentation', 'detection', 'depth', 'correspondence', 'label_scarce', 'demo', 'pretrain',
)  # fmt: skip


def load(folder):
    return yaml.safe_load((ROOT / f'configs/{folder}/metafile.yml').read_text())


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_config_has_one_entry(folder):
    content = load(folder)
    names = [model['Name'] for model in content['Models']]
    assert sorted(names) == sorted(path.stem for path in ROOT.glob(f'configs/{folder}/*.py'))
    collections = {collection['Name'] for collection in content['Collections']}
    for model in content['Models']:
        assert model['Config'] == f'configs/{folder}/{model["Name"]}.py'
        assert model['In Collection'] in collections
        length = re.search(r'-(\d+)e_', model['Name'])
        if length:
            assert model['Metadata']['Epochs'] == int(length[1])


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_number_says_whose_it_is(folder):
    """The paper's are marked in the name of the metric; ours have date, commit and seeds; no other may stand there."""
    for model in load(folder)['Models']:
        status = model['Metadata']['Status']
        metrics = {name: value for result in model['Results'] or [] for name, value in result['Metrics'].items()}
        ours = re.match(r'Ours: \d{4}-\d\d-\d\d, commit [0-9a-f]{7}, seeds? [\d, ]+', status)
        published = ('sd35-medium', 'dit-xl-2', 'sit-xl-2', 'sd15', 'sd21', 'sdxl', 'pixart', 'flux', 'sana')
        if model['Name'].startswith(published):
            assert status.startswith('Never run on published weights')
        if not ours:
            assert all('(paper)' in name for name in metrics), model['Name']
        for name, value in metrics.items():
            if '(paper)' in name:
                (dataset,) = {result['Dataset'] for result in model['Results']}
                known = read_published(ROOT / 'configs/published.yml')
                assert value in [
                    entry.mean for entry in known if entry.task.dataset == dataset and 'A-SelecT' in entry.name
                ]


def test_the_index_loads_as_mim_and_mmpretrain_load_it():
    from modelindex.load_model_index import load as load_index

    index = load_index(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert not list(index.check(silent=True) or [])
    names = [model.name for model in index.models]
    assert len(names) == len(set(names)) == sum(len(load(folder)['Models']) for folder in FOLDERS)
    tasks = {result.task for model in index.models for result in model.results or []}
    assert tasks == {
        'Image Classification', 'Semantic Segmentation', 'Semantic Correspondence', 'Object Detection',
        'Depth Estimation',
    }  # fmt: skip
    assert all((ROOT / model.config).is_file() for model in index.models)
