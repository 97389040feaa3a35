"""Stock samplers with DPSGuider: ddpm is DPS, the others run and are guided, too."""

import pytest
import torch


@pytest.fixture(scope="module")
def dps_latents(lab):
    return lab.sample(lab.guider(), lab.dps(zeta=5.0), steps=4)


# At eta 1 euler_ancestral takes the same step as ddpm, from other formulas.
@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_an_ancestral_sampler_is_dps(lab, dps_latents, name):
    latents = lab.sample(lab.guider(zeta=5.0), lab.stock(name), steps=4)
    torch.testing.assert_close(latents, dps_latents, rtol=0, atol=1e-3 * float(dps_latents.std()))


def test_ddpm_is_dps_on_sigmas_that_are_not_the_papers(lab):
    schedule = torch.tensor([9.0, 4.0, 3.9, 0.5, 0.0])
    expected = lab.sample(lab.guider(), lab.dps(zeta=2.0), schedule=schedule)
    latents = lab.sample(lab.guider(zeta=2.0), lab.stock("ddpm"), schedule=schedule)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-3 * float(expected.std()))


def test_dmap_is_not_dps(lab, dps_latents):
    latents = lab.sample(lab.guider(), lab.dmap(zeta=5.0), steps=4)
    assert float((latents - dps_latents).std()) > 0.1 * float(dps_latents.std())


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpmpp_2m", "heun"])
def test_guidance_leads_a_stock_sampler_towards_the_measurement(lab, name):
    schedule = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
    guided, free = (lab.sample(lab.guider(zeta=zeta), lab.stock(name), schedule=schedule) for zeta in (2.0, 0.001))
    assert torch.isfinite(guided).all()
    assert lab.residual(guided) < 0.95 * lab.residual(free)


def test_a_stock_sampler_may_stop_above_zero(lab):
    """Stock samplers take the first half of a split schedule; only the pack's own need all of it."""
    latents = lab.sample(lab.guider(), lab.stock("euler"), schedule=lab.sigmas(4)[:3])
    assert torch.isfinite(latents).all()
