"""Train the demo prior: a TAESD autoencoder and an SD2.0-shaped UNet on emoji pictures, in one checkpoint that ComfyUI's stock loader opens.

    python demo/train.py autoencoder --minutes 30            # from scratch
    python demo/train.py autoencoder --minutes 30 --init prior.safetensors --decoder-only
    python demo/train.py unet --minutes 90 --init autoencoder.safetensors
    python demo/train.py unet --minutes 90 --init autoencoder.safetensors --out run/unet.safetensors    # again: resumes
    python demo/train.py flow --minutes 90 --init unet.safetensors --out run/flow.safetensors    # the same prior as a rectified flow

Every stage reads and writes whole checkpoints, saves a resumable state every few minutes (atomically) and lowers the learning rate to zero
at the end of its minutes. `make demo-prior` runs all of it. The network classes are ComfyUI's own (COMFYUI_PATH).
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path

import torch
from data import concept, held_out_names, pictures, split
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmap_core.files import write_whole

log = logging.getLogger("demo.train")
HERE = Path(__file__).resolve().parent
UNET = "model.diffusion_model."
VAE = "first_stage_model."
VAE_SCALE = 0.18215  # cancels ComfyUI's SD latent scale, so that the UNet sees the encoder's output
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -1,
    "context_dim": 1024,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}


def host_classes():
    """ComfyUI's TAESD and UNetModel, with trainable weights."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from host import import_comfy

    import_comfy()
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    return TAESD, UNetModel


def initialise(module: torch.nn.Module) -> None:
    """ComfyUI's layers skip their own initialisation (they expect a checkpoint)."""
    for m in module.modules():
        if isinstance(m, torch.nn.Linear):
            torch.nn.Linear.reset_parameters(m)
        elif isinstance(m, torch.nn.Conv2d):
            torch.nn.Conv2d.reset_parameters(m)
        elif isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(m.weight)
            torch.nn.init.zeros_(m.bias)


def new_autoencoder(TAESD, weights: dict | None):
    ae = TAESD()
    if weights:
        ae.load_state_dict(weights)
        return ae
    for m in ae.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                torch.nn.init.zeros_(m.bias)
    for m in ae.modules():  # residual branches start at zero: torch's default loses 10 dB here
        if type(m).__name__ == "Block":
            torch.nn.init.zeros_(m.conv[-1].weight)
    ae.vae_scale.data.fill_(VAE_SCALE)
    return ae


def new_unet(UNetModel, weights: dict | None):
    import comfy.ops

    unet = UNetModel(**UNET_CONFIG, operations=comfy.ops.disable_weight_init)
    if weights:
        unet.load_state_dict(weights)
        return unet
    initialise(unet)
    zeroed = [unet.out[-1]] + [m.out_layers[-1] for m in unet.modules() if type(m).__name__ == "ResBlock"]
    for m in zeroed:
        torch.nn.init.zeros_(m.weight)
        torch.nn.init.zeros_(m.bias)
    return unet


def part(state: dict, prefix: str) -> dict:
    return {k[len(prefix) :]: v.float() for k, v in state.items() if k.startswith(prefix)}


def write(path: Path, state: dict, metadata: dict) -> None:
    """Half precision, atomic."""
    half = {k: (v.detach().half() if v.ndim else v.detach().float()).contiguous().clone() for k, v in state.items()}
    write_whole(path, lambda part: save_file(half, part, metadata={"format": "pt", **metadata}))


class Crops:
    """Random training crops in [-1, 1]: half whole 128x128 pictures, half crops of the 256x256 ones, flipped at random."""

    def __init__(self, cache: Path, size: int, seed: int):
        self.size = size
        self.rng = torch.Generator().manual_seed(seed)
        self.small, names = pictures(cache, 128)
        self.large, _ = pictures(cache, 256)
        secret = set(split(names)[0])
        self.train = [i for i, name in enumerate(names) if concept(name) not in secret]
        chosen = [names.index(name) for name in held_out_names(names)]
        self.held_out = self.tensor(self.small[chosen])

    @staticmethod
    def tensor(array) -> torch.Tensor:
        return torch.from_numpy(array.copy()).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def one(self):
        def draw(n):
            return int(torch.randint(n, (1,), generator=self.rng))

        i = self.train[draw(len(self.train))]
        source = self.large if draw(2) else self.small
        top, left = draw(source.shape[1] - self.size + 1), draw(source.shape[2] - self.size + 1)
        crop = source[i, top : top + self.size, left : left + self.size]
        return crop[:, ::-1] if draw(2) else crop

    def batch(self, n: int) -> torch.Tensor:
        return torch.cat([self.tensor(self.one()[None]) for _ in range(n)])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures in [-1, 1]."""
    mse = (a.clamp(-1, 1) - b).div(2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


def snr_weighted_eps_loss(unet, z0: torch.Tensor, rng: torch.Generator, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted noise, min-SNR-5 weights (Hang et al. 2023); context all zero."""
    t = torch.randint(len(alphas_cumprod), (len(z0),), generator=rng)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    eps = torch.randn(z0.shape, generator=rng)
    prediction = unet(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, context=z0.new_zeros(len(z0), 1, 1024))
    snr = a / (1 - a)
    return (snr.clamp(max=5) / snr * (prediction - eps).square()).mean()


class Velocity:
    """Distils a flow from an eps-prediction UNet: x_t = (1 - t) z0 + t eps, v = (x_t - E[z0 | x_t]) / t.

    With z = x_t / (1 - t) = z0 + sigma eps and sigma = t / (1 - t) the teacher's noise gives v = (eps - x_t) / (1 - t), exactly. Above its highest noise
    level the velocity of the data, eps - z0, is the target.
    """

    def __init__(self, teacher: torch.nn.Module, alphas_cumprod: torch.Tensor):
        self.teacher = teacher.eval().requires_grad_(False)
        self.log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The teacher's, between those it was trained at, of the flow's times t (B,)."""
        log_sigma = torch.logit(t).clamp(self.log_sigmas[0], self.log_sigmas[-1])
        above = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        return above - 1 + (log_sigma - low) / (high - low)

    def start(self, student: torch.nn.Module, latents: "Latents", rng: torch.Generator, batches: int = 40) -> None:
        """What can be had in minutes: the embedding of the time tells the teacher's noise levels, and the last layer what it then can of the velocity."""
        self._fit_times(student, rng)
        self._fit_last_layer(student, latents, rng, batches)

    def _fit_times(self, student: torch.nn.Module, rng: torch.Generator, steps: int = 600) -> None:
        from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

        width = UNET_CONFIG["model_channels"]
        optimizer = torch.optim.AdamW(student.time_embed.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            t = torch.rand(256, generator=rng).clamp(1e-3, 1 - 1e-3)
            with torch.no_grad():
                wanted = self.teacher.time_embed(timestep_embedding(self.timesteps(t), width))
            loss = (student.time_embed(timestep_embedding(1000 * t, width)) - wanted).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _fit_last_layer(
        self, student: torch.nn.Module, latents: "Latents", rng: torch.Generator, batches: int, ridge: float = 1e-4
    ) -> None:
        """Least squares of the velocity in the features that the last convolution sees."""
        seen, last = [], student.out[-1]
        hook = last.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        size = last.weight[0].numel() + 1
        square, right = torch.zeros(size, size), torch.zeros(size, last.weight.shape[0])
        for _ in range(batches):
            x, t, wanted = self.example(latents.batch(16), rng)
            student(x, 1000 * t, context=x.new_zeros(len(x), 1, 1024))
            features = torch.nn.functional.unfold(seen.pop(), 3, padding=1).transpose(1, 2).flatten(0, 1)
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
            square += features.T @ features / len(features)
            right += features.T @ wanted.flatten(2).transpose(1, 2).flatten(0, 1) / len(features)
        hook.remove()
        square.diagonal().add_(ridge * square.diagonal().mean())
        found = torch.linalg.solve(square.double(), right.double()).float()
        last.weight.copy_(found[:-1].T.reshape(last.weight.shape))
        last.bias.copy_(found[-1])

    def loss(self, student: torch.nn.Module, z0: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Squared error of the velocity; context all zero."""
        x, t, wanted = self.example(z0, rng)
        return (student(x, 1000 * t, context=x.new_zeros(len(x), 1, 1024)) - wanted).square().mean()

    def example(self, z0: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, t (B,), velocity), t uniform."""
        t = torch.rand(len(z0), generator=rng).clamp(1e-3, 1 - 1e-3)
        eps = torch.randn(z0.shape, generator=rng)
        level, context = t.view(-1, 1, 1, 1), z0.new_zeros(len(z0), 1, 1024)
        x = (1 - level) * z0 + level * eps
        with torch.no_grad():
            known = self.teacher(x / ((1 - level) ** 2 + level**2).sqrt(), self.timesteps(t), context=context)
            low = torch.logit(level) <= self.log_sigmas[-1]
            wanted = torch.where(low, (known - x) / (1 - level), eps - z0)
        return x, t, wanted


class Latents:
    """Latents of the whole training pictures at 128x128, encoded once and kept beside the checkpoint; half of a batch is flipped.

    The latents of a flipped picture are nearly the flipped latents, and a teacher knows what to say of any.
    """

    def __init__(self, crops: "Crops", encoder: torch.nn.Module, file: Path):
        self.crops = crops
        if not file.exists():
            chosen = [Crops.tensor(crops.small[i : i + 1]) for i in crops.train]
            with torch.no_grad():
                encoded = [encoder(torch.cat(chosen[i : i + 16]) * 0.5 + 0.5) for i in range(0, len(chosen), 16)]
            write_whole(file, lambda part: save_file({"latents": torch.cat(encoded).contiguous()}, part))
        self.latents = load_file(file)["latents"]

    def batch(self, n: int) -> torch.Tensor:
        chosen = self.latents[torch.randint(len(self.latents), (n,), generator=self.crops.rng)]
        flipped = torch.randint(2, (n, 1, 1, 1), generator=self.crops.rng).bool()
        return torch.where(flipped, chosen.flip(3), chosen)


def autoencoder_loss(ae, x: torch.Tensor, decoder_only: bool) -> torch.Tensor:
    """L1 + 2 MSE in [0, 1]; the encoder is held to zero-mean unit-variance latents, or left alone."""
    with torch.set_grad_enabled(not decoder_only):
        z = ae.taesd_encoder(x * 0.5 + 0.5)
    error = ae.taesd_decoder(z) - (x * 0.5 + 0.5)
    loss = error.abs().mean() + 2 * error.square().mean()
    if not decoder_only:
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        loss = loss + 0.1 * (mean.square().mean() + (std - 1).square().mean())
    return loss


def train(args) -> None:
    torch.set_num_threads(args.threads)
    TAESD, UNetModel = host_classes()
    given = load_file(args.init) if args.init else {}
    if args.init:
        with safe_open(args.init, "pt") as f:
            metadata = dict(f.metadata() or {})
    else:
        metadata = {}
    ae = new_autoencoder(TAESD, part(given, VAE))
    is_unet, is_flow = args.stage != "autoencoder", args.stage == "flow"
    if is_unet and not given:
        raise SystemExit(f"{args.stage} needs --init: a checkpoint with an autoencoder (see the autoencoder stage)")
    if is_flow and not part(given, UNET):
        raise SystemExit("flow needs --init: a checkpoint with a UNet, which is its teacher (see the unet stage)")
    model = new_unet(UNetModel, part(given, UNET)) if is_unet else (ae.taesd_decoder if args.decoder_only else ae)
    if not is_unet or is_flow:
        model = model.to(memory_format=torch.channels_last)
    ae.vae_scale.requires_grad_(False)
    ae.vae_shift.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema))
    crops = Crops(args.cache, 128 if is_unet else 64, args.seed)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).float()
    step, spent = 0, 0.0
    if is_flow:
        velocity = Velocity(new_unet(UNetModel, part(given, UNET)).to(memory_format=torch.channels_last), alphas_cumprod)
        latents = Latents(crops, ae.taesd_encoder.to(memory_format=torch.channels_last), args.out.with_suffix(".latents"))

    def unet_loss(network: torch.nn.Module, z0: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        return velocity.loss(network, z0, rng) if is_flow else snr_weighted_eps_loss(network, z0, rng, alphas_cumprod)

    state_file = args.out.with_suffix(".state")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        crops.rng.set_state(state["rng"])
        step, spent = state["step"], state["spent"]
        log.info("resumed %s at step %d, %.1f minutes", state_file, step, spent / 60)
    elif is_flow:
        velocity.start(model, latents, crops.rng)
        ema.module.load_state_dict(model.state_dict())

    def save():
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"rng": crops.rng.get_state(), "step": step, "spent": spent}
        write_whole(state_file, lambda part: torch.save(state, part))
        averaged = {k.removeprefix("module."): v for k, v in ema.state_dict().items() if k.startswith("module.")}
        out = {VAE + k: v for k, v in ae.state_dict().items()}
        if is_unet:
            out |= {UNET + k: v for k, v in averaged.items()}
        else:
            prefix = VAE + ("taesd_decoder." if args.decoder_only else "")
            out |= {prefix + k: v for k, v in averaged.items()}
            out |= {k: v for k, v in given.items() if k.startswith(UNET)}
        write(
            args.out,
            out,
            metadata
            | ({"modelspec.prediction_type": "flow"} if is_flow else {})
            | {f"{args.stage}_samples": str(step * args.batch), f"{args.stage}_init": args.init.name if args.init else "none"},
        )

    @torch.no_grad()
    def validate() -> str:
        # the fixed noise makes the figures of two moments comparable
        rng = torch.Generator().manual_seed(0)
        x = crops.held_out[:64]
        if is_unet:
            z0 = ae.taesd_encoder(x * 0.5 + 0.5)
            return f"held-out loss {float(unet_loss(ema, z0, rng)):.5f}"
        decoder = ema.module if args.decoder_only else ema.module.taesd_decoder
        encoder = ae.taesd_encoder if args.decoder_only else ema.module.taesd_encoder
        z = encoder(x * 0.5 + 0.5)
        return f"held-out PSNR {psnr(decoder(z) * 2 - 1, x):.2f} dB, latent mean {float(z.mean()):+.2f} std {float(z.std()):.2f}"

    log.info("%s: %d weights, %d training pictures, %s", args.stage, sum(p.numel() for p in weights), len(crops.train), validate())
    reported, running = time.time(), 0.0
    while spent < 60 * args.minutes and step < args.steps:
        started = time.time()
        progress = max(spent / (60 * args.minutes), step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        if is_flow:
            loss = unet_loss(model, latents.batch(args.batch), crops.rng)
        else:
            x = crops.batch(args.batch).to(memory_format=torch.channels_last)
            if is_unet:
                with torch.no_grad():
                    z0 = ae.taesd_encoder(x * 0.5 + 0.5)
                loss = unet_loss(model, z0, crops.rng)
            else:
                loss = autoencoder_loss(ae, x, args.decoder_only)
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {float(loss)} at step {step}; the last good weights are in {args.out}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        ema.update_parameters(model)
        step += 1
        spent += time.time() - started
        running = 0.98 * running + 0.02 * float(loss.detach()) if running else float(loss.detach())
        if time.time() - reported > args.save_every:
            save()
            log.info("step %d, %.1f of %g minutes, loss %.5f, %s", step, spent / 60, args.minutes, running, validate())
            reported = time.time()
    save()
    log.info("done: step %d, %d samples, loss %.5f, %s -> %s", step, step * args.batch, running, validate(), args.out)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["autoencoder", "unet", "flow"])
    parser.add_argument("--init", type=Path, help="checkpoint to start from")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write; its .state file resumes")
    parser.add_argument("--minutes", type=float, default=30, help="training time; the learning rate reaches zero at its end")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps even if minutes are left")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder, and with it the latents that a UNet knows")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="where the pictures are downloaded to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
