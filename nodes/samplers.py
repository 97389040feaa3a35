"""SAMPLER nodes, the paper's SIGMAS, and the conditioning of a model without text encoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmap_core.schedule import exponential_sigmas, paper_sigmas
from ..dmap_core.solvers import check_settings, sample_dmap, sample_dps
from . import host

CATEGORY = "DMAP/sampling"
SPACINGS = {"paper": paper_sigmas, "exponential": exponential_sigmas}


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


class DMAPSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DMAPSampler",
            display_name="DMAPSampler",
            category=CATEGORY,
            description="The paper's algorithm: at every noise level K gradient steps towards the measurement, each put back onto the sphere where the noise lives. "
            "Needs DPSGuider. T steps cost T + (T - 1) K denoiser calls.",
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
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, K, zeta, eta=1.0) -> io.NodeOutput:
        check_settings(zeta, eta, K)
        return io.NodeOutput(host.SolverSampler(f"DMAP (K {K}, zeta {zeta:g})", sample_dmap, K=K, zeta=zeta, eta=eta))


class DPSSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMAP_DPSSampler",
            display_name="DPSSampler",
            category=CATEGORY,
            description="Diffusion posterior sampling (Chung et al. 2022): one gradient step per noise level. Needs DPSGuider. T steps cost T denoiser calls.",
            inputs=[zeta_input(4.8), eta_input(0.0)],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, zeta, eta=1.0) -> io.NodeOutput:
        check_settings(zeta, eta)
        return io.NodeOutput(host.SolverSampler(f"DPS (zeta {zeta:g})", sample_dps, zeta=zeta, eta=eta))


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
                    "better with 15 to 60 steps (measured on the demo prior).",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, steps, start=1.0, end=0.0, spacing="paper") -> io.NodeOutput:
        return io.NodeOutput(SPACINGS[spacing](host.model_sigmas(model), steps, start, end))


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
        return io.NodeOutput(host.null_conditioning(model))


NODES = [DMAPSampler, DPSSampler, DMAPScheduler, DMAPUnconditional]
