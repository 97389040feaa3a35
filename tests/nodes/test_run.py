"""run.restore: the one way to restore a picture outside a graph makes the picture of a graph."""

import importlib

import pytest
import torch

STEPS = 3


def module(name):
    return importlib.import_module(f"dmap_pack.nodes.{name}")


def in_a_graph(lab, sampler, batch=1, **given):
    """The picture, and the report's text, of the nodes that users connect."""
    problem = lab.problem(**given)
    seen = {name: problem[name] for name in ("measurement", "operator", "vae")}
    latent, width, height = lab.call("DMAP_EmptyMeasurementLatent", **seen, batch_size=batch)
    guider = lab.call("DMAP_DPSGuider", **problem)
    output = lab.sample(guider, sampler, schedule=lab.sigmas(STEPS), latent=latent)
    images = lab.call("VAEDecode", samples={"samples": output}, vae=problem["vae"])
    assert torch.equal(lab.call("DMAP_Decode", latent={"samples": output}, **seen, keep_given=False), images[:, :height, :width])
    return images[:, :height, :width], guider.report


def by_hand(lab, sampler, batch=None, seed=None, warm_up=False, on_step=None, **given):
    problem = lab.problem(**given)
    y = module("pictures").measurement_to_core(problem["measurement"], problem["operator"], "a test")
    run = module("host.run")
    made = run.Problem.of(problem["model"], problem["positive"], problem["vae"], problem["operator"], y, batch=batch)
    return run.restore(made, sampler.solver, lab.sigmas(STEPS), lab.SEED if seed is None else seed, on_step=on_step, warm_up=warm_up)


def odd(lab):
    operator = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=5)
    y = lab.call("DMAP_Degrade", image=lab.picture(0, 36, 44), operator=operator, noise_sigma=0.01, seed=0)
    return {"operator": operator, "measurement": y}


@pytest.mark.parametrize("size", ["whole latents", "no whole latents"])
@pytest.mark.parametrize("solver", ["dps", "dmap"])
def test_it_is_the_picture_of_a_graph(lab, solver, size):
    given = odd(lab) if size == "no whole latents" else {}
    sampler = getattr(lab, solver)()
    images, report = in_a_graph(lab, sampler, **given)
    restored = by_hand(lab, sampler, **given)
    assert torch.equal(restored.images, images)
    assert restored.report.residuals == report.residuals and restored.report.mismatch == report.mismatch
    assert (restored.report.denoiser_calls, restored.report.decoder_calls) == (report.denoiser_calls, report.decoder_calls)
    assert 0 < restored.seconds < restored.report.seconds


def test_several_restorations_of_one_measurement(lab):
    images, _ = in_a_graph(lab, lab.dps(), batch=2)
    restored = by_hand(lab, lab.dps(), batch=2)
    assert torch.equal(restored.images, images) and not torch.equal(images[0], images[1])


def test_a_lora_and_a_prompt(lab):
    given = {
        "model": lab.with_lora(lab.shared()[0]),
        "positive": [[torch.randn(1, 3, 1024, generator=torch.Generator().manual_seed(0)), {}]],
    }
    images, _ = in_a_graph(lab, lab.dmap(), **given)
    assert torch.equal(by_hand(lab, lab.dmap(), **given).images, images)


def test_a_cse(lab, cses, tmp_path):
    with cses.Folders(tmp_path) as folders:
        cses.save(cses.weights(lab.shared()[0]), folders.controlnet / "sr8.safetensors")
        control, _, _ = cses.load("sr8.safetensors")
    inputs = lab.problem()
    seeing = cses.apply(control, inputs["measurement"], inputs["operator"])
    images, _ = in_a_graph(lab, lab.dps(), positive=seeing)
    restored = by_hand(lab, lab.dps(), positive=seeing)
    assert torch.equal(restored.images, images)
    assert not torch.equal(images, by_hand(lab, lab.dps()).images)


def test_a_warm_up_changes_nothing_but_the_time(lab):
    cold, steps = by_hand(lab, lab.dmap()), []
    warm = by_hand(lab, lab.dmap(), warm_up=True, on_step=lambda: steps.append(1))
    assert torch.equal(warm.images, cold.images) and len(steps) == STEPS
    assert (warm.report.denoiser_calls, warm.report.decoder_calls) == (cold.report.denoiser_calls, cold.report.decoder_calls)
    assert not torch.equal(by_hand(lab, lab.dmap(), seed=lab.SEED + 1).images, cold.images)


def test_the_guiders_report_is_that_of_its_own_run(lab):
    run, guider = module("host.run"), lab.guider()
    lab.sample(guider, lab.dps())
    report = guider.report
    other = run.restore(run.Problem(guider), lab.dmap().solver, lab.sigmas(2), 0).report
    assert guider.report is report and other is not report and len(other.residuals) == 2


def test_what_cannot_be_done_is_said_first(lab):
    foreign = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(ValueError, match="conditioning: its width is 768"):
        by_hand(lab, lab.dps(), positive=foreign)
    inputs = lab.problem()
    run, operator = module("host.run"), inputs["operator"]
    with pytest.raises(ValueError):
        run.Problem.of(inputs["model"], inputs["positive"], inputs["vae"], operator, torch.zeros(1, 7, 4, 4))


def test_tables_in_comfyui_are_of_the_pictures_of_graphs(lab, cses, tmp_path):
    """The backend of dmap_core.evaluate: with and without a CSE, and a CSE alone with a stock sampler."""
    core = {name: importlib.import_module(f"dmap_pack.dmap_core.{name}") for name in ("evaluate.config", "pictures")}
    with cses.Folders(tmp_path) as folders:
        cses.save(cses.weights(lab.shared()[0]), folders.controlnet / "sr8.safetensors")
        control, _, _ = cses.load("sr8.safetensors")
    inputs = lab.problem()
    file = next(tmp_path.rglob("sr8.safetensors"))
    shared = {"operator": "sr8", "steps": STEPS, "spacing": "paper", "cse": file}
    rows = [
        {**shared, "solver": "DPS", "settings": {"zeta": 1.0}, "cse": None},
        {**shared, "solver": "DPS", "settings": {"zeta": 1.0}, "name": "with"},
        {**shared, "solver": "CSE alone"},
    ]
    config = core["evaluate.config"].make_config({"operators": {"sr8": inputs["operator"].spec()}, "rows": rows, "checkpoint": file})
    backend = module("host.backend").ComfyUI(config, inputs["model"], inputs["positive"], inputs["vae"])
    operator = inputs["operator"]
    y = operator.measure(module("pictures").to_core(lab.picture(), "a test"))
    seeing = cses.apply(control, inputs["measurement"], operator)
    for row, positive in zip(config.rows, (inputs["positive"], seeing, seeing), strict=True):
        images, costs = backend.restore(row, config.plan(row), operator, torch.cat([y, y]), [lab.SEED, lab.SEED + 1])
        assert images.shape == (2, 3, lab.SIZE, lab.SIZE) and not torch.equal(images[0], images[1]) and len(costs) == 2
        if row.solver == "CSE alone":
            guider = lab.stock_guider(positive=positive)
            stock = lab.call("KSamplerSelect", sampler_name="euler_ancestral")
            output = lab.sample(guider, stock, schedule=lab.sigmas(STEPS))
            wanted = lab.call("VAEDecode", samples={"samples": output}, vae=inputs["vae"])
        else:
            wanted, report = in_a_graph(lab, lab.dps(), positive=positive)
            assert costs[0]["residual"] == report.residuals[-1][0] and costs[0]["memory"] == report.memory
        assert torch.equal(images[:1], wanted.movedim(-1, 1) * 2 - 1) and costs[0]["denoiser_calls"] == STEPS
