"""What a run tells while it goes on, and when it is over."""

import json

import pytest
import torch

STEPS = 3
K = 2


@pytest.fixture(params=["dps", "dmap"])
def sampler(lab, request):
    return {"dps": lab.dps, "dmap": lambda: lab.dmap(K=K)}[request.param]()


def expected_calls(guider):
    return STEPS + (STEPS - 1) * K if guider.report.solver.startswith("DMAP") else STEPS


@pytest.mark.parametrize("name", ["dps", "dmap", "ddpm"])
def test_callback(lab, name):
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[name]()
    seen = []
    latents = lab.watch(lab.guider(), sampler, lambda *event: seen.append(event), STEPS)
    assert [(step, steps) for step, _, _, steps in seen] == [(i, STEPS) for i in range(STEPS)]
    for _, denoised, z, _ in seen:
        for tensor in (denoised, z):
            assert tensor.shape == latents.shape and tensor.dtype == torch.float32
            assert not tensor.requires_grad and tensor.grad_fn is None
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", ["dps", "dmap", "ddpm"])
def test_the_console_gets_a_line_as_from_stock_samplers(lab, name, capsys):
    sampler = {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[name]()
    lab.watch(lab.guider(), sampler, None, STEPS)
    assert f"{STEPS}/{STEPS} [" in capsys.readouterr().err
    lab.sample(lab.guider(), sampler, STEPS)  # with ComfyUI's bars switched off
    assert "it" not in capsys.readouterr().err


def test_the_preview_is_the_denoised_latent(lab):
    """The last step of DPS goes to the denoised latent but for the gradient."""
    seen = []
    guider = lab.guider(zeta=0.001)
    latents = lab.watch(guider, lab.dps(zeta=0.001), lambda step, denoised, z, steps: seen.append(denoised), STEPS)
    assert float((lab.shared()[0].model.process_latent_out(seen[-1]) - latents).norm()) < 0.01 * float(latents.norm())


def test_the_result_has_left_autograd(lab, sampler):
    latents = lab.sample(lab.guider(), sampler, STEPS)
    assert not latents.requires_grad and latents.grad_fn is None


def test_calls_are_counted_as_they_are_made(lab, sampler):
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model, memory="fast")
    lab.sample(guider, sampler, STEPS)
    report = guider.report
    assert report.denoiser_calls == len(calls) == expected_calls(guider)
    assert report.decoder_calls == (STEPS if report.solver.startswith("DPS") else (STEPS - 1) * K + 1)


def test_noise_levels_at_which_the_model_is_called(lab):
    """DMAP takes its gradients at the new noise level."""
    model, calls = lab.counting(lab.shared()[0])
    lab.sample(lab.guider(model=model, memory="fast"), lab.dmap(K=2), schedule=torch.tensor([9.0, 5.0, 2.0, 0.0]))
    assert calls == [9, 5, 5, 5, 2, 2, 2]


def test_report(lab, sampler):
    guider = lab.guider(memory="lean")
    latents = lab.sample(guider, sampler, STEPS)
    text, values = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    values = json.loads(values)
    assert len(values["residuals"]) == STEPS and all(len(step) == 1 and step[0] > 0 for step in values["residuals"])
    assert values["memory"] == "lean" and values["seconds"] > 0 and "Super-Resolution (scale 8)" in values["operator"]
    for words in (f"{STEPS} steps", f"{values['denoiser_calls']} denoiser calls", "memory plan lean", f"{values['residuals'][-1][0]:.4g}"):
        assert words in text


def test_the_last_residual_is_that_of_the_result(lab):
    guider = lab.guider()
    latents = lab.sample(guider, lab.dmap(zeta=5.0), STEPS)
    assert guider.report.residuals[-1] == [pytest.approx(lab.residual(latents), rel=1e-4)]


def test_a_report_is_of_the_last_run(lab, sampler):
    guider = lab.guider()
    lab.sample(guider, sampler, 2)
    lab.sample(guider, sampler, STEPS)
    assert len(guider.report.residuals) == STEPS
    assert guider.report.denoiser_calls == expected_calls(guider)
