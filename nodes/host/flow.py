"""Flow models in the coordinates of everything else here: x_t = (1 - t) z0 + t eps is z = x_t / (1 - t) = z0 + sigma eps, sigma = t / (1 - t).

ComfyUI's SIGMAS of a flow model are times t, shifted as the model wants them, from 1 on; its guider answers with z0 whatever the model predicts. So a run goes
on in the host's coordinates, its patches see the times that they expect, and only what a Posterior is told is changed.
"""

from __future__ import annotations

import comfy.model_sampling
from torch import Tensor

from ...dmap_core.schedule import flow_levels, flow_sigma, flow_time


def is_flow(model) -> bool:
    """Whether a MODEL is a rectified flow."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def finite_sigmas(model, sigmas: Tensor) -> Tensor:
    """SIGMAS of that model, of which a flow's first one lies below pure noise (`schedule.flow_levels`). Raises ValueError for a VE model's where it is a flow."""
    if not is_flow(model):
        return sigmas
    if len(sigmas) and float(sigmas[0]) > 1:
        raise ValueError(
            f"sigmas: they begin at {float(sigmas[0]):.4g}, and the times of a flow lie between 1 and 0; connect the flow model to the scheduler, too"
        )
    return flow_levels(sigmas)


def host_sigmas(model, sigmas: Tensor) -> Tensor:
    """VE noise levels as ComfyUI's SIGMAS of that model."""
    return flow_time(sigmas) if is_flow(model) else sigmas


def ve_sigmas(model, sigmas: Tensor) -> Tensor:
    """ComfyUI's SIGMAS of that model as VE noise levels, all of them finite."""
    return flow_sigma(finite_sigmas(model, sigmas)) if is_flow(model) else sigmas


def to_host(model, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x, SIGMAS) of VE latents z (B, C, h, w) at levels sigma (B,)."""
    return (z / (1 + sigma.view(-1, 1, 1, 1)), flow_time(sigma)) if is_flow(model) else (z, sigma)


def to_ve(model, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(z, sigma) of what ComfyUI's samplers hold."""
    return (x / (1 - sigma.view(-1, 1, 1, 1)), flow_sigma(sigma)) if is_flow(model) else (x, sigma)


def ancestral_level(model, sigma: float, sigma_next: float) -> float:
    """The level s for which s^2 / sigma^2 is what an ancestral step of ComfyUI's samplers keeps of a VE latent: sigma_next, or of a flow's less.

    There the step goes down to the time t'^2 / t before noise is added. Levels are VE.
    """
    if not is_flow(model):
        return sigma_next
    time = flow_time(sigma_next) ** 2 / flow_time(sigma)
    return (flow_sigma(time) * sigma) ** 0.5
