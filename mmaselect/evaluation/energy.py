"""Where the energy of features comes from, and what HFR is made of: the image, its position, and the injected noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmaselect.diffusion.noise import seeded_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import naming
from mmaselect.images import Batch
from mmaselect.progress import PATIENCE, progress_bar
from mmaselect.selection.features import Features

#: What differs between noises, what all images share, what is left for the image.
PARTS = ('noise', 'common', 'image')
#: Taps that a figure has side by side.
COLUMNS = 5


@torch.no_grad()
def energy_parts(
    model: FrozenDiffusion, batches: Iterable[Batch], timesteps: Sequence[float], sigma: float = 0.25, seed: int = 0
) -> list[dict[str, Any]]:
    """Splits the energy of features, and with it HFR.

    With ``a`` and ``b`` the features of an image under two noises of its own: their cross energy is what the noise
    does not change; that around the mean over images is the image's; the rest of the cross energy is common to all
    images (position embedding); what is not cross energy is noise. The shares add up to 1, and HFR, as a ratio of
    energies summed over images, is the sum of each part's share times its own HFR.

    Args:
        model: Its taps are read.
        batches: Images, with ``groups`` for the centring.
        timesteps: In [0, 1000].
        sigma: Of the high-pass, in cycles per sample.
        seed: Of the noises.

    Returns:
        A row for each tap and timestep: ``block``, ``component``, ``timestep``, ``HFR``, and of each of ``PARTS`` its
        ``share`` and its ``HFR``.
    """
    sums: dict[tuple[Tap, float], torch.Tensor] = {}
    for batch in progress_bar(iterable=batches, desc='energy', unit='batches', delay=PATIENCE, leave=False):
        latent = model.encode(batch.padded(model.multiple).images)
        shape = tuple(latent.shape[1:])
        noises = [seeded_noise(shape, seed, index, draw) for draw in (0, 1) for index in batch.indices]
        noise = torch.stack(noises).to(latent.device)
        groups = torch.tensor(batch.groups).unique(return_inverse=True)[1]
        for timestep in timesteps:

            def add(tap: Tap, maps: torch.Tensor, timestep: float = timestep, groups: torch.Tensor = groups) -> None:
                features = Features(maps.chunk(2), groups)
                found = []
                for band in (None, sigma):
                    whole = (features.energy(0, 0, band) + features.energy(1, 1, band)) / 2
                    found += [whole, features.energy(0, 1, band), features.energy(0, 1, band, centred=True)]
                value = torch.stack([one.sum() for one in found]).cpu()
                sums[tap, timestep] = sums.get((tap, timestep), 0) + value

            with naming('image {}'.format, batch.indices):
                model.read(latent.repeat(2, 1, 1, 1), noise, timestep, add)
    return [_row(tap, timestep, *value.tolist()) for (tap, timestep), value in sums.items()]


def _row(
    tap: Tap, timestep: float, whole: float, shared: float, image: float, high: float, high_shared: float,
    high_image: float,
) -> dict[str, Any]:  # fmt: skip
    energies = dict(zip(PARTS, (whole - shared, shared - image, image)))
    highs = dict(zip(PARTS, (high - high_shared, high_shared - high_image, high_image)))
    row: dict[str, Any] = {'block': tap.block, 'component': tap.component, 'timestep': timestep, 'HFR': high / whole}
    for part in PARTS:
        row[f'share of {part}'] = energies[part] / whole
        # The ratio of next to nothing says nothing.
        row[f'HFR of {part}'] = highs[part] / energies[part] if energies[part] > 1e-3 * whole else float('nan')
    return row


def draw_energy(rows: Sequence[dict[str, Any]], path: str | Path, accuracy: dict[Tap, list[float]]) -> None:
    """Two panels for each tap: the shares above, the HFR of each part below, with the accuracy of a probe.

    Args:
        rows: Of :func:`energy_parts`.
        path: A PNG file; a CSV of the same name goes beside it.
        accuracy: In percent, at the same timesteps.
    """
    from mmaselect.evaluation.figures import new_figure, save
    from mmaselect.selection.report import COLOURS

    taps = list(dict.fromkeys(Tap(row['block'], row['component']) for row in rows))
    columns = min(COLUMNS, len(taps))
    bands = -(-len(taps) // columns)
    figure = new_figure(1.5 + 2.6 * columns, 1 + 4.6 * bands)
    panels = figure.subplots(2 * bands, columns, squeeze=False, sharex=True)
    for panel in panels[-2:, len(taps) - (bands - 1) * columns :].flatten():
        panel.set_axis_off()
    for number, tap in enumerate(taps):
        band, column = divmod(number, columns)
        top, bottom = panels[2 * band : 2 * band + 2, column]
        mine = [row for row in rows if (row['block'], row['component']) == tap]
        steps = [row['timestep'] for row in mine]
        shares = [[max(0.0, row[f'share of {part}']) for row in mine] for part in PARTS]
        top.stackplot(steps, shares, labels=PARTS, colors=COLOURS[1:4], alpha=0.7)
        top.set(title=f'block {tap.block}, {tap.component}', ylim=(0, 1))
        bottom.plot(steps, [row['HFR'] for row in mine], color='black', marker='o', ms=3, label='HFR')
        for colour, part in zip(COLOURS[1:], PARTS):
            values = [row[f'HFR of {part}'] for row in mine]
            bottom.plot(steps, values, color=colour, ls='--', label=f'HFR of {part}')
        right = bottom.twinx()
        right.plot(steps, accuracy[tap], color=COLOURS[0], ls=':', marker='*', label='probe accuracy (%)')
        right.tick_params(labelsize=7, colors=COLOURS[0])
        bottom.set(xlabel='timestep')
        if column == 0:
            top.set_ylabel('share of the energy')
            bottom.set_ylabel('HFR')
    handles, labels = panels[0, 0].get_legend_handles_labels()
    for axes in (panels[1, 0], right):
        more = axes.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, loc='outside lower center', ncols=4, fontsize=8)
    save(figure, path, rows)
