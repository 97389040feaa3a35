"""Cost of one guided step: seconds and peak memory of Posterior.gradient against its own denoiser and decoder calls.

    python benchmarks/guided_step.py --model sd2 --size 256          # the full Stable Diffusion 2.0 shape, seeded random weights
    python benchmarks/guided_step.py --model sd2 --size 512 --memory lean
    python benchmarks/guided_step.py --model demo --size 128         # the demo prior

The step's own calls are one forward and one vector-Jacobian product of the denoiser, and the same of the decoder, each alone; `lean` adds
one denoiser forward. The ratio of the step to their sum is the overhead (target: at most 1.1). Every plan runs in a process of its own, so
that peak memory is its own. Uses ComfyUI's classes and attention (COMFYUI_PATH), as the nodes do.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

SD2_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 1024,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
SD2_VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4]}
SD2_VAE |= {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Seeded weights of a sensible scale: ComfyUI's layers are created without any."""
    rng = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.requires_grad_(False)
        scale = 0.02 if p.ndim > 1 else (1.0 if name.endswith("weight") else 0.0)
        p.copy_(torch.ones(()) * scale if p.ndim == 1 else torch.randn(p.shape, generator=rng).to(p.device) * scale)
    return module.eval()


def build(model: str, device: torch.device, dtype: torch.dtype):
    """(prior, latent factor): a dmap_core Prior on ComfyUI's networks."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.ldm.modules.diffusionmodules.model import Decoder
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.no_grad():
        if model == "sd2":
            unet = randomise(UNetModel(**SD2_UNET, operations=comfy.ops.disable_weight_init, device=device, dtype=dtype))
            decoder = randomise(Decoder(**SD2_VAE).to(device, dtype))
        else:
            loaded, _, vae, _ = comfy.sd.load_checkpoint_guess_config(
                str(ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors"), output_vae=True, output_clip=False
            )
            unet, decoder = loaded.model.diffusion_model.to(device, dtype), vae.first_stage_model.to(device, dtype)
            for p in [*unet.parameters(), *decoder.parameters()]:
                p.requires_grad_(False)

    class NetworkPrior:
        options = {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        context = torch.zeros(1, 77, 1024, device=device, dtype=dtype)

        def denoise(self, z, sigma):
            t = torch.full((len(z),), 500.0, device=device)
            x = (z / (sigma**2 + 1) ** 0.5).to(dtype)
            return z - sigma * unet(x, t, context=self.context.expand(len(z), -1, -1), transformer_options=dict(self.options)).float()

        def decode(self, z0):
            return (decoder(z0.to(dtype)) if model == "sd2" else decoder.decode((z0 / 0.18215).to(dtype))).float()

        def encode(self, image):
            raise NotImplementedError

        def networks(self):
            return [unet, decoder]

        def free_memory(self):
            return float("inf")

    return NetworkPrior()


class PeakMemory:
    """Peak of this process's memory inside the block, in bytes: the CUDA allocator's on a GPU, else the resident set, sampled."""

    def __init__(self, device: torch.device):
        self.device = device

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def __enter__(self):
        self.peak = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return self
        self._stop = threading.Event()

        def watch():
            while not self._stop.wait(0.01):
                self.peak = max(self.peak, self.resident())

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()


def timed(f, device: torch.device) -> float:
    started = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forward_and_vjp(f, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        torch.autograd.grad(y, x, torch.ones_like(y))


def measure(args) -> dict:
    from host import import_comfy

    import_comfy()
    from dmap_core.operators import SuperResolution
    from dmap_core.posterior import Posterior

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[args.dtype])
    prior = build(args.model, device, dtype)
    z = torch.randn(args.batch, 4, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(args.seed)).to(device) * 5
    operator = SuperResolution(8)
    posterior = Posterior(prior, operator, torch.zeros(args.batch, 3, args.size // 8, args.size // 8, device=device), args.memory)
    weights = PeakMemory.resident() if device.type == "cpu" else torch.cuda.memory_allocated()

    def step():
        grad, _, _ = posterior.gradient(z, 5.0)
        if not torch.isfinite(grad).all():
            raise ArithmeticError("the gradient is not finite")

    def alone():
        if args.memory == "lean":
            with torch.no_grad():
                prior.denoise(z, 5.0)
        forward_and_vjp(lambda x: prior.denoise(x, 5.0), z)
        forward_and_vjp(prior.decode, z)

    pairs = []
    with PeakMemory(device) as memory:
        step_first = timed(step, device)
    for _ in range(args.runs):
        pairs.append((timed(step, device), None if args.skip_alone else timed(alone, device)))
    result = {
        "model": args.model,
        "size": args.size,
        "batch": args.batch,
        "dtype": args.dtype,
        "memory": args.memory,
        "runs": args.runs,
        "seed": args.seed,
    }
    result |= {
        "seconds": median(s for s, _ in pairs) if pairs else step_first,
        "peak_gib": memory.peak / 2**30,
        "weights_gib": weights / 2**30,
    }
    if pairs and not args.skip_alone:
        result |= {"alone_seconds": median(a for _, a in pairs), "ratio": median(s / a for s, a in pairs)}
    result |= {"denoiser_calls": posterior.denoiser_calls, "decoder_calls": posterior.decoder_calls}
    result |= {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "sd2"], default="demo")
    parser.add_argument("--size", type=int, default=None, help="picture side in pixels (default: 128 for demo, 256 for sd2)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument(
        "--memory", choices=["fast", "lean", "checkpoint"], default=None, help="one plan (default: all three, a process each)"
    )
    parser.add_argument("--runs", type=int, default=3, help="measured steps after the first; 0 measures the first only")
    parser.add_argument("--skip-alone", action="store_true", help="do not time the calls alone (no ratio)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.size = args.size or {"demo": 128, "sd2": 256}[args.model]
    if args.memory:
        print(json.dumps(measure(args)))
        return
    rows = []
    for plan in ("fast", "lean", "checkpoint"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", plan]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print("\n| plan | seconds | own calls | ratio | peak GiB | of it weights and libraries |\n|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['memory']} | {r['seconds']:.2f} | {r.get('alone_seconds', float('nan')):.2f} | {r.get('ratio', float('nan')):.2f} | {r['peak_gib']:.2f} | {r['weights_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
