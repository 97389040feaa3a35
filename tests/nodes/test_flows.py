"""Flow models: Stable Diffusion 3, Flux, Chroma, AuraFlow, Lumina 2 and Z-Image, forward and backward, in ComfyUI's own classes."""

import math

import pytest
import torch

from dmap_core.schedule import FLOW_FIRST, flow_time

T = 0.6


@pytest.fixture(scope="module")
def flows(lab):
    import flows

    return flows


NAMES = ("Flux", "Chroma", "AuraFlow", "Lumina 2", "Z-Image", "SD3")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, flows):
    with torch.inference_mode():
        return flows.Loaded(request.param)


@pytest.fixture(scope="module")
def sd3(flows):
    with torch.inference_mode():
        return flows.Loaded("SD3")


def problem(lab, loaded, **changes):
    given = {"model": loaded.model, "vae": loaded.vae, "positive": loaded.positive, **changes}
    return {name: value for name, value in lab.problem(**given).items() if name in ("model", "vae", "positive", "operator", "measurement")}


def look(lab, loaded, function, batch=1, **changes):
    """function(posterior) where a solver would be."""
    from dmap_pack.nodes.host.run import with_posterior

    guider = lab.guider(**problem(lab, loaded, **changes), **{k: v for k, v in changes.items() if k == "memory"})
    return with_posterior(guider, "test", torch.tensor([T / (1 - T), 0.0]), batch, function)


def noise(loaded, batch=1, seed=1):
    import families

    with torch.inference_mode(False):
        return families.noise(batch, loaded.flow.channels, 4, 4, seed=seed)


def test_the_posterior_sees_a_ve_model(lab, loaded):
    """E[z0 | z] = x_t - t v(x_t, t) at x_t = z / (1 + sigma), t = sigma / (1 + sigma)."""
    z, sigma = 1.5 * noise(loaded), T / (1 - T)
    found = look(lab, loaded, lambda posterior: posterior.denoise(z, sigma))
    x = z * (1 - T)
    torch.testing.assert_close(found, x - T * loaded.velocity(x, T), rtol=1e-4, atol=1e-5)
    assert float((found - x).norm()) > 0.05 * float(x.norm()), "the network says nothing"


@pytest.mark.parametrize("memory", ["fast", "checkpoint"])
def test_the_gradient_is_the_residuals_slope(lab, loaded, memory):
    sigma, step = T / (1 - T), 0.02

    def slopes(posterior):
        z = 1.5 * noise(loaded)
        grad, _, _ = posterior.gradient(z, sigma)
        other = noise(loaded, seed=2)
        direction = grad / grad.norm() + other / other.norm()
        direction = direction / direction.norm()
        up, down = (posterior.residual(z + s * step * direction, sigma) for s in (1, -1))
        return grad, float((grad * direction).sum()), float(up - down) / (2 * step)

    grad, along, slope = look(lab, loaded, slopes, memory=memory)
    assert float(grad.norm()) > 0.01
    assert slope == pytest.approx(along, rel=0, abs=0.03 * float(grad.norm()))


def run(lab, loaded, sampler, steps=4, latent=None, schedule=None, batch=1, seed=3, **changes):
    given = problem(lab, loaded, **changes)
    guider = lab.guider(**given, **{k: v for k, v in changes.items() if k not in given})
    schedule = lab.call("DMAP_DMAPScheduler", model=given["model"], steps=steps, spacing="exponential") if schedule is None else schedule
    if latent is None:
        latent = {"samples": torch.zeros(batch, loaded.flow.channels, 4, 4)}
    return lab.sample(guider, sampler, seed=seed, latent=latent, schedule=schedule), guider


@pytest.mark.parametrize("jacobian", ["exact", "none"])
def test_a_whole_run_follows_the_measurement(lab, loaded, jacobian):
    sampler = lab.call("DMAP_DMAPSampler", zeta=1.0, K=2, step="auto", jacobian=jacobian)
    latents, guider = run(lab, loaded, sampler)
    assert torch.isfinite(latents).all()
    residuals = [r[0] for r in guider.report.residuals]
    assert residuals[-1] < 0.8 * max(residuals)


def test_schedules_are_the_hosts_own(lab, loaded):
    """SIGMAS of a flow are times from below 1 down to 0, so that stock nodes can read them."""
    for spacing in ("paper", "exponential", "karras"):
        sigmas = lab.call("DMAP_DMAPScheduler", model=loaded.model, steps=6, spacing=spacing)
        assert 0.99 < float(sigmas[0]) <= FLOW_FIRST + 1e-6 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()


# What does not depend on the family


def test_a_stock_schedule_begins_below_one(lab, sd3):
    """At t = 1 the VE level would be infinite."""
    schedule = lab.call("BasicScheduler", model=sd3.model, scheduler="simple", steps=4, denoise=1.0)
    assert schedule[0] == 1
    latents, guider = run(lab, sd3, lab.call("DMAP_DPSSampler", zeta=1.0, step="auto"), schedule=schedule)
    assert torch.isfinite(latents).all() and len(guider.report.residuals) == 4


def test_levels_of_another_model_are_refused(lab, sd3):
    schedule = lab.call("DMAP_DMAPScheduler", model=lab.shared()[0], steps=4)
    with pytest.raises(ValueError, match=r"sigmas: they begin at 14\.6.*times of a flow.*connect the flow model to the scheduler"):
        run(lab, sd3, lab.call("DMAP_DPSSampler", zeta=1.0, step="auto"), schedule=schedule)


def test_a_stock_sampler_makes_the_steps_of_dps(lab, sd3):
    """One step of euler_ancestral from x_t: its mean is moved by -zeta times the gradient, in VE space."""
    t, t_next, zeta = 0.7, 0.4, 0.5
    x = noise(sd3, seed=5)
    z = x / (1 - t)
    sigma, sigma_next = t / (1 - t), t_next / (1 - t_next)

    def both(posterior):
        grad, denoised, _ = posterior.gradient(z.clone(), sigma)
        return grad, denoised

    grad, denoised = look(lab, sd3, both)
    answers = []

    def ask(model, x_, sigmas, extra_args=None, callback=None, disable=None):
        answers.append(model(x.clone(), torch.full((1,), t), **extra_args).clone())
        return answers[0]

    guider = lab.guider(**problem(lab, sd3), zeta=zeta)
    zeros = torch.zeros_like(x)
    guider.sample(zeros, zeros.clone(), lab.comfy.samplers.KSAMPLER(ask), torch.tensor([t, t_next, 0.0]), seed=0)
    down = t_next**2 / t  # where ComfyUI's ancestral step goes before it adds noise
    kept = (down / (1 - down)) / sigma
    guided = answers[0] + kept / (1 - kept) * z  # the mean over (1 - kept), in VE space
    expected = denoised + kept / (1 - kept) * z - zeta * grad / (1 - kept)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    assert math.isclose(flow_time(sigma_next), t_next)


def test_a_noise_mask_keeps_what_it_does_not_cover(lab, sd3):
    known = 0.5 * noise(sd3, seed=8)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    latents, _ = run(lab, sd3, lab.call("DMAP_DMAPSampler", zeta=1.0, step="auto"), latent={"samples": known, "noise_mask": mask})
    torch.testing.assert_close(latents[..., :2], known[..., :2], rtol=0, atol=1e-5)
    assert float((latents[..., 2:] - known[..., 2:]).abs().max()) > 0.1


def test_a_warm_start_keeps_to_its_latent(lab, sd3):
    """With little noise the result stays near what was given, with much it does not."""
    known, sampler = 0.5 * noise(sd3, seed=8), lab.call("DMAP_DPSSampler", zeta=0.001)
    distances = []
    for start in (0.02, 1.0):
        schedule = lab.call("DMAP_DMAPScheduler", model=sd3.model, steps=3, start=start)
        latents, _ = run(lab, sd3, sampler, latent={"samples": known}, schedule=schedule)
        distances.append(float((latents - known).norm()))
    assert distances[0] < 0.3 * distances[1]


def test_a_batch_is_single_runs(lab, sd3):
    sampler = lab.call("DMAP_DMAPSampler", zeta=1.0, step="auto")
    two, _ = run(lab, sd3, sampler, batch=2)
    one, _ = run(lab, sd3, sampler, batch=1)
    torch.testing.assert_close(two[:1], one, rtol=0, atol=1e-3)
    assert float((two[1] - two[0]).abs().max()) > 0.01


def test_tiles_of_the_size_of_the_picture_are_the_picture(lab, sd3):
    sampler = lab.call("DMAP_DMAPSampler", zeta=1.0, step="auto")
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    measurement = lab.call("DMAP_Degrade", image=lab.picture(height=96, width=96), operator=operator, noise_sigma=0.0, seed=0)
    latent = {"samples": torch.zeros(1, 16, 12, 12)}
    given = {"operator": operator, "measurement": measurement, "latent": latent}
    whole, tiled = (run(lab, sd3, sampler, steps=2, tile=tile, **given)[0] for tile in ("whole", "128"))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-3)


# Bad input


def test_vaes_of_the_other_kind_are_refused(lab, sd3):
    model, vae = lab.shared()
    with pytest.raises(ValueError, match="vae: it has 4 latent channels and the model 16"):
        lab.guider(**problem(lab, sd3, vae=vae))
    with pytest.raises(ValueError, match="vae: it has 16 latent channels and the model 4"):
        lab.guider(**problem(lab, sd3, model=model, positive=lab.call("DMAP_DMAPUnconditional", model=model)))


def test_another_text_encoder_is_refused(lab, loaded):
    tokens, values = loaded.positive[0]
    with pytest.raises(ValueError, match=r"positive: its width is 25, and \w+ models read 24"):
        lab.guider(**problem(lab, loaded, positive=[[torch.zeros(1, 3, 25), values]]))


def test_without_a_text_encoder(lab, loaded):
    ((tokens, values),) = lab.call("DMAP_DMAPUnconditional", model=loaded.model)
    assert tokens.shape == (1, 1, 24) and not tokens.any()
    z = noise(loaded)
    found = look(lab, loaded, lambda posterior: posterior.denoise(z, 1.0), positive=[[tokens, values]])
    assert torch.isfinite(found).all()


def test_no_cse_of_a_transformer(lab, sd3):
    from dmap_pack.nodes.host.training import check_trainable

    with pytest.raises(ValueError, match="SD3 is a transformer, and a CSE is a ControlNet of a UNet"):
        check_trainable(sd3.model)


def test_a_guidance_that_the_model_does_not_read(lab, flows, sd3):
    tokens, values = sd3.positive[0]
    guider = lab.guider(**problem(lab, sd3, positive=[[tokens, {**values, "guidance": 3.5}]]))
    assert guider.warnings == ["the conditioning has a guidance, which SD3 models do not read; leave FluxGuidance out, or use cfg"]
    with torch.inference_mode():
        flux = flows.Loaded("Flux")
    assert lab.guider(**problem(lab, flux)).warnings == []


def test_large_models_are_guided_through_the_decoder(lab, sd3, monkeypatch):
    """A hole wants the denoiser's Jacobian, for which a card may be too small."""
    from comfy import model_management

    hole = torch.zeros(1, 32, 32)
    hole[:, 8:24, 8:24] = 1
    operator = lab.call("DMAP_OperatorInpainting", mask=hole)
    given = {"operator": operator, "solver": "auto", "quality": "look"}
    sampler, _, text = lab.call("DMAP_DMAPPreset", model=sd3.model, **given)
    assert sampler.through_denoiser and "decoder" not in text
    monkeypatch.setattr(model_management, "get_torch_device", lambda: torch.device("meta"))
    monkeypatch.setattr(model_management, "get_total_memory", lambda device: 1.5 * sd3.model.model_size())
    sampler, _, text = lab.call("DMAP_DMAPPreset", model=sd3.model, **given)
    assert not sampler.through_denoiser and "gradients end at the decoder, as the model is too large for this GPU" in text
