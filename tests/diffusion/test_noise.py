"""Forward processes against their equations and against diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from mmaselect.diffusion.noise import DDPM, Interpolant, RectifiedFlow, seeded_noise
from mmaselect.errors import InputError

LATENT, NOISE = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize('timestep', (0, 1, 250, 999, 1000))
def test_rectified_flow(timestep):
    expected = (1 - timestep / 1000) * LATENT + timestep / 1000 * NOISE
    torch.testing.assert_close(RectifiedFlow().add_noise(LATENT, NOISE, timestep), expected)


def test_rectified_flow_equals_diffusers_with_a_shift():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = RectifiedFlow(shift=3.0)
    # diffusers' table holds the shifted sigma of t = 1000, 999, ..., 1.
    for index in (0, 250, 999):
        timestep = 1000 - index
        assert ours.sigma(timestep) == pytest.approx(scheduler.sigmas[index].item(), abs=1e-6)
        assert ours.network_timestep(timestep) == pytest.approx(scheduler.timesteps[index].item(), abs=1e-3)


@pytest.mark.parametrize('timestep', (0, 1, 250, 999))
def test_ddpm_equals_diffusers(timestep):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')
    ours = DDPM.from_scheduler_config(dict(scheduler.config))
    expected = scheduler.add_noise(LATENT, NOISE, torch.tensor([timestep] * 2))
    torch.testing.assert_close(ours.add_noise(LATENT, NOISE, timestep), expected)
    assert ours.network_timestep(timestep) == timestep


def test_ddpm_at_its_end_and_between_steps():
    process = DDPM.from_scheduler_config({})
    assert process.network_timestep(1000) == 999
    assert process.network_timestep(250.4) == 250
    assert DDPM(torch.linspace(0.99, 0.01, 50)).network_timestep(500) == 25


@pytest.mark.parametrize('timestep', (-1, 1000.5, float('nan'), '500', None, True))
def test_timesteps_outside_the_scale(timestep):
    for process in (RectifiedFlow(), DDPM.from_scheduler_config({})):
        with pytest.raises(InputError, match=r'is not a timestep: give a number from 0 \(clean\) to 1000'):
            process.add_noise(LATENT, NOISE, timestep)


def test_seeded_noise_is_normal_and_depends_on_its_arguments_alone():
    noise = seeded_noise((64, 64), 0, 5, 1)
    torch.manual_seed(123)
    assert torch.equal(noise, seeded_noise((64, 64), 0, 5, 1))
    others = [seeded_noise((64, 64), *key) for key in ((1, 5, 1), (0, 6, 1), (0, 5, 0), (0, 1, 5), (0,), (5,))]
    for other in others:
        # Two independent maps of 4096 cells correlate by 1/64 on average.
        assert abs((noise * other).mean()) < 5 / 64
    assert noise.mean().abs() < 4 / 64
    assert noise.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('timestep', (0, 1, 250, 500, 999, 1000))
def test_the_curved_paths_of_sit(timestep):
    """Against ``transport/path.py`` of SiT, whose time is 1 at data; VP's betas are summed up."""
    latent, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    time = 1 - timestep / 1000
    expected = 2 * math.sin(time * math.pi / 2) + 3 * math.cos(time * math.pi / 2)
    assert Interpolant('GVP').add_noise(latent, noise, timestep).item() == pytest.approx(expected, abs=1e-6)
    betas = 0.1 + (20 - 0.1) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    kept = math.exp(-betas[: round(100 * timestep)].sum().item() / 100_000 / 2)
    expected = 2 * kept + 3 * (1 - kept**2) ** 0.5
    assert Interpolant('VP').add_noise(latent, noise, timestep).item() == pytest.approx(expected, abs=1e-6)
    assert Interpolant('VP').network_timestep(timestep) == timestep


def test_paths_of_a_sit():
    from mmaselect.diffusion.families import SiT

    assert type(SiT.make_process({}, 3.0, {'path_type': 'linear'})) is RectifiedFlow
    assert vars(SiT.make_process({}, 1.0, {'path_type': 'cosine'})) == {'path': 'GVP'}
    with pytest.raises(InputError, match=r"shift=3.0 is not valid for path_type='VP': only the linear path has"):
        SiT.make_process({}, 3.0, {'path_type': 'VP'})
    arch = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)
    for field, value, known in (('path_type', 'spiral', 'Linear, linear, GVP'), ('data_time', 2, '0, 1')):
        with pytest.raises(InputError, match=f'{field}={value!r} is not known; choose from: {known}'):
            SiT.build(dict(arch, **{field: value}))
