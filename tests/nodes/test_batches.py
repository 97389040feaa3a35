"""Batches of latents and of measurements, and seeds."""

import pytest
import torch


def degraded(lab, *seeds):
    pictures = torch.cat([lab.picture(seed) for seed in seeds])
    return lab.call("DMAP_Degrade", image=pictures, operator=lab.problem()["operator"], noise_sigma=0.0, seed=0)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * float(theirs.std()))


@pytest.fixture(params=["dps", "dmap"])
def sampler(lab, request):
    return {"dps": lab.dps, "dmap": lab.dmap}[request.param](zeta=5.0)


def test_the_first_of_a_batch_does_not_depend_on_the_batch(lab, sampler):
    both = lab.sample(lab.guider(), sampler, latent=lab.empty(batch=2))
    assert_close(both[:1], lab.sample(lab.guider(), sampler))
    assert float((both[0] - both[1]).std()) > 0.1 * float(both.std())


def test_every_latent_has_its_measurement(lab, sampler):
    both = lab.sample(lab.guider(measurement=degraded(lab, 0, 1)), sampler, latent=lab.empty(batch=2))
    assert_close(both[:1], lab.sample(lab.guider(measurement=degraded(lab, 0)), sampler))
    other = lab.sample(lab.guider(measurement=degraded(lab, 0, 2)), sampler, latent=lab.empty(batch=2))
    assert_close(other[:1], both[:1])
    assert float((other[1] - both[1]).std()) > 0.01 * float(both.std())


def test_one_measurement_serves_a_batch(lab, sampler):
    one = lab.sample(lab.guider(measurement=degraded(lab, 0)), sampler, latent=lab.empty(batch=2))
    assert_close(one, lab.sample(lab.guider(measurement=degraded(lab, 0, 0)), sampler, latent=lab.empty(batch=2)))


def test_the_report_has_a_residual_of_every_sample(lab, sampler):
    guider = lab.guider()
    lab.sample(guider, sampler, steps=2, latent=lab.empty(batch=2))
    assert [len(step) for step in guider.report.residuals] == [2, 2]


def test_empty_measurement_latent(lab):
    inputs = {"operator": lab.problem()["operator"], "vae": lab.shared()[1]}
    for measurement, batch_size, batch in ((degraded(lab, 0), 1, 1), (degraded(lab, 0), 3, 3), (degraded(lab, 0, 1), 1, 2)):
        latent, _, _ = lab.call("DMAP_EmptyMeasurementLatent", measurement=measurement, batch_size=batch_size, **inputs)
        assert len(latent["samples"]) == batch


def test_seeds(lab, sampler):
    first, again, other = (lab.sample(lab.guider(), sampler, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert float((first - other).std()) > 0.1 * float(first.std())


def test_the_largest_seed(lab, sampler):
    assert torch.isfinite(lab.sample(lab.guider(), sampler, steps=2, seed=2**64 - 1)).all()


@pytest.mark.parametrize("name", ["dps", "ddpm"])
def test_the_noise_of_a_step_is_not_the_first_noise_again(lab, name):
    """RandomNoise and the sampler are given the same seed; the same numbers twice would be correlated noise."""
    sigma, sigma_next, zeta = 10.0, 9.0, 0.001
    seen = []
    sampler = lab.dps(zeta=zeta) if name == "dps" else lab.stock("ddpm")
    schedule = torch.tensor([sigma, sigma_next, 0.0])
    lab.watch(lab.guider(zeta=zeta), sampler, lambda i, denoised, z, steps: seen.append((denoised, z.clone())), schedule=schedule)
    first = lab.call("RandomNoise", noise_seed=lab.SEED).generate_noise(lab.empty())
    denoised = seen[0][0]
    mean = denoised + (sigma_next / sigma) ** 2 * (sigma * first - denoised)
    stepped = seen[0][1] if name == "dps" else seen[1][1]  # stock samplers call back before the step
    noise = (stepped - mean) / (sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5)
    assert 0.7 < float(noise.std()) < 1.3, "this is not the noise of the step"
    assert abs(float(torch.nn.functional.cosine_similarity(noise.flatten(), first.flatten(), dim=0))) < 0.5
