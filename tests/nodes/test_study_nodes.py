"""The studies as nodes: their numbers are what the guiders say, their runs those of a graph, and what cannot be done is said first."""

import contextlib
import csv
import functools
import importlib
import io
import math
import sys

import pytest
import torch

pytestmark = pytest.mark.hosts("one")

SEED = 11
SHAPE = (4, 4, 4)


@pytest.fixture(scope="module")
def seeing(lab, cses, tmp_path_factory):
    """A conditioning with a CSE, of random weights, that sees the measurement of lab.problem()."""
    with torch.inference_mode(), cses.Folders(tmp_path_factory.mktemp("models")) as folders:
        cses.save(cses.weights(lab.shared()[0]), folders.controlnet / "sr8.safetensors")
        inputs = lab.problem()
        return cses.apply(cses.load("sr8.safetensors")[0], inputs["measurement"], inputs["operator"])


def module(name):
    return importlib.import_module(f"dmap_pack.{name}")


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def figures(text, name):
    return [float(row[name]) for row in rows(text)]


def is_plot(picture):
    return picture.shape[0] == 1 and picture.shape[3] == 3 and picture.shape[2] == 900 and 0 <= picture.min() < picture.max() == 1


def score_error(lab, **changes):
    inputs = {"guider": None, "picture": lab.picture(), "sigmas": lab.sigmas(3), "zetas": "0.3, 4.8", "repeats": 2, "noise_seed": SEED}
    inputs |= changes
    inputs["guider"] = inputs["guider"] or lab.guider()
    inputs.setdefault("conditional", inputs["guider"])
    return lab.call("DMAP_ScoreErrorStudy", **inputs)


def score_mean(lab, **changes):
    inputs = {"sigmas": lab.sigmas(20), "zetas": "0.3, 4.8", "samples": 3, "batch": 2, "noise_seed": SEED, **changes}
    return lab.call("DMAP_ScoreMeanStudy", **{"guider": inputs.pop("guider", None) or lab.guider(), **inputs})


def steps(lab, **changes):
    inputs = {"reference": lab.picture(), "budget": 4, "K": "1, 2", "zeta": 2.0, "dsg_zeta": 0.3, "spacing": "exponential"} | changes
    return lab.call("DMAP_StepsStudy", **{"guider": inputs.pop("guider", None) or lab.guider(), "noise_seed": SEED, **inputs})


def solver(lab, **changes):
    inputs = {"reference": lab.picture(), "steps": 3, "zeta": 2.0, "noise_seed": SEED, **changes}
    return lab.call("DMAP_SolverStudy", **{"guider_1": inputs.pop("guider_1", None) or lab.guider(), **inputs})


@pytest.fixture
def undrawn(lab, monkeypatch):
    """Plots take longer than what they show."""
    monkeypatch.setattr(module("nodes.studies"), "drawn", lambda figure: torch.zeros(1, 1, 1, 3))


# with as little to do as possible
QUICK = {
    score_error: {"zetas": "1", "repeats": 1, "sigmas": torch.tensor([5.0, 2.0, 0.0])},
    score_mean: {"zetas": "1", "samples": 2, "batch": 1},
    steps: {"budget": 2, "K": "1", "zeta": 1.0},
    solver: {"steps": 2, "zeta": 1.0},
}
RUNS = {
    "score error": (score_error, "guider"),
    "score mean": (score_mean, "guider"),
    "steps": (steps, "guider"),
    "solver": (solver, "guider_1"),
}


@pytest.fixture(params=RUNS)
def study(request, undrawn):
    """(a small study that uses networks, the name of its guider)"""
    run, name = RUNS[request.param]
    return functools.partial(run, **QUICK[run]), name


def starts(lab, sigma, n, z0=0.0):
    """z0 + sigma eps of n samples, as the studies draw it at their first level."""
    generators = module("dmap_core.schedule").generators(SEED, n)
    return z0 + sigma * torch.stack([torch.randn(SHAPE, generator=g) for g in generators])


# Observation I


def test_a_model_has_no_error_to_itself(lab):
    plot, text = score_error(lab)
    unconditional = [row for row in rows(text) if row["method"] == "unconditional"]
    assert [float(row["mean"]) for row in unconditional] == [0.0] * 3
    dps = [row for row in rows(text) if row["method"] == "DPS"]
    assert [row["zeta"] for row in dps] == ["0.3"] * 3 + ["4.8"] * 3 and all(float(row["mean"]) > 0 for row in dps)
    for small, large in zip(dps[:3], dps[3:], strict=True):  # the error is all of the guidance, which is linear in zeta
        assert float(large["mean"]) == pytest.approx(16 * float(small["mean"]), rel=1e-3)
    assert is_plot(plot)


def test_score_errors_are_distances_of_what_the_guiders_answer(lab, seeing, undrawn):
    """At the last level of a schedule, which `lab.probe` asks a guider for."""
    sigma = 1.5
    guider, conditional = lab.guider(zeta=4.8), lab.stock_guider(positive=seeing)
    model, vae = lab.shared()
    z0 = model.model.process_latent_in(vae.first_stage_model.encode(lab.as_core(lab.picture())))
    z = starts(lab, sigma, 2, z0)
    theirs = lab.probe(conditional, z, sigma)
    scale = math.sqrt(1 + sigma**2) / sigma**2

    def distance(ours):
        return float(scale * torch.linalg.vector_norm((ours - theirs).flatten(1), dim=1).mean())

    _, text = score_error(lab, guider=guider, conditional=conditional, sigmas=torch.tensor([sigma, 0.0]), zetas="4.8")
    unconditional, dps = rows(text)
    assert float(unconditional["mean"]) == pytest.approx(distance(lab.probe(lab.stock_guider(), z, sigma)), rel=1e-3)
    assert float(dps["mean"]) == pytest.approx(distance(lab.probe(guider, z, sigma)), rel=1e-3)
    norm = scale * torch.linalg.vector_norm((theirs - z).flatten(1), dim=1).mean()
    assert float(dps["conditional_norm"]) == pytest.approx(float(norm), rel=1e-3)
    assert float(dps["mean"]) != pytest.approx(float(unconditional["mean"]), rel=0.01)
    assert float(unconditional["mean"]) > 1e-3  # the CSE says something
    assert list(dps) == ["sigma", "t", "method", "zeta", "mean", "standard_error", "n", "conditional_norm"] and dps["n"] == "2"


def test_the_conditional_model_is_the_same_in_every_guider(lab, seeing, undrawn):
    """DPSGuider answers with its model, not with DPS's estimate."""
    guider = lab.guider()
    _, ours = score_error(lab, guider=guider, conditional=lab.guider(positive=seeing))
    _, theirs = score_error(lab, guider=guider, conditional=lab.stock_guider(positive=seeing))
    assert figures(ours, "mean") == pytest.approx(figures(theirs, "mean"), rel=1e-3)
    basic = lab.call("BasicGuider", model=lab.shared()[0], conditioning=seeing)
    _, basics = score_error(lab, guider=guider, conditional=basic)
    assert figures(basics, "mean") == pytest.approx(figures(theirs, "mean"), rel=1e-5)


# Observation II


def test_score_means_are_means_of_what_the_guiders_answer(lab, seeing):
    schedule = torch.tensor([8.0, 4.0, 0.0])
    conditional = lab.stock_guider(positive=seeing)
    plot, text = score_mean(lab, conditional=conditional, sigmas=schedule, batch=3)
    z = math.sqrt(1 + 64) / 8 * starts(lab, 8.0, 3)  # x_T ~ N(0, I), in VE units
    found = {row["score"]: row for row in rows(text)}
    assert list(found) == ["unconditional", "DPS, zeta 0.3", "DPS, zeta 4.8", "conditional"] and is_plot(plot)
    for name, guider in (("unconditional", lab.stock_guider()), ("conditional", conditional)):
        score = math.sqrt(65) / 64 * (lab.probe(guider, z, 8.0) - z)
        row = found[name]
        assert row["samples"] == "3"
        assert float(row["mean over samples (mean of absolute values)"]) == pytest.approx(float(score.mean(0).abs().mean()), rel=1e-3)
        assert float(row["norm of the mean over samples"]) == pytest.approx(float(score.mean(0).norm()), rel=1e-3)
        published = [value for name, value in row.items() if name.startswith("Table 2's")]
        assert [float(value) for value in published] == pytest.approx([float(score.mean(1).abs().mean())], rel=1e-3)
    # DPS adds its guidance, with the next noise level of the schedule in it
    grad = (lab.probe(lab.stock_guider(), z, 8.0) - lab.probe(lab.guider(zeta=1.0), z, 8.0)) / (1 - 4**2 / 8**2)
    score = math.sqrt(65) / 64 * (lab.probe(lab.stock_guider(), z, 8.0) - 4.8 * grad - z)
    name = "mean over samples (mean of absolute values)"
    assert float(found["DPS, zeta 4.8"][name]) == pytest.approx(float(score.mean(0).abs().mean()), rel=1e-4)
    assert found["DPS, zeta 4.8"][name] != found["unconditional"][name]


def test_batches_change_nothing(lab, undrawn):
    results = [figures(score_mean(lab, batch=batch, conditional=lab.guider())[1], "norm of the mean over samples") for batch in (1, 64)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[1][0] == pytest.approx(results[1][-1], rel=1e-6)  # a model without a CSE is the unconditional one


# Observation III


def test_diversity_is_the_deviation_of_every_pixel(lab):
    images = torch.rand(5, 12, 20, 3, generator=torch.Generator().manual_seed(0))
    calm = 0.5 + 0.1 * (images[:3] - 0.5)
    plot, mean, std, text = lab.call("DMAP_DiversityStudy", images_1=images, images_3=calm, names="wild, calm")
    deviations = [batch.std(dim=0).mean(-1) for batch in (images, calm)]
    assert mean.shape == std.shape == (2, 12, 20, 3) and plot.shape[0] == 1
    assert torch.allclose(mean, torch.stack([images.mean(0), calm.mean(0)]), atol=1e-6)
    scaled = torch.stack(deviations) / deviations[0].max()
    assert torch.allclose(std, scaled.unsqueeze(-1).expand(-1, -1, -1, 3), atol=1e-5) and std.max() == 1
    first, second = rows(text)
    assert (first["name"], first["k"], second["name"], second["k"]) == ("wild", "5", "calm", "3")
    for row, deviation in zip((first, second), deviations, strict=True):
        assert float(row["mean standard deviation"]) == pytest.approx(float(deviation.mean()), rel=1e-4)
    assert float(first["standard error"]) > 0


def test_equal_restorations_have_no_deviation(lab, undrawn):
    _, mean, std, text = lab.call("DMAP_DiversityStudy", images_1=lab.picture().expand(3, -1, -1, -1))
    assert torch.equal(mean, lab.picture()) and not std.any()
    assert [(row["name"], float(row["mean standard deviation"])) for row in rows(text)] == [("images_1", 0.0)]


def test_what_has_no_diversity(lab):
    image = lab.picture()
    pair = image.expand(2, -1, -1, -1)

    def refused(match, **inputs):
        with pytest.raises(ValueError, match=f"Diversity Study: {match}"):
            lab.call("DMAP_DiversityStudy", **inputs)

    refused("images_1: .*1 picture", images_1=image)
    refused("images_2: .*1 picture", images_1=pair, images_2=image)
    refused("images_2 is 16x32 and images_1 32x32", images_1=pair, images_2=pair[:, :, :16])
    refused("images_4.*alpha", images_1=pair, images_4=torch.ones(2, 32, 32, 4))
    refused("names holds 1 names for 2", images_1=pair, images_2=pair, names="DPS")
    refused("names.*only once", images_1=pair, images_2=pair, names="DPS, DPS")


# the toy


def test_the_toy_is_dmap_cores(lab):
    plot, text, table = lab.call("DMAP_ToyStudy", zeta=0.1, K=3, steps=5, samples=20, y0=0.25, noise_seed=SEED, dsg_zeta=0.2, dmap_zeta=0.3)
    with torch.inference_mode(False):
        toy = module("dmap_core.studies").toy_example(20, 5, 0.1, 0.2, 0.3, 3, y=(0.25, 0.0), seed=SEED)
    wanted = toy.rows()
    assert [row["method"] for row in rows(table)] == [row["method"] for row in wanted]
    for name in ("y", "n", "upper", "mean", "std", "residual"):
        assert figures(table, name) == pytest.approx([float(row[name]) for row in wanted])
    assert len(text.splitlines()) == len(wanted) and text.splitlines()[2].startswith(f"DPS: {100 * wanted[2]['upper']:.1f} %")
    assert is_plot(plot)


# spread


def test_the_spread_is_that_of_the_command_line(lab, tmp_path):
    given = {"problem": "averaging", "solvers": "DPS; DAPS, gradient;", "truths": 2, "versions": 39, "steps": 4, "noise_seed": SEED}
    plot, text, table = lab.call("DMAP_SpreadStudy", **given)
    with torch.inference_mode(False):
        more = {"problems": "averaging", "solvers": "DPS; DAPS, gradient", "draws": 2, "steps": 4, "seed": SEED}
        module("dmap_core.studies.commands").spread_study(tmp_path, **more)
    assert table == (tmp_path / "spread.csv").read_text(encoding="utf-8")
    assert [row["method"] for row in rows(table)] == ["exact samples", "DPS", "DAPS, gradient"]
    assert figures(table, "ratio_seen")[0] == pytest.approx(1, abs=0.2)
    assert len(text.splitlines()) == 3 and is_plot(plot)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"solvers": "DPS; DIP"}, "solvers: there is no 'DIP'; choose from DPS; "),
        ({"solvers": "LATINO", "problem": "plane"}, "solvers: LATINO cannot do 'plane'"),
        ({"versions": 40}, "versions is 40; it must be one less than a multiple of 40"),
    ],
)
def test_a_spread_that_cannot_be(lab, wrong, match):
    given = {"problem": "inpainting", "solvers": "DPS", "truths": 2, "versions": 39, "steps": 4, "noise_seed": 0}
    with pytest.raises(ValueError, match=match):
        lab.call("DMAP_SpreadStudy", **given | wrong)


# whole runs


def decoded(lab, latents, vae=None, height=32, width=32):
    pictures = lab.call("VAEDecode", samples={"samples": latents}, vae=vae or lab.shared()[1])
    return (pictures[:, :height, :width] * 255).round() / 255


def psnr(images, reference):
    return (-10 * (images - reference).double().square().mean(dim=(1, 2, 3)).log10()).tolist()


def test_the_runs_of_a_budget_are_those_of_a_graph(lab):
    guider = lab.guider()
    plot, pictures, text = steps(lab, guider=guider)
    four, two = (lab.sigmas(n, spacing="exponential") for n in (4, 2))
    runs = {
        ("DPS", "", "4", "2.0"): (lab.dps(2.0), four),
        ("DSG", "", "4", "0.3"): (lab.call("DMAP_DSGSampler", zeta=0.3), four),
        ("DMAP", "1", "4", "2.0"): (lab.dmap(2.0, 1), four),
        ("DMAP", "2", "2", "4.0"): (lab.dmap(4.0, 2), two),
    }
    wanted = torch.cat([decoded(lab, lab.sample(guider, sampler, seed=SEED, schedule=s)) for sampler, s in runs.values()])
    assert torch.equal(pictures, wanted) and is_plot(plot)
    assert [tuple(row[name] for name in ("method", "K", "T", "zeta")) for row in rows(text)] == list(runs)
    assert figures(text, "PSNR (dB)") == pytest.approx(psnr(pictures, lab.picture()))
    operator, y = lab.problem()["operator"], lab.as_core(lab.problem()["measurement"])
    assert figures(text, "residual") == pytest.approx(operator.distance(operator(lab.as_core(pictures)), y).tolist(), rel=1e-4)
    assert figures(text, "denoiser calls") == [4, 4, 4 + 3, 2 + 2]
    assert all(seconds > 0 for seconds in figures(text, "seconds of the batch"))
    assert all(0 < value < 1 for value in figures(text, "SSIM"))


@pytest.mark.thorough
def test_a_batch_of_measurements_of_an_odd_size(lab, undrawn):
    operator = lab.call("DMAP_OperatorGaussianBlur", sigma=1.0, kernel_size=5)
    images = torch.cat([lab.picture(i, 36, 44) for i in range(2)])
    y = lab.call("DMAP_Degrade", image=images, operator=operator, noise_sigma=0.0, seed=0)
    guider = lab.guider(operator=operator, measurement=y)
    _, pictures, text = steps(lab, guider=guider, reference=images, K="2")
    assert pictures.shape == (6, 36, 44, 3)
    assert [row["picture"] for row in rows(text)] == ["1", "2"] * 3
    assert figures(text, "PSNR (dB)") == pytest.approx(psnr(pictures, images.repeat(3, 1, 1, 1)))


@pytest.mark.hosts("all")
def test_samplers_and_models_are_those_of_a_graph(lab):
    other = lab.guider(model=lab.with_lora(lab.shared()[0], 0.5))
    plot, pictures, text = solver(lab, guider_2=other, names="plain, with LoRA")
    wanted = [decoded(lab, lab.sample(guider, lab.dps(2.0, eta=eta), seed=SEED)) for guider in (lab.guider(), other) for eta in (1.0, 0.0)]
    assert torch.equal(pictures, torch.cat(wanted)) and is_plot(plot)
    assert [(row["model"], row["sampler"], row["eta"]) for row in rows(text)] == [
        (model, sampler, eta) for model in ("plain", "with LoRA") for sampler, eta in (("ancestral", "1.0"), ("PF-ODE", "0.0"))
    ]
    assert figures(text, "PSNR (dB)") == pytest.approx(psnr(pictures, lab.picture()))
    assert len(set(figures(text, "PSNR (dB)"))) == 4
    _, alone, text = solver(lab)
    assert torch.equal(alone, pictures[:2]) and [row["model"] for row in rows(text)] == ["guider_1", "guider_1"]


# all that use networks


def numbers_of(output):
    """All of a study's csv but its times."""
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows(output[-1])]


def test_a_seed_repeats_the_study(lab, study):
    run, _ = study
    first = run(lab)
    assert numbers_of(first) == numbers_of(run(lab))
    assert numbers_of(first) != numbers_of(run(lab, noise_seed=SEED + 1))
    for output in first[:-1]:
        assert output.device.type == "cpu" and output.dtype == torch.float32 and not output.requires_grad


def test_a_study_leaves_the_guiders_report(lab, study):
    run, name = study
    guider = lab.guider()
    lab.sample(guider, lab.dps(), 2)
    report = guider.report
    run(lab, **{name: guider})
    assert guider.report is report and report.denoiser_calls == 2


def test_progress_goes_to_the_end_step_by_step(lab, cses, study, monkeypatch):
    run, _ = study
    with cses.watching(monkeypatch) as seen:
        run(lab)
    values, totals = [value for value, _, _ in seen], {total for _, total, _ in seen}
    assert len(totals) == 1 and values == sorted(values) and values[-1] == totals.pop() and len(values) > 1


def test_cancel_ends_it(lab, study):
    run, name = study
    management = lab.comfy.model_management
    model, calls = lab.counting(lab.shared()[0])
    at_interruption = []

    def cancel(image):
        at_interruption.append(len(calls))
        management.interrupt_current_processing(True)
        return image

    with lab.decoder(lab.shared()[1], 2, cancel), pytest.raises(management.InterruptProcessingException):
        run(lab, **{name: lab.guider(model=model)})
    assert at_interruption == [len(calls)] and not management.processing_interrupted()


def test_cancel_ends_the_conditional_model_too(lab, undrawn):
    management = lab.comfy.model_management
    model, calls = lab.counting(lab.shared()[0])
    clone = model.clone()
    wrapper = clone.model_options["model_function_wrapper"]

    def cancel(apply_model, arguments):
        management.interrupt_current_processing(True)
        return wrapper(apply_model, arguments)

    clone.set_model_unet_function_wrapper(cancel)
    for conditional in (lab.stock_guider(model=clone), lab.guider(model=clone)):
        calls.clear()
        with pytest.raises(management.InterruptProcessingException):
            score_error(lab, conditional=conditional)
        assert len(calls) == 1
    assert not management.processing_interrupted()


@contextlib.contextmanager
def before_any_network(lab, match):
    """Refused with a message, and no guider has run."""
    guider = module("nodes.host.guider").PosteriorGuider
    sample = guider.sample
    guider.sample = lambda *args, **kwargs: pytest.fail("a run began")
    try:
        with pytest.raises(ValueError, match=match):
            yield
    finally:
        guider.sample = sample


@pytest.mark.parametrize(
    ("run", "package"),
    [*((run, "matplotlib") for run, _ in RUNS.values()), (steps, "torchmetrics"), (solver, "torchmetrics"), (steps, "scipy")],
)
def test_missing_packages_are_named_first(lab, monkeypatch, run, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with before_any_network(lab, f"pip install {package}"):
        run(lab)


@pytest.mark.parametrize("node", ["DiversityStudy", "ToyStudy", "SpreadStudy"])
def test_the_others_name_matplotlib_too(lab, monkeypatch, node):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    toy = {"zeta": 0.1, "K": 1, "steps": 3, "samples": 5, "y0": 0.5, "noise_seed": 0}
    spread = {"problem": "plane", "solvers": "DPS", "truths": 2, "versions": 39, "steps": 3, "noise_seed": 0}
    inputs = {"DiversityStudy": {"images_1": lab.picture().expand(2, -1, -1, -1)}, "ToyStudy": toy, "SpreadStudy": spread}
    with pytest.raises(ValueError, match="pip install matplotlib"):
        lab.call(f"DMAP_{node}", **inputs[node])


def test_a_guider_without_measurement(lab, study):
    run, name = study
    with before_any_network(lab, f"{name}: it is a CFGGuider.*connect DPSGuider"):
        run(lab, **{name: lab.stock_guider()})


def test_the_second_guider_is_looked_at_too(lab):
    with before_any_network(lab, "Solver Study: guider_2: it is a CFGGuider.*connect DPSGuider"):
        solver(lab, guider_2=lab.stock_guider())


@pytest.mark.parametrize("text", ["", "0.3, zeta", "0.3, 0", "-1", "nan", "inf", "1, 1.0"])
@pytest.mark.parametrize("run", [score_error, score_mean])
def test_lists_of_step_sizes(lab, run, text):
    with before_any_network(lab, "Study: zetas is"):
        run(lab, zetas=text)


@pytest.mark.parametrize("levels", [[3.0], [1.0, 3.0, 0.0], [3.0, 1.0], [3.0, float("nan"), 0.0]])
@pytest.mark.parametrize("run", [score_error, score_mean])
def test_noise_levels_without_meaning(lab, run, levels):
    with before_any_network(lab, "Study: sigmas: sigmas"):
        run(lab, sigmas=torch.tensor(levels))


def several(lab):
    """A guider with two measurements."""
    y = lab.problem()["measurement"]
    return lab.guider(measurement=torch.cat([y, y.flip(1)]))


@pytest.mark.parametrize("run", [score_error, score_mean])
def test_scores_are_of_one_picture(lab, run):
    with before_any_network(lab, "Study: guider: it has 2 measurements"):
        run(lab, guider=several(lab))
    with before_any_network(lab, "Study: conditional: it has 2 measurements"):
        run(lab, conditional=several(lab))


@pytest.mark.parametrize("run", [score_error, score_mean])
def test_a_conditional_model_of_another_kind(lab, run):
    sdxl = lab.shared()[0].clone()
    sdxl.add_object_patch("latent_format", lab.comfy.latent_formats.SDXL())
    with before_any_network(lab, "Study: conditional: its model works on latents of SDXL, and the guider's on those of SD15"):
        run(lab, conditional=lab.stock_guider(model=sdxl))
    other = lab.call("ModelSamplingDiscrete", model=lab.shared()[0], sampling="img_to_img", zsnr=False)
    with before_any_network(lab, "Study: conditional: model: .*image-to-image"):
        run(lab, conditional=lab.stock_guider(model=other))
    with before_any_network(lab, "Study: conditional: it is a str"):
        run(lab, conditional="guider")
    small = lab.guider(measurement=lab.problem()["measurement"][:, :2])
    with before_any_network(lab, "Study: conditional: it restores 32x16 pictures, and the guider 32x32"):
        run(lab, conditional=small)


def test_pictures_that_do_not_fit(lab):
    with before_any_network(lab, "Score Error Study: picture: it is 40x32, but the guider restores 32x32"):
        score_error(lab, picture=lab.picture(0, 32, 40))
    with before_any_network(lab, "Score Error Study: picture: 2 pictures"):
        score_error(lab, picture=lab.picture().expand(2, -1, -1, -1))
    for run in (steps, solver):
        with before_any_network(lab, "Study: reference.*it is 40x32, but the guider restores 32x32"):
            run(lab, reference=lab.picture(0, 32, 40))
        with before_any_network(lab, r"Study: reference.*2 pictures for 1 measurement"):
            run(lab, reference=lab.picture().expand(2, -1, -1, -1))
        with before_any_network(lab, "Study: reference.*NaN"):
            run(lab, reference=lab.picture() * float("nan"))
    with before_any_network(lab, "Solver Study: guider_1 has 1 measurement.* and guider_2 2"):
        solver(lab, guider_2=several(lab))
    with before_any_network(lab, "Solver Study: names holds 1 names for 2"):
        solver(lab, guider_2=lab.guider(), names="one")


@pytest.mark.parametrize(
    ("K", "match"),
    [
        ("3", "K 3 does not divide the budget of 4"),
        ("1, 3", "K 3 does not divide"),
        ("4", "K 4 leaves one noise level"),
        ("1.5", "whole numbers with commas"),
        ("0", "above 0"),
        ("2, 2", "only once"),
    ],
)
def test_a_budget_that_does_not_come_out_even(lab, K, match):
    with before_any_network(lab, f"Steps Study: .*{match}"):
        steps(lab, K=K)


def test_step_sizes_out_of_range(lab):
    for value in (0.0, -1.0, float("nan"), float("inf")):
        for run, node in ((steps, "Steps Study"), (solver, "Solver Study")):
            with before_any_network(lab, f"{node}: zeta is .*above 0"):
                run(lab, zeta=value)
    with before_any_network(lab, "Steps Study: dsg_zeta is 1.5; .*at most 1"):
        steps(lab, dsg_zeta=1.5)
