"""Makes web/docs/images/ID.webp, the picture in the help page of a node.

    python tools/help_pictures.py               all of them: an hour of one slow core
    python tools/help_pictures.py DMAP_Decode   some

What a node does is restored by the demo prior in a ComfyUI that this starts (STRIPS); studies show what docs/ has of them (SHEETS); nodes of which
there is nothing to be seen are painted by the interface in a headless browser (NODES).
"""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from host import PRIOR, Host  # noqa: E402
from prompts import node_inputs  # noqa: E402

OUT = ROOT / "web" / "docs" / "images"
MAX_BYTES = 40_000
SIDE = 208  # of one picture in a strip
WIDTH = 640  # of a sheet at most
SAMPLE = "dmap-demo-18"
CSE = "dmap-demo-cse-sr4.safetensors"

Ref = list[Any]  # [node, output]


class Prompt:
    """A prompt for the API, in which one problem is set up and solved."""

    def __init__(self, object_info: dict[str, Any]) -> None:
        self.info = object_info
        self.nodes: dict[str, Any] = {}
        loaded = self.add("CheckpointLoaderSimple", ckpt_name=PRIOR)[0]
        self.model, self.vae = [loaded, 0], [loaded, 2]
        self.nothing = self.add("DMAP_DMAPUnconditional", model=self.model)
        self.sample = self.add("DMAP_SamplePicture", picture=SAMPLE)

    def add(self, kind: str, **inputs: Any) -> Ref:
        """A node; its widgets have their defaults."""
        given = {name: options["default"] for name, _, options in node_inputs(self.info[kind]) if "default" in options}
        inputs = {**given, **inputs}
        self.nodes[str(len(self.nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(self.nodes)), 0]

    def operator(self, kind: str, **inputs: Any) -> Ref:
        return self.add(f"DMAP_Operator{kind}", **inputs)

    def degrade(self, operator: Ref, noise: float = 0.0) -> Ref:
        return self.add("DMAP_Degrade", image=self.sample, operator=operator, noise_sigma=noise, seed=1)

    def solve(self, operator: Ref, y: Ref, match: bool = True, preset: dict | None = None, batch: int = 1, **more: Any) -> dict[str, Ref]:
        """Guider, latent, decoded and matched of a run by DMAPPreset. more: inputs of DPSGuider and Empty Measurement Latent."""
        given = {"model": self.model, "operator": operator, "solver": "auto", "quality": "good", "steps": 0, "start": 1.0, **(preset or {})}
        chosen = self.add("DMAP_DMAPPreset", **given)[0]
        latent = self.add("DMAP_EmptyMeasurementLatent", measurement=y, operator=operator, vae=self.vae, batch_size=batch)
        positive = more.pop("positive", self.nothing)
        guider = self.add(
            "DMAP_DPSGuider", model=self.model, positive=positive, vae=self.vae, operator=operator, measurement=y, cfg=1.0, **more
        )
        noise = self.add("RandomNoise", noise_seed=3)
        out = self.add("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=[chosen, 0], sigmas=[chosen, 1], latent_image=latent)
        found = {"guider": guider, "latent": out}
        found["decoded"] = self.add("DMAP_Decode", latent=out, vae=self.vae, measurement=y, operator=operator)
        if match:
            found["matched"] = self.add("DMAP_MatchMeasurement", image=found["decoded"], measurement=y, operator=operator)
        return found


Strip = list[tuple[str, Ref]]  # captions and pictures


def damage(kind: str, noise: float = 0.0, **inputs: Any) -> Callable[[Prompt], Strip]:
    """The clean picture, its damage, and what is made of it."""

    def strip(p: Prompt) -> Strip:
        operator = p.operator(kind, **{name: value(p) if callable(value) else value for name, value in inputs.items()})
        y = p.degrade(operator, noise)
        return [("the picture", p.sample), ("what you have", y), ("restored", p.solve(operator, y)["matched"])]

    return strip


def solver(name: str, quality: str = "look") -> Callable[[Prompt], Strip]:
    """Super-resolution by one of DMAPPreset's solvers, as it comes out, not matched."""

    def strip(p: Prompt) -> Strip:
        operator = p.operator("SuperResolution", scale=4)
        y = p.degrade(operator)
        steps = 20 if quality == "paper" else 0
        result = p.solve(operator, y, match=False, preset={"solver": name, "quality": quality, "steps": steps})["decoded"]
        return [("what you have", y), (name, result), ("the picture", p.sample)]

    return strip


def scratches(p: Prompt) -> Ref:
    return [p.add("LoadImage", image="scratches.png")[0], 1]


def kernel(p: Prompt) -> Ref:
    return p.add("LoadImage", image="kernel.png")


def old_photo(p: Prompt) -> Ref:
    parts = [p.operator("Grayscale"), p.operator("GaussianBlur", sigma=1.0, kernel_size=61), p.operator("SuperResolution", scale=2)]
    return p.operator("Compose", first=parts[0], second=parts[1], third=parts[2])


def composed(p: Prompt) -> Strip:
    operator = old_photo(p)
    y = p.degrade(operator)
    return [("the picture", p.sample), ("grey, blurred, small", y), ("restored", p.solve(operator, y)["matched"])]


def noisy(p: Prompt) -> Strip:
    blur = p.operator("GaussianBlur", sigma=1.0, kernel_size=61)
    known = p.operator("Noise", operator=blur, sigma=0.08)
    y = p.degrade(known)
    told = p.solve(known, y)["matched"]
    untold = p.solve(blur, y)["matched"]
    return [("blur and grain", y), ("grain not told", untold), ("grain told", told)]


def estimated(p: Prompt) -> Strip:
    y = p.degrade(p.operator("GaussianBlur", sigma=2.0, kernel_size=61), 0.02)
    found = p.add("DMAP_EstimateDegradation", image=y)[0]
    return [("what you have", y), ("restored from what was found", p.solve([found, 0], [found, 1])["matched"]), ("the picture", p.sample)]


def whole(p: Prompt) -> Strip:
    parts = [p.operator("GaussianBlur", sigma=1.0, kernel_size=61), p.operator("SuperResolution", scale=2)]
    y = p.degrade(p.operator("Compose", first=parts[0], second=parts[1]), 0.02)
    found = p.add("DMAP_Restore", model=p.model, vae=p.vae, image=y, damage="old photo", enlarge="2", grain=5.0, seed=3)
    return [("what you have", y), ("restored", found), ("the picture", p.sample)]


def degraded(p: Prompt) -> Strip:
    small = p.operator("SuperResolution", scale=4)
    blur = p.operator("MotionBlur", length=15.0, angle=30.0)
    return [("the picture", p.sample), ("too small", p.degrade(small)), ("shaken, with grain", p.degrade(blur, 0.05))]


def samples(p: Prompt) -> Strip:
    names = (SAMPLE, "rooster-512", "rooster-holes-512", "rooster-old-photo-128")
    return [(name, p.add("DMAP_SamplePicture", picture=name)) for name in names]


def decoded(p: Prompt) -> Strip:
    operator = p.operator("Inpainting", mask=scratches(p))
    y = p.degrade(operator)
    out = p.solve(operator, y)
    plain = p.add("VAEDecode", samples=out["latent"], vae=p.vae)
    return [("what you have", y), ("VAE Decode", plain), ("DMAP Decode", out["decoded"])]


def matched(p: Prompt) -> Strip:
    operator = p.operator("SuperResolution", scale=4)
    y = p.degrade(operator)
    out = p.solve(operator, y, preset={"quality": "look"})
    return [("what you have", y), ("decoded", out["decoded"]), ("matched", out["matched"]), ("the picture", p.sample)]


def qualities(p: Prompt) -> Strip:
    operator = p.operator("SuperResolution", scale=4)
    y = p.degrade(operator)
    return [("what you have", y)] + [(name, p.solve(operator, y, preset={"quality": name})["matched"]) for name in ("look", "good", "best")]


def versions(p: Prompt, count: int = 3) -> tuple[Ref, Ref, Ref]:
    """A measurement that says little, pictures of it, and the operator."""
    operator = p.operator("SuperResolution", scale=8)
    y = p.degrade(operator)
    return y, p.solve(operator, y, batch=count)["matched"], operator


def several(p: Prompt) -> Strip:
    y, pictures, _ = versions(p)
    return [("what you have", y), ("three versions", pictures)]


def uncertain(p: Prompt) -> Strip:
    _, pictures, _ = versions(p)
    return [("three versions", pictures), ("where they differ", p.add("DMAP_UncertaintyMap", images=pictures))]


def mismatch(p: Prompt) -> Strip:
    operator = p.operator("Inpainting", mask=scratches(p))
    y = p.degrade(operator)
    x = p.solve(operator, y, match=False)["latent"]
    plain = p.add("VAEDecode", samples=x, vae=p.vae)
    found = p.add("DMAP_MismatchMap", restored=plain, measurement=y, operator=operator)
    return [("what you have", y), ("restored", plain), ("off by", found)]


def curve(p: Prompt) -> Strip:
    operator = p.operator("SuperResolution", scale=4)
    out = p.solve(operator, p.degrade(operator), match=False)
    return [("", p.add("DMAP_ResidualCurve", guider=out["guider"], latent=out["latent"]))]


def with_cse(p: Prompt) -> Strip:
    operator = p.operator("SuperResolution", scale=4)
    y = p.degrade(operator)
    cse = p.add("DMAP_CSEControlNetLoader", cse=CSE)
    hint = p.add(
        "DMAP_ApplyCSE", conditioning=p.nothing, cse=cse, measurement=y, operator=operator, strength=1.0, start_percent=0.0, end_percent=1.0
    )
    settings = {"match": False, "preset": {"solver": "DMAP", "quality": "look"}}
    plain, helped = p.solve(operator, y, **settings)["decoded"], p.solve(operator, y, positive=hint, **settings)["decoded"]
    return [("what you have", y), ("DMAP", plain), ("DMAP with the CSE", helped), ("the picture", p.sample)]


def own_pictures(p: Prompt) -> Strip:
    settings = {"count": 4, "steps": 20, "cfg": 1.0, "width": 128, "height": 128, "seed": 0, "save_name": "help"}
    return [("made by the model itself", p.add("DMAP_SelfGenerateCSEDataset", model=p.model, positive=p.nothing, vae=p.vae, **settings))]


STRIPS: dict[str, Callable[[Prompt], Strip]] = {
    "DMAP_Restore": whole,
    "DMAP_OperatorSuperResolution": damage("SuperResolution", scale=4),
    "DMAP_OperatorGaussianBlur": damage("GaussianBlur", sigma=2.0, kernel_size=61),
    "DMAP_OperatorMotionBlur": damage("MotionBlur", length=15.0, angle=30.0),
    "DMAP_OperatorKernelBlur": damage("KernelBlur", kernel=kernel),
    "DMAP_OperatorInpainting": damage("Inpainting", mask=scratches),
    "DMAP_OperatorGrayscale": damage("Grayscale"),
    "DMAP_OperatorJpeg": damage("Jpeg", quality=5, subsampling="4:2:0", rounding="straight-through"),
    "DMAP_OperatorCompose": composed,
    "DMAP_OperatorNoise": noisy,
    "DMAP_Degrade": degraded,
    "DMAP_EstimateDegradation": estimated,
    "DMAP_SamplePicture": samples,
    "DMAP_Decode": decoded,
    "DMAP_MatchMeasurement": matched,
    "DMAP_DMAPPreset": qualities,
    "DMAP_EmptyMeasurementLatent": several,
    "DMAP_UncertaintyMap": uncertain,
    "DMAP_MismatchMap": mismatch,
    "DMAP_ResidualCurve": curve,
    "DMAP_DMAPSampler": solver("DMAP"),
    "DMAP_DPSSampler": solver("DPS"),
    "DMAP_DSGSampler": solver("DSG"),
    "DMAP_PSLDSampler": solver("PSLD", "paper"),
    "DMAP_FreeDoMSampler": solver("FreeDoM"),
    "DMAP_ReSampleSampler": solver("ReSample"),
    "DMAP_LATINOSampler": solver("LATINO"),
    "DMAP_FlowDPSSampler": solver("FlowDPS"),
    "DMAP_DAPSSampler": solver("DAPS"),
    "DMAP_ApplyCSE": with_cse,
    "DMAP_SelfGenerateCSEDataset": own_pictures,
}
SHEETS = {
    "DMAP_ComparisonSheet": "all-solvers.png",
    "DMAP_RestorationMetrics": "metrics.png",
    "DMAP_ScoreErrorStudy": "observations.png",
    "DMAP_ScoreMeanStudy": "report/score-mean.png",
    "DMAP_DiversityStudy": "report/diversity-dmap-demo-00.png",
    "DMAP_StepsStudy": "steps.png",
    "DMAP_SolverStudy": "report/table9-psnr.png",
    "DMAP_ToyStudy": "toy.png",
    "DMAP_SpreadStudy": "spread.png",
    "DMAP_CSEControlNetLoader": "cse.png",
}
NODES = (
    "DMAP_DPSGuider",
    "DMAP_DMAPScheduler",
    "DMAP_DMAPUnconditional",
    "DMAP_SamplingReport",
    "DMAP_OperatorNonlinearBlur",
    "DMAP_OperatorSegmentation",
    "DMAP_TrainCSE",
    "DMAP_LoadPhoto",
    "DMAP_FinishRestore",
)


def caption(page: Image.Image, text: str, x: int, y: int, width: int) -> None:
    ImageDraw.Draw(page).text((x + width / 2, y), text, font=ImageFont.load_default(15), fill=(40, 40, 40), anchor="ma")


def shown(file: Path) -> Image.Image:
    """In the height of a strip; small ones without smoothing, so that nothing looks better than it is."""
    picture = Image.open(file)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "grey"), picture)
    small = max(picture.size) < SIDE
    size = (round(SIDE * picture.width / picture.height), SIDE)
    return picture.convert("RGB").resize(size, Image.NEAREST if small else Image.LANCZOS)


def page_of(found: list[tuple[str, list[Path]]]) -> Image.Image:
    """Pictures beside each other, of a batch all, with captions below."""
    if not found[0][0]:
        (file,) = found[0][1]
        return fitted(Image.open(file))
    groups = [(text, [shown(file) for file in files]) for text, files in found]
    width = sum(p.width + 6 for _, pictures in groups for p in pictures) - 6
    page, x = Image.new("RGB", (width, SIDE + 22), "white"), 0
    for text, pictures in groups:
        start = x
        for picture in pictures:
            page.paste(picture, (x, 0))
            x += picture.width + 6
        caption(page, text, start, SIDE + 2, x - 6 - start)
    return page


def fitted(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    return ImageOps.contain(picture, (WIDTH, WIDTH), Image.LANCZOS) if picture.width > WIDTH else picture


def save(node_id: str, page: Image.Image) -> None:
    """As small as it must be. Raises SystemExit for a picture that is too large even so."""
    for quality in (85, 75, 65, 50):
        content = io.BytesIO()
        page.save(content, "WEBP", quality=quality, method=6)
        if len(content.getvalue()) <= MAX_BYTES:
            (OUT / f"{node_id}.webp").write_bytes(content.getvalue())
            print(f"{node_id}  {page.width}x{page.height}  {len(content.getvalue())} bytes", flush=True)
            return
    raise SystemExit(f"{node_id}: {len(content.getvalue())} bytes, more than {MAX_BYTES}")


def draw_inputs(folder: Path) -> None:
    """A mask of scratches as the MaskEditor leaves it, in the alpha channel, and a blur's kernel: a bent streak."""
    alpha = Image.new("L", (128, 128), 255)
    draw = ImageDraw.Draw(alpha)
    for line in ((18, -2, 40, 130), (70, 10, 52, 118), (96, -2, 112, 90), (-2, 60, 130, 74)):
        draw.line(line, fill=0, width=4)
    picture = Image.new("RGB", alpha.size)
    picture.putalpha(alpha)
    picture.save(folder / "scratches.png")
    streak = Image.new("RGB", (15, 15))
    ImageDraw.Draw(streak).line((2, 12, 6, 7, 12, 5), fill="white", width=2)
    streak.save(folder / "kernel.png")


def restored(host: Host, object_info: dict[str, Any], node_id: str) -> Image.Image:
    prompt = Prompt(object_info)
    strip = STRIPS[node_id](prompt)
    saves = [(text, prompt.add("PreviewImage", images=ref)[0]) for text, ref in strip]
    entry = host.run(prompt.nodes, timeout=1800)
    return page_of([(text, host.images(entry, node)) for text, node in saves])


def painted(host: Host, wanted: list[str]) -> dict[str, Image.Image]:
    """Nodes as the interface shows them, with their defaults."""
    from conftest import BROWSER_ARGUMENTS, BROWSERS
    from playwright.sync_api import sync_playwright

    host.post("/api/settings/Comfy.TutorialCompleted", True)
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=next(filter(None, map(shutil.which, BROWSERS))), args=BROWSER_ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1600, "height": 1400})
        tab.goto(host.url, timeout=120_000)
        tab.wait_for_function("() => window.app?.extensionManager && app.graph", timeout=120_000)
        for node_id in wanted:
            x, y, width, height = tab.evaluate(
                """async kind => {
                    app.graph.clear()
                    const node = LiteGraph.createNode(kind)
                    node.pos = [0, 60]
                    app.graph.add(node)
                    app.canvas.ds.scale = 1
                    app.canvas.ds.offset = [500, 200]
                    app.canvas.setDirty(true, true)
                    await new Promise(resolve => setTimeout(resolve, 1500))
                    const box = app.canvas.canvas.getBoundingClientRect()
                    return [box.x + 500 - 8, box.y + 260 - 38, node.size[0] + 16, node.size[1] + 46]
                }""",
                node_id,
            )
            shot = tab.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
            found[node_id] = Image.open(io.BytesIO(shot)).convert("RGB")
        browser.close()
    return found


def main() -> None:
    everything = [*STRIPS, *SHEETS, *NODES]
    wanted = sys.argv[1:] or everything
    unknown = set(wanted) - set(everything)
    if unknown:
        raise SystemExit(f"there is no picture of {', '.join(sorted(unknown))}")
    OUT.mkdir(exist_ok=True)
    for node_id in wanted:
        if node_id in SHEETS:
            save(node_id, fitted(Image.open(ROOT / "docs" / SHEETS[node_id])))
    if all(node_id in SHEETS for node_id in wanted):
        return
    with Host() as host:
        nodes = [node_id for node_id in wanted if node_id in NODES]
        for node_id, picture in (painted(host, nodes) if nodes else {}).items():
            save(node_id, picture)
        draw_inputs(host.input)
        info = host.object_info()
        for node_id in wanted:
            if node_id in STRIPS:
                save(node_id, restored(host, info, node_id))


if __name__ == "__main__":
    main()
