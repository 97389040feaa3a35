"""Memory of one training step of a CSE: Stable Diffusion 2.0's shape, 512x512, float32, with and without gradient checkpointing.

    python benchmarks/cse_training_step.py cuda --batch 1
    python benchmarks/cse_training_step.py cpu           # some minutes, and 16 GiB

Random weights of the right shapes. Every row is a process of its own; on the CPU its peak is all that the process ever held, libraries too, on
a GPU what PyTorch allocated. Two steps are run, because Adam's moments come to be at the end of the first. The autoencoder, which only
encodes and is done before the step, is not in it.
"""

import argparse
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SD2 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
LATENT, HINT, CONTEXT = (4, 64, 64), (3, 512, 512), (77, 1024)
GIB = 2**30


def run(device: str, checkpointing: bool, batch: int) -> str:
    """One row of the table."""
    from host import import_torchvision

    import_torchvision()  # which diffusers imports, and which does not load everywhere
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    from dmap_core.backends.autoencoded import BLOCKS
    from dmap_core.cse.loss import denoising_loss
    from dmap_core.memory import blocks_of, checkpointed

    with torch.device(device):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **SD2).requires_grad_(False)
        controlnet = ControlNetModel.from_unet(unet)
        z0, noise = torch.randn(2, batch, *LATENT)
        t, sigma = torch.full((batch,), 500), torch.ones(batch)
        context, hint = torch.zeros(batch, *CONTEXT), torch.zeros(batch, *HINT)
    blocks = blocks_of([unet, controlnet], BLOCKS)
    optimizer = torch.optim.Adam(controlnet.parameters(), lr=5e-6)
    for _ in range(2):
        started, z = time.perf_counter(), z0 + noise
        with checkpointed(blocks) if checkpointing else nullcontext():
            down, middle = controlnet(z, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
            control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            denoised = z - unet(z, t, encoder_hidden_states=context, return_dict=False, **control)[0]
            denoising_loss(denoised, z0, sigma, "eps").mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    return f"| {'on' if checkpointing else 'off'} | {batch} | {peak / GIB:.2f} | {seconds:.1f} | {name}, torch {torch.__version__} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=1, help="pictures of one part of a step (batch_size / accumulation)")
    parser.add_argument("--only", choices=("on", "off"), help="one row, in this process")
    args = parser.parse_args()
    if args.only:
        print(run(args.device, args.only == "on", args.batch), flush=True)
        return
    print("| checkpointing | pictures | peak GiB | seconds | device |\n|---|---|---|---|---|", flush=True)
    for only in ("off", "on"):
        subprocess.run([sys.executable, __file__, args.device, "--batch", str(args.batch), "--only", only], check=True)


if __name__ == "__main__":
    main()
