"""Runs that end early: they say why, keep the last picture, and the next run is as if they had not been."""

import importlib

import numpy as np
import pytest
import torch

STEPS = 3


@pytest.fixture(autouse=True)
def output(lab, tmp_path, monkeypatch):
    """The folder where pictures of cancelled runs are kept."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


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


# the picture of a cancelled run


def cancelled(lab, guider, sampler, at, latent=None):
    """The denoised latents of the steps of a run that is cancelled after step `at` (from 1) is seen, or before the first for 0."""
    management, seen = lab.comfy.model_management, []

    def watched(step, denoised, z, steps):
        seen.append(denoised)
        if step + 1 == at:
            management.interrupt_current_processing(True)

    if at == 0:
        management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        lab.watch(guider, sampler, watched, STEPS, latent=latent)
    assert not management.processing_interrupted()
    return seen


def opened(path):
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return torch.from_numpy(np.asarray(picture, np.float32)) / 255


def decoded(lab, z0):
    return lab.shared()[1].decode(lab.shared()[0].model.process_latent_out(z0)).clamp(0, 1)


@pytest.fixture
def said(lab, monkeypatch):
    lines = []
    for name in ("guider", "clock"):
        monkeypatch.setattr(importlib.import_module(f"dmap_pack.nodes.host.{name}"), "say", lines.append)
    return lines


def test_a_cancel_keeps_the_last_picture(lab, sampler, output, said, caplog):
    with caplog.at_level("INFO"):
        seen = cancelled(lab, lab.guider(), sampler, at=2)
    (path,) = output.iterdir()
    assert path.name == "dmap-cancelled_00001_.png"
    assert len(seen) == 2
    assert (opened(path) - decoded(lab, seen[-1])[0]).abs().max() < 1.01 / 255
    told = f"cancelled at step 2 of {STEPS}; the last picture is in output/dmap-cancelled_00001_.png"
    assert said[-1] == told and f"DPSGuider: {told}" in caplog.text


def test_nothing_is_kept_of_a_run_without_a_step(lab, sampler, output):
    assert cancelled(lab, lab.guider(), sampler, at=0) == []
    assert list(output.iterdir()) == []


def test_a_cancel_in_the_middle_of_a_step_keeps_the_step_before(lab, output):
    management, seen = lab.comfy.model_management, []
    with lab.interrupting(lab.shared()[1], at=4), pytest.raises(management.InterruptProcessingException):  # two decoder calls a step
        lab.watch(lab.guider(), lab.dmap(K=2), lambda step, denoised, z, steps: seen.append(denoised), STEPS)
    (path,) = output.iterdir()
    assert len(seen) == 1 and (opened(path) - decoded(lab, seen[0])[0]).abs().max() < 1.01 / 255


def test_a_cancel_in_an_optimisation_of_the_picture(lab, output):
    """ReSample's: no network is called in it."""
    operators, management = lab.core.operators, lab.comfy.model_management
    guider, calls = lab.guider(), []
    distance = guider.operator.distance

    def cancelling(y_hat, y):
        calls.append(1)
        if len(calls) == 12:
            management.interrupt_current_processing(True)
        return distance(y_hat, y)

    assert isinstance(guider.operator, operators.SuperResolution)
    object.__setattr__(guider.operator, "distance", cancelling)
    sampler = lab.call(
        "DMAP_ReSampleSampler", zeta=1.0, first=0, last=2, every=1, iterations=5, learning_rate=0.01, factor=1.0, space="pixel"
    )
    with pytest.raises(management.InterruptProcessingException):
        lab.watch(guider, sampler, lambda *_: None, STEPS)
    assert len(calls) == 12 and len(list(output.iterdir())) == 1


def test_every_sample_of_a_batch_is_kept(lab, output):
    seen = cancelled(lab, lab.guider(), lab.dmap(), at=1, latent=lab.empty(batch=2))
    paths = sorted(output.iterdir())
    assert [path.name for path in paths] == ["dmap-cancelled_00001_.png", "dmap-cancelled_00002_.png"]
    for path, picture in zip(paths, decoded(lab, seen[0]), strict=True):
        assert (opened(path) - picture).abs().max() < 1.01 / 255


def test_a_second_cancel_while_it_is_kept(lab, output, monkeypatch):
    """The host's layers look for it, too."""
    management = lab.comfy.model_management
    prior = importlib.import_module("dmap_pack.nodes.host.prior").HostPrior
    picture, seen = prior.picture, []

    def again(self, z0):
        if len(seen) < 2:
            seen.append(1)
            management.interrupt_current_processing(True)
        return picture(self, z0)

    def first(step, denoised, z, steps):
        management.interrupt_current_processing(True)
        monkeypatch.setattr(prior, "picture", again)

    with pytest.raises(management.InterruptProcessingException):
        lab.watch(lab.guider(), lab.dmap(), first, STEPS)
    assert len(seen) == 2 and len(list(output.iterdir())) == 1
    assert not management.processing_interrupted()


def test_a_picture_in_tiles_of_odd_size(lab, output):
    measurement = lab.picture(0, 9, 31)
    operator = lab.call("DMAP_OperatorSuperResolution", scale=5)
    guider = lab.guider(measurement=measurement, operator=operator)
    guider.tile = 16
    seen = cancelled(lab, guider, lab.dps(), at=1, latent=lab.empty(height=6, width=20))
    (path,) = output.iterdir()
    picture = opened(path)
    assert picture.shape == (45, 155, 3)
    # tiles see less around them: near to the whole, and their seams are blended
    assert (picture - decoded(lab, seen[0])[0, :45, :155]).abs().mean() < 0.02


def test_what_cannot_be_kept_does_not_hide_the_cancel(lab, output, monkeypatch, caplog):
    def full(images):
        raise OSError("No space left on device")

    monkeypatch.setattr(importlib.import_module("dmap_pack.nodes.host.guider"), "save_cancelled", full)
    cancelled(lab, lab.guider(), lab.dmap(), at=1)
    assert "is not kept: No space left on device" in caplog.text and list(output.iterdir()) == []


def test_a_half_written_file_is_removed(lab, output, monkeypatch):
    from PIL import Image

    def broken(self, path, format):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    cancelled(lab, lab.guider(), lab.dmap(), at=1)
    assert list(output.iterdir()) == []


def test_a_study_that_is_cancelled_leaves_no_picture(lab, output):
    module, management = importlib.import_module("dmap_pack.nodes.host.run"), lab.comfy.model_management
    solvers = importlib.import_module("dmap_pack.dmap_core.solvers")
    with pytest.raises(management.InterruptProcessingException):
        module.restore(
            module.Problem(lab.guider()),
            solvers.DMAP(zeta=1.0, K=1),
            lab.sigmas(STEPS),
            0,
            lambda: management.interrupt_current_processing(True),
        )
    assert list(output.iterdir()) == []


def test_activations_of_the_interrupted_gradient_are_gone_before_the_picture_is_decoded(lab, output, monkeypatch):
    """They may be most of the memory."""
    import gc
    import weakref

    guider_module = importlib.import_module("dmap_pack.nodes.host.guider")
    held, alive = [], []

    def interrupt(image):
        lab.comfy.model_management.interrupt_current_processing(True)
        held.append(weakref.ref(image))
        return image

    def keep(images):
        alive.extend(ref() is not None for ref in held)
        return []

    monkeypatch.setattr(guider_module, "save_cancelled", keep)
    gc.disable()
    try:
        with lab.decoder(lab.shared()[1], 3, interrupt), pytest.raises(lab.comfy.model_management.InterruptProcessingException):
            lab.watch(lab.guider(memory="fast"), lab.dps(), lambda *_: None, STEPS)
    finally:
        gc.enable()
    assert alive == [False]
