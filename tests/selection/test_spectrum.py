"""Spectra against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from mmaselect.errors import InputError
from mmaselect.selection.spectrum import (
    cross_energies,
    fisher_score,
    gaussian_high_pass,
    high_frequency_ratio,
    noise_consistent_hfr,
)

SIZES = ((8, 8), (8, 12), (7, 9), (16, 5))


def high_pass(f_y, f_x, sigma):
    return 1 - math.exp(-(f_y**2 + f_x**2) / (2 * sigma**2))


def sinusoid(height, width, cycles_y, cycles_x):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.sin(2 * math.pi * (cycles_y * y / height + cycles_x * x / width) + 0.3)[None, None]


@pytest.mark.parametrize('sigma', (0.1, 0.25, 0.4))
@pytest.mark.parametrize('height,width', SIZES)
def test_a_single_sinusoid_gives_the_filter_at_its_frequency(height, width, sigma):
    # Above half a cycle per sample a wave is the alias of a slower one.
    for cycles_y, cycles_x in ((0, 1), (1, 0), (2, 2), (3, 1), (height // 2, 1), (1, width // 2)):
        expected = high_pass(cycles_y / height, cycles_x / width, sigma) ** 2
        ratio = high_frequency_ratio(sinusoid(height, width, cycles_y, cycles_x), sigma)
        assert ratio.item() == pytest.approx(expected, abs=1e-5)


def test_magnitudes_instead_of_energies():
    ratio = high_frequency_ratio(sinusoid(8, 8, 2, 3), 0.25, norm=1)
    assert ratio.item() == pytest.approx(high_pass(2 / 8, 3 / 8, 0.25), abs=1e-5)


def test_constant_and_empty_maps_have_none():
    assert high_frequency_ratio(torch.full((2, 3, 6, 6), 5.0)).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert high_frequency_ratio(torch.zeros(1, 3, 6, 6)).item() == 0
    assert high_frequency_ratio(torch.randn(1, 3, 1, 1)).item() == 0


@pytest.mark.parametrize('height,width', SIZES)
def test_white_noise_has_the_mean_of_the_squared_filter(height, width):
    noise = torch.randn(64, 64, height, width, generator=torch.Generator().manual_seed(0))
    expected = sum(
        high_pass(fy, fx, 0.25) ** 2
        for fy in torch.fft.fftfreq(height).tolist()
        for fx in torch.fft.fftfreq(width).tolist()
    ) / (height * width)
    assert high_frequency_ratio(noise).mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('height,width', SIZES)
def test_parseval_and_the_whole_plane(height, width):
    """The half-plane sums equal those of a full FFT with the filter spelled out."""
    a, b = torch.randn(2, 3, 5, height, width)
    high, total = cross_energies(a, b, 0.3)
    torch.testing.assert_close(total, (a * b).sum((1, 2, 3)))
    spectrum_a, spectrum_b = (torch.fft.fft2(x, norm='ortho') for x in (a, b))
    weight = gaussian_high_pass(height, width, 0.3) ** 2
    expected = (weight * (spectrum_a * spectrum_b.conj()).real).sum((1, 2, 3))
    torch.testing.assert_close(high, expected, rtol=1e-4, atol=1e-4)
    expected = (weight * spectrum_a.abs() ** 2).sum((1, 2, 3)) / spectrum_a.abs().square().sum((1, 2, 3))
    torch.testing.assert_close(high_frequency_ratio(a, 0.3), expected, rtol=1e-4, atol=1e-5)


def test_bounds_and_invariances():
    q = torch.randn(4, 6, 8, 10)
    ratio = high_frequency_ratio(q)
    assert ((ratio >= 0) & (ratio <= 1)).all()
    torch.testing.assert_close(high_frequency_ratio(-3 * q), ratio)
    torch.testing.assert_close(high_frequency_ratio(q.roll((2, 3), (2, 3))), ratio)
    torch.testing.assert_close(high_frequency_ratio(q[:, torch.randperm(6)]), ratio)
    torch.testing.assert_close(high_frequency_ratio(q.double()), ratio)
    torch.testing.assert_close(high_frequency_ratio(q.bfloat16()), ratio, rtol=0.01, atol=0.01)


def smooth_images(count):
    """Different images with little high frequency: each a constant plus one slow wave of random strength."""
    generator = torch.Generator().manual_seed(1)
    strength = torch.randn(count, 8, 1, 1, generator=generator)
    return 1 + strength * sinusoid(16, 16, 1, 0) + 0.2 * strength.flip(1) * sinusoid(16, 16, 3, 4)


def test_noise_consistent_hfr_recovers_the_image_where_plain_hfr_does_not():
    images = smooth_images(256)
    generator = torch.Generator().manual_seed(2)
    a, b = (images + 2 * torch.randn(images.shape, generator=generator) for _ in range(2))
    high, total = cross_energies(images, images)
    own = (high.sum() / total.sum()).item()
    assert noise_consistent_hfr(a, b).item() == pytest.approx(own, abs=0.01)
    assert high_frequency_ratio(a).mean().item() > own + 0.1
    centred = images - images.mean(0)
    high, total = cross_energies(centred, centred)
    own = (high.sum() / total.sum()).item()
    assert noise_consistent_hfr(a, b, centred=True).item() == pytest.approx(own, abs=0.01)


def test_centring_takes_out_what_all_images_share():
    images = smooth_images(64)
    shared = 10 * sinusoid(16, 16, 7, 7)
    before = noise_consistent_hfr(images, images, centred=True)
    torch.testing.assert_close(
        noise_consistent_hfr(images + shared, images + shared, centred=True), before, rtol=1e-3, atol=1e-4
    )
    assert noise_consistent_hfr(images + shared, images + shared) > 2 * noise_consistent_hfr(images, images)


def test_fisher_score_of_known_scatter():
    # Two classes at -1 and +1, each point 0.5 away from its centre: 4 * 1 over 4 * 0.25.
    q = torch.tensor([-1.5, -0.5, 0.5, 1.5]).view(4, 1, 1, 1)
    labels = torch.tensor([3, 3, 8, 8])
    assert fisher_score(q, labels).item() == pytest.approx(4.0)
    assert fisher_score(q + 100, labels).item() == pytest.approx(4.0)
    assert fisher_score(5 * q, labels).item() == pytest.approx(4.0)
    assert fisher_score(q, torch.tensor([1, 2, 1, 2])).item() == pytest.approx(0.25)
    assert fisher_score(torch.ones(4, 1, 2, 2), labels).item() == 0


@pytest.mark.parametrize('sigma', (0, -1, 'wide', None, True))
def test_sigma_is_checked(sigma):
    with pytest.raises(InputError, match=r'sigma=.* is not valid: give a number above 0'):
        high_frequency_ratio(torch.randn(1, 1, 4, 4), sigma)


def test_norm_is_checked():
    with pytest.raises(InputError, match=r'norm=3 is not valid: choose 2 \(energy\) or 1 \(magnitude\)'):
        high_frequency_ratio(torch.randn(1, 1, 4, 4), 0.25, 3)
