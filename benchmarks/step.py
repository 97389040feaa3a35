"""One measurement in a process of its own: a guided step's seconds, peak memory and gradient, by a plan, a solver, or a plain reference.

`measure` is told what to do by a job, a dict: family, decoder, size, dtype, vae_dtype, batch, tile, device, threads, seed, runs, and `how`:
a plan of dmap_core.gradient.STRATEGIES, the name of a solver, or one of REFERENCES.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.prior import DTYPES
from dmap_core.solvers import SOLVERS, from_spec

from . import ROOT, shapes
from .live import flop_counter

GIB = 2**30
SIGMA = 5.0
LEVELS = (5.0, 3.0, 1.5, 0.0)  # a solver's schedule: three steps, of which the first warms up
SETTINGS = {  # of solvers, where the defaults belong to longer schedules
    "DSG": {"zeta": 0.3},
    "PSLD": {"zeta": 0.5, "gamma": 0.3},
    "FreeDoM": {"first": 0, "last": 1, "K": 2},
    "ReSample": {"first": 0, "last": 1, "every": 1, "iterations": 3},
}
# The gradient as published code takes it: one graph through both networks, float32, parameters that ask for gradients as they do after
# loading. "plain": with the same fused attention as ours. "published": with the attention of the published code, its matrix in full.
REFERENCES = ("plain", "published")


class PeakMemory:
    """Peak of this process's memory inside the block, in bytes: the CUDA allocator's on a GPU, else the resident set, sampled."""

    def __init__(self, device: torch.device):
        self.device = device

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def before(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else self.resident()

    def __enter__(self) -> PeakMemory:
        self.peak = self.before()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return self
        self._stop = threading.Event()

        def watch() -> None:
            while not self._stop.wait(0.005):
                self.peak = max(self.peak, self.resident())

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()


def clock(device: torch.device) -> float:
    """Seconds, on a CPU those that this process had of it: cores are often shared, and with one thread these are what an idle one takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(f, device: torch.device) -> float:
    started = clock(device)
    f()
    return clock(device) - started


def rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Operations a second of products of n x n matrices: the best of five."""
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


def plain_gradient(prior: shapes.ShapePrior, operator, y: Tensor, z: Tensor) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        residual = torch.linalg.vector_norm(operator(prior.decode(prior.denoise(z, SIGMA))) - y, dim=(1, 2, 3)).sum()
        return torch.autograd.grad(residual, z)[0]


def as_published(prior: shapes.ShapePrior) -> None:
    from comfy.ldm.modules.attention import attention_basic
    from comfy.ldm.modules.diffusionmodules import model as kl

    prior.options["optimized_attention_override"] = lambda func, *args, **kwargs: attention_basic(*args, **kwargs)
    for module in prior.autoencoder.modules():
        if isinstance(module, kl.AttnBlock):
            module.optimized_attention = kl.normal_attention


def weights_hash(prior: shapes.ShapePrior) -> str:
    found = hashlib.sha256()
    for network in prior.networks():
        for tensor in network.state_dict().values():
            found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes() if tensor.ndim else str(float(tensor)).encode())
    return found.hexdigest()


def built(job: dict, device: torch.device) -> shapes.ShapePrior:
    if job["family"] == "demo prior":
        return shapes.demo(job["dtype"], device)
    return shapes.build(job["family"], job["decoder"], job["dtype"], job.get("vae_dtype"), device, tile=job.get("tile"))


@torch.no_grad()
def measure(job: dict, prior: shapes.ShapePrior | None = None) -> dict:
    """The job, and what was measured: seconds of a step (the median), GiB before and at most, a solver's operations by torch's counter.

    prior: one that was built for the job's family and precision before.
    """
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    device, how, size, batch = torch.device(job["device"]), job["how"], job["size"], job.get("batch", 1)
    prior = prior or built(job, device)
    prior.tile = job.get("tile")
    z = shapes.latent(size, batch, job.get("seed", 0), device)
    operator = SuperResolution(8)
    y = operator(torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device))
    dtype = DTYPES[job["dtype"]]
    result = dict(job) | {"rate_tflops": rate(device, dtype, job.get("matrix", 2048)) / 1e12}
    gradients: list[Tensor] = []
    start = PeakMemory(device).before()
    if how in SOLVERS:
        seconds, memory, operations = solver_steps(prior, operator, y, z, how, device)
        result["flop"] = operations
    else:
        if how in REFERENCES:
            for network in prior.networks():
                network.requires_grad_(True)
            if how == "published":
                as_published(prior)

            def step() -> None:
                gradients[:] = [plain_gradient(prior, operator, y, z)]
        else:
            posterior = Posterior(prior, operator, y, how)

            def step() -> None:
                gradients[:] = [posterior.gradient(z, SIGMA)[0]]

        with PeakMemory(device) as memory:
            seconds = [timed(step, device)]
        seconds += [timed(step, device) for _ in range(job.get("runs", 0))]
        seconds = seconds[1:] or seconds
        if not torch.isfinite(gradients[0]).all():
            raise ArithmeticError(f"{job}: the gradient is not finite")
        if job.get("keep"):
            torch.save(gradients[0].cpu(), job["keep"])
    weights = sum(p.numel() * p.element_size() for network in prior.networks() for p in network.parameters())
    result |= {
        "seconds": median(seconds),
        "n": len(seconds),
        "before_gib": start / GIB,
        "peak_gib": memory.peak / GIB,
        "weights_gib": weights / GIB,
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return result | {"device_name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def solver_steps(prior, operator, y, z, name: str, device: torch.device) -> tuple[list[float], PeakMemory, int]:
    """Seconds of a solver's steps after the first, its memory, and operations of one of them, the mean."""
    solver = from_spec({"solver": name, **SETTINGS.get(name, {})})
    marks: list[float] = []

    def run() -> None:
        marks[:] = []
        solver(Posterior(prior, operator, y, "fast"), z, LEVELS, torch.Generator().manual_seed(0), lambda *_: marks.append(clock(device)))

    with flop_counter() as counter:
        run()
    with PeakMemory(device) as memory:
        run()
    return [after - before for before, after in zip(marks, marks[1:], strict=False)], memory, counter.get_total_flops() // len(marks)


def in_a_process(job: dict) -> dict:
    """`measure`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(a: Path, b: Path) -> float:
    """The relative difference of two kept gradients."""
    a, b = (torch.load(path, weights_only=True).double() for path in (a, b))
    return float((a - b).norm() / b.norm())
