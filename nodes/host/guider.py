"""ComfyUI's GUIDER and SAMPLER protocols drive a Posterior."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...dmap_core.consistency import grey_levels, residual_levels
from ...dmap_core.operators import Operator
from ...dmap_core.posterior import Posterior
from ...dmap_core.schedule import FLOW_FIRST, check_sigmas, generators
from ...dmap_core.solvers import DPS, Cost, Solver, check_finite, guided_denoised
from ...dmap_core.solvers.step import step_of
from ...dmap_core.tiles import Part, denoising, tiled, wanted
from ..messages import node_of, speaking_of_nodes
from .clock import Clock, say
from .controlnet import controls_of, cut, untied
from .flow import ancestral_level, finite_sigmas, is_flow, to_host, to_ve, ve_sigmas
from .gradients import (
    add_own_skip,
    as_in_training,
    check_quantised,
    check_whole,
    differentiable_attention,
    exact_layers,
    frozen,
    normal,
    own_input,
    pytorch_attention,
    without_caches,
)
from .job import GIB, job_of, room
from .preview import Watch, is_small, save_cancelled, told
from .prior import (
    HostPrior,
    check_model,
    check_vae,
    doubts,
    latent_size,
    native_latents,
    round_trip,
    stand_in,
    too_large_for_gradients,
)
from .report import REPORT, Report
from .static import static_controls, static_patchers

log = logging.getLogger(__name__)

# How much more a gradient keeps than the host's estimate for inference; only decides what else is moved off the GPU.
GRADIENT_MEMORY = 3
AUTO = "auto"  # tiles where they are wanted


def _host_shifts_seed() -> bool:
    """Whether the host's ancestral samplers already draw from seed + 1 on the CPU, so that steps do not repeat the initial noise."""
    one = torch.zeros(4)
    return bool((default_noise_sampler(one, seed=0)(1, 0) != torch.randn(4, generator=torch.Generator().manual_seed(0))).any())


SEED_SHIFT = 0 if _host_shifts_seed() else 1


class HostPosterior(Posterior):
    """A Posterior that the host can interrupt in optimisations of the picture, too, which call no network of the prior."""

    def distance(self, image: Tensor, bare: bool = False) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return super().distance(image, bare)

    def picture(self, z0: Tensor) -> Tensor:
        """D(z0) to look at, (B, 3, H, W), counted nowhere. A second Cancel, which the host's layers look for, begins it anew."""
        while True:
            try:
                return self._plain(lambda: self.prior.picture(z0))
            except comfy.model_management.InterruptProcessingException:
                continue


class PosteriorGuider(comfy.samplers.CFGGuider):
    """GUIDER that owns the problem: model, conditioning, VAE, operator and measurement y (B, c, h, w) in [-1, 1].

    A stock sampler is given the denoised latent of DPS's conditional score (Prop. 1), with the step of `dps`; a PosteriorSampler is given the Posterior.
    tile: latents of a side of the tiles on which networks run; None runs them on whole pictures, and AUTO on tiles of the model's native size where the
    picture is much larger or does not fit. guidance_vae: whose decoder gradients take instead.
    """

    def __init__(self, model, vae, operator: Operator, y: Tensor, dps: DPS, memory: str, tile: int | str | None = None, guidance_vae=None):
        check_model(model)
        check_vae(vae, model)
        if guidance_vae is not None:
            check_vae(guidance_vae, model, "guidance_vae")
            if guidance_vae.downscale_ratio != vae.downscale_ratio:
                raise ValueError(
                    f"guidance_vae: a latent is {guidance_vae.downscale_ratio} pixels wide in it and {vae.downscale_ratio} in vae; "
                    "load a small decoder of the same latents, such as taesd for Stable Diffusion"
                )
        model, caches = without_caches(model)
        super().__init__(model)
        self.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
        self.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = pytorch_attention
        self.vae, self.operator, self.y, self.dps, self.memory = vae, operator, y, dps, memory
        self.size, self.tile, self.guidance_vae = operator.image_size(y), tile, guidance_vae
        self.warnings: list[str] = [f"{name} is left out: outputs that it reuses have no gradient" for name in caches]
        self.report: Report | None = None
        self._posterior: Posterior | None = None
        self._static = None  # set for every run, as what follows
        self._exact = True  # whether gradients go through the denoiser
        self._guided = True  # whether there are gradients at all
        self._spared: Cost | None = None  # what the run would take with jacobian none; None where that is no choice
        self._tiling: tuple[int | None, int | None] = (None, None)  # what `_tiles` says
        self._clock: Clock | None = None
        self._watch: Watch | None = None
        self._cut: dict[tuple, dict[str, list[dict]]] = {}  # conditioning of tiles, of a run
        self.vae_tried = False
        self._solving = False

    def inner_set_conds(self, conds):
        # the host's own would load the model once more here, for conditioning with hooks under dynamic VRAM
        for name, conditioning in conds.items():
            self.original_conds[name] = comfy.sampler_helpers.convert_cond(conditioning)

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        if sigmas.shape[-1] == 0:  # denoise 0: nothing to do, as in any ComfyUI guider
            return latent_image
        ours = isinstance(sampler, PosteriorSampler)
        self._exact = sampler.through_denoiser if ours else self.dps.jacobian == "exact"
        sigmas = finite_sigmas(self.model_patcher, sigmas)
        self._check_run(noise, sigmas, ours)
        if ours:
            sampler.check(self.operator, len(sigmas) - 1)
        steps = len(sigmas) - 1
        cost, self._spared = (sampler.cost(steps), sampler.spared(steps)) if ours else (self.dps.cost(steps), spared(self.dps, steps))
        self._guided = cost is None or cost.decoder_gradients > 0
        self._own_doubts(steps)
        self._tiling = self._tiles(noise)
        counted = self._counted(len(noise), cost)
        name = sampler.name if ours else f"{self.dps.describe().replace('DPS', 'DPSGuider', 1)} with a stock sampler"
        self.report, self._clock = Report(name, self.operator.describe()), Clock(len(sigmas) - 1)
        self._watch = Watch(callback, len(sigmas) - 1) if callback else None
        self.report.flop, self.report.counted_memory = counted
        original_conds, model = self.original_conds, self.model_patcher
        device = comfy.model_management.get_torch_device()
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad(), static_patchers() as self._static:
                if self._exact:
                    self.model_patcher = self._static(model)
                    self.original_conds = static_controls(normal(original_conds), self._static)
                else:
                    self.original_conds = normal(original_conds)
                noise, latent_image, sigmas, denoise_mask = normal((noise, latent_image, sigmas, denoise_mask))
                seed = ((seed or 0) + SEED_SHIFT) % 2**64
                samples = super().sample(noise, latent_image, sampler, sigmas, denoise_mask, self._watch, disable_pbar, seed)
                samples = samples.to(
                    comfy.model_management.intermediate_device()
                )  # where sampler nodes move it: they pass on this very tensor
                setattr(samples, REPORT, self.report)
                return samples
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(self._too_large()) from error
        finally:
            self.original_conds, self.model_patcher, self._static = original_conds, model, None
            self.report.peak_memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
            self._finish_report(time.perf_counter() - started)
            self._posterior, self._watch, self._cut = None, None, {}

    def _check_run(self, noise: Tensor, sigmas: Tensor, ours: bool) -> None:
        check_sigmas(sigmas, to_zero=ours)
        if isinstance(self.tile, int) and (found := untied(self.original_conds)):
            raise ValueError(
                f"DPSGuider: tile: the conditioning has {found}, made for the whole picture, which cannot be cut into tiles; set tile to whole, or leave it out"
            )
        channels = self.model_patcher.get_model_object("latent_format").latent_channels
        if noise.ndim != 4 or noise.shape[1] != channels:
            raise ValueError(
                f"latent_image: it has shape {tuple(noise.shape)}, but the model's latents are (batch, {channels} channels, height, width); "
                "encode it with the model's own VAE"
            )
        wanted, given = latent_size(self.vae, self.size), tuple(noise.shape[-2:])
        if wanted != given:
            factor = self.vae.downscale_ratio
            raise ValueError(
                f"latent_image: {given[1]}x{given[0]} latents make a {given[1] * factor}x{given[0] * factor} picture, but the measurement "
                f"of {self.y.shape[-1]}x{self.y.shape[-2]} and {self.operator.describe()} make one of {self.size[1]}x{self.size[0]} "
                f"({wanted[1]}x{wanted[0]} latents). Connect 'Empty Measurement Latent', or mend the operator's settings"
            )
        if len(self.y) not in (1, len(noise)):
            raise ValueError(
                f"latent_image: a batch of {len(noise)} latents for {len(self.y)} measurements; give one measurement, or one per latent"
            )
        with speaking_of_nodes():
            self.operator.check(self.size, len(noise))

    def _counted(self, batch: int, cost: Cost | None) -> tuple[float | None, float | None]:
        """(operations, bytes) that a run takes, both None where they are not known. Raises ValueError for one that cannot fit into the memory there is."""
        tile, native = self._tiling
        job = cost and job_of(self.model_patcher, self.vae, self.guidance_vae, self.size, batch, tile, cost, self._spared)
        if job is None:
            return None, None
        there = room()
        strategy = job.fitting(self.memory, there)
        if strategy is None and native:
            job = replace(job, tile=native)
            strategy = job.fitting(self.memory, there)
        if strategy is None:
            need = job.peak("checkpoint" if self.memory == "auto" else self.memory)
            remedies = job.remedies(there)
            fits = ", or ".join(remedies) if remedies else "a smaller picture or model"
            raise ValueError(
                f"DPSGuider: {'a gradient' if self._guided else 'a run'} of {self.size[1]}x{self.size[0]}{f' in tiles of {8 * job.tile}' if job.tile else ''} needs {need / GIB:.1f} GiB with the weights, "
                f"and there are {there / GIB:.1f}. What would fit: {fits}"
            )
        flop, peak = job.flop(strategy), job.peak(strategy)
        log.info("DPSGuider: %.3g TFLOP and %.1f GiB at most, counted for %s", flop / 1e12, peak / GIB, job.family)
        return flop, peak

    def _try_vae(self, prior: HostPrior, y: Tensor) -> None:
        if not self.vae_tried:
            warnings = round_trip(prior, self.operator.hint(y))
            warnings += stand_in(prior, self.operator.hint(y)) if self.guidance_vae else []
            for warning in warnings:
                log.warning("DPSGuider: vae: %s", warning)
            self.warnings += warnings
        self.vae_tried = True

    def _report_mismatch(self, z0: Tensor) -> None:
        """What the picture and the measurement differ by in the end, where they can be compared."""
        y_hat = self.operator(self._posterior.prior.decode(z0).clamp(-1, 1))
        try:
            rms, worst = grey_levels(self.operator, y_hat, self._posterior.y)
        except NotImplementedError:  # scores of classes against classes
            return
        self.report.mismatch, self.report.mismatch_worst = rms.tolist(), worst.tolist()

    def _step_done(self, residual: Tensor) -> None:
        residual = residual.detach().cpu()  # waits for the GPU
        self.report.residuals.append(residual.tolist())
        levels = residual_levels(self.operator, residual, self._posterior.y)
        if levels is not None:
            self.report.levels.append(levels.tolist())
        self._clock.step(None if levels is None else float(levels.max()))

    def _finish_report(self, seconds: float) -> None:
        self.report.seconds, self.report.seconds_per_step = seconds, self._clock.seconds_per_step()
        if self._posterior:
            p = self._posterior
            tiles = f", tiles of {p.prior.tile * self.vae.downscale_ratio} pixels" if p.prior.tile else ""
            self.report.memory = (p.plan if self._guided else "no gradient") + tiles
            self.report.denoiser_calls, self.report.decoder_calls = p.denoiser_calls, p.decoder_calls
            self.report.guidance_calls = p.guidance_calls
        self.report.noise = 127.5 * self.operator.noise
        self.report.warnings = [*self.warnings, *self.report.misfits(self.report.noise)]
        log.info("%s", self.report.text())

    def inner_sample(self, noise, latent_image, device, *args, **kwargs):
        """The models are loaded here, and the solver has not started: the moment to ready them for gradients."""
        vaes = [self._static(vae.patcher) for vae in (self.vae, self.guidance_vae) if vae]
        plain = [self.model_patcher, *self.loaded_models]
        tile, native = self._tiling
        shape = [*noise.shape[:2], *(min(n, tile or n) for n in noise.shape[2:])]
        estimate = self.inner_model.memory_required(shape) + self.vae.memory_used_decode(shape, self.vae.vae_dtype)
        whole = [*plain, *vaes] if self._exact else vaes
        most = GRADIENT_MEMORY * estimate if self._guided else estimate
        comfy.model_management.load_models_gpu(whole, memory_required=most, force_full_load=True)
        check_whole(whole)
        if not self._exact:  # as for plain sampling: a part of it may stay where it is
            comfy.model_management.load_models_gpu([*plain, *vaes], memory_required=estimate)
        controls = list(controls_of(self.conds))
        if controls:
            add_own_skip(self.model_options["transformer_options"])  # of this run: the host works on a copy
        for control in controls:
            if hasattr(control, "control_weights"):  # of a control LoRA, whose network is made of them later
                control.control_weights = normal(control.control_weights)
        latent_format = vars(self.inner_model.latent_format)
        latent_format.update(normal(latent_format))  # some have a mean and a deviation per channel
        networks = [p.model for p in self.loaded_models]
        networks += [m for control in controls for m in vars(control).values() if isinstance(m, nn.Module) and m not in networks]
        prior = HostPrior(self.inner_model, self.vae, [vae.model for vae in vaes], networks, self.size, tile, self.guidance_vae)
        y = normal(self.y).to(device).expand(len(noise), -1, -1, -1)
        try:
            guidance = prior.guide if self.guidance_vae else None
            into_tiles = (lambda: self._into_tiles(prior, native)) if native else None
            self._posterior = HostPosterior(prior, self.operator.to(device), y, self.memory, guidance, into_tiles)
            through = prior.networks() if self._exact else [vae.model for vae in vaes]
            tracked = networks if self._exact else []
            slow = as_in_training(self.inner_model.diffusion_model) if self._exact else nullcontext()
            with frozen(through), differentiable_attention(tracked), own_input(through), exact_layers(through), slow:
                check_quantised(through)
                self._try_vae(prior, y[:1])
                if self._watch:
                    self._watch.show = prior.picture if is_small(self.vae) else prior.rough_picture if is_small(self.guidance_vae) else None
                try:
                    samples = super().inner_sample(noise, latent_image, device, *args, **kwargs)
                    if self._watch:
                        self._watch.finish()
                    if self.report.residuals:  # a study's run restores nothing
                        self._report_mismatch(self.inner_model.process_latent_in(samples))
                    return samples
                except comfy.model_management.InterruptProcessingException as error:
                    interruption = error.with_traceback(None)  # which keeps the activations of a gradient alive
                self._keep_last_picture()
                raise interruption
        finally:
            self.operator.to("cpu")

    def _keep_last_picture(self) -> None:
        """Of a run that was cancelled: what was paid for is not lost."""
        if self._watch is None or self._watch.last is None:
            return
        say("cancelled: keeping the last picture")
        try:
            paths = save_cancelled(self._posterior.picture(self._watch.last))
        except (torch.OutOfMemoryError, OSError) as error:  # the run ends as cancelled in any case
            log.warning("DPSGuider: the last picture of the cancelled run is not kept: %s", error)
            return
        text = told(paths, self._watch.done, self._clock.steps)
        log.info("DPSGuider: %s", text)
        say(text)

    def _own_doubts(self, steps: int) -> None:
        found = doubts(self.model_patcher, steps)
        if self._exact and too_large_for_gradients(self.model_patcher):
            found.append(
                f"gradients go through the denoiser, whose weights of {self.model_patcher.model_size() / GIB:.1f} GiB leave little of the GPU; "
                f"{'jacobian none' if self._spared else 'another solver with jacobian none'} (DMAPPreset's choice here) needs no gradient of it"
            )
        for doubt in found:
            self._warn(doubt)

    def _tiles(self, noise: Tensor) -> tuple[int | None, int | None]:
        """(the tiles of a run in latents, None for whole pictures; those that it may take when the memory does not suffice)."""
        if self.tile != AUTO:
            return self.tile, None
        size, native = tuple(noise.shape[-2:]), native_latents(self.model_patcher)
        tied = untied(self.original_conds)
        if tied and wanted(size, native):
            self._warn(
                f"the picture is much larger than those that the model knows, and is not cut into tiles: the conditioning has {tied}, "
                "made for the whole of it"
            )
        if tied or max(size) <= native:
            return None, None
        return (native, None) if wanted(size, native) else (None, native)

    def _into_tiles(self, prior: HostPrior, native: int) -> bool:
        log.warning("DPSGuider: the memory does not suffice for the whole picture; from here on it is restored in tiles")
        prior.tile = native
        return True

    def _too_large(self) -> str:
        """What is said where the memory does not suffice."""
        tile = self._posterior and self._posterior.prior.tile
        if tile:
            what, instead = f"tiles of {tile * self.vae.downscale_ratio} pixels", "a smaller tile"
        else:
            what, instead = f"the whole picture of {self.size[1]}x{self.size[0]}", "tile auto and memory auto"
        of, less = ("a gradient of ", "a small decoder as guidance_vae, ") if self._guided else ("", "")
        less = f"jacobian none, {less}" if self._spared else less
        return f"DPSGuider: the memory does not suffice for {of}{what}. Try {instead}, {less}one picture at a time, or the model in half precision"

    def _warn(self, warning: str) -> None:
        log.warning("DPSGuider: %s", warning)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _of_part(self, part: Part, size: Sequence[int]) -> dict[str, list[dict]]:
        """The conditioning of a tile; made once in a run."""
        key = tuple((s.start, s.stop) for s in part)
        if key not in self._cut:
            self._cut[key] = cut(self.conds, part, size)
        return self._cut[key]

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        def whole(z, sigma):
            return super(PosteriorGuider, self).predict_noise(z, sigma, model_options or {}, seed)

        def plain(z, sigma):
            tile = self._posterior.prior.tile
            if not tile:
                return whole(z, sigma)
            conds = self.conds

            def of_tile(tile: Tensor, part: Part) -> Tensor:
                self.conds = self._of_part(part, z.shape[-2:])
                try:
                    return whole(tile, sigma).float()
                finally:
                    self.conds = conds

            return tiled(of_tile, z, denoising(tile))

        if self._solving:
            return plain(x, timestep)
        model = self.model_patcher
        self._posterior.prior.denoiser = lambda z, sigma: plain(*to_host(model, z, sigma))
        levels = ve_sigmas(model, model_options["transformer_options"]["sample_sigmas"]).tolist()
        z, (sigma, *_) = to_ve(model, x, timestep.flatten())
        sigma = float(sigma)
        sigma_next = ancestral_level(model, sigma, max((s for s in levels if s < sigma * (1 - 1e-6)), default=0.0))
        grad, denoised, residual = self._posterior.gradient(z, sigma, jacobian=self.dps.jacobian)
        check_finite(len(self.report.residuals), len(levels) - 1, self.dps.zeta, grad, residual)
        self._step_done(residual)
        return guided_denoised(denoised, grad, step_of(self.dps, grad, residual, sigma), sigma, sigma_next)

    def solve(self, sampler: PosteriorSampler, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar) -> Tensor:
        """Run a solver of dmap_core on the posterior, from the noise and the latent that the host prepared."""
        model, levels = self.model_patcher, ve_sigmas(self.model_patcher, sigmas)
        inpaint = comfy.samplers.KSamplerX0Inpaint(self, sigmas)  # keeps the unmasked part of a latent with a noise mask
        inpaint.latent_image, inpaint.noise = latent_image, noise
        self._posterior.prior.denoiser = lambda z, sigma: inpaint(*to_host(model, z, sigma), denoise_mask=denoise_mask, **extra_args)
        if is_flow(model):
            whole = float(sigmas[0]) >= FLOW_FIRST * (1 - 1e-6)  # of noise, as the host has it for VE models
            z = latent_image + (levels[0].square() + whole).sqrt() * noise
        else:
            z = self.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, sampler.max_denoise(self, sigmas))
        steps = len(sigmas) - 1

        def report(step: int, denoised: Tensor, z: Tensor, residual: Tensor) -> None:
            self._step_done(residual)
            bar.update()
            if callback:
                callback(step, denoised, z, steps)

        self._solving = True
        try:
            # on a host that shifts the seed itself, the shift has not happened yet: only its own samplers do it
            noise_seed = extra_args["seed"] + 1 - SEED_SHIFT
            with tqdm(total=steps, disable=disable_pbar) as bar:  # the line that stock samplers write
                z = sampler.run(self._posterior, z, levels, generators(noise_seed, len(z)), report)
        finally:
            self._solving = False
        if denoise_mask is not None:
            z = z * denoise_mask + latent_image * (1 - denoise_mask)
        return z


class PosteriorSampler(comfy.samplers.Sampler):
    """SAMPLER that is given the Posterior of a PosteriorGuider. `name` is what reports and messages call it."""

    name: str
    through_denoiser = True  # whether it takes gradients through the denoiser, whose weights must then be whole where it runs

    def check(self, operator: Operator, steps: int) -> None:
        """Raises ValueError for a run that it cannot do; called before models are loaded."""

    def cost(self, steps: int) -> Cost | None:
        """What a run takes; None if that is not known."""
        return None

    def spared(self, steps: int) -> Cost | None:
        """What it would take with jacobian none; None where it has no such input, or takes no gradient through the denoiser."""
        return None

    def run(self, posterior: Posterior, z: Tensor, sigmas: Tensor, generator, callback) -> Tensor:
        """What the run puts out, a latent like z (B, C, h, w). callback(step, denoised, z, residual) is to be called after every step."""
        raise NotImplementedError

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        if not isinstance(model_wrap, PosteriorGuider):
            raise ValueError(
                f"{self.name}: it was given a {node_of(model_wrap)}, which knows neither measurement nor operator. "
                "Connect the node 'DPSGuider' to the guider input of SamplerCustomAdvanced"
            )
        return model_wrap.solve(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)


class SolverSampler(PosteriorSampler):
    """SAMPLER that owns the algorithm: a solver of dmap_core."""

    def __init__(self, solver: Solver):
        self.solver, self.name = solver, solver.describe()
        self.through_denoiser = solver.cost(2).denoiser_gradients > 0

    def check(self, operator: Operator, steps: int) -> None:
        self.solver.check(operator, steps)

    def cost(self, steps: int) -> Cost:
        return self.solver.cost(steps)

    def spared(self, steps: int) -> Cost | None:
        return spared(self.solver, steps)

    def run(self, posterior, z, sigmas, generator, callback) -> Tensor:
        return self.solver(posterior, z, sigmas, generator=generator, callback=callback)


def spared(solver: Solver, steps: int) -> Cost | None:
    """What a run takes with jacobian none, of a solver that has this input at another value."""
    if getattr(solver, "jacobian", "none") == "none":
        return None
    return replace(solver, jacobian="none").cost(steps)
