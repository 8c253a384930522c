"""``PCK``: the percentage of correct keypoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

from mmaselect.errors import InputError, check_choice, check_number
from mmaselect.tasks.correspondence import pck

#: What a distance is compared with.
SIDES = ('bbox', 'img')


@METRICS.register_module()
class PCK(BaseMetric):
    """Percentage of correct keypoints: points found at most ``threshold * max(width, height)`` away, equality included.

    Width and height are those of the target's bounding box (``bbox``) or image (``img``), in its own pixels. Each is
    averaged over points, over images (the mean of each pair, then over pairs), and over categories (the mean over the
    points of each, then over categories): ``PCK/bbox_0.1/point``, ``.../image``, ``.../category``. Of published
    numbers, DIFT's, DiTF's and GDF's are ``bbox@0.1``, per point; GeoAware-SC counts a distance that equals the
    threshold as wrong.

    The log has a table by category, and the massive channels that were left out.

    Args:
        thresholds: In (0, 1].
        by: ``'bbox'``, ``'img'``, or both.
        **kwargs: As of mmengine's ``BaseMetric``.

    Raises:
        InputError: If an argument is out of range; when called, if a pair has no box.
    """

    default_prefix = 'PCK'

    def __init__(
        self, thresholds: Sequence[float] = (0.05, 0.1, 0.15), by: Sequence[str] = SIDES, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, values in (('thresholds', thresholds), ('by', by)):
            if not isinstance(values, (list, tuple)) or not values:
                raise InputError(f'{name}={values!r} is not valid: give a list')
        for threshold in thresholds:
            check_number(threshold, 'thresholds', 0, 1, open_low=True)
        for side in by:
            check_choice(side, 'by', SIDES)
        self.thresholds, self.by = tuple(thresholds), tuple(by)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Measures the distances of a batch."""
        for sample in data_samples:
            lengths, box = {'img': max(sample['target_size'])}, sample.get('target_box')
            if 'bbox' in self.by:
                if box is None:
                    raise InputError(f"{sample['name']} has no target_box: set by=('img',) of the metric PCK")
                lengths['bbox'] = max(box[2] - box[0], box[3] - box[1])
            distances = (sample['pred_points'] - sample['target_points'].cpu()).double().norm(dim=1)
            self.results.append(
                dict(distances=distances.tolist(), lengths=lengths, category=sample['category'],
                     discarded=sample.get('discarded') or [])
            )  # fmt: skip

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Averages over all pairs."""
        categories = [one['category'] for one in results]
        logger, metrics = MMLogger.get_current_instance(), {}
        for side in self.by:
            shares = [torch.tensor(one['distances'], dtype=torch.float64) / one['lengths'][side] for one in results]
            for threshold in self.thresholds:
                right = [share <= threshold for share in shares]
                for average, value in pck(right, categories).items():
                    metrics[f'{side}_{threshold:g}/{average}'] = value
                each = {
                    name: pck([one for one, other in zip(right, categories) if other == name], [name] * n)
                    for name, n in sorted(Counter(categories).items())
                }
                table = ', '.join(f'{name} {value["point"]:.1f}' for name, value in each.items())
                logger.info(f'PCK {side}@{threshold:g} per point, by category (%): {table}')
        self._report_discarded(results, logger)
        return metrics

    @staticmethod
    def _report_discarded(results: list[dict[str, Any]], logger: MMLogger) -> None:
        counts = Counter(
            (number, channel)
            for one in results
            for number, channels in enumerate(one['discarded'])
            for channel in channels
        )
        if counts:
            listed = ', '.join(f'map {place[0]} channel {place[1]} ({n})' for place, n in sorted(counts.items()))
            logger.info(f'massive channels left out, and in how many of {len(results)} pairs: {listed}')
