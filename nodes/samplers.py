"""SAMPLER nodes, the paper's SIGMAS, and the conditioning of a model without text encoder."""

from __future__ import annotations

from dataclasses import MISSING, Field, replace
from typing import Any, ClassVar

from comfy_api.latest import io

from ..dmap_core import presets
from ..dmap_core.schedule import SPACINGS
from ..dmap_core.solvers import DAPS, DMAP, DPS, DSG, LATINO, PSLD, FlowDPS, FreeDoM, ReSample, Solver
from ..dmap_core.solvers.base import Setting
from .host.flow import host_sigmas
from .host.guider import SolverSampler
from .host.prior import model_sigmas, null_conditioning, searched_model, too_large_for_gradients
from .operators import Operator
from .schema import schema

CATEGORY = "DMAP/sampling"


class SolverNode(io.ComfyNode):
    """The node of a solver: its inputs are the solver's settings. A subclass names the solver and says what it is."""

    solver: ClassVar[type[Solver]]
    description: ClassVar[str]
    search_aliases: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def define_schema(cls):
        name = f"{cls.solver.name()}Sampler"
        return schema(
            node_id=f"DMAP_{name}",
            display_name=name,
            category=CATEGORY,
            description=cls.description,
            search_aliases=list(cls.search_aliases),
            inputs=solver_inputs(cls.solver),
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(SolverSampler(cls.solver(**chosen_step(settings))))


def solver_inputs(solver: type[Solver]) -> list[io.Input]:
    """The inputs of a solver's settings; of one whose step can set itself the choice as well."""
    described = solver.described()
    found = {name: setting_input(field, about) for name, (field, about) in described.items()}
    if "strength" in found:  # before it, and both behind what earlier versions had: saved workflows hold the values of widgets by place
        return [i for name, widget in found.items() for i in ([step_input(), widget] if name == "strength" else [widget])]
    return list(found.values())


def step_input() -> io.Input:
    return io.Combo.Input(
        "step",
        options=["auto", "zeta"],
        default="auto",
        optional=True,
        tooltip="auto: every step is as long as the residual and its gradient say, and only strength counts. zeta: every step is zeta times the gradient, as in the paper.",
    )


def chosen_step(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a solver, of those of its node. A prompt of an earlier version has no step, and means zeta."""
    rest = dict(settings)
    if rest.pop("step", "zeta") == "auto":
        rest["zeta"] = None
    return rest


def setting_input(field: Field, about: Setting) -> io.Input:
    """The input of a solver's setting."""
    told = {"default": about.usual if field.default in (MISSING, None) else field.default, "tooltip": about.help}
    if about.optional:
        told["optional"] = True
    if about.choices:
        return io.Combo.Input(field.name, options=list(about.choices), **told)
    if field.type in (int, "int"):  # as a name where annotations are texts
        return io.Int.Input(field.name, min=about.least, max=about.most, **told)
    return io.Float.Input(field.name, min=about.least, max=about.most, step=about.step, round=about.digits, **told)


class DMAPSampler(SolverNode):
    solver = DMAP
    description = (
        "The paper's algorithm: at every noise level K gradient steps towards the measurement, each put back onto the sphere where the noise lives. "
        "Needs DPSGuider. T steps cost T + (T - 1) K denoiser calls."
    )
    search_aliases = ("restore", "restoration", "photo")


class DPSSampler(SolverNode):
    solver = DPS
    description = "Diffusion posterior sampling (Chung et al. 2022): one gradient step per noise level. Needs DPSGuider. T steps cost T denoiser calls."


class DSGSampler(SolverNode):
    solver = DSG
    description = (
        "Diffusion with spherical Gaussian constraint (Yang et al. 2024): the noise of every step is turned towards the measurement, its length kept. "
        "Needs DPSGuider. T steps cost T denoiser calls."
    )


class PSLDSampler(SolverNode):
    solver = PSLD
    description = (
        "Posterior sampling with latent diffusion (Rout et al. 2023): DPS, and a second term that keeps the latent where encoder and decoder agree. "
        "Linear operators only. Needs DPSGuider. T steps cost T denoiser calls, and the VAE's encoder too."
    )


class FreeDoMSampler(SolverNode):
    solver = FreeDoM
    description = (
        "FreeDoM (Yu et al. 2023): DPS that walks the steps of a window several times, adding the noise again between. "
        "Needs DPSGuider. T steps cost T + (K - 1) (last - first + 1) denoiser calls."
    )


class ReSampleSampler(SolverNode):
    solver = ReSample
    description = (
        "ReSample (Song et al. 2023): DPS, and at some steps an optimisation until the picture fits the measurement, whose result is noised again. "
        "Needs DPSGuider. T steps cost T denoiser calls; every consistency step up to `iterations` decoder calls more."
    )


class LATINOSampler(SolverNode):
    solver = LATINO
    description = (
        "LATINO (Spagnoletti et al. 2025): at every step the model's picture is matched to the measurement, encoded and noised again; no gradient at all. Made for "
        "8 steps and an LCM, Turbo or Lightning LoRA at cfg 1; the plain model works, too. Needs DPSGuider. T steps cost T denoiser calls, and the VAE both ways."
    )
    search_aliases = ("LCM", "turbo", "lightning", "fast")


class FlowDPSSampler(SolverNode):
    solver = FlowDPS
    description = (
        "FlowDPS (Kim et al. 2025), with the weights of TriPS (2026): at every step the model's clean latent takes a few gradient steps through the VAE alone, and is noised "
        "again. For flow models and for others. Needs DPSGuider. T steps cost T denoiser calls."
    )
    search_aliases = ("TriPS", "flow", "fast")


class DAPSSampler(SolverNode):
    solver = DAPS
    description = (
        "DAPS (Zhang et al. 2025): at every noise level the model's clean latent is drawn again by a short chain of steps that fit the measurement, through the VAE alone, and noised from "
        "there, so that early mistakes do not stay. Needs DPSGuider. T steps cost ode T denoiser calls and iterations T calls of the VAE."
    )
    search_aliases = ("Langevin", "HMC")


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
        return io.NodeOutput(host_sigmas(model, SPACINGS[spacing](model_sigmas(model), steps, start, end)))


class DMAPPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_DMAPPreset",
            display_name="DMAPPreset",
            category=CATEGORY,
            description="A sampler and its noise levels for the operator, with steps that set themselves: nothing has to be searched. Connect both to SamplerCustomAdvanced. "
            "The text says what was chosen and where the numbers come from.",
            search_aliases=["restore", "restoration", "photo"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled."),
                Operator.Input("operator", tooltip="The damage, the same that goes to DPSGuider."),
                io.Combo.Input(
                    "solver",
                    options=[*presets.NAMES, presets.AUTO, *presets.OTHERS],  # in this order: saved workflows go by place
                    default=presets.AUTO,
                    tooltip="auto: what was best for its cost: DPS with inner steps, for holes and JPEGs DMAP. DMAP costs about what DPS costs; DMAP full is the paper's best and takes three times as long. The others are for comparison.",
                ),
                io.Combo.Input(
                    "quality",
                    options=[*presets.QUALITIES, presets.PAPER],
                    default="good",
                    tooltip="look: quick. good: about twice the time. best: four to five times. The step size sets itself. "
                    "paper: the paper's zeta and 250 or 500 steps (on the demo prior a searched one), as tables of the paper use it.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="0 takes the quality's own number of steps. Fewer are faster and coarser; a zeta of the paper is raised to match.",
                ),
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip="1 begins with noise. Below 1 the given latent is noised to that fraction of the timesteps: 0.4 with the measurement in Empty Measurement Latent "
                    "needs half the steps. Not for holes.",
                ),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, model, operator, solver, quality, steps=0, start=1.0) -> io.NodeOutput:
        if quality == presets.PAPER:
            p = presets.preset(operator, "DMAP" if solver == presets.AUTO else solver, searched_model(model))
        else:
            p = presets.automatic(operator, solver, quality)
            if too_large_for_gradients(model) and p.solver.settings().get("jacobian") == "exact":
                p = replace(
                    p.with_settings(jacobian="none"),
                    source=f"{p.source}; gradients end at the decoder, as the model is too large for this GPU",
                )
        p = replace(p.with_steps(steps) if steps else p, start=start)
        return io.NodeOutput(SolverSampler(p.solver), host_sigmas(model, p.sigmas(model_sigmas(model))), p.text())


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
    LATINOSampler,
    FlowDPSSampler,
    DAPSSampler,
    DMAPPreset,
    DMAPScheduler,
    DMAPUnconditional,
]
