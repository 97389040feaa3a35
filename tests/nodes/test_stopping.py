"""Runs that end early: they say why, and the next run is as if they had not been."""

import pytest
import torch

STEPS = 3


@pytest.fixture(params=["dps", "dmap", "ddpm"])
def sampler(lab, request):
    return {"dps": lab.dps, "dmap": lab.dmap, "ddpm": lambda: lab.stock("ddpm")}[request.param]()


def test_a_nan_is_reported_with_its_step(lab, sampler):
    guider = lab.guider()
    undisturbed = lab.sample(guider, sampler, STEPS)
    # at most two decoder calls a step: the third one belongs to the second step of DMAP, and to the third of the others
    step = 2 if isinstance(guider.report.solver, str) and guider.report.solver.startswith("DMAP") else 3
    with (
        lab.diverging(lab.shared()[1], at=3),
        pytest.raises(lab.core.errors.Diverged, match=rf"step {step} of {STEPS}: NaN .*residual nan; lower zeta"),
    ):
        lab.sample(guider, sampler, STEPS)
    assert len(guider.report.residuals) == step - 1
    assert torch.equal(lab.sample(guider, sampler, STEPS), undisturbed)


def test_a_nan_of_one_sample_names_it(lab, sampler):
    def spoil(image):
        image = image.clone()
        image[1] = float("nan")
        return image

    with lab.decoder(lab.shared()[1], 2, spoil), pytest.raises(lab.core.errors.Diverged, match="sample 1 of the batch"):
        lab.sample(lab.guider(), sampler, STEPS, latent=lab.empty(batch=2))


@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_ends_the_run_before_the_next_denoiser_call(lab, sampler, call):
    """Call 2 of the decoder lies in the middle of a step of DMAP."""
    management = lab.comfy.model_management
    undisturbed = lab.sample(lab.guider(), sampler, STEPS)
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model)
    at_interruption = []

    def cancel(image):
        at_interruption.append(len(calls))
        management.interrupt_current_processing(True)
        return image

    with lab.decoder(lab.shared()[1], call, cancel), pytest.raises(management.InterruptProcessingException):
        lab.sample(guider, sampler, STEPS)
    assert at_interruption == [len(calls)]
    assert not management.processing_interrupted()
    assert torch.equal(lab.sample(guider, sampler, STEPS), undisturbed)


def test_an_interruption_between_two_steps(lab, sampler):
    management = lab.comfy.model_management
    model, calls = lab.counting(lab.shared()[0])
    at_interruption = []

    def cancel(step, denoised, z, steps):
        at_interruption.append(len(calls))
        management.interrupt_current_processing(True)

    with pytest.raises(management.InterruptProcessingException):
        lab.watch(lab.guider(model=model), sampler, cancel, STEPS)
    assert at_interruption == [len(calls)]
    assert not management.processing_interrupted()


@pytest.mark.parametrize("memory", ["lean", "checkpoint"])
def test_an_interruption_in_a_lean_plan(lab, memory):
    """lean calls the denoiser again after the decoder: that call is one too many, too."""
    management = lab.comfy.model_management
    model, calls = lab.counting(lab.shared()[0])
    with lab.interrupting(lab.shared()[1], at=2), pytest.raises(management.InterruptProcessingException):
        lab.sample(lab.guider(model=model, memory=memory), lab.dps(), STEPS)
    assert len(calls) == (3 if memory == "lean" else 2)
    assert not management.processing_interrupted()


def test_a_guider_still_guides_stock_samplers_after_a_failed_run(lab):
    guider = lab.guider()
    undisturbed = lab.sample(guider, lab.stock("ddpm"), STEPS)
    with lab.diverging(lab.shared()[1], at=2), pytest.raises(lab.core.errors.Diverged):
        lab.sample(guider, lab.dmap(), STEPS)
    assert torch.equal(lab.sample(guider, lab.stock("ddpm"), STEPS), undisturbed)
