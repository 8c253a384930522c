"""What the standard data sets look like on disk, and how many classes and images they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mmengine.fileio import LocalBackend, get_file_backend

from mmaselect.errors import InputError

GUIDE = 'docs/en/datasets.md'


@dataclass(frozen=True)
class Layout:
    """A data set as its authors publish it.

    Attributes:
        title: Its name in tables.
        num_classes: Classes that a head needs.
        images: Images of each split.
        trees: Folders (with a slash) and files below ``data_root``. Where a data set comes in several forms, one tree
            for each; ``{split}`` stands for the split in use.
        unit: What ``images`` counts.
    """

    title: str
    num_classes: int
    images: Mapping[str, int]
    trees: tuple[tuple[str, ...], ...]
    unit: str = 'images'


#: By the type of the data set in a config. Numbers of images: the data sets' own pages and papers.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        'CUB': Layout(
            'CUB-200-2011',
            200,
            {'train': 5994, 'test': 5794},
            (('images/', 'images.txt', 'image_class_labels.txt', 'train_test_split.txt'),),
        ),
        'Flowers102': Layout(
            'Oxford Flowers-102',
            102,
            {'train': 1020, 'val': 1020, 'trainval': 2040, 'test': 6149},
            (('jpg/', 'imagelabels.mat', 'setid.mat'),),
        ),
        'StanfordCars': Layout(
            'Stanford Cars',
            196,
            {'train': 8144, 'test': 8041},
            (
                ('car_ims/', 'cars_annos.mat'),
                (
                    'cars_train/',
                    'cars_test/',
                    'devkit/cars_train_annos.mat',
                    'devkit/cars_test_annos_withlabels.mat',
                ),
            ),
        ),
        'FGVCAircraft': Layout(
            'FGVC-Aircraft',
            100,
            {'train': 3334, 'val': 3333, 'trainval': 6667, 'test': 3333},
            (('data/images/', 'data/images_variant_{split}.txt'),),
        ),
        'NABirds': Layout(
            'NABirds',
            555,
            {'train': 23929, 'test': 24633},
            (
                (
                    'images/',
                    'images.txt',
                    'image_class_labels.txt',
                    'train_test_split.txt',
                    'classes.txt',
                    'hierarchy.txt',
                ),
            ),
        ),
        'StanfordDogs': Layout(
            'Stanford Dogs', 120, {'train': 12000, 'test': 8580}, (('Images/', '{split}_list.mat'),)
        ),
        'ADE20KDataset': Layout(
            'ADE20K',
            150,
            {'training': 20210, 'validation': 2000},
            (('images/training/', 'images/validation/', 'annotations/training/', 'annotations/validation/'),),
        ),
        'SPair71k': Layout(
            'SPair-71k',
            18,
            {'trn': 53340, 'val': 5384, 'test': 12234},
            (('JPEGImages/', 'PairAnnotation/{split}/', 'Layout/large/{split}.txt'),),
            'pairs',
        ),
    }
)


def check_layout(name: str, data_root: str, split: str | None = None) -> None:
    """Checks that a data set lies where a config says, before its own code stumbles over what is missing.

    Args:
        name: Type of the data set, a key of :data:`LAYOUTS`.
        data_root: Its folder; one in a remote store is not checked.
        split: The split in use, where files are named after it.

    Raises:
        InputError: If the folder, or one of its parts, is not there; one line with what was expected where.
    """
    # What lies in a remote store is asked for by the data set itself: not every store can list folders.
    if not isinstance(get_file_backend(data_root, enable_singleton=True), LocalBackend):
        return
    root = Path(data_root).expanduser()

    def missing(tree: tuple[str, ...]) -> list[str]:
        found = {True: Path.is_dir, False: Path.is_file}
        return [part for part in tree if not found[part.endswith('/')](root / part)]

    trees = [tuple(part.format(split=split) for part in tree) for tree in LAYOUTS[name].trees]
    lacks = [missing(tree) for tree in trees]
    if not all(lacks):
        return
    expected = ' or '.join(', '.join(tree) for tree in trees)
    if not root.is_dir():
        raise InputError(f'{name}: data_root={data_root!r} is not a folder; expected there: {expected} (see {GUIDE})')
    nearest = min(lacks, key=len)
    raise InputError(f'{name}: data_root={data_root!r} lacks {", ".join(nearest)}; expected: {expected} (see {GUIDE})')


def check_images(name: str, data_root: str, split: str, found: int) -> str | None:
    """One sentence if a split is not of its published size, else None.

    Args:
        name: Type of the data set.
        data_root: Its folder.
        split: The split.
        found: Images found in it.
    """
    published = LAYOUTS[name].images[split]
    if found == published:
        return None
    return (
        f'{name}: split {split!r} of {data_root!r} has {found} {LAYOUTS[name].unit}, the published one {published}: '
        'results are not comparable with others on this data set'
    )
