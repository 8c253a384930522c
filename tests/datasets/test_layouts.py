"""The six fine-grained data sets, from miniatures in their official layouts."""

from __future__ import annotations

import re
import shutil
from itertools import zip_longest
from pathlib import Path

import pytest
from conftest import ROOT, error_line
from miniatures import COUNT, NABIRDS_INNER, make
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope

from mmaselect.datasets import LAYOUTS, check_layout
from mmaselect.errors import InputError

FGVC = ('CUB', 'Flowers102', 'StanfordCars', 'FGVCAircraft', 'NABirds', 'StanfordDogs')


def build(name, root, split):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmpretrain.datasets  # noqa: F401

        return DATASETS.build(dict(type=name, data_root=str(root), split=split))


def splits(name):
    """Those that the configs use."""
    return ('trainval', 'test') if 'trainval' in LAYOUTS[name].images else ('train', 'test')


@pytest.mark.parametrize('name', FGVC)
def test_each_is_built_from_its_official_layout(name, tmp_path):
    root = make(name, tmp_path)
    check_layout(name, str(root), 'test')
    train, test = (build(name, root, split) for split in splits(name))
    assert len(train) == len(test) == COUNT
    paths = [dataset.get_data_info(index)['img_path'] for dataset in (train, test) for index in range(COUNT)]
    assert len(set(paths)) == 2 * COUNT
    assert all(Path(path).is_relative_to(root) and Path(path).read_bytes()[:3] == b'\xff\xd8\xff' for path in paths)
    labels = [int(label) for dataset in (train, test) for label in dataset.get_gt_labels()]
    assert all(0 <= label < LAYOUTS[name].num_classes for label in labels)
    if name != 'Flowers102':  # mmpretrain knows no names of its classes
        assert len(train.metainfo['classes']) == LAYOUTS[name].num_classes


def test_nabirds_labels_are_the_leaves_of_its_tree(tmp_path):
    dataset = build('NABirds', make('NABirds', tmp_path), 'test')
    # Every 41st leaf has an image; the leaves are numbered in the order of their classes.
    assert [int(label) for label in dataset.get_gt_labels()] == [41 * index for index in range(COUNT, 2 * COUNT)]
    for index in range(COUNT):
        info = dataset.get_data_info(index)
        number = int(info['img_path'].split('/')[-2])
        assert dataset.metainfo['classes'][info['gt_label']] == f'Name of {number} (Adult, male)'
        assert number == NABIRDS_INNER + info['gt_label']
    assert dataset.test_mode
    assert 'Number of categories: \t555' in repr(dataset)


def test_stanford_dogs_labels_are_those_of_the_folders(tmp_path):
    dataset = build('StanfordDogs', make('StanfordDogs', tmp_path), 'train')
    assert dataset.metainfo['classes'][:2] == ('Chihuahua', 'Japanese spaniel')
    assert dataset.metainfo['classes'][-1] == 'African hunting dog'
    for index in range(COUNT):
        info = dataset.get_data_info(index)
        folder = info['img_path'].split('/')[-2]
        assert folder.split('-', 1)[1].replace('_', ' ') == dataset.metainfo['classes'][info['gt_label']]
    # ImageNet has the same breeds in the same order, and one more.
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    dogs = [*IMAGENET_CATEGORIES[151:269], *IMAGENET_CATEGORIES[273:276]]
    dogs = [name for name in dogs if not name.startswith('dalmatian')]
    assert len(dogs) == 120
    for ours, imagenet in zip_longest(dataset.metainfo['classes'], dogs):
        assert ours.lower().replace('-', ' ') in imagenet.lower().replace('-', ' ')


@pytest.mark.parametrize('name,split', [('NABirds', 'train'), ('StanfordDogs', 'test')])
def test_a_split_that_is_not_the_published_one_is_said(name, split, tmp_path, caplog):
    root = make(name, tmp_path)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        build(name, root, split)
    finally:
        logger.removeHandler(caplog.handler)
    published = {'NABirds': 23929, 'StanfordDogs': 8580}[name]
    expected = f'has {COUNT} images, the published one {published}: results are not comparable'
    assert expected in caplog.text


@pytest.mark.parametrize('name', sorted(LAYOUTS))
def test_a_wrong_folder_and_a_missing_list(name, tmp_path):
    split = 'test' if name != 'ADE20KDataset' else None
    with pytest.raises(InputError, match=rf"^{name}: data_root='/no/where' is not a folder; expected there: \S+"):
        check_layout(name, '/no/where', split)
    root = make(name, tmp_path / 'whole')
    parts = [part.format(split=split) for part in LAYOUTS[name].trees[0]]
    for part in parts:
        spoilt = tmp_path / part.replace('/', '_')
        shutil.copytree(root, spoilt)
        shutil.rmtree(spoilt / part) if part.endswith('/') else (spoilt / part).unlink()
        with pytest.raises(InputError) as caught:
            check_layout(name, str(spoilt), split)
        line = str(caught.value)
        assert line.startswith(f'{name}: data_root={str(spoilt)!r} lacks {part}; expected: ')
        assert all(other in line for other in parts)
        assert 'docs/en/datasets.md' in line
        assert '\n' not in line


def test_our_classes_check_their_own_folder(tmp_path):
    """Under any toolbox's tools, not under ours alone."""
    for name in ('NABirds', 'StanfordDogs'):
        with pytest.raises(InputError, match=f"{name}: data_root='/no/where' is not a folder"):
            build(name, '/no/where', 'train')
        with pytest.raises(InputError, match="split='val' is not known; choose from: train, test"):
            build(name, tmp_path, 'val')


def test_a_number_of_classes_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match='554 classes without children, expected 555'):
        build('NABirds', make('NABirds', tmp_path / 'birds', leaves=554), 'train')
    with pytest.raises(InputError, match=r'label 121.0; expected a label from 1 to 120'):
        build('StanfordDogs', make('StanfordDogs', tmp_path / 'dogs', labels=[1, 2, 3, 4, 120, 121]), 'train')


@pytest.mark.parametrize(
    'file,old,new,message',
    [
        ('images.txt', None, 'lonely\n', r"line 1 of images.txt .*'lonely', is not an entry and its value"),
        ('classes.txt', '1 Name of 1 ', '0 Name of 1 ', r'line 2 of classes.txt .* comes twice'),
        ('image_class_labels.txt', None, '', r'images.txt and image_class_labels.txt .* same images; 12 differ'),
        ('train_test_split.txt', 'e23b3 1', 'e23b3 yes', r"is_training 'yes'; expected a class without children"),
        ('image_class_labels.txt', 'e23b3 456', 'e23b3 7', r"has class '7' and is_training '1'; expected a class"),
    ],
)
def test_broken_lists_of_nabirds(file, old, new, message, tmp_path):
    root = make('NABirds', tmp_path)
    text = (root / file).read_text()
    assert old is None or old in text
    (root / file).write_text(new if old is None else text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        build('NABirds', root, 'train')


def test_broken_lists_of_stanford_dogs(tmp_path):
    from scipy.io import savemat

    root = make('StanfordDogs', tmp_path)
    file = root / 'train_list.mat'
    good = file.read_bytes()
    for content in (b'', good[:200], b'<html>not found</html>'):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r'train_list.mat is not a readable list \(a MATLAB file with file_list'):
            build('StanfordDogs', root, 'train')
    savemat(file, {'file_list': ['a', 'b'], 'labels': [1.0]})
    with pytest.raises(InputError, match='has 2 images and 1 labels'):
        build('StanfordDogs', root, 'train')
    savemat(file, {'file_list': ['n02085782-Japanese_spaniel/x.jpg'], 'labels': [1.0]})
    with pytest.raises(InputError, match=r"the label 1(.0)?; expected folder 'n02085620-Chihuahua'"):
        build('StanfordDogs', root, 'train')


@pytest.mark.parametrize('dataset', ['cub', 'flowers102', 'stanford-cars', 'fgvc-aircraft', 'nabirds', 'stanford-dogs'])
def test_the_tools_say_what_is_missing_in_one_line(dataset, call_tool, tmp_path):
    config = ROOT / f'configs/classification/dit-xl-2_linear_4xb32-100e_{dataset}-256px.py'
    name = Config.fromfile(config).train_dataloader.dataset.type
    done = call_tool('train.py', config, '--work-dir', tmp_path / 'out')
    assert re.search(rf"{name}: data_root='.*' is not a folder; expected there: ", error_line(done))
    root = make(name, tmp_path / 'data')
    data = [f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val', 'test')]
    done = call_tool(
        'train.py', config, '--work-dir', tmp_path / 'out', '--cfg-options', *data, 'model.head.num_classes=99'
    )
    expected = (
        f'model.head.num_classes=99 does not fit train_dataloader: {name} has {LAYOUTS[name].num_classes} classes'
    )
    assert expected in error_line(done)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', sorted(LAYOUTS))
def test_the_guide_shows_every_tree_and_number(name):
    guide = (ROOT / 'docs/en/datasets.md').read_text()
    layout = LAYOUTS[name]
    row = next(line for line in guide.splitlines() if line.startswith(f'| {layout.title} |'))
    assert f'`{name}`' in row
    assert f'| {layout.num_classes} |' in row
    used = next(split for split in ('trainval', 'train', 'training', 'trn') if split in layout.images)
    assert f'{layout.images[used]:,}' in row
    assert f'{layout.images.get("test") or layout.images["validation"]:,}' in row
    section = guide.split(f'## {layout.title}\n')[1].split('\n## ')[0]
    for part in (part for tree in layout.trees for part in tree):
        # The last name of each part, with its slash if it is a folder.
        last = re.search(r'[^/]+/?$', part)[0].replace('{split}', 'test')
        assert last in section, part


def test_the_browser(call_tool, tmp_path):
    import cv2

    for name, config, size in (
        ('StanfordDogs', 'classification/sit-xl-2_attention_4xb32-28e_stanford-dogs-256px.py', 256),
        ('BaseSegDataset', 'segmentation/dit-micro_upernet_bs8-200_camvid-192x256.py', 128),
    ):
        root, out = make(name, tmp_path / name), tmp_path / f'{name}-pictures'
        done = call_tool(
            'misc/browse_dataset.py', ROOT / 'configs' / config, '-o', out, '--not-show', '-n', 2,
            '--cfg-options', f'train_dataloader.dataset.data_root={root}',
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f'{out}: 2 pictures' in done.stdout
        pictures = [cv2.imread(str(path)) for path in sorted(out.iterdir())]
        assert [picture.shape for picture in pictures] == [(size, size, 3)] * 2
    config = ROOT / 'configs/classification/sit-xl-2_attention_4xb32-28e_stanford-dogs-256px.py'
    done = call_tool('misc/browse_dataset.py', config, '-o', tmp_path / 'x', '--not-show')
    assert "StanfordDogs: data_root='data/stanford_dogs' is not a folder" in error_line(done)
    assert '--show-number 0 is not valid' in error_line(call_tool('misc/browse_dataset.py', config, '-o', 'x', '-n', 0))
    assert '--not-show without --output-dir' in error_line(call_tool('misc/browse_dataset.py', config, '--not-show'))


def test_a_remote_store_is_not_asked_for_folders():
    check_layout('CUB', 'http://example.invalid/CUB_200_2011')
