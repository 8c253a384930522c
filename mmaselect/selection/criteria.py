"""What a timestep is scored by: the spectral criteria, the Fisher Score, and the list of all criteria.

A new criterion is a new class and one more name in ``CRITERIA``; one of one's own is added by
``CRITERIA['Mine'] = Mine``, see docs/en/add_a_criterion.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmaselect.errors import InputError, check_choice, check_count, check_fields, check_flag, check_number
from mmaselect.selection.criterion import Criterion, SummedCriterion, Sums
from mmaselect.selection.features import Features
from mmaselect.selection.instance import InstanceInformation, LiDAR, RankMe, ViewConsistency
from mmaselect.selection.spectrum import check_sigma, ratio_of_power


class HighFrequencyRatio(SummedCriterion):
    """The paper's criterion: HFR of each image, averaged over images. Rises with noise where the network leaks it.

    Args:
        sigma: Width of the Gaussian, in cycles per sample.
        norm: 2 for energies, 1 for magnitudes.
    """

    fields = ('ratio', 'count')

    def __init__(self, sigma: float = 0.25, norm: int = 2) -> None:
        check_sigma(sigma)
        check_choice(norm, 'norm', (1, 2))
        self.sigma, self.norm = sigma, norm
        self.label = f'HFR (sigma {sigma:g}{", norm 1" if norm == 1 else ""})'

    def sums(self, features: Features) -> Sums:
        """Sum of the ratios and number of images."""
        power = features.power(0, 0) if self.norm == 2 else features.spectrum(0).abs().sum(1).double()
        ratio = ratio_of_power(power, features.maps[0].shape[-1], self.sigma, self.norm)
        return {'ratio': features.per_group(ratio), 'count': features.counts}

    def score(self, sums: Sums) -> Tensor:
        """Mean ratio, in [0, 1]."""
        return sums['ratio'] / sums['count']


class NoiseConsistentHFR(SummedCriterion):
    """HFR of what two independent noises agree on, see :func:`~mmaselect.selection.spectrum.noise_consistent_hfr`.

    Args:
        sigma: Width of the Gaussian, in cycles per sample.
        centred: Take out what all images share (position embedding), group by group, see
            :class:`~mmaselect.selection.features.Features`; needs groups of at least two images.
        min_consistency: Where the agreeing share of the features' energy is below this, the ratio is noise over noise
            and the score is 0. At pure noise that share is 0 by construction, up to an error of about
            ``1 / sqrt(images * cells)``.
    """

    draws = 2
    fields = ('high', 'total', 'energy')

    def __init__(self, sigma: float = 0.25, centred: bool = True, min_consistency: float = 0.01) -> None:
        check_sigma(sigma)
        check_flag(centred, 'centred')
        check_number(min_consistency, 'min_consistency', 0, 1, open_high=True)
        self.sigma, self.centred, self.min_consistency = sigma, centred, min_consistency
        self.label = f'{"centred " if centred else ""}noise-consistent HFR (sigma {sigma:g})'

    def sums(self, features: Features) -> Sums:
        """Cross energies in the high band and in all bands, and the features' own energy."""
        own = [features.energy(draw, draw, None, self.centred) for draw in (0, 1)]
        return {
            'high': features.energy(0, 1, self.sigma, self.centred),
            'total': features.energy(0, 1, None, self.centred),
            'energy': (own[0] + own[1]) / 2,
        }

    def score(self, sums: Sums) -> Tensor:
        """Ratio of the sums, in about [0, 1]; 0 where too little is consistent."""
        high, total, energy = (sums[name] for name in self.fields)
        consistent = (total > self.min_consistency * energy) & (total > 0)
        return torch.where(consistent, high / torch.where(consistent, total, 1.0), 0.0)


class FisherScore(SummedCriterion):
    """Between-class over within-class scatter, with labels, see :func:`~mmaselect.selection.spectrum.fisher_score`.

    With one label per image a sample is a flattened map. With one label per cell (segmentation) a sample is the
    feature of a cell, and ``pool`` does not apply. Its class means are maps, so it takes memory for every class,
    timestep and tap, and is not resampled.

    Args:
        pool: Average the map to ``pool`` x ``pool`` cells first; None keeps every cell. One such map is kept for
            every class.
        ignore_index: Label of cells that are left out.
    """

    needs_labels = True
    fields = None

    def __init__(self, pool: int | None = None, ignore_index: int = 255) -> None:
        if pool is not None:
            check_count(pool, 'pool')
        check_count(ignore_index, 'ignore_index', -(2**31))
        self.pool, self.ignore_index = pool, ignore_index
        self.label = f'Fisher Score (labels{f", pooled to {pool}x{pool}" if pool else ""})'

    def sums(self, features: Features) -> Sums:
        """Energy, and number and summed map of every class."""
        x, labels = features.maps[0].float(), features.labels
        if labels is None:
            raise InputError(f'{self.label} needs labels')
        if labels.dim() == 3:
            labels = labels.flatten()
            x = x.permute(0, 2, 3, 1).flatten(0, 2)[labels != self.ignore_index]
            labels = labels[labels != self.ignore_index]
        elif self.pool is not None:
            x = torch.nn.functional.adaptive_avg_pool2d(x, self.pool)
        sums = {'energy': x.double().square().sum()}
        for label in labels.unique().tolist():
            members = x[labels == label]
            sums[f'map/{label}'] = members.double().sum(0)
            sums[f'count/{label}'] = members.new_tensor(len(members), dtype=torch.float64)
        return sums

    def score(self, sums: Sums) -> Tensor:
        """The score of all images, at least 0; infinite scatter ratios, as of one image per class, are an error.

        Raises:
            InputError: If no class has two images.
        """
        classes = [key.removeprefix('map/') for key in sums if key.startswith('map/')]
        explained = sum((sums[f'map/{c}'].square().sum() / sums[f'count/{c}']) for c in classes)
        count = sum(sums[f'count/{c}'] for c in classes)
        if count == len(classes):
            raise InputError(f'FisherScore needs a class with two images; all {len(classes)} classes have one')
        mean_energy = torch.stack([sums[f'map/{c}'] for c in classes]).sum(0).square().sum() / count
        between, within = explained - mean_energy, sums['energy'] - explained
        # Identical images leave rounding error where the scatter is zero.
        tiny = 1e-12 * sums['energy']
        return torch.where(between <= tiny, 0.0, between / within.clamp_min(tiny))


CRITERIA: dict[str, type[Criterion]] = {
    criterion.__name__: criterion
    for criterion in (
        InstanceInformation, HighFrequencyRatio, NoiseConsistentHFR, ViewConsistency, RankMe, LiDAR, FisherScore
    )
}  # fmt: skip

#: What decides where the user does not say; see docs/en/evidence.md.
RECOMMENDED = dict(type='InstanceInformation')
#: The criterion of arXiv 2603.25758. Its sigma is ours, the paper's is not public.
PAPER = dict(type='HighFrequencyRatio', sigma=0.25)


def build_criteria(configs: Sequence[dict[str, Any] | Criterion], fields: Sequence[str]) -> dict[str, Criterion]:
    """Builds several criteria, each once, under names that differ.

    Args:
        configs: See :func:`build_criterion`.
        fields: The name of each in the config.

    Returns:
        The criteria by label; where two would have the same, the second one's says in what they differ.
    """
    criteria: dict[str, Criterion] = {}
    for config, field in zip(configs, fields):
        criterion = build_criterion(config, field)
        mine = criterion.parameters
        if any(mine == other.parameters for other in criteria.values()):
            continue
        if criterion.label in criteria:
            other = criteria[criterion.label].parameters
            differing = ', '.join(f'{name}={value!r}' for name, value in mine.items() if value != other[name])
            criterion.label = f'{criterion.label} [{differing}]'
        criteria[criterion.label] = criterion
    return criteria


def build_criterion(config: dict[str, Any] | Criterion, field: str = 'criterion') -> Criterion:
    """Builds a criterion from a config entry such as ``dict(type='HighFrequencyRatio', sigma=0.25)``.

    Args:
        config: The entry.
        field: Its name in the config.

    Raises:
        InputError: If its type or one of its fields is unknown.
    """
    import inspect

    if isinstance(config, Criterion):
        return config
    if not isinstance(config, dict):
        raise InputError(f"{field}={config!r} is not valid: give dict(type='HighFrequencyRatio', sigma=0.25)")
    fields = dict(config)
    name = check_choice(fields.pop('type', None), f'{field}.type', CRITERIA)
    check_fields(fields, f'{field} {name}', inspect.signature(CRITERIA[name]).parameters, '')
    return CRITERIA[name](**fields)
