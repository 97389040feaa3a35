"""Presets: the paper's numbers, settings that the solvers take, and what changes with the number of steps."""

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.consistency import matchable
from dmap_core.operators import (
    OPERATORS,
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Jpeg,
    KernelBlur,
    MotionBlur,
    Noisy,
    NonlinearBlur,
    Operator,
    Segmentation,
    SuperResolution,
    centred_box,
)
from dmap_core.operators.nonlinear_blur import random_kernel_wizard
from dmap_core.operators.segmentation import random_room_layout
from dmap_core.posterior import Posterior
from dmap_core.presets import AUTO, DEMO, LIKE, MODELS, NAMES, OTHERS, PAPER_ZETA, QUALITIES, automatic, kind, preset
from dmap_core.schedule import SPACINGS, check_sigmas
from dmap_core.solvers import DMAP, DPS, DSG, PSLD, SOLVERS, FreeDoM, ReSample
from dmap_core.solvers.step import STRENGTH

SD, DEMO_PRIOR = MODELS
every_solver = pytest.mark.parametrize("solver", NAMES)
every_model = pytest.mark.parametrize("model", MODELS)
BOX = Inpainting(centred_box((16, 16), (8, 8)))
EXAMPLES = [
    SuperResolution(8),
    SuperResolution(4),
    GaussianBlur(),
    KernelBlur(((1.0,),)),
    MotionBlur(),
    NonlinearBlur(random_kernel_wizard(0, 4, 1, 2)),
    BOX,
    Grayscale(),
    Jpeg(30),
    Segmentation(random_room_layout(0, (1, 1, 1, 1), 4, 3)),
    Compose([Grayscale(), GaussianBlur(), SuperResolution(4)]),
    Noisy(SuperResolution(8), 0.05),
]
every_operator = pytest.mark.parametrize("f", EXAMPLES, ids=lambda f: f.describe().split("(")[0])


def test_there_is_an_example_of_every_operator_and_a_preset_of_every_solver():
    assert {f.name for f in EXAMPLES} == set(OPERATORS)
    assert {name.removesuffix(" full") for name in (*NAMES, *OTHERS)} == set(SOLVERS)
    assert not set(OTHERS) & set(NAMES)
    assert set(LIKE.values()) <= DEMO.keys()
    assert PAPER_ZETA.keys() <= DEMO.keys()


@every_operator
@every_solver
@every_model
def test_every_preset_fits_its_solver(f, solver, model):
    if f.name == "Segmentation" and solver != "DSG":
        with pytest.raises(ValueError, match=f"no zeta of {solver} is known for Segmentation.*take an automatic step .*or DSG"):
            preset(f, solver, model)
        return
    found = preset(f, solver, model)
    assert type(found.solver) is SOLVERS[solver.removesuffix(" full")]
    assert found.spacing in SPACINGS
    assert found.source
    assert str(found.steps) in found.text()
    assert found.text().isascii()
    for steps in (1, 2, 3, 7, found.steps, 100, 101, 1000):
        assert_is_valid(found.with_steps(steps), steps)


def assert_is_valid(found, steps):
    settings = found.solver.settings()
    assert found.steps == steps
    assert settings["zeta"] > 0
    assert settings.get("gamma", 1) > 0
    found.solver.check(SuperResolution(4), steps)
    for name in ("K", "every", "iterations", "first", "last"):
        assert isinstance(settings.get(name, 1), int)


@every_solver
@every_model
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_the_solvers_take_them(solver, model, steps):
    """A whole run on a Gaussian prior, whatever comes out: nothing is refused."""
    found = preset(BOX, solver, model).with_steps(steps)
    found = found.with_settings(iterations=2) if "iterations" in found.solver.settings() else found
    y = BOX(torch.ones(1, 3, 16, 16))
    posterior = Posterior(GaussianMixture(torch.zeros(1, 3, 16, 16), 0.5), BOX, y)
    sigmas = SPACINGS[found.spacing](torch.linspace(0.03, 14.6, 1000), found.steps)
    assert len(check_sigmas(sigmas)) == steps + 1
    z = 14.6 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = found.solver(posterior, z, sigmas, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(out).all()


# The numbers of the paper and its authors at 512 pixels and 500 steps.
SR, BLUR = SuperResolution(8), GaussianBlur()
PAPER = [
    (SR, "DPS", DPS(zeta=4.8), 500),
    (SR, "DMAP", DMAP(zeta=9.6, K=2), 250),  # "same": K 2, half the steps, twice the zeta
    (SR, "DMAP full", DMAP(zeta=4.8, K=3), 500),
    (SR, "DSG", DSG(zeta=0.08), 500),
    (SR, "PSLD", PSLD(zeta=4.8, gamma=0.0096), 500),
    (SR, "FreeDoM", FreeDoM(zeta=4.8, K=2, first=25, last=50), 500),
    (
        SR,
        "ReSample",
        ReSample(zeta=4.8, first=50, last=100, every=50, iterations=200, learning_rate=0.005, factor=40.0),
        500,
    ),
    (BLUR, "DPS", DPS(zeta=0.6), 500),
    (BLUR, "DMAP", DMAP(zeta=1.2, K=2), 250),
    (BLUR, "DMAP full", DMAP(zeta=0.6, K=3), 500),
    (BLUR, "DSG", DSG(zeta=0.08), 500),
    (BLUR, "PSLD", PSLD(zeta=0.6, gamma=0.0012), 500),
]


@pytest.mark.parametrize(
    "f, solver, expected, steps", PAPER, ids=lambda v: v if isinstance(v, str) else v.name if isinstance(v, Operator) else ""
)
def test_the_papers_numbers(f, solver, expected, steps):
    found = preset(f, solver, SD)
    assert type(found.solver) is type(expected)
    assert found.solver.settings() == pytest.approx(expected.settings())
    assert (found.steps, found.spacing) == (steps, "paper")
    assert "paper" in found.source
    assert "carried over" not in found.source


@every_solver
def test_numbers_that_are_not_the_papers_say_so(solver):
    for f in (BOX, MotionBlur(), SuperResolution(4), Grayscale(), Jpeg(30)):
        source = preset(f, solver, SD).source
        assert source != "paper and authors"
        assert "carried over" in source or "for super-resolution and Gaussian blur" in source


@pytest.mark.parametrize("f", [BOX, MotionBlur(), SuperResolution(4), Grayscale()], ids=lambda f: f.name)
def test_others_are_carried_over_by_the_demos_ratio(f):
    dps = {model: {g: preset(g, "DPS", model).solver.zeta for g in (f, SR)} for model in MODELS}
    assert dps[SD][f] == pytest.approx(4.8 * dps[DEMO_PRIOR][f] / dps[DEMO_PRIOR][SR], abs=0.005)
    assert dps[SD][f] < 4.8


def test_the_demos_spacing_is_for_few_steps():
    for solver in NAMES:
        assert preset(SR, solver, DEMO_PRIOR).spacing == "exponential"
        assert preset(SR, solver, DEMO_PRIOR).steps <= 20


# Another number of steps


def test_the_same_number_of_steps_is_the_same_preset():
    for solver in NAMES:
        found = preset(SR, solver, SD)
        assert found.with_steps(found.steps) is found


def test_half_the_steps_double_zeta_and_halve_windows():
    found = preset(SR, "FreeDoM", SD).with_steps(250)
    assert found.solver == FreeDoM(zeta=9.6, K=2, first=12, last=25)
    found = preset(SR, "ReSample", SD).with_steps(250)
    assert found.solver == ReSample(zeta=9.6, first=25, last=50, every=25, iterations=200, learning_rate=0.005, factor=40.0)
    assert preset(SR, "PSLD", SD).with_steps(250).solver == PSLD(zeta=9.6, gamma=0.0192)
    assert preset(SR, "DMAP", SD).with_steps(500).solver == DMAP(zeta=4.8, K=2)


def test_the_preset_itself_does_not_change():
    found = preset(SR, "FreeDoM", SD)
    before = found.solver.settings()
    found.with_steps(20)
    assert found.solver.settings() == before
    assert preset(SR, "FreeDoM", SD).solver.settings() == before


@pytest.mark.parametrize("steps", [1, 12, 20, 250, 1000])
@every_model
def test_dsgs_rate_has_no_unit_and_is_not_scaled(model, steps):
    """Scaled like a step size, 0.6 at 20 steps became 1 at 12, and 32 pictures lost 4.4 dB."""
    found = preset(SR, "DSG", model)
    assert found.with_steps(steps).solver == found.solver


@every_solver
@every_model
def test_few_steps_are_spaced_exponentially_and_the_source_says_how_it_came_about(solver, model):
    found = preset(SR, solver, model)
    few, many = found.with_steps(30), found.with_steps(400)
    assert few.spacing == "exponential"
    assert many.spacing == found.spacing
    assert few.source == f"{found.source}; scaled from {found.steps} to 30 steps"


# Which operator is treated as which


@pytest.mark.parametrize(
    "f, expected",
    [
        *((SuperResolution(scale), "Super-Resolution x4") for scale in (2, 4, 5)),
        *((SuperResolution(scale), "Super-Resolution x8") for scale in (6, 8, 16)),
        *((f, f.title) for f in (GaussianBlur(), MotionBlur(), BOX, EXAMPLES[5])),
        *((f, LIKE[f.title]) for f in (KernelBlur(((1.0,),)), Grayscale(), EXAMPLES[9])),
        (Noisy(SuperResolution(4), 0.1), "Super-Resolution x4"),
        (Compose([Grayscale(), GaussianBlur(), SuperResolution(8)]), "Super-Resolution x8"),
        (Compose([SuperResolution(2), Compose([GaussianBlur(), SuperResolution(2)])]), "Super-Resolution x4"),
        (Noisy(Compose([SuperResolution(8), GaussianBlur()]), 0.1), "Super-Resolution x8"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_kind(f, expected):
    assert kind(f) == expected


def test_segmentation_is_found_within_others():
    for f in (Compose([GaussianBlur(), EXAMPLES[9]]), Compose([Compose([EXAMPLES[9]])])):
        with pytest.raises(ValueError, match="no zeta of DPS is known for"):
            preset(f, "DPS", SD)


def test_noise_and_company_do_not_change_the_settings():
    for solver in NAMES:
        for model in MODELS:
            alone = preset(SR, solver, model)
            assert preset(Noisy(SR, 0.1), solver, model) == alone
            assert preset(Compose([GaussianBlur(), SR]), solver, model) == alone


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="solver is 'Dps'; it must be one of DPS, PSLD, FreeDoM, ReSample, DSG, DMAP, DMAP full$"):
        preset(SR, "Dps", SD)
    with pytest.raises(ValueError, match=f"model is 'SDXL'; it must be one of {SD}, {DEMO_PRIOR}$"):
        preset(SR, "DPS", "SDXL")


def test_other_settings():
    found = preset(SR, "DMAP", SD).with_settings(K=3, eta=0.5)
    assert found.solver == DMAP(zeta=9.6, K=3, eta=0.5)
    with pytest.raises(
        ValueError,
        match="DMAP has no setting gamma; it has K, zeta, eta, optimizer, strength, jacobian, every, guide_start, guide_end, inner$",
    ):
        found.with_settings(gamma=1.0)
    with pytest.raises(ValueError, match="zeta is -1"):
        found.with_settings(zeta=-1.0)


def test_what_a_preset_says():
    """What matters of the solver's settings, and what is not at its default."""
    assert preset(SR, "DMAP", SD).text() == "DMAP: zeta 9.6, K 2, 250 steps, paper spacing (paper and authors)"
    assert (
        preset(SR, "FreeDoM", SD).with_settings(eta=0.5).text().startswith("FreeDoM: zeta 4.8, K 2, first 25, last 50, eta 0.5, 500 steps")
    )


@every_operator
@pytest.mark.parametrize("quality", QUALITIES)
@every_solver
def test_automatic_steps_need_no_zeta(f, solver, quality):
    """For every operator, Segmentation included. What the step does is the same for all: nothing of it is searched."""
    if solver == "PSLD":
        with pytest.raises(ValueError, match="PSLD has two terms, and no automatic step of both is known; take the quality 'paper'"):
            automatic(f, solver, quality)
        return
    found = automatic(f, solver, quality)
    assert type(found.solver) is SOLVERS[solver.removesuffix(" full")] and found.spacing == "exponential"
    assert found.steps == QUALITIES[quality] * automatic(f, solver, "look").steps
    found.solver.check(f, found.steps)
    if solver == "DSG":
        assert 0 < found.solver.zeta <= 1
    else:
        assert found.solver.zeta is None and found.solver.strength == STRENGTH
        assert found.solver.jacobian == ("exact" if kind(f) == "Inpainting" else "none")
        assert f"strength {STRENGTH:g}" in found.text() and "sets itself" in found.text()


@every_operator
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("solver", OTHERS)
def test_solvers_that_are_not_the_papers(f, solver, quality):
    """The same for every operator, or a refusal; and no settings of the paper."""
    with pytest.raises(ValueError, match=f"no settings of {solver} are the paper's; take the quality look, good or best"):
        preset(f, solver, MODELS[0])
    if solver == "LATINO" and matchable(f):
        with pytest.raises(ValueError, match="which LATINO needs at every step"):
            automatic(f, solver, quality)
        return
    found, look = automatic(f, solver, quality), OTHERS[solver]
    assert (found.solver, found.steps, found.spacing) == (look[0], QUALITIES[quality] * look[1], look[2])
    told = "nothing to be set" if solver == "LATINO" else "step sets itself"
    assert found.text().startswith(f"{solver}: ") and found.text().endswith(f"({quality}: {told})")


@every_operator
def test_auto_is_what_was_best_for_its_cost(f):
    """DPS with several gradient steps per call of the denoiser, DMAP through the denoiser for holes, and without it for JPEGs. Better qualities cost more."""
    found = [automatic(f, AUTO, quality) for quality in QUALITIES]
    if kind(f) in ("Inpainting", "JPEG"):
        dmap = [automatic(f, "DMAP", quality) for quality in QUALITIES]
        assert [one.solver for one in found] == [one.solver for one in dmap]
        assert [one.steps for one in found] == ([10, 20, 20] if kind(f) == "JPEG" else [10, 20, 50])
        assert found[0] == dmap[0] and found[1] == dmap[1]
        return
    for one in found:
        assert one.solver == DPS(jacobian="none", inner=one.solver.inner, guide_start=0.3) and one.spacing == "exponential"
        assert "sets itself" in one.text() and f"inner {one.solver.inner}" in one.text()
        one.solver.check(f, one.steps)
    gradients = [one.solver.cost(one.steps).decoder_gradients for one in found]
    assert gradients == [14, 28, 56]


def test_automatic_names_what_is_wrong():
    with pytest.raises(ValueError, match="solver is 'Euler'"):
        automatic(SR, "Euler", "good")
    with pytest.raises(ValueError, match="quality is 'paper'; it must be one of look, good, best, paper"):
        automatic(SR, "DMAP", "paper")


def test_a_strength_takes_the_place_of_zeta():
    found = preset(SR, "DMAP", SD).with_settings(strength=0.3)
    assert found.solver.zeta is None and found.solver.strength == 0.3
    assert preset(SR, "DMAP", SD).with_settings(strength=0.3, zeta=2.0).solver.zeta == 2.0
