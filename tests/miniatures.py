"""The standard data sets in their official layouts, with every list and class, and a few random images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat

#: Images of each split.
COUNT = 6


def write_image(path, seed, size=(80, 100)):
    """A blurred random image, so that it has low and high frequencies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    assert cv2.imwrite(str(path), cv2.blur(noise, (2 + seed % 3, 2 + seed % 3)))


def write_labels(path, horizon, above, below, size):
    """A label map of two classes, one above the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full(size, below, np.uint8)
    labels[:horizon] = above
    assert cv2.imwrite(str(path), labels)


def write_lists(root, **lists):
    for name, lines in lists.items():
        (root / f'{name}.txt').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


def make_cub(root):
    lists = {'images': [], 'image_class_labels': [], 'train_test_split': []}
    for index in range(1, 2 * COUNT + 1):
        species = (index - 1) % 3 + 1
        name = f'{species:03d}.Species/{index:04d}.jpg'
        write_image(root / 'images' / name, index)
        lists['images'].append(f'{index} {name}')
        lists['image_class_labels'].append(f'{index} {species}')
        lists['train_test_split'].append(f'{index} {int(index <= COUNT)}')
    write_lists(root, **lists)


def make_flowers102(root):
    for index in range(1, 2 * COUNT + 1):
        write_image(root / f'jpg/image_{index:05d}.jpg', index)
    labels = [(index * 17) % 102 + 1 for index in range(2 * COUNT)]
    savemat(root / 'imagelabels.mat', {'labels': np.array([labels])})
    train, test = np.arange(1, COUNT + 1), np.arange(COUNT + 1, 2 * COUNT + 1)
    splits = {'trnid': train[None, : COUNT // 2], 'valid': train[None, COUNT // 2 :], 'tstid': test[None]}
    savemat(root / 'setid.mat', splits)


def make_stanford_cars(root):
    # As in the official file, numbers are uint8.
    kinds = [('relative_im_path', object), ('class', np.uint8), ('test', np.uint8)]
    annotations = np.zeros((1, 2 * COUNT), dtype=kinds)
    for index in range(2 * COUNT):
        name = f'car_ims/{index + 1:06d}.jpg'
        write_image(root / name, index)
        annotations[0, index] = (name, (index * 31) % 196 + 1, index >= COUNT)
    savemat(root / 'cars_annos.mat', {'annotations': annotations})


def make_fgvc_aircraft(root):
    from mmpretrain.datasets.categories import FGVCAIRCRAFT_CATEGORIES

    (root / 'data').mkdir()
    lines = []
    for index in range(2 * COUNT):
        write_image(root / f'data/images/{index:07d}.jpg', index)
        lines.append(f'{index:07d} {FGVCAIRCRAFT_CATEGORIES[index * 13 % 100]}')
    splits = {'train': lines[:3], 'val': lines[3:COUNT], 'trainval': lines[:COUNT], 'test': lines[COUNT:]}
    write_lists(root / 'data', **{f'images_variant_{split}': content for split, content in splits.items()})


#: NABirds' tree has 1,011 classes; here 22 orders, 434 families and species below them, and their 555 leaves.
NABIRDS_INNER = 456


def make_nabirds(root, leaves=555):
    inner = range(1, NABIRDS_INNER)
    tree = [(number, 0 if number <= 22 else (number - 23) % 22 + 1) for number in inner]
    # Every inner class gets a child, so that none of them is a leaf.
    tree += [(NABIRDS_INNER + leaf, 23 + leaf % (NABIRDS_INNER - 23)) for leaf in range(leaves)]
    lists = {
        'hierarchy': [f'{child} {parent}' for child, parent in tree],
        'classes': ['0 Birds', *(f'{child} Name of {child} (Adult, male)' for child, _ in tree)],
        'images': [],
        'image_class_labels': [],
        'train_test_split': [],
    }
    for index in range(2 * COUNT):
        number = NABIRDS_INNER + index * 41
        key, name = f'{index:08x}-99a1-4a67-b940-d419413e23b3', f'{number:04d}/{index:08x}99a14a67b940d419413e23b3.jpg'
        write_image(root / 'images' / name, index)
        lists['images'].append(f'{key} {name}')
        lists['image_class_labels'].append(f'{key} {number}')
        lists['train_test_split'].append(f'{key} {int(index < COUNT)}')
    write_lists(root, **lists)


def make_stanford_dogs(root, labels=None):
    from mmaselect.datasets.stanford_dogs import FOLDERS

    for split, seed in (('train', 0), ('test', 100)):
        numbers = labels or [index * 23 % 120 + 1 for index in range(COUNT)]
        files = np.empty((COUNT, 1), object)
        for index, number in enumerate(numbers):
            folder = FOLDERS[(number - 1) % 120]
            name = f'{folder}/{folder.split("-")[0]}_{seed + index}.jpg'
            write_image(root / 'Images' / name, seed + index)
            files[index, 0] = name
        content = {'file_list': files, 'annotation_list': files, 'labels': np.array(numbers, float)[:, None]}
        savemat(root / f'{split}_list.mat', content)


def make_ade20k(root):
    for split, seed in (('training', 0), ('validation', 100)):
        for index in range(COUNT):
            write_image(root / f'images/{split}/ADE_{index:08d}.jpg', seed + index, (96, 120))
            write_labels(root / f'annotations/{split}/ADE_{index:08d}.png', 30 + 5 * index, index + 1, 0, (96, 120))


def make_cityscapes(root):
    for split, seed in (('train', 0), ('val', 100)):
        for index in range(COUNT):
            name = f'{split}/town/town_{index:06d}_000019'
            write_image(root / f'leftImg8bit/{name}_leftImg8bit.png', seed + index, (96, 128))
            labels = root / f'gtFine/{name}_gtFine_labelTrainIds.png'
            write_labels(labels, 30 + 5 * index, 10, 0, (96, 128))


def make_camvid(root):
    for split, seed in (('train', 0), ('val', 100)):
        for index in range(COUNT):
            write_image(root / f'img_dir/{split}/{index}.png', seed + index, (96, 128))
            write_labels(root / f'ann_dir/{split}/{index}.png', 30 + 5 * index, 0, 3, (96, 128))


def make_folders(root):
    for split, seed in (('train', 0), ('test', 100)):
        for index in range(COUNT):
            # CustomDataset takes its classes from the folders: all ten digits must have one.
            write_image(root / split / str(index) / f'{index}.png', seed + index, (16, 16))
        for digit in range(COUNT, 10):
            (root / split / str(digit)).mkdir(parents=True)


#: Of SPair-71k in miniature.
SPAIR_CATEGORIES = ('cat', 'bus')


def make_spair(root, splits=('trn', 'val', 'test')):
    """Pairs of differing sizes; of 'bus' some points lie outside, or nowhere."""
    import json

    for split in splits:
        names = []
        for number in range(COUNT):
            category = SPAIR_CATEGORIES[number % 2]
            sides, content = [], {'category': category, 'mirror': 0, 'kps_ids': list(range(4))}
            for key, seed, size in (('src', number, (90, 110)), ('trg', number + 50, (100, 80))):
                name = f'2008_{seed:06d}'
                write_image(root / 'JPEGImages' / category / f'{name}.jpg', seed, size)
                content[f'{key}_imname'], content[f'{key}_imsize'] = f'{name}.jpg', [size[1], size[0], 3]
                content[f'{key}_bndbox'] = [10, 20, 60, 70]
                content[f'{key}_kps'] = [[10 + 5 * point + number, 20 + 7 * point] for point in range(4)]
                sides.append(name)
            if number == 1:
                content['trg_kps'][2] = [300, 20]
            names.append(f'{number:06d}-{sides[0]}-{sides[1]}:{category}')
            file = root / 'PairAnnotation' / split / f'{names[-1]}.json'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content), encoding='utf-8')
        (root / 'Layout/large').mkdir(parents=True, exist_ok=True)
        write_lists(root / 'Layout/large', **{split: names})


def make_ddpm(root, classes=21):
    """Images of 64x64 whose brightness says the class, and their label maps."""
    for split, seed in (('train', 0), ('test', 100)):
        for index in range(COUNT):
            path = root / 'real' / split / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng(seed + index)
            labels = np.zeros((64, 64), np.float64)
            labels[10 + index : 40, 12:50] = 1 + index % 3
            labels[45:60, 20:40] = 10
            # Ten pixels of a class are too few for a training, and one row has no label.
            labels[:2, :5], labels[63] = classes - 1, 255
            noise = generator.integers(0, 30, (64, 64, 3))
            cv2.imwrite(str(path), (noise + 20 * np.minimum(labels, 10)[..., None]).clip(0, 255).astype(np.uint8))
            np.save(path.with_suffix('.npy'), labels)


def make_coco(root):
    """Dark images of unlike sizes with one bright rectangle, of COCO's first or last class; the last image has none."""
    import json

    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO['classes']
    for split, seed in (('train2017', 0), ('val2017', 100)):
        categories = [{'id': number, 'name': name} for number, name in enumerate(classes, 1)]
        content = {'images': [], 'annotations': [], 'categories': categories}
        for index in range(COUNT):
            height, width = ((120, 100), (90, 140))[index % 2]
            generator = np.random.default_rng(seed + index)
            # Each has a colour of its own: else nothing would tell one from another.
            image = generator.integers(0, 30, (height, width, 3), np.uint8)
            image += generator.integers(0, 45, 3, np.uint8)
            name, box = f'{seed + index:012d}.jpg', [10 + 5 * index, 20, 40, 48]
            if index < COUNT - 1:
                image[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] += 180
                content['annotations'].append(
                    dict(id=index + 1, image_id=index + 1, category_id=(1, 80)[index % 2], bbox=box, iscrowd=0,
                         area=box[2] * box[3], segmentation=[])
                )  # fmt: skip
            (root / split).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / split / name), image)
            content['images'].append(dict(id=index + 1, file_name=name, height=height, width=width))
        file = root / f'annotations/instances_{split}.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content), encoding='utf-8')


def make_nyu(root):
    """Images at NYU's size, bright at the bottom; what is bright is near, and the depth of the border unknown."""
    for split, seed in (('train', 0), ('test', 100)):
        for index in range(COUNT):
            near = np.linspace(0, 1, 480)[:, None] * np.ones(640)
            noise = np.random.default_rng(seed + index).integers(0, 30, (480, 640, 3))
            depth = (1000 + 3000 * (1 - near)).astype(np.uint16)
            depth[:8] = depth[-8:] = depth[:, :8] = depth[:, -8:] = 0
            image = noise + 220 * near[..., None]
            for folder, suffix, content in (('images', 'jpg', image.astype(np.uint8)), ('annotations', 'png', depth)):
                path = root / folder / split / f'kitchen_{seed + index:04d}.{suffix}'
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), content)


MAKERS = {
    'SPair71k': make_spair,
    'DatasetDDPM': make_ddpm,
    'CUB': make_cub,
    'Flowers102': make_flowers102,
    'StanfordCars': make_stanford_cars,
    'FGVCAircraft': make_fgvc_aircraft,
    'NABirds': make_nabirds,
    'StanfordDogs': make_stanford_dogs,
    'ADE20KDataset': make_ade20k,
    'BaseSegDataset': make_camvid,
    'CityscapesDataset': make_cityscapes,
    'CocoDataset': make_coco,
    'NYUDataset': make_nyu,
    'CustomDataset': make_folders,
}


def make(name: str, root: Path, **kwargs) -> Path:
    """Writes a miniature of a data set.

    Args:
        name: Its type in a config.
        root: Its ``data_root``, made if it does not exist.
        **kwargs: Of its maker.
    """
    root.mkdir(parents=True, exist_ok=True)
    MAKERS[name](root, **kwargs)
    return root
