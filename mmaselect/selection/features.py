"""Feature maps as the criteria read them: every spectrum is computed once, whatever the number of criteria."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.selection.spectrum import cross_power, half_plane, spectrum


def cell_labels(labels: Tensor, cells: Sequence[int]) -> Tensor:
    """The label of the pixel in the middle of each cell.

    Args:
        labels: Of pixels, (B, H, W).
        cells: Rows and columns of a map.

    Returns:
        (B, rows, columns).
    """
    return F.interpolate(labels[:, None].float(), size=tuple(cells), mode='nearest-exact')[:, 0].long()


class Features:
    """The maps of one tap under every noise, for a batch of images.

    Images come in small groups. A group is what the bootstrap draws, and what centring works on: the cross energy of
    ``n`` images around their own mean, times ``n / (n - 1)``, has the expectation of that around the true mean, so
    that nothing as large as a map has to be kept from batch to batch.

    Args:
        maps: Features under each noise, tensors (B, C, h, w).
        groups: Group of each image, (B,), counted from 0.
        labels: Class of each image, (B,), or of each pixel, (B, H, W).
        views: Features of augmented views of the images, each as ``maps``.

    Attributes:
        views: Features of the images themselves under the first noise, and of their views.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        groups: Tensor | None = None,
        labels: Tensor | None = None,
        views: Sequence[Tensor] = (),
    ) -> None:
        self.maps = list(maps)
        self.views = [self.maps[0], *views]
        device = self.maps[0].device
        if groups is None:
            groups = torch.zeros(len(self.maps[0]), dtype=torch.long)
        self.groups = groups.to(device)
        self.labels = labels if labels is None or labels.dim() == 1 else cell_labels(labels, self.maps[0].shape[-2:])
        self.counts = torch.bincount(self.groups).double()
        self._spectra: dict[tuple[int, bool], Tensor] = {}
        self._powers: dict[tuple[int, int, bool], Tensor] = {}

    def per_group(self, values: Tensor) -> Tensor:
        """Adds up (B, ...) over the images of each group: (G, ...)."""
        return values.new_zeros(len(self.counts), *values.shape[1:]).index_add_(0, self.groups, values)

    def spectrum(self, draw: int, mean: bool = False) -> Tensor:
        """Spectrum of the maps under a noise, or of their mean over each group."""
        if (draw, mean) not in self._spectra:
            if mean:
                total = torch.view_as_real(self.spectrum(draw))
                counts = self.counts.to(total.dtype).view(-1, 1, 1, 1, 1)
                value = torch.view_as_complex(self.per_group(total) / counts)
            else:
                value = spectrum(self.maps[draw])
            self._spectra[draw, mean] = value
        return self._spectra[draw, mean]

    def power(self, first: int, second: int, mean: bool = False) -> Tensor:
        """Cross power of two draws summed over channels, (B or G, h, w // 2 + 1), float64."""
        if (first, second, mean) not in self._powers:
            value = cross_power(self.spectrum(first, mean), self.spectrum(second, mean))
            self._powers[first, second, mean] = value.double()
        return self._powers[first, second, mean]

    def energy(self, first: int, second: int, sigma: float | None = None, centred: bool = False) -> Tensor:
        """Cross energy of two draws, summed over the images of each group.

        Args:
            first: Number of the one draw.
            second: Number of the other; the same gives the maps' own energy.
            sigma: Of the Gaussian high-pass; None for all frequencies.
            centred: Around the mean map of the group, times ``n / (n - 1)``; 0 for a group of one image.

        Returns:
            (G,), float64.
        """
        height, width = self.maps[0].shape[-2:]
        high, count = half_plane(height, width, 0.25 if sigma is None else float(sigma), 2, self.maps[0].device)
        weight = count if sigma is None else high
        energy = self.per_group((self.power(first, second) * weight).sum((1, 2)))
        if not centred:
            return energy
        mean = (self.power(first, second, mean=True) * weight).sum((1, 2))
        unbiased = self.counts / (self.counts - 1).clamp_min(1)
        return torch.where(self.counts > 1, unbiased * (energy - self.counts * mean), 0.0)
