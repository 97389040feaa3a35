"""SAMPLER nodes, the paper's SIGMAS, and the conditioning of a model without text encoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmap_core import presets
from ..dmap_core.schedule import SPACINGS
from ..dmap_core.solvers import check_settings, sample_dmap, sample_dps, sample_dsg, sample_freedom, sample_psld, sample_resample
from ..dmap_core.solvers.adam import OPTIMIZERS
from ..dmap_core.solvers.checks import check_window
from ..dmap_core.solvers.freedom import TRAVELS
from ..dmap_core.solvers.psld import TRANSPOSES, check_linear
from ..dmap_core.solvers.resample import SPACES, TWEEDIES
from .host.guider import SolverSampler
from .host.prior import model_sigmas, null_conditioning
from .operators import Operator
from .schema import schema

CATEGORY = "DMAP/sampling"


def zeta_input(default: float):
    return io.Float.Input(
        "zeta",
        default=default,
        min=0.001,
        max=1000.0,
        step=0.1,
        round=0.001,
        tooltip="Step size of the guidance, in latent units per unit of gradient. Paper, 512x512 at 500 steps: 4.8 for super-resolution x8, 0.6 for Gaussian blur; "
        "twice that at 250 steps. Raise it if the result does not match the measurement, lower it if it is noisy or the run diverges.",
    )


def eta_input(low: float):
    return io.Float.Input(
        "eta",
        default=1.0,
        min=low,
        max=1.0,
        step=0.05,
        optional=True,
        tooltip="How much fresh noise every step adds: 1 is ancestral sampling (paper), "
        + ("0 deterministic (DDIM)." if low == 0 else "less keeps closer to the deterministic path."),
    )


def optimizer_input():
    return io.Combo.Input(
        "optimizer",
        options=list(OPTIMIZERS),
        default="gradient",
        optional=True,
        tooltip="gradient: the paper's. adam: steps scaled by Adam (C.1 of the paper); zeta is then the size of a step in every latent value: start at 0.05.",
    )


def window_inputs(first: int, last: int, what: str):
    return [
        io.Int.Input(
            "first",
            default=first,
            min=0,
            max=9999,
            tooltip=f"First step that {what}, counted from 0 at the start, where the noise is strongest.",
        ),
        io.Int.Input(
            "last",
            default=last,
            min=0,
            max=9999,
            tooltip=f"Last step that {what}. Must lie within the schedule: below its number of steps.",
        ),
    ]


class DMAPSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_DMAPSampler",
            display_name="DMAPSampler",
            category=CATEGORY,
            description="The paper's algorithm: at every noise level K gradient steps towards the measurement, each put back onto the sphere where the noise lives. "
            "Needs DPSGuider. T steps cost T + (T - 1) K denoiser calls.",
            search_aliases=["restore", "restoration", "photo"],
            inputs=[
                io.Int.Input(
                    "K",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="Gradient steps per noise level. 2 with half the steps and twice the zeta costs what DPS costs (the paper's 'same'); 3 with all steps is its 'full'.",
                ),
                zeta_input(9.6),
                eta_input(0.05),
                optimizer_input(),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, K, zeta, eta=1.0, optimizer="gradient") -> io.NodeOutput:
        check_settings(zeta, eta, K)
        name = f"DMAP (K {K}, zeta {zeta:g}{', Adam' if optimizer == 'adam' else ''})"
        return io.NodeOutput(SolverSampler(name, sample_dmap, K=K, zeta=zeta, optimizer=optimizer, eta=eta))


class DPSSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DPSSampler",
            display_name="DPSSampler",
            category=CATEGORY,
            description="Diffusion posterior sampling (Chung et al. 2022): one gradient step per noise level. Needs DPSGuider. T steps cost T denoiser calls.",
            inputs=[zeta_input(4.8), eta_input(0.0), optimizer_input()],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, zeta, eta=1.0, optimizer="gradient") -> io.NodeOutput:
        check_settings(zeta, eta)
        name = f"DPS (zeta {zeta:g}{', Adam' if optimizer == 'adam' else ''})"
        return io.NodeOutput(SolverSampler(name, sample_dps, zeta=zeta, optimizer=optimizer, eta=eta))


class DSGSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DSGSampler",
            display_name="DSGSampler",
            category=CATEGORY,
            description="Diffusion with spherical Gaussian constraint (Yang et al. 2024): the noise of every step is turned towards the measurement, its length kept. "
            "Needs DPSGuider. T steps cost T denoiser calls.",
            inputs=[
                io.Float.Input(
                    "zeta",
                    default=0.08,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Mix rate, not a step size: how far the noise is turned, 0 to 1 (paper: 0.08 at 500 steps). With some dozens of steps several times that.",
                ),
                eta_input(0.05),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, zeta, eta=1.0) -> io.NodeOutput:
        check_settings(zeta, eta)
        return io.NodeOutput(SolverSampler(f"DSG (zeta {zeta:g})", sample_dsg, zeta=zeta, eta=eta))


class PSLDSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_PSLDSampler",
            display_name="PSLDSampler",
            category=CATEGORY,
            description="Posterior sampling with latent diffusion (Rout et al. 2023): DPS, and a second term that keeps the latent where encoder and decoder agree. "
            "Linear operators only. Needs DPSGuider. T steps cost T denoiser calls, and the VAE's encoder too.",
            inputs=[
                zeta_input(4.8),
                io.Float.Input(
                    "gamma",
                    default=0.0096,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Weight of the second term, in the units of zeta (paper: 0.002 zeta). 0 is DPS.",
                ),
                io.Combo.Input(
                    "transpose",
                    options=list(TRANSPOSES),
                    default="adjoint",
                    optional=True,
                    tooltip="The operator's transpose in the second term. adjoint: the true one, scaled. published: what the authors' code uses in its place, "
                    "the measurement enlarged without interpolation.",
                ),
                eta_input(0.0),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, zeta, gamma, transpose="adjoint", eta=1.0) -> io.NodeOutput:
        check_settings(zeta, eta)
        name = f"PSLD (zeta {zeta:g}, gamma {gamma:g})"
        settings = {"zeta": zeta, "gamma": gamma, "transpose": transpose, "eta": eta}
        return io.NodeOutput(SolverSampler(name, sample_psld, lambda operator, steps: check_linear(operator), **settings))


class FreeDoMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_FreeDoMSampler",
            display_name="FreeDoMSampler",
            category=CATEGORY,
            description="FreeDoM (Yu et al. 2023): DPS that walks the steps of a window several times, adding the noise again between. "
            "Needs DPSGuider. T steps cost T + (K - 1) (last - first + 1) denoiser calls.",
            inputs=[
                zeta_input(4.8),
                io.Int.Input("K", default=2, min=1, max=100, tooltip="How many times a step of the window is walked. 1 is DPS."),
                *window_inputs(25, 50, "is walked K times"),
                io.Combo.Input(
                    "travel",
                    options=list(TRAVELS),
                    default="forward",
                    optional=True,
                    tooltip="The noise of the way back. forward: as much as the step took away. published: what the authors' latent code adds, a thousandth of it.",
                ),
                eta_input(0.0),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, zeta, K, first, last, travel="forward", eta=1.0) -> io.NodeOutput:
        check_settings(zeta, eta, K)
        check_window(first, last)
        name = f"FreeDoM (zeta {zeta:g}, K {K} in steps {first} to {last})"
        settings = {"zeta": zeta, "K": K, "first": first, "last": last, "travel": travel, "eta": eta}
        return io.NodeOutput(SolverSampler(name, sample_freedom, lambda operator, steps: check_window(first, last, steps), **settings))


class ReSampleSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_ReSampleSampler",
            display_name="ReSampleSampler",
            category=CATEGORY,
            description="ReSample (Song et al. 2023): DPS, and at some steps an optimisation until the picture fits the measurement, whose result is noised again. "
            "Needs DPSGuider. T steps cost T denoiser calls; every consistency step up to `iterations` decoder calls more.",
            inputs=[
                zeta_input(4.8),
                *window_inputs(50, 100, "may be followed by a consistency step"),
                io.Int.Input(
                    "every",
                    default=50,
                    min=1,
                    max=9999,
                    tooltip="A consistency step after first, first + every, first + 2 every and so on, up to last.",
                ),
                io.Int.Input("iterations", default=200, min=1, max=10000, tooltip="Optimisation steps of a consistency step (AdamW)."),
                io.Float.Input(
                    "learning_rate",
                    default=0.005,
                    min=0.00001,
                    max=1.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="Step size of that optimisation. With fewer iterations raise it.",
                ),
                io.Float.Input(
                    "factor",
                    default=40.0,
                    min=0.01,
                    max=100000.0,
                    step=1.0,
                    round=0.01,
                    tooltip="How far a consistency step moves the latent (original: 40): large values trust the optimised picture, small ones the current latent.",
                ),
                io.Combo.Input(
                    "space",
                    options=list(SPACES),
                    default="both",
                    optional=True,
                    tooltip="What is optimised: the latent (slower: a decoder call per iteration), the picture in pixels, or pixels for the first two thirds of the steps and then the latent.",
                ),
                io.Combo.Input(
                    "tweedie",
                    options=list(TWEEDIES),
                    default="correct",
                    optional=True,
                    tooltip="Where the optimisation starts: the denoised latent, or what the published code computes in its place.",
                ),
                eta_input(0.0),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(
        cls, zeta, first, last, every, iterations, learning_rate, factor, space="both", tweedie="correct", eta=1.0
    ) -> io.NodeOutput:
        check_settings(zeta, eta)
        check_window(first, last)
        settings = {
            "first": first,
            "last": last,
            "every": every,
            "iterations": iterations,
            "learning_rate": learning_rate,
            "factor": factor,
        }
        name = f"ReSample (zeta {zeta:g}, steps {first} to {last} every {every})"
        settings |= {"zeta": zeta, "space": space, "tweedie": tweedie, "eta": eta}
        return io.NodeOutput(SolverSampler(name, sample_resample, lambda operator, steps: check_window(first, last, steps), **settings))


class DMAPScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DMAPScheduler",
            display_name="DMAPScheduler",
            category=CATEGORY,
            description="The noise levels of a run: the paper's (timesteps evenly spaced from the last to the first, then 0), or a spacing for few steps.",
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled."),
                io.Int.Input(
                    "steps",
                    default=250,
                    min=1,
                    max=10000,
                    tooltip="Noise levels (paper: 500 for DPS and DMAP full, 250 for DMAP same). Fewer steps want a larger zeta; 50 to 100 give a quick look.",
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where to begin, as a fraction of the model's timesteps: 1 is pure noise. Below 1 the given latent is noised to that level and refined (partial denoising): 0.3 to 0.6 keep its composition.",
                ),
                io.Float.Input(
                    "end",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Where the last step before 0 begins, as a fraction of the timesteps. 0 is the paper's; 0.05 skips the finest noise levels.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default="paper",
                    optional=True,
                    tooltip="paper: timesteps evenly spaced, made for 250 to 500 steps. exponential: noise falls by the same factor at every step; "
                    "better with 15 to 60 steps (measured on the demo prior). karras: between the two (Karras et al. 2022).",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, steps, start=1.0, end=0.0, spacing="paper") -> io.NodeOutput:
        return io.NodeOutput(SPACINGS[spacing](model_sigmas(model), steps, start, end))


class DMAPPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_DMAPPreset",
            display_name="DMAPPreset",
            category=CATEGORY,
            description="A sampler and its noise levels, set as the paper or a search on the demo prior found best for the operator. Connect both to SamplerCustomAdvanced. "
            "The text says what was chosen and where the numbers come from.",
            search_aliases=["restore", "restoration", "photo"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled."),
                Operator.Input("operator", tooltip="The damage, the same that goes to DPSGuider."),
                io.Combo.Input(
                    "solver",
                    options=list(presets.SOLVERS),
                    default="DMAP",
                    tooltip="DMAP costs about what DPS costs; DMAP full is the paper's best and takes three times as long. The others are for comparison.",
                ),
                io.Combo.Input(
                    "settings_for",
                    options=list(presets.MODELS),
                    default=presets.MODELS[0],
                    tooltip="The kind of model that the numbers are for.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="0 takes the preset's own number of steps (Stable Diffusion: 250 or 500). Fewer are faster and coarser: 50 for a quick look; zeta is raised to match.",
                ),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, model, operator, solver, settings_for, steps=0) -> io.NodeOutput:
        p = presets.preset(operator, solver, settings_for)
        p = p.with_steps(steps) if steps else p
        sigmas = SPACINGS[p.spacing](model_sigmas(model), p.steps)
        return io.NodeOutput(sampler_of(p.solver, p.settings), sigmas, p.text())


def sampler_of(solver: str, settings: dict) -> SolverSampler:
    """The sampler that the solver's own node makes of these settings."""
    nodes = {
        "DPS": DPSSampler,
        "PSLD": PSLDSampler,
        "FreeDoM": FreeDoMSampler,
        "ReSample": ReSampleSampler,
        "DSG": DSGSampler,
        "DMAP": DMAPSampler,
    }
    return nodes[solver].execute(**settings).result[0]


class DMAPUnconditional(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DMAPUnconditional",
            display_name="DMAPUnconditional",
            category=CATEGORY,
            description="All-zero conditioning, for checkpoints without a text encoder such as the demo prior. For Stable Diffusion encode an empty prompt instead.",
            inputs=[io.Model.Input("model", tooltip="The model to be conditioned: it says how wide its context is.")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(null_conditioning(model))


NODES = [
    DMAPSampler,
    DPSSampler,
    DSGSampler,
    PSLDSampler,
    FreeDoMSampler,
    ReSampleSampler,
    DMAPPreset,
    DMAPScheduler,
    DMAPUnconditional,
]
