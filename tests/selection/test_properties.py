"""What must hold for any map and any noise, not only for those that somebody thought of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmaselect.diffusion.noise import DDPM, RectifiedFlow, pixel_noise, seeded_noise
from mmaselect.selection.spectrum import cross_energies, high_frequency_ratio, noise_consistent_hfr, spectrum

SIGMAS = st.floats(0.05, 2)
TIMESTEPS = st.floats(0, 1000)
#: float32 sums of a few thousand squares.
CLOSE = dict(rel=1e-4, abs=1e-6)
settings.register_profile('suite', max_examples=40, deadline=None)
settings.load_profile('suite')


@st.composite
def maps(draw, least=1):
    """(B, C, h, w): smooth, rough, or with a large mean, as features are."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(least, 9)), draw(st.integers(least, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from((1e-3, 1.0, 50.0)))
    return values + draw(st.sampled_from((0.0, 1.0)))


@given(maps(), SIGMAS, st.sampled_from((1, 2)))
def test_a_ratio_is_a_ratio(q, sigma, norm):
    ratio = high_frequency_ratio(q, sigma, norm)
    assert ratio.shape == (len(q),)
    assert ((ratio >= 0) & (ratio <= 1)).all()


@given(maps(), SIGMAS, st.floats(-100, 100).filter(lambda factor: abs(factor) > 1e-3))
def test_scale_does_not_matter(q, sigma, factor):
    assert high_frequency_ratio(factor * q, sigma).tolist() == pytest.approx(
        high_frequency_ratio(q, sigma).tolist(), **CLOSE
    )


@given(maps(), SIGMAS, st.integers(0, 8), st.integers(0, 8))
def test_neither_do_shifts_flips_and_turns(q, sigma, rows, columns):
    """The filter knows frequencies, not places, and is round."""
    expected = high_frequency_ratio(q, sigma).tolist()
    for moved in (q.roll((rows, columns), (2, 3)), q.flip(2), q.flip(3), q.transpose(2, 3), q.rot90(1, (2, 3))):
        assert high_frequency_ratio(moved, sigma).tolist() == pytest.approx(expected, **CLOSE)


@given(maps(), SIGMAS, st.randoms())
def test_the_order_of_channels_does_not_matter(q, sigma, random):
    order = list(range(q.shape[1]))
    random.shuffle(order)
    assert high_frequency_ratio(q[:, order], sigma).tolist() == pytest.approx(
        high_frequency_ratio(q, sigma).tolist(), **CLOSE
    )


@given(maps(), SIGMAS, SIGMAS)
def test_a_wider_low_band_leaves_less(q, first, second):
    narrow, wide = sorted((first, second))
    assert (high_frequency_ratio(q, wide) <= high_frequency_ratio(q, narrow) + 1e-5).all()


@given(maps())
def test_parseval(q):
    """The half of the spectrum that is kept holds all of the energy, each frequency as often as it comes."""
    kept = spectrum(q).abs().square()
    width = q.shape[-1]
    twice = torch.full((kept.shape[-1],), 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    energy = q.square().sum((1, 2, 3))
    assert (kept * twice).sum((1, 2, 3)).tolist() == pytest.approx(energy.tolist(), **CLOSE)
    high, total = cross_energies(q, q, 0.25)
    assert total.tolist() == pytest.approx(energy.tolist(), **CLOSE)
    assert (high <= total * (1 + 1e-4) + 1e-6).all()
    assert (high >= 0).all()


@given(maps(), SIGMAS)
def test_cross_energies_are_symmetric_and_linear(q, sigma):
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    scale = max(q.abs().max().item(), 1)
    tolerance = dict(rel=1e-3, abs=1e-3 * scale * q.numel() ** 0.5)
    for one, two in zip(cross_energies(q, other, sigma), cross_energies(other, q, sigma)):
        assert one.tolist() == pytest.approx(two.tolist(), **tolerance)
    for one, two in zip(cross_energies(3 * q, other, sigma), cross_energies(q, other, sigma)):
        assert one.tolist() == pytest.approx((3 * two).tolist(), **tolerance)


@given(maps(2), SIGMAS)
def test_without_noise_its_consistent_form_is_the_ratio_of_energies(q, sigma):
    high, total = cross_energies(q, q, sigma)
    assert noise_consistent_hfr(q, q, sigma).item() == pytest.approx((high.sum() / total.sum()).item(), **CLOSE)
    if len(q) == 1:
        assert noise_consistent_hfr(q, q, sigma).item() == pytest.approx(high_frequency_ratio(q, sigma).item(), **CLOSE)


@pytest.mark.parametrize('dtype,bits', [(torch.bfloat16, 8), (torch.float16, 11)])
@given(q=maps(2), sigma=SIGMAS)
def test_half_precision_scores_are_near(dtype, bits, q, sigma):
    """Rounding to 2**-bits of each value moves the energy in a band by at most twice that share of all energy."""
    exact, rounded = high_frequency_ratio(q, sigma), high_frequency_ratio(q.to(dtype), sigma)
    assert rounded.dtype == torch.float32
    allowed = 4 * 2.0**-bits
    assert ((rounded - exact).abs() <= allowed * exact.sqrt() + allowed**2).all()


# --- noise -----------------------------------------------------------------------------------------------------------


@given(maps(), TIMESTEPS, st.floats(0.1, 10))
@example(torch.ones(1, 1, 1, 1), 1000.0, 0.1)
def test_a_rectified_flow_is_a_straight_line(latent, timestep, shift):
    process = RectifiedFlow(shift)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    sigma = process.sigma(timestep)
    assert 0 <= sigma <= 1
    assert torch.equal(process.add_noise(latent, noise, 0), latent)
    assert torch.allclose(process.add_noise(latent, noise, 1000), noise, atol=1e-6)
    expected = latent + sigma * (noise - latent)
    assert torch.allclose(process.add_noise(latent, noise, timestep), expected, rtol=1e-4, atol=1e-5)
    assert process.network_timestep(timestep) == pytest.approx(1000 * sigma)


@given(TIMESTEPS, TIMESTEPS, st.floats(0.1, 10))
def test_later_is_noisier(first, second, shift):
    early, late = sorted((first, second))
    assert RectifiedFlow(shift).sigma(early) <= RectifiedFlow(shift).sigma(late)
    process = DDPM.from_scheduler_config({})
    assert process.index(early) <= process.index(late)
    assert 0 <= process.index(late) <= 999


@given(TIMESTEPS)
def test_ddpm_keeps_the_variance(timestep):
    process = DDPM.from_scheduler_config({})
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    signal, noise = process.add_noise(one, zero, timestep), process.add_noise(zero, one, timestep)
    assert (signal**2 + noise**2).item() == pytest.approx(1, rel=1e-12)


@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**40), max_size=3), st.integers(0, 2**40))
def test_noise_is_that_of_its_numbers(seed, stream, other):
    shape = (2, 3, 4)
    noise = seeded_noise(shape, seed, *stream)
    assert torch.equal(noise, seeded_noise(shape, seed, *stream))
    assert noise.isfinite().all()
    if other != seed:
        assert not torch.equal(noise, seeded_noise(shape, other, *stream))
    assert not torch.equal(noise, seeded_noise(shape, seed, *stream, 1))


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_noise_of_pixels_knows_neither_batch_nor_order(seed, content):
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(content)) * 2 - 1
    noise = pixel_noise(images, (1, 5, 5), seed)
    assert torch.equal(pixel_noise(images.flip(0), (1, 5, 5), seed), noise.flip(0))
    assert torch.equal(pixel_noise(images[1:2], (1, 5, 5), seed)[0], noise[1])
    assert not torch.equal(noise[0], noise[1])
