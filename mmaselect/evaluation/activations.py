"""Which activations of a network are worth reading, without labels: GDF's qualitative filter, by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmaselect.diffusion.taps import Tap
from mmaselect.errors import check_number
from mmaselect.selection.criterion import SummedCriterion, Sums
from mmaselect.selection.features import Features


class EnergyShare(SummedCriterion):
    """A share of the energy of features, by channel, so that massive channels can be told apart.

    With ``a`` and ``b`` the maps of an image under two noises, ``m`` the mean of each channel over images and cells:
    ``a b - m^2`` is what the noise does not change, that around the mean over images is the image's, the rest of it is
    common to all images (position); what is left of ``(a^2 + b^2) / 2 - m^2`` is noise. ``m`` itself, a constant,
    counts for nothing: every head has a bias.

    Args:
        k: A channel is massive if its mean magnitude is above ``k`` times the median.
    """

    draws = 2
    fields = None

    def __init__(self, k: float = 10.0) -> None:
        self.k = check_number(k, 'k', 1, open_low=True)

    def sums(self, features: Features) -> Sums:
        """Sums over images and cells, (C,)."""
        first, second = (one.double() for one in features.maps[:2])
        cells = first.shape[2] * first.shape[3]
        shared = features.per_group(first * second)
        counts = features.counts.to(first.device).view(-1, 1, 1, 1)
        means = features.per_group(first) / counts * (features.per_group(second) / counts)
        image = torch.where(counts > 1, counts / (counts - 1).clamp_min(1) * (shared - counts * means), 0.0)
        return {
            'whole': ((first.square() + second.square()) / 2).sum((0, 2, 3)),
            'shared': shared.sum((0, 2, 3)),
            'image': image.sum((0, 2, 3)),
            'sum': ((first + second) / 2).sum((0, 2, 3)),
            'magnitude': first.abs().sum((0, 2, 3)),
            'count': first.new_tensor(float(len(first) * cells)),
        }

    def parts(self, sums: Sums) -> dict[str, Tensor]:
        """Energies of noise, position and image in ordinary channels, of all in massive ones, and of everything."""
        massive = sums['magnitude'] > self.k * sums['magnitude'].median()
        constant = sums['sum'].square() / sums['count']
        image, shared, whole = sums['image'], sums['shared'] - constant, sums['whole'] - constant
        by_channel = {'noise': whole - shared, 'position': shared - image, 'image': image}
        energies = {name: value[~massive].sum() for name, value in by_channel.items()}
        return {**energies, 'massive': sums['whole'][massive].sum(), 'all': sums['whole'].sum()}


class NoiseShare(EnergyShare):
    """Share that changes with the noise."""

    label = 'noise'

    def score(self, sums: Sums) -> Tensor:
        """In about [0, 1]."""
        parts = self.parts(sums)
        return parts['noise'] / (parts['noise'] + parts['position'] + parts['image']).clamp_min(1e-30)


class PositionShare(EnergyShare):
    """Share that varies from place to place, in all images alike."""

    label = 'position'

    def score(self, sums: Sums) -> Tensor:
        """In about [0, 1]."""
        parts = self.parts(sums)
        return parts['position'] / (parts['noise'] + parts['position'] + parts['image']).clamp_min(1e-30)


class MassiveShare(EnergyShare):
    """Share, of all, that lies in massive channels, see :func:`~mmaselect.tasks.correspondence.massive_channels`."""

    label = 'massive channels'

    def score(self, sums: Sums) -> Tensor:
        """In [0, 1]."""
        parts = self.parts(sums)
        return parts['massive'] / parts['all'].clamp_min(1e-30)


#: What an activation may be dominated by, and the largest share of it; the first that applies is named. A head can
#: take off what all images have in common, so that a tenth of the energy is enough; the noise it cannot.
LIMITS = {MassiveShare.label: 0.5, NoiseShare.label: 0.5, PositionShare.label: 0.9}
WORDS = {
    'massive channels': 'of the energy lie in massive channels',
    'noise': 'of the energy change with the noise',
    'position': 'of the energy are position, the same in all images',
}


@dataclass
class Verdict:
    """What was found of an activation at one timestep.

    Attributes:
        name: As ``taps`` calls it in a config.
        tap: Where it is.
        channels: Of its map.
        stride: Image pixels per cell.
        timestep: In [0, 1000].
        shares: Of its energy, by the names of :data:`LIMITS`.
        score: What it is ranked by.
        why: Why it was dropped; empty if it was kept.
    """

    name: str
    tap: Tap
    channels: int
    stride: int
    timestep: float
    shares: dict[str, float]
    score: float
    why: str = ''

    def row(self) -> dict[str, Any]:
        """For a table."""
        values = asdict(self)
        shares = {f'share of {name}': value for name, value in values.pop('shares').items()}
        block, component = values.pop('tap')
        return {'name': values.pop('name'), 'block': block, 'component': component, **values, **shares}


def judge(verdicts: Sequence[Verdict], keep: int = 8, limits: dict[str, float] = LIMITS) -> list[Verdict]:
    """Sorts activations into a short list and the rest.

    Dropped is what is dominated by massive channels, noise or position, and what tells nothing of the image; of the
    rest the ``keep`` with the highest score stay.

    Args:
        verdicts: Of one timestep.
        keep: How many stay.
        limits: Largest share of each.

    Returns:
        All of them, the highest score first, with ``why``.
    """
    judged = []
    kept = 0
    for one in sorted(verdicts, key=lambda one: -one.score):
        fault = next((name for name, limit in limits.items() if one.shares[name] > limit), None)
        if fault is not None:
            why = f'{100 * one.shares[fault]:.0f} % {WORDS[fault]}'
        elif not one.score > 0:
            why = 'tells nothing of the image'
        else:
            kept += 1
            why = '' if kept <= keep else f'number {kept} by its score'
        judged.append(replace(one, why=why))
    return judged


def draw_activations(
    verdicts: Sequence[Verdict], images: Tensor, maps: dict[Tap, Tensor], path: str | Path, most: int = 8
) -> None:
    """The first three principal components of what was kept, and below of what was dropped, as red, green and blue.

    Args:
        verdicts: Of :func:`judge`.
        images: (B, 3, H, W) in [-1, 1].
        maps: Of each activation, (B, C, h, w).
        path: A PNG file; the verdicts go beside it as CSV.
        most: Activations of each kind.
    """
    from mmaselect.evaluation.figures import new_figure, principal_colours, save

    # Of what was dropped, some of each reason.
    dropped = [one for one in verdicts if one.why]
    kinds: dict[str, list[Verdict]] = {}
    for one in dropped:
        kinds.setdefault(one.why.split(' ', 2)[-1], []).append(one)
    mixed = [one for rank in range(len(dropped)) for group in kinds.values() for one in group[rank : rank + 1]]
    bands = [band for band in ([one for one in verdicts if not one.why][:most], mixed[:most]) if band]
    columns = 1 + max(len(band) for band in bands)
    figure = new_figure(1.5 * columns + 0.5, (1.5 * len(images) + 0.9) * len(bands) + 0.5)
    panels = figure.subplots(len(bands) * len(images), columns, squeeze=False)
    pixels = ((images.cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for panel in panels.flatten():
        panel.set_axis_off()
    for number, band in enumerate(bands):
        rows = panels[number * len(images) : (number + 1) * len(images)]
        shots: list[tuple[str, np.ndarray]] = [('dropped' if band[0].why else 'kept', pixels)]
        for one in band:
            shown, _ = principal_colours(maps[one.tap].float().cpu())
            note = one.why if one.why and len(one.why) < 30 else f'{one.why[:26]}...' if one.why else ''
            shots.append((f'{one.name}\n{note or f"score {one.score:.3g}"}', shown))
        for column, (title, shot) in enumerate(shots):
            for row in range(len(images)):
                rows[row, column].imshow(shot[row].squeeze(), interpolation='nearest')
            rows[0, column].set_title(title.replace('-vit', '\n-vit'), fontsize=6)
    figure.suptitle(f'Timestep {verdicts[0].timestep:g}: three principal components', fontsize=9)
    save(figure, path, [one.row() for one in verdicts])
