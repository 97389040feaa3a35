"""The samplers besides DMAP and DPS, Adam's steps, the presets and Karras' noise levels, in ComfyUI."""

import contextlib
import importlib
import math

import pytest
import torch
from variants import some_at_once

STEPS = 4
EVERY_SAMPLE = 0x9E3779B97F4A7C15  # between the seeds of two samples of a batch

# None of the settings is the node's default.
SETTINGS = {
    "DSG": {"zeta": 0.3, "eta": 0.8},
    "PSLD": {"zeta": 2.0, "gamma": 0.5, "transpose": "published", "eta": 0.7},
    "FreeDoM": {"zeta": 2.0, "K": 3, "first": 1, "last": 2, "travel": "published", "eta": 0.9},
    "ReSample": {
        "zeta": 2.0,
        "first": 0,
        "last": 3,
        "every": 3,
        "iterations": 4,
        "learning_rate": 0.03,
        "factor": 20.0,
        "space": "latent",
        "tweedie": "published",
        "eta": 0.8,
    },
    "LATINO": {"delta": 0.5, "eta": 0.6},
    "FlowDPS": {"zeta": 2.0, "inner": 2, "weight": "published", "noise": "falling", "eta": 0.7},
    "DAPS": {
        "zeta": 0.001,
        "iterations": 2,
        "ode": 1,
        "move": "gradient",
        "momentum": 0.3,
        "tau": 0.05,
        "decay": 0.5,
        "space": "latent",
        "eta": 0.7,
    },
}
OTHERS = {  # another value for each of them, the default where it lies within the schedule
    "DSG": {"zeta": 0.08, "eta": 1.0},
    "PSLD": {"zeta": 4.8, "gamma": 0.0096, "transpose": "adjoint", "eta": 1.0},
    "FreeDoM": {"zeta": 4.8, "K": 2, "first": 2, "last": 1, "travel": "forward", "eta": 1.0},
    "ReSample": {
        "zeta": 4.8,
        "first": 1,
        "last": 2,
        "every": 2,
        "iterations": 5,
        "learning_rate": 0.005,
        "factor": 40.0,
        "space": "both",
        "tweedie": "correct",
        "eta": 1.0,
    },
    "LATINO": {"delta": 0.0, "eta": 1.0},
    "FlowDPS": {"zeta": 4.8, "inner": 3, "weight": "constant", "noise": "published", "eta": 1.0},
    "DAPS": {
        "zeta": 0.0001,
        "iterations": 4,
        "ode": 2,
        "move": "langevin",
        "momentum": 0.0,
        "tau": 0.0,
        "decay": 1.0,
        "space": "both",
        "eta": 1.0,
    },
}
NAMES = list(SETTINGS)


def make(lab, name, **changes):
    return lab.call(f"DMAP_{name}Sampler", **{**SETTINGS[name], **changes})


def core(lab, module):
    return importlib.import_module(f"{lab.core.posterior.__package__}.{module}")


def run(lab, sampler, steps=STEPS, **problem):
    return lab.sample(lab.guider(**problem), sampler, steps)


def degraded(lab, *seeds, operator=None):
    pictures = torch.cat([lab.picture(seed) for seed in seeds])
    return lab.call("DMAP_Degrade", image=pictures, operator=operator or lab.problem()["operator"], noise_sigma=0.0, seed=0)


def jpeg(lab):
    return lab.call("DMAP_OperatorJpeg", quality=30, subsampling="4:2:0")


# runs


@pytest.mark.parametrize("name", NAMES)
def test_a_run(lab, name):
    """Finite, the same bit by bit once more, another with another seed, and free of autograd."""
    sampler = make(lab, name)
    first, again, other = (lab.sample(lab.guider(), sampler, STEPS, seed=seed) for seed in (1, 1, 2))
    assert torch.isfinite(first).all() and float(first.std()) > 0.01
    assert torch.equal(first, again)
    assert float((first - other).std()) > 0.1 * float(first.std())
    assert not first.requires_grad and first.grad_fn is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.hosts("one")
def test_it_is_the_solver_with_these_settings(lab, name):
    """The same bits as from the solver, which is given the posterior and the noise by hand; and every setting reaches it."""
    guiders = importlib.import_module(f"{lab.pack.__name__}.nodes.host.guider")
    given = []

    class ByHand(guiders.PosteriorSampler):
        name = "by hand"

        def run(self, posterior, z, sigmas, generator, callback):
            given.append(float(z.std()))
            seeds = core(lab, "schedule").generators(lab.SEED + 1, 1)  # ComfyUI's samplers begin one seed after RandomNoise
            return core(lab, "solvers").SOLVERS[name](**SETTINGS[name])(posterior, z, sigmas, generator=seeds, callback=callback)

    result = run(lab, make(lab, name))
    assert torch.equal(run(lab, ByHand()), result)
    assert given == [pytest.approx(float(lab.sigmas(STEPS)[0]), rel=0.3)]
    for setting, value in OTHERS[name].items():
        assert SETTINGS[name][setting] != value
        assert make(lab, name, **{setting: value}).solver == core(lab, "solvers").SOLVERS[name](**SETTINGS[name] | {setting: value})


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_no_setting_is_without_effect(lab, name):
    result = run(lab, make(lab, name))
    for setting, value in OTHERS[name].items():
        assert not torch.equal(run(lab, make(lab, name, **{setting: value})), result), f"{setting} changes nothing"


# Settings that do not amplify rounding, on any processor. AdamW's first steps have the learning rate's length whatever the gradient's, so that
# rounding of an entry near 0 is worth a whole step: ReSample descends without it here. That AdamW does the same for a batch is tested in
# float64, without ComfyUI. FreeDoM's travels with a zeta of 2 magnify rounding to 2e-3.
RESAMPLE_BATCH = {"learning_rate": 1e-3}
FREEDOM_BATCH = {"zeta": 0.5}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DSG", {}),
        pytest.param("PSLD", {}, marks=pytest.mark.thorough),
        pytest.param("PSLD", {"transpose": "adjoint"}, marks=pytest.mark.thorough),
        pytest.param("FreeDoM", FREEDOM_BATCH, marks=pytest.mark.thorough),
        ("ReSample", RESAMPLE_BATCH),
        ("LATINO", {}),
        pytest.param("FlowDPS", FREEDOM_BATCH, marks=pytest.mark.thorough),
        pytest.param("DAPS", {}, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.hosts("one")
def test_a_batch_is_as_good_as_single_runs(lab, monkeypatch, name, changes):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    sampler, schedule = make(lab, name, **changes), lab.sigmas(STEPS)
    latent = lab.empty(batch=2)
    noise = lab.call("RandomNoise", noise_seed=lab.SEED).generate_noise(latent)

    def sample(which, seed, *pictures):
        guider = lab.guider(measurement=degraded(lab, *pictures))
        result = guider.sample(noise[which], latent["samples"][which], sampler, schedule, seed=seed % 2**64)
        assert [len(step) for step in guider.report.residuals] == [len(pictures)] * STEPS
        return result, torch.tensor(guider.report.residuals)

    both, residuals = sample(slice(0, 2), lab.SEED, 0, 1)
    for i in range(2):
        alone, residual = sample(slice(i, i + 1), lab.SEED + i * EVERY_SAMPLE, i)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-3 * float(both.std()))
        torch.testing.assert_close(residuals[:, i : i + 1], residual, rtol=1e-3, atol=0)


# step -> [calls of the denoiser, of the decoder]
CALLS = {
    "DSG": (STEPS, STEPS),
    "PSLD": (STEPS, STEPS),
    "FreeDoM": (STEPS + 2 * 2, STEPS + 2 * 2),
    "ReSample": (STEPS, STEPS + 2 * 4),
    "LATINO": (STEPS, STEPS),
    "FlowDPS": (STEPS, 2 * STEPS),
    "DAPS": (STEPS, 2 * STEPS),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_report_has_every_step_and_call(lab, name):
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model, memory="fast")
    seen = []
    latents = lab.watch(guider, make(lab, name), lambda *event: seen.append((event[0], event[3])), STEPS)
    assert seen == [(i, STEPS) for i in range(STEPS)]
    report = guider.report
    assert (report.denoiser_calls, report.decoder_calls) == CALLS[name] and len(calls) == report.denoiser_calls
    assert len(report.residuals) == STEPS and all(len(r) == 1 and 0 < r[0] < math.inf for r in report.residuals)
    text, _ = lab.call("DMAP_SamplingReport", guider=guider, latent={"samples": latents})
    first = "delta" if name == "LATINO" else "zeta"
    assert text.startswith(f"{name} ({first} {SETTINGS[name][first]:g}") and f"{report.denoiser_calls} denoiser calls" in text


def test_freedom_walks_the_steps_of_its_window_again(lab):
    model, calls = lab.counting(lab.shared()[0])
    sampler = make(lab, "FreeDoM", K=3, first=1, last=1)
    lab.sample(lab.guider(model=model, memory="fast"), sampler, schedule=torch.tensor([9.0, 5.0, 2.0, 0.0]))
    assert calls == [9, 5, 5, 5, 2]


def test_a_picture_is_optimised_without_the_decoder(lab):
    """ReSample's pixel space decodes once for every consistency step; "both" changes over after two thirds of the steps."""
    for space, more in (("pixel", 2), ("both", 1 + 4)):
        guider = lab.guider()
        lab.sample(guider, make(lab, "ReSample", space=space), STEPS)
        assert guider.report.decoder_calls == STEPS + more


# what they compute


def test_special_cases_are_dps(lab):
    zeta = 2.0
    dps = run(lab, lab.dps(zeta=zeta))
    assert torch.equal(run(lab, make(lab, "FreeDoM", zeta=zeta, K=1, eta=1.0)), dps)
    assert torch.equal(run(lab, make(lab, "PSLD", zeta=zeta, gamma=0.0, eta=1.0)), dps)


def test_dsg_stays_on_the_sphere_of_the_noise(lab):
    zs, denoised = [], []
    schedule = lab.sigmas(STEPS, spacing="exponential")
    lab.watch(
        lab.guider(),
        make(lab, "DSG", eta=1.0),
        lambda i, z0, z, n: (zs.append(z.clone()), denoised.append(z0.clone())),
        schedule=schedule,
    )
    levels = schedule.tolist()
    for i in range(1, STEPS - 1):
        share = (levels[i + 1] / levels[i]) ** 2
        mean = (1 - share) * denoised[i] + share * zs[i - 1]
        radius = math.sqrt(zs[i].numel()) * levels[i + 1] * math.sqrt(1 - share)
        assert float((zs[i] - mean).norm()) == pytest.approx(radius, rel=1e-4)
    torch.testing.assert_close(zs[-1], denoised[-1], rtol=0, atol=1e-5)  # the last step is not guided


@pytest.mark.hosts("one")
def test_resample_ends_where_the_picture_fits(lab):
    schedule = lab.sigmas(STEPS, spacing="exponential")
    settings = {"zeta": 1.0, "first": 3, "iterations": 30, "learning_rate": 0.05, "tweedie": "correct"}
    fitted = lab.sample(lab.guider(), make(lab, "ReSample", **settings), schedule=schedule)
    assert lab.residual(fitted) < 0.5 * lab.residual(lab.sample(lab.guider(), lab.dps(zeta=1.0), schedule=schedule))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (36, 44)])
@pytest.mark.hosts("one")
def test_the_second_term_of_psld_is_the_slope_of_what_the_encoder_says(lab, height, width):
    """Also where the picture is no multiple of the VAE's factor: the encoder then sees its edge repeated."""
    sigma, h, gamma, operator = 2.0, 0.05, 0.5, lab.call("DMAP_OperatorSuperResolution", scale=4)
    measurement = lab.call("DMAP_Degrade", image=lab.picture(height=height, width=width), operator=operator, noise_sigma=0.0, seed=0)
    inputs = {"operator": operator, "measurement": measurement}
    y, (rows, columns) = lab.as_core(measurement), lab.latent_size(inputs)
    z = sigma * torch.randn(1, 4, rows, columns, generator=torch.Generator().manual_seed(1))
    stock, network = lab.stock_guider(**inputs), lab.shared()[1].first_stage_model
    model = stock.model_patcher.model

    def glue(z):
        z0 = lab.probe(stock, z, sigma)
        image = network.decode(model.process_latent_out(z0))[..., :height, :width]
        rest = (y - operator(image)).repeat_interleave(4, 2).repeat_interleave(4, 3)
        down, across = torch.arange(8 * rows).clamp(max=height - 1), torch.arange(8 * columns).clamp(max=width - 1)
        return float((z0 - model.process_latent_in(network.encode((image + rest)[..., down, :][..., across]))).norm())

    def last_step(sampler):
        schedule, latent = torch.tensor([sigma, 0.0]), torch.zeros_like(z)
        return model.process_latent_in(lab.guider(**inputs).sample(z / sigma, latent, sampler, schedule, seed=0))

    without, with_it = (last_step(make(lab, "PSLD", gamma=g, zeta=1.0)) for g in (0.0, gamma))
    grad = (without - with_it) / gamma
    assert float(grad.norm()) > 0.05
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    for direction in (grad / grad.norm(), other / other.norm()):
        slope = (glue(z + h * direction) - glue(z - h * direction)) / (2 * h)
        assert slope == pytest.approx(float((grad * direction).sum()), rel=0, abs=0.02 * float(grad.norm()))


@pytest.mark.parametrize("name", some_at_once(["PSLD", "ReSample"], ["PSLD"]))
def test_plans_agree_and_leave_the_encoder_alone(lab, name):
    model, vae = lab.shared()
    weights = {k: v.clone() for k, v in vae.first_stage_model.state_dict().items()}
    results = {plan: run(lab, make(lab, name), memory=plan) for plan in lab.core.gradient.STRATEGIES}
    for plan in ("lean", "checkpoint"):
        torch.testing.assert_close(results[plan], results["fast"], rtol=0, atol=1e-3 * float(results["fast"].std()))
    assert all(torch.equal(v, weights[k]) for k, v in vae.first_stage_model.state_dict().items())
    assert all(p.grad is None for network in (model.model, vae.first_stage_model) for p in network.parameters())


# Adam


def test_adam_begins_with_the_sign_of_the_gradient(lab):
    schedule = torch.tensor([2.0, 1.5, 0.0])
    firsts = {}
    for optimizer, zeta in (("gradient", 0.5), ("gradient", 1.0), ("adam", 0.05), ("adam", 0.1)):
        seen = []
        sampler = lab.dps(zeta=zeta, optimizer=optimizer)
        lab.watch(lab.guider(), sampler, lambda i, z0, z, n, seen=seen: seen.append(z.clone()), schedule=schedule)
        firsts[optimizer, zeta] = seen[0]
    gradient = 2 * (firsts["gradient", 0.5] - firsts["gradient", 1.0])
    step = (firsts["adam", 0.05] - firsts["adam", 0.1]) / 0.05
    clear = gradient.abs() > 1e-3
    assert int(clear.sum()) > 0.9 * gradient.numel()
    torch.testing.assert_close(step[clear], gradient[clear].sign(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["dps", "dmap"])
def test_adam_in_a_whole_run(lab, name):
    make = getattr(lab, name)
    guider = lab.guider()
    result = lab.sample(guider, make(zeta=0.05, optimizer="adam"))
    assert torch.isfinite(result).all()
    assert "Adam" in guider.report.text() and "Adam" not in make(zeta=0.05).name
    assert torch.equal(result, lab.sample(guider, make(zeta=0.05, optimizer="adam"))), "moments of the first run are left in the sampler"
    assert not torch.allclose(result, lab.sample(guider, make(zeta=0.05)), atol=1e-3)


# noise levels


@pytest.mark.parametrize("limits", [{}, {"start": 0.6, "end": 0.1}])
def test_karras_levels_are_those_of_k_diffusion(lab, limits):
    paper, karras = (lab.sigmas(7, spacing=spacing, **limits) for spacing in ("paper", "karras"))
    expected = lab.comfy.k_diffusion.sampling.get_sigmas_karras(7, float(paper[-2]), float(paper[0]), rho=7.0)
    torch.testing.assert_close(karras, expected.to(karras), rtol=1e-4, atol=0)


# presets


def operators(lab):
    o = lab.core.operators
    kernel = ((0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    mask = torch.zeros(32, 32)
    mask[8:20, 4:28] = 1
    network = torch.nn.Identity()
    return [
        o.SuperResolution(2),
        o.SuperResolution(8),
        o.GaussianBlur(9, 1.5),
        o.KernelBlur(kernel),
        o.MotionBlur(5.0, 30.0),
        o.NonlinearBlur(network, 0, "blur.safetensors"),
        o.Inpainting(mask),
        o.Grayscale(),
        o.Jpeg(20),
        o.Segmentation(network, "room.safetensors"),
        o.Compose((o.Grayscale(), o.GaussianBlur(9, 1.5), o.SuperResolution(4))),
        o.Noisy(o.SuperResolution(4), 0.02),
        o.Noisy(o.Compose((o.Grayscale(), o.Jpeg(20))), 0.02),
    ]


def preset(lab, solver, operator=None, quality="paper", **more):
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8) if operator is None else operator
    return lab.call("DMAP_DMAPPreset", model=lab.shared()[0], operator=operator, solver=solver, quality=quality, **more)


def test_a_preset_from_the_measurement(lab):
    _, sigmas, text = preset(lab, "DMAP", quality="look", start=0.4)
    assert torch.equal(sigmas, lab.sigmas(10, spacing="exponential", start=0.4)) and "start 0.4" in text
    assert "start" not in preset(lab, "DMAP", quality="look")[2]


def test_there_is_a_preset_for_every_operator_and_solver(lab):
    presets, made = core(lab, "presets"), operators(lab)
    assert {type(operator) for operator in made} == set(lab.core.operators.OPERATORS.values())
    for operator in made:
        for quality in (*presets.QUALITIES, "paper"):
            for solver in presets.NAMES:
                if quality == "paper" and operator.name == "Segmentation" and solver != "DSG":  # zeta has other units there
                    with pytest.raises(ValueError, match="(?s)solver: .*Segmentation.*DSG"):
                        preset(lab, solver, operator, quality)
                    continue
                if quality != "paper" and solver == "PSLD":
                    with pytest.raises(ValueError, match="solver: PSLD has two terms.*'paper'"):
                        preset(lab, solver, operator, quality)
                    continue
                for more in ({}, {"steps": 1}, {"steps": 33}):
                    sampler, sigmas, text = preset(lab, solver, operator, quality, **more)
                    steps = len(sigmas) - 1
                    sets_itself = quality != "paper" and solver != "DSG"
                    assert text.startswith(f"{solver.split()[0]}: {'strength' if sets_itself else 'zeta'} ")
                    assert f", {more.get('steps', steps)} steps, " in text
                    assert float(sigmas[-1]) == 0 and (sigmas[1:] < sigmas[:-1]).all()
                    assert any(source in text for source in ("paper", "demo prior", "sets itself")), text
                    assert ("scaled from" in text) == bool(more)
                    if not (solver == "PSLD" and not operator.linear):
                        sampler.check(operator, steps)


PAPER = {  # what the paper and its authors' code have for super-resolution x8
    "DPS": "zeta 4.8, 500 steps",
    "PSLD": "zeta 4.8, gamma 0.0096, 500 steps",
    "FreeDoM": "zeta 4.8, K 2, first 25, last 50, 500 steps",
    "ReSample": "zeta 4.8, first 50, last 100, every 50, iterations 200, learning_rate 0.005, factor 40, 500 steps",
    "DSG": "zeta 0.08, 500 steps",
    "DMAP": "zeta 9.6, K 2, 250 steps",
    "DMAP full": "zeta 4.8, K 3, 500 steps",
}


@pytest.fixture
def levels(lab, monkeypatch):
    """Sets how many levels the shared model's UNet says it has: the demo prior has one, Stable Diffusion four."""
    config = lab.shared()[0].model.model_config.unet_config
    return lambda n: monkeypatch.setitem(config, "channel_mult", [1] * n)


@pytest.mark.parametrize("solver", PAPER)
def test_the_papers_settings(lab, levels, solver):
    levels(4)
    _, sigmas, text = preset(lab, solver)
    assert text == f"{solver.split()[0]}: {PAPER[solver]}, paper spacing (paper and authors)"
    assert torch.equal(sigmas, lab.sigmas(len(sigmas) - 1, spacing="paper"))


def test_a_preset_says_where_it_comes_from(lab, levels):
    levels(4)
    blur = lab.call("DMAP_OperatorGaussianBlur", sigma=3.0, kernel_size=61)
    assert "zeta 0.6," in preset(lab, "DPS", blur)[2]
    motion = lab.call("DMAP_OperatorMotionBlur", length=9.0, angle=0.0)
    assert "carried over from the demo prior (treated as Motion Blur)" in preset(lab, "DPS", motion)[2]
    levels(1)
    whole = preset(lab, "DMAP", motion)[2]
    assert "searched on the demo prior" in whole and "Motion Blur" in whole and "scaled" not in whole
    assert preset(lab, "DMAP", motion, steps=5)[2].endswith("; scaled from 10 to 5 steps)")


@pytest.mark.parametrize("solver", PAPER)
def test_a_preset_makes_what_the_solvers_own_node_makes(lab, levels, solver):
    """The settings by hand: those of the whole run, zeta multiplied by what the steps are divided by, the window moved along."""
    levels(1)
    presets = core(lab, "presets")
    whole = presets.preset(lab.core.operators.SuperResolution(8), solver, presets.MODELS[1])
    for steps in (0, STEPS):
        settings, ratio = whole.solver.settings(), (steps or whole.steps) / whole.steps
        for name in settings:
            if name in ("first", "last", "every"):
                settings[name] = min(max(1, round(settings[name] * ratio)), STEPS - 1 if steps else 9999)
            elif name in ("zeta", "gamma") and solver != "DSG":  # whose zeta is a rate without unit
                settings[name] = pytest.approx(settings[name] / ratio, rel=1e-3)
        sampler, sigmas, _ = preset(lab, solver, steps=steps)
        assert sampler.solver.settings() == settings
        assert torch.equal(sigmas, lab.sigmas(steps or whole.steps, spacing="exponential"))
        by_hand = lab.call(f"DMAP_{solver.split()[0]}Sampler", **sampler.solver.settings())
        assert (by_hand.name, by_hand.solver) == (sampler.name, sampler.solver)


@pytest.mark.hosts("one")
def test_a_preset_runs_as_its_settings_by_hand(lab, levels):
    levels(1)
    for solver in ("DMAP", "FreeDoM"):
        sampler, sigmas, _ = preset(lab, solver, steps=STEPS)
        names = {"DMAP": ("K", "zeta"), "FreeDoM": ("zeta", "K", "first", "last")}[solver]
        by_hand = lab.call(f"DMAP_{solver}Sampler", **{name: sampler.solver.settings()[name] for name in names})
        assert torch.equal(*(lab.sample(lab.guider(), s, schedule=sigmas) for s in (sampler, by_hand)))


# errors and ends


@pytest.fixture
def refused(lab, monkeypatch):
    """A context in which a ValueError must be raised that holds all of the words, before a model is called; or before one is loaded."""
    model, calls = lab.counting(lab.shared()[0])
    management, loads = lab.comfy.model_management, []
    load = management.load_models_gpu

    @contextlib.contextmanager
    def check(*words, before_loading=False):
        monkeypatch.setattr(management, "load_models_gpu", lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs)))
        with pytest.raises(ValueError) as error:
            yield model
        assert [word for word in words if word not in str(error.value)] == [], str(error.value)
        assert calls == [], f"refused only after the model had been called: {error.value}"
        assert not (before_loading and loads), f"refused only after models had been loaded: {error.value}"

    return check


def test_psld_with_a_nonlinear_operator(lab, refused):
    compose = lab.call("DMAP_OperatorCompose", first=jpeg(lab), second=lab.call("DMAP_OperatorSuperResolution", scale=4))
    noisy = lab.call("DMAP_OperatorNoise", operator=jpeg(lab), sigma=0.1)
    for operator, size in ((jpeg(lab), 32), (noisy, 32), (compose, 8)):
        for sampler in (make(lab, "PSLD"), preset(lab, "PSLD", operator, steps=STEPS)[0]):
            with refused("operator", "JPEG", "not linear", "DMAP", before_loading=True) as model:
                run(lab, sampler, model=model, operator=operator, measurement=lab.picture(0, size, size))


def test_latino_with_an_operator_that_cannot_be_matched(lab, refused):
    noisy = lab.call("DMAP_OperatorNoise", operator=jpeg(lab), sigma=0.1)
    with refused("operator", "noise on top of a JPEG", "which LATINO needs at every step", "use DMAP", before_loading=True) as model:
        run(lab, make(lab, "LATINO", delta=0.0), model=model, operator=noisy, measurement=lab.picture(0, 32, 32))
    with refused("operator", "which LATINO needs"):
        preset(lab, "LATINO", noisy, quality="look")
    with refused("delta is 0.5", "JPEG", "not linear", "set it to 0", before_loading=True) as model:
        run(lab, make(lab, "LATINO"), model=model, operator=jpeg(lab), measurement=lab.picture(0, 32, 32))


def test_presets_of_solvers_that_are_not_the_papers(lab):
    sampler, sigmas, text = preset(lab, "LATINO", quality="look")
    assert len(sigmas) == 9 and text.startswith("LATINO: ") and not sampler.through_denoiser
    assert torch.isfinite(lab.sample(lab.guider(), sampler, schedule=sigmas)).all()
    sampler, sigmas, text = preset(lab, "FlowDPS", quality="look", steps=3)
    assert len(sigmas) == 4 and text.startswith("FlowDPS: strength 0.7, ") and not sampler.through_denoiser
    with pytest.raises(ValueError, match="no settings of FlowDPS are the paper's; take the quality look"):
        preset(lab, "FlowDPS")


@pytest.mark.parametrize("name", ["FreeDoM", "ReSample"])
def test_a_window_beyond_the_schedule(lab, refused, name):
    with refused("last is 4", "steps 0 to 3", before_loading=True) as model:
        run(lab, make(lab, name, last=4), model=model)
    with refused("first is 3", "last 2", "end before it begins"):
        make(lab, name, first=3, last=2)
    with refused("first", "at least 0"):
        make(lab, name, first=-1)


@pytest.mark.parametrize("name", NAMES)
def test_settings_without_meaning(lab, refused, name):
    for zeta in (0.0, -1.0, math.nan, math.inf) if "zeta" in SETTINGS[name] else ():
        with refused("zeta", "above 0"):
            make(lab, name, zeta=zeta)
    for eta in (-0.1, 1.1, math.nan):
        with refused("eta", "between 0"):
            make(lab, name, eta=eta)


BAD = [
    ("DSG", {"eta": 0.0}, ("eta is 0", "above 0")),
    ("DSG", {"zeta": 1.5}, ("zeta is 1.5", "mix rate", "between 0")),
    ("PSLD", {"gamma": -1.0}, ("gamma", "at least 0")),
    ("PSLD", {"gamma": math.nan}, ("gamma", "at least 0")),
    ("PSLD", {"transpose": "inverse"}, ("transpose", "adjoint, published")),
    ("FreeDoM", {"travel": "back"}, ("travel", "forward, published")),
    ("FreeDoM", {"K": 0}, ("K", "at least 1")),
    ("LATINO", {"delta": -1.0}, ("delta", "at least 0")),
    ("FlowDPS", {"inner": 0}, ("inner", "at least 1")),
    ("FlowDPS", {"weight": "late"}, ("weight", "constant, published, falling, rising")),
    ("FlowDPS", {"noise": "late"}, ("noise", "published, falling")),
    ("ReSample", {"space": "colour"}, ("space", "both, latent, pixel")),
    ("ReSample", {"tweedie": "wrong"}, ("tweedie", "correct, published")),
    ("ReSample", {"every": 0}, ("every", "at least 1")),
    ("ReSample", {"iterations": 0}, ("iterations", "at least 1")),
    ("ReSample", {"learning_rate": 0.0}, ("learning_rate", "above 0")),
    ("ReSample", {"factor": -1.0}, ("factor", "above 0")),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD)
def test_a_setting_without_meaning(lab, refused, name, change, words):
    with refused(*words) as model:
        run(lab, make(lab, name, **change), model=model)


def test_words_that_are_not_known(lab, refused):
    for sampler in (lab.dps, lab.dmap):
        with refused("optimizer", "gradient, adam") as model:
            run(lab, sampler(optimizer="sgd"), model=model)
    with refused("solver", "DMAP full"):
        preset(lab, "Euler")
    with refused("quality", "look, good, best, paper"):
        preset(lab, "DPS", quality="Flux")


@pytest.mark.parametrize("name", NAMES)
def test_with_a_stock_guider(lab, refused, name):
    with refused(name, "DPSGuider", "guider input") as model:
        lab.sample(lab.stock_guider(model=model), make(lab, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_reported_with_its_step(lab, name):
    """The third picture that is decoded: ReSample's belongs to the consistency step after the first step."""
    guider, sampler = lab.guider(), make(lab, name)
    step = {"ReSample": 1, "FreeDoM": 2, "FlowDPS": 2, "DAPS": 2}.get(name, 3)
    told = rf"step {step} of {STEPS}: NaN .*" + ("; run the model" if name == "LATINO" else "lower zeta")
    with lab.diverging(lab.shared()[1], at=3), pytest.raises(lab.core.errors.Diverged, match=told):
        lab.sample(guider, sampler, STEPS)
    assert len(guider.report.residuals) == step - 1


@pytest.mark.parametrize("name", some_at_once(NAMES, ["DSG", "ReSample"]))
def test_an_interruption(lab, name):
    """While the third picture is decoded: ReSample's in the middle of an optimisation, FreeDoM's on the second pass over a step."""
    management = lab.comfy.model_management
    sampler = make(lab, name)
    undisturbed = run(lab, sampler)
    model, calls = lab.counting(lab.shared()[0])
    guider = lab.guider(model=model, memory="fast")
    with lab.interrupting(lab.shared()[1], at=3), pytest.raises(management.InterruptProcessingException):
        lab.sample(guider, sampler, STEPS)
    assert len(calls) == {"ReSample": 1, "FlowDPS": 2, "DAPS": 2}.get(name, 3)
    assert guider.report.decoder_calls == 3
    assert not management.processing_interrupted()
    assert torch.equal(lab.sample(guider, sampler, STEPS), undisturbed)


def test_an_interruption_of_the_optimisation_of_a_picture(lab):
    """The second picture that is decoded is the one to be optimised, without any network of the model until it is encoded again."""
    sampler, guider = make(lab, "ReSample", space="pixel"), lab.guider()
    encoded = []
    vae = lab.shared()[1]
    with lab.interrupting(vae, at=2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae.first_stage_model, "encode", lambda image: encoded.append(image), raising=False)
        with pytest.raises(lab.comfy.model_management.InterruptProcessingException):
            lab.sample(guider, sampler, STEPS)
    assert guider.report.decoder_calls == 2 and not encoded
