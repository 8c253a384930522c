"""Energies of feature maps in the frequency domain: pure functions of tensors.

``F`` is the 2-D FFT over (h, w), orthonormal, so that by Parseval ``sum |F(q)|^2 = sum q^2``. The radial frequency is
``f = sqrt(fy^2 + fx^2)`` in cycles per sample, each axis in [-0.5, 0.5). The Gaussian high-pass is
``H(f) = 1 - exp(-f^2 / (2 sigma^2))``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmaselect.errors import InputError, check_number


def gaussian_high_pass(height: int, width: int, sigma: float, device: torch.device | str | None = None) -> Tensor:
    """Gaussian high-pass on the grid of the FFT.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        sigma: Width of the removed low band, in cycles per sample, above 0.
        device: Where the result goes.

    Returns:
        ``H(f)``, (height, width), in [0, 1), 0 at frequency 0, in the order of ``torch.fft.fft2``.

    Raises:
        InputError: If ``sigma`` is not positive.
    """
    check_sigma(sigma)
    squared = torch.fft.fftfreq(height, device=device)[:, None] ** 2 + torch.fft.fftfreq(width, device=device) ** 2
    return -torch.expm1(-squared / (2 * sigma**2))


def check_sigma(sigma: float) -> None:
    """Raises :class:`InputError` unless ``sigma`` is a positive number."""
    check_number(sigma, 'sigma', 0, open_low=True)


@functools.lru_cache(maxsize=64)
def half_plane(height: int, width: int, sigma: float, power: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights for the frequencies that :func:`spectrum` keeps.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        sigma: See :func:`gaussian_high_pass`.
        power: Of the filter: 2 for energies, 1 for magnitudes.
        device: Where the result goes.

    Returns:
        ``count * H^power`` and ``count``, each (height, width // 2 + 1): every kept frequency but those of the columns
        0 and width / 2 counts for two.
    """
    columns = width // 2 + 1
    count = torch.full((columns,), 2.0, device=device)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    high = gaussian_high_pass(height, width, sigma, device)[:, :columns]
    return count * high**power, count.expand(height, columns)


def spectrum(maps: Tensor) -> Tensor:
    """The half of ``F(maps)`` that a real map needs, (..., h, w // 2 + 1), complex64."""
    # Half precision has no FFT on most devices and too few bits for a sum of squares.
    return torch.fft.rfft2(maps.float(), norm='ortho')


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def high_frequency_ratio(q: Tensor, sigma: float = 0.25, norm: int = 2) -> Tensor:
    """High-Frequency Ratio of every image, arXiv 2603.25758.

    ``HFR = sum |H F(q)|^norm / sum |F(q)|^norm``, sums over channels and frequencies. Which norm and sigma the paper
    used is not public.

    Args:
        q: Feature maps, (B, C, h, w).
        sigma: See :func:`gaussian_high_pass`.
        norm: 2 for energies, 1 for magnitudes.

    Returns:
        (B,), each in [0, 1]; 0 for a constant map and for an all-zero one.

    Raises:
        InputError: If ``sigma`` or ``norm`` is out of range.
    """
    if norm not in (1, 2):
        raise InputError(f'norm={norm!r} is not valid: choose 2 (energy) or 1 (magnitude)')
    check_sigma(sigma)
    return ratio_of_power((spectrum(q).abs() ** norm).sum(1), q.shape[-1], sigma, norm)


def ratio_of_power(power: Tensor, width: int, sigma: float, norm: int) -> Tensor:
    """:func:`high_frequency_ratio` of what a spectrum's channels add up to.

    Args:
        power: ``sum |F(q)|^norm`` over channels, (B, h, width // 2 + 1).
        width: Of the maps.
        sigma: See :func:`gaussian_high_pass`.
        norm: 2 or 1.

    Returns:
        (B,).
    """
    high, count = half_plane(power.shape[1], width, float(sigma), norm, power.device)
    return _ratio((power * high).sum((1, 2)), (power * count).sum((1, 2)))


def cross_energies(a: Tensor, b: Tensor, sigma: float = 0.25) -> tuple[Tensor, Tensor]:
    """Energy that two maps share, in the high band and in all bands.

    Args:
        a: Feature maps, (B, C, h, w).
        b: Feature maps of the same images under another noise, likewise.
        sigma: See :func:`gaussian_high_pass`.

    Returns:
        ``Re sum (H F(a)) conj(H F(b))`` and ``Re sum F(a) conj(F(b))`` of every image, (B,) each. With ``a is b``
        these are the energies of ``a``.
    """
    check_sigma(sigma)
    high, _ = half_plane(*a.shape[-2:], float(sigma), 2, a.device)
    spectrum_a = spectrum(a)
    spectrum_b = spectrum_a if b is a else spectrum(b)
    # Parseval: the total needs no spectrum.
    return (cross_power(spectrum_a, spectrum_b) * high).sum((1, 2)), (a.float() * b.float()).sum((1, 2, 3))


def cross_power(spectrum_a: Tensor, spectrum_b: Tensor) -> Tensor:
    """``Re sum F(a) conj(F(b))`` over channels, of every frequency that is kept.

    Args:
        spectrum_a: Of :func:`spectrum`, (B, C, h, w // 2 + 1).
        spectrum_b: Likewise.

    Returns:
        (B, h, w // 2 + 1).
    """
    return (spectrum_a.real * spectrum_b.real + spectrum_a.imag * spectrum_b.imag).sum(1)


def noise_consistent_hfr(a: Tensor, b: Tensor, sigma: float = 0.25, centred: bool = False) -> Tensor:
    """HFR of what the image, not the noise, put into the features.

    ``Re sum (H F(a)) conj(H F(b)) / Re sum F(a) conj(F(b))``, sums over images, channels and frequencies. Over
    independent noises the expectation of a cross term is the energy of the mean feature, so noise that leaks through
    the network cancels out, which plain HFR counts as high frequency.

    Args:
        a: Features of N images under one noise each, (N, C, h, w).
        b: Features of the same images under other, independent noises.
        sigma: See :func:`gaussian_high_pass`.
        centred: First subtract the mean map over the images, which takes out what the position embedding puts into
            every image alike. Needs N > 1.

    Returns:
        A scalar. Not confined to [0, 1]: where hardly anything is consistent it is noise over noise.
    """
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    high, total = cross_energies(a, b, sigma)
    return _ratio(high.sum(), total.sum())


def fisher_score(q: Tensor, labels: Tensor) -> Tensor:
    """Between-class over within-class scatter of flattened features.

    ``sum_c n_c |mu_c - mu|^2 / sum_c sum_(i in c) |x_i - mu_c|^2``.

    Args:
        q: Features, (N, ...).
        labels: Class of each image, (N,), integers.

    Returns:
        A scalar of at least 0; infinite if every class is a single point, 0 if there is no scatter at all.
    """
    x = q.flatten(1).double()
    mean = x.mean(0)
    between = within = x.new_zeros(())
    for label in labels.unique():
        members = x[labels == label]
        centre = members.mean(0)
        between = between + len(members) * (centre - mean).square().sum()
        within = within + (members - centre).square().sum()
    return torch.where(between == 0, torch.zeros_like(between), between / within)
