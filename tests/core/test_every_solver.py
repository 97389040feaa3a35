"""What all solvers promise alike: batches, seeds, callbacks, calls, interrupts, errors and what they refuse."""

import json
import math
from dataclasses import MISSING, dataclass, replace
from itertools import pairwise

import pytest
import torch
from variants import some_at_once

from dmap_core.errors import Diverged
from dmap_core.operators import GaussianBlur, Inpainting, Jpeg, SuperResolution
from dmap_core.operators.base import Operator
from dmap_core.posterior import Posterior
from dmap_core.schedule import SPACINGS, generators
from dmap_core.solvers import SOLVERS, Cost, Unguided, from_spec

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]
STEPS = len(SIGMAS) - 1
NAN, INF = math.nan, math.inf
CASES = {
    "DPS": ("DPS", {"zeta": 0.5}),
    "DPS adam": ("DPS", {"zeta": 0.05, "optimizer": "adam"}),
    "PSLD": ("PSLD", {"zeta": 0.5, "gamma": 0.3}),
    "PSLD published": ("PSLD", {"zeta": 0.5, "gamma": 0.3, "transpose": "published"}),
    "FreeDoM": ("FreeDoM", {"zeta": 0.5, "K": 3, "first": 1, "last": 3}),
    "FreeDoM published": ("FreeDoM", {"zeta": 0.5, "K": 3, "first": 1, "last": 3, "travel": "published"}),
    # steps 0 and 2 in pixels, step 4 in the latent
    "ReSample": ("ReSample", {"zeta": 0.5, "first": 0, "last": 4, "every": 2, "iterations": 3, "learning_rate": 0.05}),
    "DSG": ("DSG", {"zeta": 0.3}),
    "DMAP": ("DMAP", {"zeta": 0.5, "K": 2}),
    "DMAP adam": ("DMAP", {"zeta": 0.05, "K": 2, "optimizer": "adam"}),
    "DPS auto": ("DPS", {"strength": 0.4}),
    "FreeDoM auto": ("FreeDoM", {"K": 3, "first": 1, "last": 3}),
    "ReSample auto": ("ReSample", {"first": 0, "last": 4, "every": 2, "iterations": 3, "learning_rate": 0.05}),
    "DMAP auto": ("DMAP", {"K": 2}),
    "DMAP auto, no Jacobian": ("DMAP", {"K": 2, "jacobian": "none"}),
    "LATINO": ("LATINO", {}),
    "LATINO published": ("LATINO", {"delta": 0.5}),
    "FlowDPS": ("FlowDPS", {"zeta": 0.5}),
    "FlowDPS auto": ("FlowDPS", {"weight": "falling", "noise": "falling"}),
    "DAPS": ("DAPS", {"zeta": 0.001}),
    "DAPS auto": ("DAPS", {"momentum": 0.3}),
}
GRADIENTS = {"DPS": 6, "DPS adam": 6, "PSLD": 6, "PSLD published": 6, "FreeDoM": 12, "FreeDoM published": 12, "ReSample": 6, "DSG": 5}
GRADIENTS |= {"DMAP": 10, "DMAP adam": 10, "DPS auto": 6, "FreeDoM auto": 12, "ReSample auto": 6, "DMAP auto": 10}
GRADIENTS |= {"DMAP auto, no Jacobian": 10}
# Those that never differentiate the denoiser, and what their runs take.
PLAIN = {
    **dict.fromkeys(("LATINO", "LATINO published"), Cost(denoiser=6, denoiser_gradients=0, decoder=6, decoder_gradients=0, encoder=6)),
    **dict.fromkeys(("FlowDPS", "FlowDPS auto"), Cost(denoiser=6, denoiser_gradients=0, decoder=18, decoder_gradients=18)),
    "DAPS": Cost(denoiser=6, denoiser_gradients=0, decoder=24, decoder_gradients=24),
    "DAPS auto": Cost(denoiser=6, denoiser_gradients=0, decoder=33, decoder_gradients=33),  # with probes of the curvature
}
GRADIENTS |= dict.fromkeys(PLAIN, 0)
ENCODES = ("PSLD", "ReSample", "LATINO")
OTHER = {"LATINO": "delta"}  # a setting that is a number, of those without a zeta
every_case = pytest.mark.parametrize("case", CASES)


def test_every_solver_has_a_case():
    assert {name for name, _ in CASES.values()} == set(SOLVERS)
    assert CASES.keys() == GRADIENTS.keys()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def autoencoder(conv_autoencoder):
    class Autoencoder(conv_autoencoder):
        """`before` may do something before every call of a network."""

        def __init__(self, before=lambda name, *inputs: None, **settings):
            super().__init__(**settings)
            self.before = before

        def denoise(self, z, sigma):
            self.before("denoise", z, sigma)
            return super().denoise(z, sigma)

        def decode(self, z0):
            self.before("decode", z0)
            return super().decode(z0)

        def encode(self, image):
            self.before("encode", image)
            return super().encode(image)

    return Autoencoder


class Recording(Posterior):
    """Keeps every gradient: (z, sigma, denoised, residual)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gradients = []

    def gradient(self, z, sigma, extra=None, jacobian="exact"):
        grad, denoised, residual = super().gradient(z, sigma, extra, jacobian)
        self.gradients.append((z.clone(), sigma, denoised, residual))
        return grad, denoised, residual


def problem(prior, batch=1, f=None):
    f = f or SuperResolution(2)
    y = f.measure(randn(batch, 3, *IMAGE, seed=1).tanh())
    return Recording(prior, f, y, "fast"), SIGMAS[0] * randn(batch, *LATENT, seed=2)


def make(case, **more):
    name, settings = CASES[case]
    return SOLVERS[name](**{**settings, **more})


def solve(case, posterior, z, sigmas=SIGMAS, generator=None, callback=None, **more):
    return make(case, **more)(posterior, z, sigmas, generator=generator, callback=callback)


def masks(batch):
    return (torch.rand(batch, 1, *IMAGE, generator=torch.Generator().manual_seed(4)) < 0.3).float()


@every_case
@pytest.mark.parametrize(
    "f", [SuperResolution(2), Inpainting(masks(3)), pytest.param(GaussianBlur(5, 1.0), marks=pytest.mark.thorough)], ids=lambda f: f.name
)
def test_a_batch_is_as_many_single_runs(autoencoder, case, f):
    posterior, z = problem(autoencoder(), 3, f)
    whole = solve(case, posterior, z, generator=generators(11, 3))
    for i in range(3):
        f_i = Inpainting(f.mask[i : i + 1]) if isinstance(f, Inpainting) else f
        alone = Posterior(posterior.prior, f_i, posterior.y[i : i + 1], "fast")
        out = solve(case, alone, z[i : i + 1], generator=generators(11, 3)[i : i + 1])
        # residuals and spheres are rounded to float32
        torch.testing.assert_close(out, whole[i : i + 1], rtol=1e-5, atol=1e-5)


@every_case
def test_seeds_decide_and_nothing_outside_changes(autoencoder, case):
    posterior, z = problem(autoencoder(), 2)
    before, y, state = z.clone(), posterior.y.clone(), torch.get_rng_state()
    first, second = (solve(case, posterior, z, generator=generators(1, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(z, before)
    assert torch.equal(posterior.y, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert (solve(case, posterior, z, generator=generators(2, 2)) - first).abs().max() > 1e-3
    assert all(p.grad is None for network in posterior.prior.networks() for p in network.parameters())


@every_case
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_gradients_outside_do_not_matter(autoencoder, case, outer):
    posterior, z = problem(autoencoder())
    expected = solve(case, posterior, z, generator=generators(1, 1))
    with outer():
        out = solve(case, posterior, z, generator=generators(1, 1))
    assert torch.equal(out, expected)
    assert not out.requires_grad


@every_case
def test_float32_stays_float32(autoencoder, case):
    prior = autoencoder(dtype=torch.float32)
    prior.encoder = prior.encoder.float()
    posterior, z = problem(prior)
    posterior.y = posterior.y.float()
    assert solve(case, posterior, z.float(), generator=generators(1, 1)).dtype == torch.float32


@every_case
def test_float64_stays_float64_and_sigmas_may_be_a_tensor(autoencoder, case):
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, torch.tensor(SIGMAS, dtype=torch.float64), generator=generators(1, 1))
    assert out.dtype == torch.float64
    assert torch.equal(out, solve(case, posterior, z, generator=generators(1, 1)))


@every_case
def test_the_callback_sees_every_step(autoencoder, case):
    """denoised and residual are those of the step's last gradient: at z before the step, in DMAP at the new noise level.

    DMAP and DSG take none at the last step, which ends at z0: denoised is z0, and the residual is its.
    """
    posterior, z = problem(autoencoder(), 2)
    seen = []

    def callback(step, denoised, z, residual):
        assert denoised.shape == z.shape == (2, *LATENT)
        assert residual.shape == (2,)
        assert not any(t.requires_grad for t in (denoised, z, residual))
        seen.append((step, denoised.clone(), z.clone(), residual.clone(), len(posterior.gradients)))

    out = solve(case, posterior, z, generator=generators(1, 2), callback=callback)
    assert [step for step, *_ in seen] == list(range(STEPS))
    assert torch.equal(seen[-1][2], out)
    if case in PLAIN:  # of z before the step
        for step, denoised, latent, residual, _ in seen:
            before, sigma = seen[step - 1][2] if step else z, SIGMAS[step]
            torch.testing.assert_close(denoised, posterior.denoise(before, sigma), rtol=1e-6, atol=0)
            torch.testing.assert_close(residual, posterior.residual(before, sigma), rtol=1e-6, atol=0)
            assert not torch.equal(latent, before)
        return
    dmap, spherical = case.startswith("DMAP"), case[:3] in ("DMA", "DSG")
    for step, denoised, latent, residual, gradients in seen[: STEPS - 1 if spherical else STEPS]:
        at, sigma, last_denoised, last_residual = posterior.gradients[gradients - 1]
        assert sigma == SIGMAS[step + 1 if dmap else step]
        assert torch.equal(denoised, last_denoised)
        assert torch.equal(residual, last_residual)
        torch.testing.assert_close(residual, posterior.residual(at, sigma), rtol=1e-6, atol=0)
        if not dmap and not (case.startswith("FreeDoM") and 1 <= step <= 3):
            assert torch.equal(at, seen[step - 1][2] if step else z)
        assert not torch.equal(latent, at)
    if spherical:
        assert torch.equal(seen[-1][1], out)
        torch.testing.assert_close(seen[-1][3], posterior.residual(out, 0.0), rtol=1e-6, atol=0)


@every_case
def test_calls_of_the_networks_are_those_that_cost_says(autoencoder, case):
    prior = autoencoder()
    posterior, z = problem(prior)
    solve(case, posterior, z)
    assert make(case).cost(STEPS) == Cost(
        denoiser=len(prior.denoised_at),
        denoiser_gradients=sum(with_gradient for _, with_gradient in prior.denoised_at),
        decoder=prior.decoded,
        decoder_gradients=prior.decoded_with_gradient,
        encoder=prior.encoded,
        encoder_gradients=prior.encoded_with_gradient,
    )
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (len(prior.denoised_at), prior.decoded)
    if case in PLAIN:
        assert make(case).cost(STEPS) == PLAIN[case]
        assert prior.denoised_at == [(sigma, False) for sigma in SIGMAS[:-1]]
        return
    gradients, rest = GRADIENTS[case], STEPS if case.startswith("DMAP") else 1 if case == "DSG" else 0
    assert posterior.denoiser_calls == gradients + rest
    through = 0 if "no Jacobian" in case else gradients
    assert len(posterior.gradients) == gradients
    assert sum(with_gradient for _, with_gradient in prior.denoised_at) == through
    assert prior.decoded_with_gradient == gradients + (3 if case.startswith("ReSample") else 0)
    assert prior.encoded_with_gradient == (gradients if case.startswith("PSLD") else 0)
    # ReSample: D and E once for each of two pictures, D at every iteration in the latent; DMAP, DSG: the last residual
    more = 2 + 3 if case.startswith("ReSample") else 1 if case[:3] in ("DMA", "DSG") else 0
    assert prior.decoded == gradients + more


class Interrupted(Exception):
    """What a host raises when a person presses Cancel."""


@every_case
@pytest.mark.parametrize("where", ["denoise", "decode", "encode", "callback"])
def test_an_exception_from_outside_passes_through(autoencoder, case, where):
    if where == "encode" and CASES[case][0] not in ENCODES:
        where = "decode"
    calls = []

    def interrupt(name, *_):
        calls.append(name)
        if calls.count(where) == 2:
            raise Interrupted

    posterior, z = problem(autoencoder(interrupt))
    with pytest.raises(Interrupted):
        solve(case, posterior, z, callback=lambda *_: interrupt("callback"))
    assert calls.count(where) == 2
    assert calls[-1] == where


@every_case
def test_only_some_solvers_need_an_encoder(conv_prior, case):
    posterior, z = problem(conv_prior())
    if CASES[case][0] in ENCODES:
        with pytest.raises(NotImplementedError):
            solve(case, posterior, z)
    else:
        assert torch.isfinite(solve(case, posterior, z)).all()


@every_case
@pytest.mark.parametrize("network", some_at_once(["denoise", "decode", "encode"], ["decode"]))
def test_the_call_that_became_nan_is_named_by_its_step(autoencoder, case, network):
    """Whichever call of the networks it is that a sample becomes NaN in, the step says so in which it happened, before its callback."""
    calls, nan_at, steps = [], [None], []

    def solve_once():
        calls.clear()
        steps.clear()
        prior = autoencoder()
        clean = getattr(prior, network)

        def broken(*inputs):
            out = clean(*inputs)
            calls.append(len(steps))
            return torch.cat([out[:1], out[1:] * NAN]) if len(calls) - 1 == nan_at[0] else out

        setattr(prior, network, broken)
        posterior, z = problem(prior, 2)
        solve(case, posterior, z, generator=generators(1, 2), callback=lambda step, *_: steps.append(step))

    solve_once()
    expected = list(calls)
    assert network == "encode" or len(expected) >= STEPS
    for call, step in enumerate(expected):
        nan_at[0] = call
        with pytest.raises(Diverged, match=rf"^step {step + 1} of {STEPS}: NaN or infinity in sample 1 of the batch, residual "):
            solve_once()
        assert steps == list(range(step))


@every_case
def test_a_zeta_far_too_large_diverges(autoencoder, case):
    if CASES[case][0] in ("DSG", "LATINO"):  # whose zeta is at most 1, and which has none
        return
    prior = autoencoder(dtype=torch.float32)
    prior.encoder = prior.encoder.float()
    posterior, z = problem(prior)
    posterior.y = posterior.y.float()
    with pytest.raises(Diverged, match=r"step 1 of 6: NaN or infinity in sample 0 of the batch, residual .*; lower zeta \(now 1e\+39\)"):
        solve(case, posterior, z.float(), zeta=1e39)


def test_diverged_is_an_arithmetic_error():
    assert issubclass(Diverged, ArithmeticError)


@every_case
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_in_the_prior_names_step_sample_and_zeta(autoencoder, case, value):
    prior = autoencoder()
    clean = prior.denoise

    def denoise(z, sigma):
        out = clean(z, sigma)
        return torch.cat([out[:1], out[1:] * value]) if sigma == 2.0 else out

    prior.denoise = denoise
    posterior, z = problem(prior, 2)
    steps = []
    # DMAP's gradients are taken one level lower
    step = 2 if case.startswith("DMAP") else 3
    zeta = CASES[case][1].get("zeta")
    lower = rf"lower zeta \(now {zeta:g}\), or " if zeta else "" if CASES[case][0] == "LATINO" else "lower strength, or "
    with pytest.raises(Diverged, match=rf"^step {step} of 6: NaN or infinity in sample 1 of the batch, residual [^;]*; {lower}run the"):
        solve(case, posterior, z, generator=generators(1, 2), callback=lambda step, *_: steps.append(step))
    assert steps == list(range(step - 1))


INVALID = [
    *(
        (case, {"zeta": zeta}, f"zeta is {zeta}")
        for case in CASES
        for zeta in (0, 0.0, -1.0, NAN, INF, -INF)
        if not case.startswith("LATINO")
    ),
    *((case, {"eta": eta}, f"eta is {eta}") for case in CASES for eta in (-0.1, 1.01, 1.1, NAN, INF)),
    ("DSG", {"eta": 0.0}, "eta is 0"),
    ("DSG", {"eta": 0}, "eta is 0"),
    ("DMAP", {"eta": 0.0}, "eta is 0"),
    ("DSG", {"zeta": 1.01}, "zeta is 1.01.*mix rate"),
    *((case, {"K": K}, f"K is {K}") for case in ("FreeDoM", "DMAP", "DMAP adam") for K in (0, -1, 0.5, 1.5, NAN, INF)),
    *((case, {"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of gradient, adam") for case in ("DPS", "DMAP")),
    *(("PSLD", {"gamma": gamma}, f"gamma is {gamma}") for gamma in (-0.1, NAN)),
    ("PSLD", {"transpose": "inverse"}, "transpose is 'inverse'; it must be one of adjoint, published"),
    ("FreeDoM", {"travel": "back"}, "travel is 'back'; it must be one of forward, published"),
    *((case, {"first": 3, "last": 2}, "first is 3 and last 2") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": -1, "last": 2}, "first is -1") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 1.5, "last": 2}, "first is 1.5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": -3, "last": -2}, "first is -3") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 0, "last": 2.5}, "last is 2.5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 0, "last": 6}, "last is 6, but the schedule has the steps 0 to 5") for case in ("FreeDoM", "ReSample")),
    *((case, {"first": 25, "last": 50}, "last is 50, but") for case in ("FreeDoM", "ReSample")),
    *(("LATINO", {"delta": delta}, f"delta is {delta}") for delta in (-0.1, NAN, INF)),
    *(("FlowDPS", {"inner": inner}, f"inner is {inner}") for inner in (0, -1, 1.5)),
    ("FlowDPS", {"weight": "late"}, "weight is 'late'; it must be one of constant, published, falling, rising"),
    ("FlowDPS", {"noise": "late"}, "noise is 'late'; it must be one of published, falling"),
    *(("FlowDPS auto", {"strength": strength}, f"strength is {strength}") for strength in (0, 2.1, NAN)),
    ("ReSample", {"space": "image"}, "space is 'image'; it must be one of both, latent, pixel"),
    ("ReSample", {"tweedie": "wrong"}, "tweedie is 'wrong'; it must be one of correct, published"),
    *(("ReSample", {name: value}, f"{name} is {value}") for name in ("iterations", "every") for value in (0, -1, 1.5)),
    *(
        ("ReSample", {name: value}, f"{name} is? ?{value}|{name} {value}")
        for name in ("learning_rate", "factor")
        for value in (0, -1.0, NAN)
    ),
    *((case, {"sigmas": [4.0, 1.0, 2.0, 0.0]}, "sigmas must fall at every step, but step 1 goes from 1 to 2") for case in CASES),
    *((case, {"sigmas": [0.0, 1.0, 4.0]}, "sigmas must fall at every step") for case in CASES),
    *((case, {"sigmas": [4.0, 2.0, 1.5, 1.2, 1.1, 1.0]}, "sigmas must end at 0, but end at 1") for case in CASES),
    *((case, {"sigmas": [4.0, NAN, 0.0]}, "sigmas holds NaN") for case in CASES),
    *((case, {"sigmas": [INF, 1.0, 0.0]}, "sigmas holds NaN or infinite") for case in CASES),
    *((case, {"sigmas": [4.0, 4.0, 0.0]}, "step 0 goes from 4 to 4") for case in CASES),
    *((case, {"sigmas": [4.0]}, "sigmas holds 1 noise levels; it must hold at least two") for case in CASES),
    *((case, {"sigmas": []}, "sigmas holds 0 noise levels; it must hold at least two") for case in CASES),
]


@pytest.mark.parametrize("case, settings, message", INVALID, ids=lambda value: str(value).replace(" ", ""))
def test_settings_without_meaning_are_refused_before_the_first_call(autoencoder, case, settings, message):
    posterior, z = problem(autoencoder())
    for sigmas in ("sigmas" in settings) * (settings.get("sigmas"), torch.tensor(settings.get("sigmas", []))) or (SIGMAS,):
        with pytest.raises(ValueError, match=message):
            solve(case, posterior, z, **{**settings, "sigmas": sigmas})
    assert posterior.denoiser_calls == posterior.decoder_calls == 0


@every_case
def test_the_number_of_generators_must_fit(autoencoder, case):
    posterior, z = problem(autoencoder(), 3)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        solve(case, posterior, z, generator=generators(0, 2))


@pytest.mark.parametrize("case, eta", [(case, eta) for case in CASES for eta in (0, 0.5, 1) if eta or case[:3] not in ("DSG", "DMA")])
def test_every_eta_runs_and_means_something(autoencoder, case, eta):
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, eta=eta, generator=generators(1, 1))
    assert torch.isfinite(out).all()
    other = solve(case, posterior, z, eta=0.7, generator=generators(1, 1))
    assert (out - other).abs().max() > 1e-3
    draws = solve(case, posterior, z, eta=eta, generator=generators(2, 1))
    # at eta 0 only going back in time and resampling draw noise
    assert torch.equal(out, draws) is (eta == 0 and CASES[case][0] in ("DPS", "PSLD", "LATINO", "FlowDPS"))


def stable_diffusion_sigmas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    return ((1 - abar) / abar).sqrt()


@every_case
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_runs(autoencoder, case, spacing):
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, SPACINGS[spacing](stable_diffusion_sigmas(), 6), generator=generators(1, 1))
    assert torch.isfinite(out).all()
    assert out.abs().max() < 1e3


@dataclass(frozen=True)
class Labels(Operator):
    """The brightest channel of every pixel, which has no gradient."""

    linear = False

    def __call__(self, image):
        return image.argmax(1, keepdim=True).to(image)


@dataclass(frozen=True)
class Detached(Operator):
    """Linear, with an adjoint, but computed where no gradient passes."""

    def __call__(self, image):
        return 0.5 * image.detach()

    def adjoint(self, y, size):
        return 0.5 * y


@every_case
@pytest.mark.parametrize("f", [Labels(), Detached()], ids=lambda f: f.name)
def test_an_operator_without_gradient_is_named(autoencoder, case, f):
    posterior, z = problem(autoencoder(), f=f)
    if CASES[case][0] == "LATINO" and f.linear:
        assert torch.isfinite(solve(case, posterior, z)).all()
        return
    what = "is not linear" if CASES[case][0] in ("PSLD", "LATINO") and not f.linear else "is not differentiable"
    with pytest.raises(ValueError, match=f"^operator: {f.name} {what}"):
        solve(case, posterior, z)


@pytest.mark.parametrize("case", ["DMAP", "DSG"])
def test_the_last_step_of_a_sphere_takes_no_gradient(autoencoder, case):
    """There is no sphere to move on: the operator need not be differentiable, and the result is the denoised latent."""
    posterior, z = problem(autoencoder(), f=Labels())
    out = solve(case, posterior, z, [4.0, 0.0])
    assert torch.equal(out, posterior.denoise(z, 4.0))


@every_case
def test_a_nonlinear_operator_stops_only_psld_and_a_given_delta(autoencoder, case):
    f = Jpeg(30)
    posterior, z = problem(autoencoder(), f=f)
    if case != "LATINO published" and CASES[case][0] != "PSLD":
        assert torch.isfinite(solve(case, posterior, z)).all()
        return
    psld = r"^operator: JPEG \(.*\) is not linear, and PSLD needs its transpose; use DMAP, DPS"
    with pytest.raises(
        ValueError, match=psld if CASES[case][0] == "PSLD" else r"^delta is 0.5, but JPEG \(.*\) is not linear.*set it to 0"
    ):
        solve(case, posterior, z)
    assert posterior.denoiser_calls == 0


# What turns the others into DPS

EQUAL_TO_DPS = {
    "PSLD without gluing": ("PSLD", {"gamma": 0}),
    "PSLD published without gluing": ("PSLD", {"gamma": 0.0, "transpose": "published"}),
    "FreeDoM of one pass": ("FreeDoM", {"K": 1, "first": 0, "last": 5}),
    "DPS by name": ("DPS", {"optimizer": "gradient"}),
}


@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("name", EQUAL_TO_DPS)
def test_what_equals_dps(autoencoder, name, eta):
    posterior, z = problem(autoencoder(), 2)
    expected = SOLVERS["DPS"](zeta=0.5, eta=eta)(posterior, z, SIGMAS, generator=generators(1, 2))
    solver, settings = EQUAL_TO_DPS[name]
    out = SOLVERS[solver](zeta=0.5, eta=eta, **settings)(posterior, z, SIGMAS, generator=generators(1, 2))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case, first", [("FreeDoM", 3), ("FreeDoM published", 3), ("ReSample", 3)])
def test_a_window_changes_nothing_before_it(autoencoder, case, first):
    posterior, z = problem(autoencoder(), 2)
    latents = {"DPS": [], case: []}
    for name, settings in (("DPS", {}), (case, {"first": first, "last": 4})):
        solve(name, posterior, z, **settings, generator=generators(1, 2), callback=lambda i, d, z, r, name=name: latents[name].append(z))
    for i, (ours, dps) in enumerate(zip(latents[case], latents["DPS"], strict=True)):
        assert torch.equal(ours, dps) is (i < first)


@pytest.mark.parametrize("case", ["FreeDoM", "ReSample"])
def test_a_window_at_the_last_step(autoencoder, case):
    """sigma_next is 0 there: FreeDoM goes back to the full noise level, ReSample returns the consistent latent."""
    posterior, z = problem(autoencoder())
    out = solve(case, posterior, z, first=5, last=5, generator=generators(1, 1))
    assert torch.isfinite(out).all()
    assert (out - solve("DPS", posterior, z, generator=generators(1, 1))).abs().max() > 1e-3


@every_case
def test_dps_like_solvers_take_gradients_at_the_levels_of_the_schedule(autoencoder, case):
    posterior, z = problem(autoencoder())
    solve(case, posterior, z)
    expected = []
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        if case.startswith("DMAP"):
            expected += [sigma_next] * (2 if sigma_next else 0)
        elif case not in PLAIN and (case != "DSG" or sigma_next):
            expected += [sigma] * (3 if case.startswith("FreeDoM") and 1 <= i <= 3 else 1)
    assert [sigma for _, sigma, *_ in posterior.gradients] == expected


# What a solver declares of itself


@every_case
def test_a_spec_makes_the_same_solver(case):
    solver = make(case)
    spec = json.loads(json.dumps(solver.spec()))
    assert from_spec(spec) == solver
    assert spec.pop("solver") == solver.name() == CASES[case][0]
    assert spec == solver.settings()
    assert hash(solver) == hash(make(case)) and replace(solver, **{OTHER.get(CASES[case][0], "zeta"): 0.25}) != solver


def test_a_spec_without_defaults_and_that_of_the_model_alone():
    assert from_spec({"solver": "DMAP", "zeta": 2.0}) == SOLVERS["DMAP"](zeta=2.0)
    assert from_spec(Unguided(eta=0.5).spec()) == Unguided(eta=0.5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("DMAP", "a solver is 'DMAP'; it must map names to settings"),
        ({}, "solver is None; it must be one of DPS, PSLD, FreeDoM, ReSample, DSG, DMAP, LATINO, FlowDPS, DAPS$"),
        ({"solver": "dmap"}, "solver is 'dmap'"),
        ({"solver": ["DMAP"]}, "solver is"),
        ({"solver": "PSLD", "zeta": 1.0}, "PSLD: the settings 'zeta' do not describe one: .*gamma"),
        ({"solver": "DMAP", "zeta": 1.0, "gamma": 2.0}, "DMAP: the settings .* do not describe one: .*gamma"),
        ({"solver": "DMAP", "zeta": "1"}, "DMAP: the settings 'zeta' do not describe one"),
        ({"solver": "DMAP", "zeta": 1.0, 3: 4}, "DMAP: the settings"),
        ({"solver": "DMAP", "zeta": -1.0}, "zeta is -1.0; the step size must be above 0"),
    ],
)
def test_what_is_no_spec(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec)


@every_case
def test_people_are_told_about_every_setting(case):
    """An interface can be made of it: a help, and either choices or a range around what it begins with."""
    for name, (field, about) in make(case).described().items():
        start = about.usual if field.default in (MISSING, None) else field.default
        assert about.help.endswith(".") and about.help.isascii(), name
        if about.choices:
            assert start in about.choices and about.optional
        else:
            assert about.least <= start <= about.most
            assert isinstance(start, int) or about.step
            if name not in ("first", "last"):  # which are checked against each other
                make(case, **{name: start})


@every_case
def test_what_a_report_says(case):
    text = make(case).describe()
    assert text.startswith(f"{CASES[case][0]} (") and text.isascii()
    settings, other = CASES[case][1], OTHER.get(CASES[case][0], "zeta")
    if other == "zeta":
        assert (f"zeta {settings['zeta']:g}" if "zeta" in settings else "automatic step") in text
    assert ("Adam" in text) is ("optimizer" in settings)
    assert text != make(case, **{other: 0.26}).describe()


@every_case
def test_half_the_steps(case):
    """Step sizes double, windows halve and stay within the schedule, all else is as it was."""
    solver = make(case)
    half = solver.rescaled(0.5, 3)
    for name, (_, about) in solver.described().items():
        was, now = getattr(solver, name), getattr(half, name)
        if about.scales == "step" and was is not None:
            assert now == 2 * was
        elif about.scales == "window":
            assert now == (min(2, max(1, round(was / 2))) if name in ("first", "last") else max(1, round(was / 2)))
        else:
            assert now == was
    if CASES[case][0] in OTHER:
        assert half == solver
        return
    assert (half.settings()["zeta"] == solver.settings()["zeta"]) is (CASES[case][0] in ("DSG", "DAPS") or "auto" in case)


def test_what_a_run_weighs():
    """In guided evaluations, which DPS takes one of at every step; only for the time that is left."""
    weights = {case: make(case).cost(STEPS).weight() for case in CASES}
    assert weights["DPS"] == weights["DPS adam"] == pytest.approx(STEPS)
    assert weights["FreeDoM"] == pytest.approx(12) and weights["PSLD"] == pytest.approx(1.5 * STEPS)
    assert weights["DMAP"] == pytest.approx(10 + 0.3 * 6 + 0.3)
    assert weights["LATINO"] == pytest.approx((0.3 + 0.3 + 0.2) * STEPS)
    assert Unguided().cost(10).weight() == pytest.approx(3.0)
