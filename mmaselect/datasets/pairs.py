"""Pairs of images with points that belong together: any list of them, SPair-71k, and photographs under known warps."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmaselect.datasets.layouts import LAYOUTS, check_images, check_layout
from mmaselect.errors import InputError, check_choice, check_count, check_number, one_line
from mmaselect.tasks.correspondence import outside_of

#: Points of an image, as shares of its size, that are sent through the transforms beside it: where they come out says
#: where everything else does. The fifth shows whether the others were clipped.
REFERENCES = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.25, 0.4]])


@TRANSFORMS.register_module()
class PackImage:
    """The last transform of an image of a pair: image and points to tensors."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Gives ``inputs``, (3, H, W) uint8, and ``data_samples``."""
        image = np.ascontiguousarray(results['img'].transpose(2, 0, 1))
        meta = {key: results[key] for key in ('img_path', 'ori_shape', 'img_shape') if key in results}
        sample = BaseDataElement(metainfo=meta)
        for key in ('gt_label', 'gt_keypoints'):
            if key in results:
                sample.set_data({key: torch.as_tensor(results[key])})
        return {'inputs': torch.from_numpy(image), 'data_samples': sample}


@DATASETS.register_module()
class PairDataset(BaseDataset):
    """Pairs from a list in OpenMMLab's format.

    ``ann_file`` is JSON: ``{"metainfo": {}, "data_list": [...]}``, an entry for each pair, with ``source`` and
    ``target`` (files below ``data_prefix['img_path']``), ``source_points`` and ``target_points`` ([[x, y], ...], in
    pixels from 0 to width and height, the same number of both), and where known ``target_box`` ([x1, y1, x2, y2]) and
    ``category``.

    Each image of a pair goes through the pipeline by itself. Where its points come out is found by sending five points
    of known place along as ``gt_keypoints``: they are right under every transform that is affine and moves keypoints,
    as mmcv's ``Resize``, ``RandomFlip`` and ``Pad`` do.

    A point that lies outside its image, or is no number, is dropped with its partner; a pair that has none left is
    dropped. Both are counted and listed in the log.

    Args:
        ann_file: The list.
        **kwargs: As of mmengine's ``BaseDataset``: ``data_root``, ``data_prefix``, ``pipeline``, ``indices``, ...

    Raises:
        InputError: If the list cannot be read, an image is missing, or no pair is left.
    """

    METAINFO: dict = {'dataset_name': 'pairs'}

    def __init__(self, ann_file: str = '', **kwargs: Any) -> None:
        # Its transforms are registered by this.
        import mmcv.transforms  # noqa: F401

        super().__init__(ann_file=ann_file, **kwargs)

    # --- the list ------------------------------------------------------------------------------------------------

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the pairs, and drops what cannot be used."""
        pairs = self.read_pairs()
        missing = [path for path in _images_of(pairs) if not Path(path).is_file()]
        if missing:
            raise InputError(f'{self.title}: {len(missing)} images are missing, the first is {missing[0]}')
        dropped, odd = [], []
        for pair in pairs:
            for side in ('source', 'target'):
                pair.setdefault(f'{side}_size', None)
                if pair[f'{side}_size'] is None:
                    pair[f'{side}_size'] = _size_of(pair[side])
            before = len(pair['source_points'])
            inside = ~(outside_of(pair['source_points'], pair['source_size'])
                       | outside_of(pair['target_points'], pair['target_size']))  # fmt: skip
            pair['source_points'], pair['target_points'] = pair['source_points'][inside], pair['target_points'][inside]
            if before > int(inside.sum()):
                odd.append(f'{pair["name"]} ({before - int(inside.sum())})')
            if not inside.any():
                dropped.append(pair['name'])
        self.tell('points outside their image, or none at all, are dropped', odd)
        self.tell('pairs without common points are dropped', dropped)
        kept = [pair for pair in pairs if len(pair['source_points'])]
        if not kept:
            raise InputError(f'{self.title}: no pair has points')
        return kept

    @property
    def title(self) -> str:
        """What the data set is called in messages."""
        return f'{type(self).__name__} {self.ann_file or self.data_root}'

    def tell(self, what: str, found: Sequence[str]) -> None:
        """Lists something in the log, with its number, if there is any."""
        if found:
            listed = ', '.join(found[:20]) + (', ...' if len(found) > 20 else '')
            MMLogger.get_current_instance().warning(f'{self.title}: {len(found)} {what}: {listed}')

    def read_pairs(self) -> list[dict[str, Any]]:
        """Reads what ``ann_file`` lists: dicts with ``name``, ``category``, and of ``source`` and ``target`` the path
        and ``_points`` (N, 2), and where known their ``_size`` (width, height), and ``target_box``.
        """
        entries = read_json(self.ann_file, 'data_list')
        root = Path(self.data_prefix.get('img_path', self.data_root or ''))
        pairs = []
        for number, entry in enumerate(entries):
            try:
                pair: dict[str, Any] = {side: str(root / entry[side]) for side in ('source', 'target')}
                pair.update(points_of(entry['source_points'], entry['target_points']))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f'{self.title}: entry {number} is not a pair: {one_line(error)}') from error
            box = entry.get('target_box')
            pair.update(name=f'pair {number}', category=str(entry.get('category', 'all')), target_box=box)
            pairs.append(pair)
        return pairs

    # --- samples -------------------------------------------------------------------------------------------------

    def prepare_data(self, idx: int) -> dict[str, Any] | None:
        """A pair: ``inputs`` are a dict of ``source`` and ``target``; None if an image cannot be read."""
        pair = self.get_data_info(idx)
        sample = BaseDataElement(metainfo={key: pair[key] for key in ('name', 'category', 'target_box')})
        inputs = {}
        for side in ('source', 'target'):
            seen = self.look(pair[side], pair.get(f'{side}_warp'))
            if seen is None:
                return None
            inputs[side] = seen['inputs']
            matrix = _affine(seen['data_samples'].gt_keypoints[0, :, :2], pair[f'{side}_size'], pair[side])
            warped = f' under {pair[f"{side}_warp"]}' if pair.get(f'{side}_warp') is not None else ''
            sample.set_metainfo({side: pair[side] + warped, f'{side}_size': pair[f'{side}_size']})
            sample.set_data({f'{side}_points': pair[f'{side}_points'], f'{side}_matrix': matrix})
        return {'inputs': inputs, 'data_samples': sample}

    def look(self, path: str, warp: np.ndarray | None = None) -> dict[str, Any] | None:
        """Sends an image through the pipeline, with the points of :data:`REFERENCES`.

        Args:
            path: Of the image.
            warp: (3, 3), takes its pixels to those of the image that is wanted.
        """
        results: dict[str, Any] | None = {'img_path': path}
        for transform in self.pipeline.transforms:
            results = transform(results)
            if results is None:
                return None
            if 'img' in results and 'gt_keypoints' not in results:
                height, width = results['img'].shape[:2]
                # As mmcv has them: x, y and whether it is visible, of one instance.
                results['gt_keypoints'] = np.insert(REFERENCES * (width, height), 2, 1, axis=1)[None]
                if warp is not None:
                    results['img'] = _warp(results['img'], warp)
        return results

    @property
    def single_images(self) -> SingleImages:
        """The images of the pairs, each once: what a timestep is selected on."""
        return SingleImages(self)


class SingleImages:
    """The images of pairs as a data set of its own, each once, with its category as ``gt_label``.

    Args:
        pairs: The pairs.
    """

    def __init__(self, pairs: PairDataset) -> None:
        self.pipeline = pairs.pipeline
        categories: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        for index in range(len(pairs)):
            pair = pairs.get_data_info(index)
            label = categories.setdefault(pair['category'], len(categories))
            for side in ('source', 'target'):
                self.labels.setdefault(pair[side], label)
        self.paths = list(self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Path and label of an image."""
        return {'img_path': self.paths[index], 'gt_label': self.labels[self.paths[index]], 'sample_idx': index}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pipeline(self.get_data_info(index))


@DATASETS.register_module()
class SPair71k(PairDataset):
    """`SPair-71k <https://cvlab.postech.ac.kr/research/SPair-71k/>`_ (Min et al., 2019), 18 categories: ::

        SPair-71k
        ├── JPEGImages/aeroplane/*.jpg, ...
        ├── PairAnnotation/{trn,val,test}/*:aeroplane.json
        └── Layout/large/{trn,val,test}.txt

    The numbers of its files name pixels; a point is the middle of its pixel.

    Args:
        data_root: The folder above.
        split: ``'trn'`` (53,340 pairs), ``'val'`` (5,384) or ``'test'`` (12,234).
        categories: Some of them; None for all.
        **kwargs: As of :class:`PairDataset`.

    Raises:
        InputError: If a file is missing or cannot be read, or a category does not exist.
    """

    METAINFO: dict = {
        'dataset_name': 'SPair-71k',
        'categories': (
            'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'dog', 'horse',
            'motorbike', 'person', 'pottedplant', 'sheep', 'train', 'tvmonitor',
        ),
    }  # fmt: skip

    def __init__(
        self, data_root: str, split: str = 'test', categories: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        check_choice(split, 'split', LAYOUTS['SPair71k'].images)
        for category in categories or ():
            check_choice(category, 'categories', self.METAINFO['categories'])
        check_layout('SPair71k', data_root, split)
        self.split, self.categories = split, tuple(categories or self.METAINFO['categories'])
        super().__init__(data_root=data_root, **kwargs)

    @property
    def title(self) -> str:
        """With the split."""
        return f'SPair71k {self.data_root}, split {self.split!r}'

    def read_pairs(self) -> list[dict[str, Any]]:
        """Reads the pairs that the split's layout lists."""
        root = Path(self.data_root)
        layout = root / 'Layout' / 'large' / f'{self.split}.txt'
        names = layout.read_text(encoding='utf-8').split()
        warning = check_images('SPair71k', str(root), self.split, len(names))
        if warning:
            MMLogger.get_current_instance().warning(warning)
        pairs = []
        for name in names:
            category = name.rpartition(':')[2]
            if category not in self.METAINFO['categories']:
                raise InputError(f'{layout}: {name[:80]!r} is not NUMBER-SOURCE-TARGET:CATEGORY')
            if category in self.categories:
                pairs.append(self._read(root, name, category))
        found = Counter(pair['category'] for pair in pairs)
        self.tell('categories have no pair', [name for name in self.categories if not found[name]])
        return pairs

    def _read(self, root: Path, name: str, category: str) -> dict[str, Any]:
        file = root / 'PairAnnotation' / self.split / f'{name}.json'
        content = read_json(file)
        try:
            folder = root / 'JPEGImages' / category
            pair: dict[str, Any] = {**points_of(content['src_kps'], content['trg_kps'], 0.5)}
            for side, key in (('source', 'src'), ('target', 'trg')):
                pair[side] = str(folder / content[f'{key}_imname'])
                pair[f'{side}_size'] = tuple(map(float, content[f'{key}_imsize'][:2]))
            pair.update(name=name, category=category, target_box=[float(one) for one in content['trg_bndbox']])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f'{file} is not a pair of SPair-71k: {one_line(error)}') from error
        return pair


@DATASETS.register_module()
class WarpedPairs(PairDataset):
    """Photographs and themselves under known warps: where every point must be found is known exactly.

    A warp is a homography: it turns, scales and shifts the image around its middle, then moves its corners. What comes
    from outside is grey.

    Args:
        data_root: A folder of photographs, searched through with all below it.
        num_points: Of each pair, on a regular grid with a random shift; those that leave the image are left out.
        rotate: Largest angle, in degrees.
        scale: Smallest and largest factor.
        shift: Largest, as a share of width and height.
        perspective: How far corners are moved, as a share of width and height; 0 for an affine map.
        warps: Of each photograph.
        seed: Of the warps.
        **kwargs: As of :class:`PairDataset`; ``indices`` takes some of the pairs.

    Raises:
        InputError: If an argument is out of range, or there are no photographs.
    """

    METAINFO: dict = {'dataset_name': 'warped pairs'}

    def __init__(
        self, data_root: str, num_points: int = 16, rotate: float = 20, scale: Sequence[float] = (0.8, 1.25),
        shift: float = 0.1, perspective: float = 0.08, warps: int = 1, seed: int = 0, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_count(num_points, 'num_points')
        check_count(warps, 'warps')
        check_count(seed, 'seed', 0)
        check_number(rotate, 'rotate', 0, 180)
        check_number(shift, 'shift', 0, 1)
        check_number(perspective, 'perspective', 0, 0.4)
        if not isinstance(scale, (list, tuple)) or len(scale) != 2:
            raise InputError(f'scale={scale!r} is not valid: give the smallest and the largest factor')
        for factor in scale:
            check_number(factor, 'scale', 0, open_low=True)
        self.num_points, self.warps, self.seed = num_points, warps, seed
        self.ranges = (rotate, tuple(scale), shift, perspective)
        super().__init__(data_root=data_root, **kwargs)

    def read_pairs(self) -> list[dict[str, Any]]:
        """Draws a warp and points for each photograph."""
        from mmaselect.images import EXTENSIONS

        root = Path(self.data_prefix.get('img_path') or self.data_root)
        files = sorted(path for path in root.rglob('*') if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(f'WarpedPairs: data_root={str(root)!r} has no photographs')
        pairs = []
        for number, (file, draw) in enumerate((file, draw) for file in files for draw in range(self.warps)):
            generator, size = np.random.default_rng([self.seed, number]), _size_of(str(file))
            warp = draw_warp(generator, size, *self.ranges)
            side = max(1, round(self.num_points**0.5))
            grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
            points = (grid + generator.uniform(0, 1, grid.shape)) / side * size
            pair: dict[str, Any] = dict(
                name=f'{file.name}, warp {draw}', category='all', target_warp=warp, target_box=None
            )
            pair.update(source=str(file), target=str(file), source_size=size, target_size=size)
            there = move(warp, points)
            inside = ~outside_of(torch.from_numpy(there), size).numpy()
            pairs.append({**pair, **points_of(points[inside], there[inside])})
        return pairs


def draw_warp(
    generator: np.random.Generator, size: tuple[float, float], rotate: float, scale: Sequence[float], shift: float,
    perspective: float,
) -> np.ndarray:  # fmt: skip
    """Draws a homography (3, 3) of an image of ``size`` (width, height); the ranges are those of
    :class:`WarpedPairs`.
    """
    import cv2

    corners, middle = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size, np.array(size) / 2
    angle, factor = np.deg2rad(generator.uniform(-rotate, rotate)), np.exp(generator.uniform(*np.log(scale)))
    turn = factor * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    there = (corners - middle) @ turn + middle + generator.uniform(-shift, shift, 2) * size
    there = there + generator.uniform(-perspective, perspective, (4, 2)) * size
    return cv2.getPerspectiveTransform(corners.astype(np.float32), there.astype(np.float32))


def move(warp: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 2) under a homography (3, 3)."""
    moved = np.concatenate([points, np.ones((len(points), 1))], 1) @ warp.T
    return moved[:, :2] / moved[:, 2:]


def _warp(image: np.ndarray, warp: np.ndarray) -> np.ndarray:
    import cv2

    # OpenCV's pixels have their middles at whole numbers, ours at halves.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = np.linalg.inv(half) @ warp @ half
    height, width = image.shape[:2]
    return cv2.warpPerspective(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(127, 127, 127))


def points_of(source: object, target: object, shift: float = 0.0) -> dict[str, Tensor]:
    """``source_points`` and ``target_points``, (N, 2) float32, both moved by ``shift``.

    Raises:
        ValueError: If they are no points, or not as many.
    """
    pair = [torch.as_tensor(np.asarray(one, np.float32).reshape(-1, 2)) + shift for one in (source, target)]
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f'{len(pair[0])} points in the source, {len(pair[1])} in the target')
    return {'source_points': pair[0], 'target_points': pair[1]}


def read_json(path: str | Path, field: str | None = None) -> Any:
    """Reads a JSON file of a dict, or one field of it.

    Raises:
        InputError: If it is not there, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        return copy.copy(content if field is None else content[field])
    except FileNotFoundError as error:
        raise InputError(f'{path} is missing') from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path} cannot be read as JSON{f" with {field}" if field else ""}: {error!r}') from error


def _images_of(pairs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(pair[side] for pair in pairs for side in ('source', 'target')))


def _size_of(path: str) -> tuple[float, float]:
    """Width and height of an image, from its header, the right side up."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as file:
            lying = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = file.size[::-1] if lying else file.size
            return float(width), float(height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f'{path} cannot be read as an image: {one_line(error)}') from error


def _affine(moved: Tensor, size: tuple[float, float], path: str) -> Tensor:
    """The affine map (2, 3), in pixels, that took :data:`REFERENCES` to where they are.

    Raises:
        InputError: If there is none.
    """
    points = np.concatenate([REFERENCES * size, np.ones((len(REFERENCES), 1))], 1)
    solution = np.linalg.lstsq(points, moved.double().numpy(), rcond=None)[0]
    if np.abs(points @ solution - moved.double().numpy()).max() > 0.01:
        raise InputError(f'the pipeline moves the points of {path} by more than an affine transform: leave out crops')
    return torch.from_numpy(solution.T)
