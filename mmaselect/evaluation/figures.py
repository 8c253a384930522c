"""The figures of the paper, drawn from numbers: each a PNG with the same numbers beside it as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmaselect.files import atomic_path
from mmaselect.selection.report import COLOURS, MARKERS, Selection, name_taps, plot
from mmaselect.selection.spectrum import gaussian_high_pass

#: Perceptually uniform, and the same to colour-blind eyes (Nunez et al., 2018).
COLOUR_MAP = 'cividis'


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same keys, atomically."""
    with atomic_path(path) as temporary, Path(temporary).open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def new_figure(width: float, height: float) -> Any:
    """A figure that no display is needed for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a figure as ``path`` and its numbers as CSV beside it."""
    write_csv(Path(path).with_suffix('.csv'), rows)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; nan where one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float('nan')
    return float(np.corrcoef(first, second)[0, 1])


def draw_timesteps(selection: Selection, accuracy: Sequence[float], path: str | Path) -> None:
    """Scores and accuracy over timesteps, as the paper's Fig. 1.

    Args:
        selection: The scores.
        accuracy: Of a linear probe at every timestep, in percent.
        path: A PNG file.
    """
    rows = []
    for position, timestep in enumerate(selection.sweep.timesteps):
        row: dict[str, Any] = {'timestep': timestep, 'probe accuracy (%)': accuracy[position]}
        for label in selection.sweep.scores:
            row[label] = selection.curve(label)[position]
            bounds = selection.bounds(label)
            if bounds:
                row[f'{label}, 2.5 %'], row[f'{label}, 97.5 %'] = bounds[position]
        rows.append(row)
    write_csv(Path(path).with_suffix('.csv'), rows)
    plot(selection, path, accuracy)


def draw_fisher(selection: Selection, fisher: str, path: str | Path) -> None:
    """Every label-free score against the Fisher Score, a point per timestep, as the paper's Fig. 4.

    Args:
        selection: The scores, among them the Fisher Score.
        fisher: Its label.
        path: A PNG file.
    """
    sweep = selection.sweep
    others = [label for label in sweep.scores if label != fisher]
    columns = min(3, len(others))
    rows_of_panels = -(-len(others) // columns)
    figure = new_figure(4 * columns + 1, 3.6 * rows_of_panels)
    panels = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    against = selection.curve(fisher)
    for panel in panels[len(others) :]:
        panel.set_axis_off()
    for number, (label, panel) in enumerate(zip(others, panels)):
        curve = selection.curve(label)
        panel.plot(curve, against, color='0.8', lw=1, zorder=1)
        marker = MARKERS[number % len(MARKERS)]
        points = panel.scatter(curve, against, c=sweep.timesteps, cmap=COLOUR_MAP, marker=marker, zorder=2)
        panel.set(xlabel=label, ylabel='Fisher Score (ratio of scatters)')
        panel.set_title(f'r = {correlation(curve, against):+.2f}', fontsize=10)
    figure.colorbar(points, ax=list(panels), label='timestep (0 clean, 1000 pure noise)')
    figure.suptitle(f'Scores against the Fisher Score, {sweep.num_images} images, {name_taps(selection.taps)}')
    rows = [
        {'timestep': timestep, **{label: selection.curve(label)[position] for label in sweep.scores}}
        for position, timestep in enumerate(sweep.timesteps)
    ]
    save(figure, path, rows)


def draw_blocks(
    scores: np.ndarray,
    accuracy: np.ndarray,
    blocks: Sequence[int],
    components: Sequence[str],
    label: str,
    timestep: float,
    path: str | Path,
) -> None:
    """Heat maps of component and block, as the paper's Fig. 5.

    Args:
        scores: Of the criterion, (components, blocks).
        accuracy: Of a linear probe, in percent, likewise.
        blocks: Names of the columns.
        components: Names of the rows.
        label: Of the criterion.
        timestep: At which all this is.
        path: A PNG file.
    """
    width = 2 + 0.75 * len(blocks)
    figure = new_figure(2 * width + 1.5, 1.6 + 0.6 * len(components))
    panels = figure.subplots(1, 2)
    for panel, values, name, form in (
        (panels[0], accuracy, 'accuracy of a linear probe (%)', '{:.1f}'),
        (panels[1], scores, label, '{:.3f}'),
    ):
        image = panel.imshow(values, cmap=COLOUR_MAP, aspect='auto')
        panel.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        panel.set_yticks(range(len(components)), list(components))
        panel.set(xlabel='block', ylabel='component')
        panel.set_title(name, fontsize=10)
        middle = (values.min() + values.max()) / 2
        highest = np.unravel_index(values.argmax(), values.shape)
        for row in range(len(components)):
            for column in range(len(blocks)):
                value = values[row, column]
                weight = 'bold' if (row, column) == highest else 'normal'
                panel.text(column, row, form.format(value), ha='center', va='center', weight=weight, fontsize=8,
                           color='black' if value > middle else 'white')  # fmt: skip
        figure.colorbar(image, ax=panel)
    together = correlation(scores.flatten().tolist(), accuracy.flatten().tolist())
    figure.suptitle(f'Blocks and components at timestep {timestep:g} (bold: highest), r = {together:+.2f}')
    rows = [
        {
            'component': component,
            'block': block,
            'probe accuracy (%)': accuracy[row, column],
            label: scores[row, column],
        }
        for row, component in enumerate(components)
        for column, block in enumerate(blocks)
    ]
    save(figure, path, rows)


def decompose(maps: Tensor, sigma: float = 0.25) -> tuple[Tensor, Tensor]:
    """Splits maps by the Gaussian high-pass, as the paper's Fig. 3.

    Args:
        maps: (B, C, h, w).
        sigma: In cycles per sample.

    Returns:
        Low- and high-frequency part, each (B, C, h, w); their sum is ``maps``.
    """
    height, width = maps.shape[-2:]
    passed = gaussian_high_pass(height, width, sigma, maps.device)
    high = torch.fft.ifft2(torch.fft.fft2(maps.float()) * passed).real
    return maps.float() - high, high


def principal_colours(maps: Tensor, basis: Tensor | None = None) -> tuple[np.ndarray, Tensor]:
    """Shows a map by its first three principal components as red, green and blue.

    Args:
        maps: (B, C, h, w).
        basis: (C, 3) of an earlier call, to show another map in the same colours.

    Returns:
        (B, h, w, 3) in [0, 1], scaled from the 2nd to the 98th percentile of each component, and the basis.
    """
    cells = maps.permute(0, 2, 3, 1)
    flat = cells.flatten(0, 2) - cells.mean((0, 1, 2))
    if basis is None:
        basis = torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    shown = flat @ basis
    low, high = (torch.quantile(shown, share, dim=0) for share in (0.02, 0.98))
    scaled = ((shown - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scaled.unflatten(0, cells.shape[:3]).numpy(), basis


def draw_decomposition(
    images: Tensor, maps: Tensor, names: Sequence[str], title: str, path: str | Path, sigma: float = 0.25
) -> None:
    """Images beside their features and the low- and high-frequency parts of these, as the paper's Fig. 3.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        maps: (B, C, h, w).
        names: Of the images.
        title: Above it all.
        path: A PNG file.
        sigma: Of the Gaussian, in cycles per sample.
    """
    maps = maps.float().cpu()
    low, high = decompose(maps, sigma)
    shown, basis = principal_colours(maps)
    low_shown, _ = principal_colours(low, basis)
    high_shown, _ = principal_colours(high, basis)
    energy = high.square().sum(1).sqrt().numpy()
    figure = new_figure(11, 2.1 * len(maps) + 0.9)
    panels = figure.subplots(len(maps), 5, squeeze=False)
    pixels = ((images.cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    headings = ('image', 'features', 'low frequencies', 'high frequencies', 'strength of the\nhigh frequencies')
    for row in range(len(maps)):
        for column, shot in enumerate((pixels, shown, low_shown, high_shown)):
            panels[row, column].imshow(shot[row], interpolation='nearest')
        drawn = panels[row, 4].imshow(energy[row], cmap=COLOUR_MAP, vmin=0, vmax=energy.max(), interpolation='nearest')
        panels[row, 0].set_ylabel(names[row], fontsize=8)
        for column in range(5):
            panels[row, column].set(xticks=[], yticks=[])
            if not row:
                panels[row, column].set_title(headings[column], fontsize=10)
    figure.colorbar(drawn, ax=list(panels[:, 4]), label='norm over channels', shrink=0.8)
    figure.suptitle(f'{title}, sigma {sigma:g} (colours: three principal components)', fontsize=10)
    total, parts = maps.square().sum((1, 2, 3)), [part.square().sum((1, 2, 3)) for part in (low, high)]
    rows = [
        {
            'image': name, 'energy': total[row].item(), 'energy of low frequencies': parts[0][row].item(),
            'energy of high frequencies': parts[1][row].item(), 'HFR': (parts[1][row] / total[row]).item(),
        }
        for row, name in enumerate(names)
    ]  # fmt: skip
    save(figure, path, rows)


def draw_matches(
    pictures: Sequence[tuple[np.ndarray, np.ndarray]],
    points: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    distances: Sequence[np.ndarray],
    names: Sequence[str],
    title: str,
    path: str | Path,
    threshold: float = 0.1,
) -> None:
    """Pairs beside each other, a line from each point to where it was found; what was missed has a cross at its place.

    Args:
        pictures: Source and target of each pair, (H, W, 3) in [0, 255], as the model sees them.
        points: Of each pair the points of the source, where they were found, and where they are, (N, 2) in pixels of
            the pictures.
        distances: Between the last two, as shares of the target's box or image, (N,).
        names: Of the pairs.
        title: Above it all.
        path: A PNG file.
        threshold: Largest distance that counts as right.
    """
    columns = 2 if len(pictures) > 1 else 1
    bands = -(-len(pictures) // columns)
    figure = new_figure(5.4 * columns, 3 * bands + 0.6)
    panels = figure.subplots(bands, columns, squeeze=False).flatten()
    rows = []
    for panel in panels:
        panel.set_axis_off()
    for number, (panel, (source, target)) in enumerate(zip(panels, pictures)):
        height, gap = max(len(source), len(target)), 4
        canvas = np.full((height, source.shape[1] + gap + target.shape[1], 3), 255, np.uint8)
        canvas[: len(source), : source.shape[1]] = source
        canvas[: len(target), source.shape[1] + gap :] = target
        panel.imshow(canvas, interpolation='nearest', extent=(0, canvas.shape[1], height, 0))
        offset = np.array([source.shape[1] + gap, 0])
        asked, found, there = points[number]
        right = distances[number] <= threshold
        for one, place, truth, good in zip(asked, found + offset, there + offset, right):
            colour = COLOURS[2] if good else COLOURS[1]
            panel.plot(*zip(one, place), color=colour, lw=1, marker='o', ms=3, mec='white', mew=0.5)
            if not good:
                panel.plot(*truth, color=colour, marker='x', ms=5)
        panel.set_title(f'{names[number]}: {right.sum()} of {len(right)}', fontsize=8)
        rows += [
            {
                'pair': names[number], 'x': one[0], 'y': one[1], 'found x': place[0], 'found y': place[1],
                'true x': truth[0], 'true y': truth[1], 'distance (share)': distance,
            }
            for one, place, truth, distance in zip(asked, found, there, distances[number])
        ]  # fmt: skip
    figure.suptitle(f'{title}; a cross is where a point is that was missed by more than {threshold:g}', fontsize=9)
    save(figure, path, rows)
