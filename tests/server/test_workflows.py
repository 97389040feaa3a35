"""The shipped workflows, through ComfyUI's API: accepted, run, followed, interrupted, failed, repeated."""

import copy
import io
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from host import FLOW_PRIOR, PRIOR, ROOT, Host, PromptFailed
from PIL import Image, ImageDraw
from prompts import NOTES, node_inputs, titled, to_prompt, upstream, use_picture

from dmap_core.operators import SuperResolution

FILES = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
ALL_SOLVERS = [name for name in FILES if name.endswith("-all-solvers")]
WITH_CSE = ["demo-cse", "sd2-train-cse"]
STUDIES = ["demo-metrics", "demo-observations", "demo-steps-and-solvers", "demo-toy"]
RESTORE = [name for name in FILES if name[0].isdigit()]  # of DMAP Restore: test_restore.py
OTHERS = [*ALL_SOLVERS, *WITH_CSE, *STUDIES, *RESTORE]
DEMO = [name for name in FILES if name.startswith("demo-") and name not in OTHERS]
SD2 = [name for name in FILES if name.startswith("sd2-") and name not in OTHERS]
SD2_CHECKPOINT = "512-base-ema.safetensors"
ORIGINAL = ROOT / "demo" / "held-out" / "dmap-demo-00.png"
STEPS = 2
K = 2
SMALL = 64  # pixels; a guided evaluation costs a quarter of what it costs at the demo's 128


def load(name: str) -> dict:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def of_class(prompt: dict, class_type: str) -> dict:
    """The one node of that class."""
    (found,) = [node for node in prompt.values() if node["class_type"] == class_type]
    return found


def small_original(host: Host) -> str:
    """A held-out picture at 64x64 in the input folder."""
    name = "small-original.png"
    Image.open(ORIGINAL).resize((SMALL, SMALL), Image.LANCZOS).save(host.input / name)
    return name


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def cached(entry: dict) -> set[str]:
    """Ids of the nodes that ComfyUI did not run again."""
    return {node for event, data in entry["status"]["messages"] if event == "execution_cached" for node in data["nodes"]}


def dmap_prompt(
    host: Host, info: dict, steps: int = STEPS, seed: int = 0, zeta: float | None = None, match: bool = True
) -> tuple[dict, str, str]:
    """(prompt, id of its save node, id of its report): super-resolution x4 to 64x64 by DMAP, cut out of the demo workflow."""
    prompt = to_prompt(load("demo-super-resolution-x4"), info)
    use_picture(prompt, "Original picture", small_original(host))
    prompt[titled(prompt, "DMAP: schedule")]["inputs"]["steps"] = steps
    of_class(prompt, "RandomNoise")["inputs"]["noise_seed"] = seed
    if zeta is not None:
        prompt[titled(prompt, "DMAP: sampler")]["inputs"] |= {"zeta": zeta, "step": "zeta"}
    save, report = titled(prompt, "DMAP: save"), titled(prompt, "DMAP: report")
    if not match:  # as if it were bypassed
        matching = prompt[prompt[save]["inputs"]["images"][0]]
        assert matching["class_type"] == "DMAP_MatchMeasurement"
        prompt[save]["inputs"]["images"] = matching["inputs"]["image"]
    return upstream(prompt, [save, report]), save, report


def report_of(entry: dict, node: str) -> dict:
    return json.loads(entry["outputs"][node]["text"][0])


@pytest.fixture(scope="module")
def info(host: Host) -> dict:
    return host.object_info()


def test_workflows_are_there():
    assert len(DEMO) == 5
    assert len(SD2) == 4
    assert len(ALL_SOLVERS) == 2
    assert len(RESTORE) == 11
    assert sorted(DEMO + SD2 + OTHERS) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_link_and_slot_fits_the_nodes(info: dict, name: str):
    workflow = load(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) <= workflow["last_node_id"]
    for link, source, output, target, slot, kind in workflow["links"]:
        source_info, target_slot = info[nodes[source]["type"]], nodes[target]["inputs"][slot]
        assert link in nodes[source]["outputs"][output]["links"]
        assert target_slot["link"] == link
        assert kind == source_info["output"][output]
        assert target_slot["type"] == "*" or kind in target_slot["type"].split(",")
        assert nodes[source]["outputs"][output]["name"] == source_info["output_name"][output]
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        kinds = {input_name: kind for input_name, kind, _ in node_inputs(info[node["type"]])}
        for slot in node["inputs"]:
            assert kinds[slot["name"]] == slot["type"], (node["type"], slot)
        ends = [link for slot in node["inputs"] if (link := slot["link"])] + [link for slot in node["outputs"] for link in slot["links"]]
        assert set(ends) <= {link[0] for link in workflow["links"]}
    prompt = to_prompt(workflow, info)
    for node in prompt.values():
        required = set(info[node["class_type"]]["input"].get("required", {}))
        assert required <= set(node["inputs"]), node


@pytest.mark.parametrize("name", [name for name in FILES if name != "demo-toy"])  # which needs no model
def test_checkpoint_can_be_downloaded_from_the_workflow(name: str):
    (loader,) = [node for node in load(name)["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    (model,) = loader["properties"]["models"]
    ours = FLOW_PRIOR if "flow" in name else PRIOR
    assert model["name"] == loader["widgets_values"][0] == (ours if name.startswith("demo-") or name.endswith("-demo") else SD2_CHECKPOINT)
    assert model["directory"] == "checkpoints"
    assert model["url"].startswith("https://")
    assert model["url"].endswith("/" + model["name"])


@pytest.mark.parametrize("name", DEMO)
def test_demo_workflow_runs(host: Host, info: dict, name: str):
    prompt = to_prompt(load(name), info)
    for solver in ("DPS", "DMAP"):
        prompt[titled(prompt, f"{solver}: schedule")]["inputs"]["steps"] = STEPS
    with host.listen() as messages:
        entry = host.run(prompt)

    scale = {"demo-super-resolution-x8": 8, "demo-super-resolution-x4": 4, "demo-old-photo": 2}.get(name, 1)
    (degraded,) = host.images(entry, titled(prompt, "Degraded: save"))
    assert Image.open(degraded).size == (128 // scale, 128 // scale)
    pictures = {}
    for solver, calls, decodes in (("DPS", STEPS, STEPS), ("DMAP", STEPS + (STEPS - 1) * K, (STEPS - 1) * K + 1)):
        (path,) = host.images(entry, titled(prompt, f"{solver}: save"))
        assert path.is_relative_to(host.output / "dmap-demo")
        pictures[solver] = pixels(path)
        assert pictures[solver].shape == (128, 128, 3)
        assert pictures[solver].std() > 1  # not one flat colour
        report = report_of(entry, titled(prompt, f"{solver}: report"))
        assert report["solver"].startswith(solver)
        assert (report["denoiser_calls"], report["decoder_calls"]) == (calls, decodes)
        assert [len(step) for step in report["residuals"]] == [1] * STEPS
        assert all(math.isfinite(step[0]) and step[0] > 0 for step in report["residuals"])
        assert report["seconds"] > 0
        values = [
            message["data"]["value"]
            for message in messages
            if isinstance(message, dict)
            and message["type"] == "progress"
            and message["data"]["node"] == titled(prompt, f"{solver}: run")
            and message["data"]["max"] == STEPS
        ]
        assert values[-1] == STEPS
        assert values == sorted(values)
        told = [text for node, text in texts(messages) if node == titled(prompt, f"{solver}: run")]
        assert [text.split(",")[0] for text in told] == [f"step {i + 1} of {STEPS}" for i in range(STEPS)]
        assert ", about " not in told[0] and all(" s left, mismatch " in text and text.endswith(" of 255 grey levels") for text in told[1:])
    assert (pictures["DPS"] != pictures["DMAP"]).any()
    if name == "demo-inpainting":
        known = np.ones((128, 128), bool)
        known[40:88, 40:88] = False
        assert all((picture[known] == pixels(degraded)[known]).all() for picture in pictures.values())

    previews = [message[1] for message in messages if isinstance(message, tuple) and int.from_bytes(message[1][:4], "big") == 1]
    assert previews
    for preview in previews:  # event number, picture format, picture
        width, height = Image.open(io.BytesIO(preview[8:])).size
        assert width == height >= 16  # a pixel per latent, or enlarged


def texts(messages):
    """(node id, line) of what nodes showed while they ran: event number, length of the id, id, text."""
    for message in messages:
        if isinstance(message, tuple) and int.from_bytes(message[1][:4], "big") == 3:
            length = int.from_bytes(message[1][4:8], "big")
            yield message[1][8 : 8 + length].decode(), message[1][8 + length :].decode()


@pytest.mark.parametrize("name", SD2)
def test_sd2_workflow_lacks_nothing_but_its_checkpoint_and_runs_on_another(host: Host, info: dict, name: str):
    prompt = to_prompt(load(name), info)
    scale = {"sd2-super-resolution-x8": 8, "sd2-old-photo": 4}.get(name, 1)
    side = SMALL // scale
    picture = Image.open(ORIGINAL).resize((side, side), Image.LANCZOS)
    if name == "sd2-inpainting":  # the mask editor saves what was painted over as transparent
        alpha = Image.new("L", picture.size, 255)
        ImageDraw.Draw(alpha).rectangle((20, 20, 43, 43), fill=0)
        picture.putalpha(alpha)
    loader = of_class(prompt, "CheckpointLoaderSimple")["inputs"]
    use_picture(prompt, "Damaged picture", f"{name}.png")
    picture.save(host.input / f"{name}.png")

    with pytest.raises(urllib.error.HTTPError) as refusal:
        host.post("/prompt", {"prompt": prompt})
    problems = [
        (node["class_type"], error["type"], error["extra_info"]["input_name"], error["extra_info"]["received_value"])
        for node in json.loads(refusal.value.read())["node_errors"].values()
        for error in node["errors"]
    ]
    assert problems == [("CheckpointLoaderSimple", "value_not_in_list", "ckpt_name", SD2_CHECKPOINT)]

    # The same graph runs with the demo prior, which has no text encoder.
    loader["ckpt_name"] = PRIOR
    text = prompt[titled(prompt, "Prompt (empty: the paper)")]
    text["class_type"], text["inputs"] = "DMAP_DMAPUnconditional", {"model": [text["inputs"]["clip"][0], 0]}
    schedule = prompt[titled(prompt, "DMAP: schedule")]["inputs"]
    assert schedule["steps"] == 50
    schedule["steps"] = STEPS
    entry = host.run(prompt)
    (path,) = host.images(entry, titled(prompt, "DMAP: save"))
    assert Image.open(path).size == (SMALL, SMALL)
    report = report_of(entry, titled(prompt, "DMAP: report"))
    assert report["denoiser_calls"] == STEPS + (STEPS - 1) * K
    assert all(math.isfinite(step[0]) for step in report["residuals"])


def test_a_photo_of_odd_size_with_a_painted_mask(host: Host, info: dict):
    """What comes back has its size, and is the photo itself outside the mask."""
    prompt = to_prompt(load("sd2-inpainting"), info)
    photo = Image.open(ORIGINAL).convert("RGB").resize((45, 30), Image.LANCZOS)
    given = np.asarray(photo)
    alpha = Image.new("L", photo.size, 255)
    ImageDraw.Draw(alpha).rectangle((30, 10, 44, 20), fill=0)
    photo.putalpha(alpha)
    photo.save(host.input / "odd.png")
    use_picture(prompt, "Damaged picture", "odd.png")
    of_class(prompt, "CheckpointLoaderSimple")["inputs"]["ckpt_name"] = PRIOR
    text = prompt[titled(prompt, "Prompt (empty: the paper)")]
    text["class_type"], text["inputs"] = "DMAP_DMAPUnconditional", {"model": [text["inputs"]["clip"][0], 0]}
    prompt[titled(prompt, "DMAP: schedule")]["inputs"]["steps"] = STEPS
    (path,) = host.images(host.run(prompt), titled(prompt, "DMAP: save"))
    restored, known = pixels(path), np.asarray(alpha) > 0
    assert restored.shape == given.shape
    assert (restored[known] == given[known]).all()
    assert (restored[~known] != given[~known]).any()


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_all_solvers_side_by_side(host: Host, info: dict, name: str):
    prompt = to_prompt(load(name), info)
    use_picture(prompt, "Original picture", small_original(host))
    if name.startswith("sd2-"):  # the graph with the demo prior, which has no text encoder
        of_class(prompt, "CheckpointLoaderSimple")["inputs"]["ckpt_name"] = PRIOR
        text = prompt[titled(prompt, "Prompt (empty: the paper)")]
        text["class_type"], text["inputs"] = "DMAP_DMAPUnconditional", {"model": [text["inputs"]["clip"][0], 0]}
    solvers = [node["_meta"]["title"].removesuffix(": preset") for node in prompt.values() if node["class_type"] == "DMAP_DMAPPreset"]
    assert solvers == ["DPS", "PSLD", "FreeDoM", "ReSample", "DSG", "DMAP"]
    guiders = set()
    for solver in solvers:
        preset = prompt[titled(prompt, f"{solver}: preset")]["inputs"]
        assert preset["solver"] == solver
        preset["steps"] = 3
        guiders.add(tuple(prompt[titled(prompt, f"{solver}: run")]["inputs"]["guider"]))
    assert len(guiders) == 6  # a report belongs to one guider
    seeds = {tuple(prompt[titled(prompt, f"{solver}: run")]["inputs"]["noise"]) for solver in solvers}
    assert len(seeds) == 1
    entry = host.run(prompt)
    (path,) = host.images(entry, titled(prompt, "Sheet: save"))
    page = pixels(path)
    assert page.shape[1] == 4 * 264 + 8 and page.shape[0] > 2 * 256  # damaged, six restorations, original: two rows of four
    for solver in solvers:
        report = report_of(entry, titled(prompt, f"{solver}: report"))
        assert report["solver"].startswith(solver)
        assert len(report["residuals"]) == 3 and all(math.isfinite(step[0]) for step in report["residuals"])


def test_cse_side_by_side(host: Host, info: dict):
    prompt = to_prompt(load("demo-cse"), info)
    use_picture(prompt, "Original picture", small_original(host))
    assert of_class(prompt, "DMAP_CSEControlNetLoader")["inputs"]["cse"].startswith("dmap-demo-cse-sr4")
    for solver in ("DPS", "DMAP"):
        prompt[titled(prompt, f"{solver}: preset")]["inputs"]["steps"] = 3
    prompt[titled(prompt, "CSE alone: schedule")]["inputs"]["steps"] = 3
    entry = host.run(prompt)
    (path,) = host.images(entry, titled(prompt, "Sheet: save"))
    assert pixels(path).shape[1] == 4 * 264 + 8  # damaged, five restorations, original: two rows of four
    residuals = {}
    for way in ("DPS", "DMAP", "DPS + CSE", "DMAP + CSE"):
        report = report_of(entry, titled(prompt, f"{way}: report"))
        assert not [warning for warning in report["warnings"] if "trained for" in warning]  # the operator is the CSE's own
        residuals[way] = [step[0] for step in report["residuals"]]
        assert all(map(math.isfinite, residuals[way]))
    for solver in ("DPS", "DMAP"):  # the CSE's first estimate is closer to the measurement
        assert residuals[f"{solver} + CSE"][0] < 0.9 * residuals[solver][0], residuals


def study_prompt(host: Host, info: dict, name: str) -> dict:
    """A workflow of studies with a small picture."""
    prompt = to_prompt(load(name), info)
    use_picture(prompt, "Original picture", small_original(host))
    return prompt


def plots_of(host: Host, entry: dict, prompt: dict, *titles: str) -> list[np.ndarray]:
    """What the SaveImage nodes of those titles saved, none of it of one colour."""
    found = [pixels(host.images(entry, titled(prompt, title))[0]) for title in titles]
    assert all(picture.std() > 1 for picture in found)
    return found


def test_metrics_of_a_restoration(host: Host, info: dict):
    prompt = study_prompt(host, info, "demo-metrics")
    of_class(prompt, "DMAP_DMAPPreset")["inputs"]["steps"] = 3
    of_class(prompt, "DMAP_EmptyMeasurementLatent")["inputs"]["batch_size"] = 2
    entry = host.run(prompt)
    plots_of(host, entry, prompt, "Table: save", "Error map: save")
    text = entry["outputs"][titled(prompt, "Metrics")]["text"][0]
    assert "2 pictures of 64x64" in text and "PSNR (dB): " in text and "residual" in text and "denoiser calls" in text


def test_observations(host: Host, info: dict):
    prompt = study_prompt(host, info, "demo-observations")
    of_class(prompt, "DMAP_DMAPPreset")["inputs"]["steps"] = 3
    of_class(prompt, "DMAP_EmptyMeasurementLatent")["inputs"]["batch_size"] = 2
    of_class(prompt, "DMAP_ScoreErrorStudy")["inputs"]["repeats"] = 1
    of_class(prompt, "DMAP_ScoreMeanStudy")["inputs"].update(samples=4, batch=2)
    entry = host.run(prompt)
    for page in plots_of(host, entry, prompt, "Score error: save", "Score mean: save", "Diversity: save"):
        assert min(page.shape[:2]) > 300


def test_steps_and_solvers(host: Host, info: dict):
    prompt = study_prompt(host, info, "demo-steps-and-solvers")
    of_class(prompt, "DMAP_StepsStudy")["inputs"].update(budget=4, K="1, 2")
    of_class(prompt, "DMAP_SolverStudy")["inputs"]["steps"] = 3
    entry = host.run(prompt)
    plots_of(host, entry, prompt, "Steps: save", "Solvers: save")
    for title, count in (("Steps: pictures", 4), ("Solvers: pictures", 2)):  # DPS, DSG, DMAP twice; ancestral and PF-ODE
        pictures = [pixels(path) for path in host.images(entry, titled(prompt, title))]
        assert len(pictures) == count and all(picture.shape == (SMALL, SMALL, 3) for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == count


def test_toy(host: Host, info: dict):
    prompt = to_prompt(load("demo-toy"), info)
    studies = [node["inputs"] for node in prompt.values() if node["class_type"] == "DMAP_ToyStudy"]
    assert [inputs["y0"] for inputs in studies] == [0.5, 0.0]
    for inputs in studies:
        inputs["samples"] = 100
    entry = host.run(prompt)
    plots_of(host, entry, prompt, "Toy: published: save", "Toy: two modes: save")
    assert "DPS" in entry["outputs"][titled(prompt, "Toy: published: numbers")]["text"][0]


def test_a_cse_is_trained_and_then_used(host: Host, info: dict):
    prompt = to_prompt(load("sd2-train-cse"), info)
    of_class(prompt, "CheckpointLoaderSimple")["inputs"]["ckpt_name"] = PRIOR
    text = prompt[titled(prompt, "Prompt (empty: the paper)")]
    text["class_type"], text["inputs"] = "DMAP_DMAPUnconditional", {"model": [text["inputs"]["clip"][0], 0]}
    of_class(prompt, "DMAP_SelfGenerateCSEDataset")["inputs"].update(count=2, steps=2, width=32, height=32)
    training = of_class(prompt, "DMAP_TrainCSE")["inputs"]
    training.update(steps=2, batch_size=2, accumulation=1, size=32, precision="fp32", save_every=1, save_name="tests/trained")
    with host.listen() as messages:
        entry = host.run(prompt)
    assert (host.base / "models" / "controlnet" / "tests" / "trained.safetensors").is_file()
    assert len(list((host.output / "cse-sd2").glob("*.png"))) == 2
    for name in ("Loss curve: save", "Validation: save"):
        (path,) = host.images(entry, titled(prompt, name))
        assert pixels(path).std() > 1
    summary = entry["outputs"][titled(prompt, "Summary")]["text"][0]
    assert "trained for Super-Resolution (scale 8)" in summary and "2 pictures" in summary and "2 steps of 2" in summary
    node = next(key for key, value in prompt.items() if value["class_type"] == "DMAP_TrainCSE")
    own = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "progress" and m["data"]["node"] == node]
    assert own[-1]["value"] == own[-1]["max"] == 2
    again = host.object_info()["DMAP_CSEControlNetLoader"]["input"]["required"]["cse"]
    options = again[1]["options"] if again[0] == "COMBO" else again[0]
    assert "tests/trained.safetensors" in [name.replace("\\", "/") for name in options]


def test_guidance_lowers_the_residual_and_brings_the_picture_closer(host: Host, info: dict):
    original = pixels(host.input / small_original(host))
    found = {}  # label: (residual, PSNR) of the result
    for label, steps, zeta in (("one step", 1, None), ("hardly guided", 8, 0.001), ("guided", 8, None)):
        prompt, save, report = dmap_prompt(host, info, steps=steps, zeta=zeta, match=False)
        entry = host.run(prompt)
        residuals = [step[0] for step in report_of(entry, report)["residuals"]]
        found[label] = residuals[-1], psnr(pixels(host.images(entry, save)[0]), original)
    assert residuals[-1] < 0.7 * residuals[0], residuals
    for label in ("one step", "hardly guided"):
        assert found["guided"][0] < 0.6 * found[label][0], found
        assert found["guided"][1] > found[label][1] + 2, found


def test_the_shipped_workflow_explains_its_measurement(host: Host, info: dict):
    """What the save node writes, degraded once more, is the degraded picture to within a grey level, whatever the model made of it.

    Half of it is the match's, and half the save node's, which cuts digits off instead of rounding.
    """
    prompt, save, report = dmap_prompt(host, info, steps=2, seed=5)
    entry = host.run(prompt)
    original, restored = (
        torch.from_numpy(np.array(x)).permute(2, 0, 1)[None].double()
        for x in (pixels(host.input / small_original(host)), pixels(host.images(entry, save)[0]))
    )
    f = SuperResolution(4)
    assert float((f(restored) - f(original)).square().mean().sqrt()) < 1.0
    assert report_of(entry, report)["mismatch"][0] > 2  # that of the picture before it


def test_a_seed_repeats_its_picture(host: Host, info: dict):
    files = []
    for seed in (0, 1, 0):  # ComfyUI remembers the last prompt only, so that the third run computes again
        prompt, save, _ = dmap_prompt(host, info, seed=seed)
        entry = host.run(prompt)
        assert save not in cached(entry)
        files.append(host.images(entry, save)[0].read_bytes())
    assert files[0] == files[2]
    assert files[0] != files[1]


def test_zeta_of_the_guider_is_not_the_samplers(host: Host, info: dict):
    pictures = []
    for zeta in (1.0, 7.0):
        prompt, save, _ = dmap_prompt(host, info)
        of_class(prompt, "DMAP_DPSGuider")["inputs"]["zeta"] = zeta
        entry = host.run(prompt)
        assert save not in cached(entry)
        pictures.append(pixels(host.images(entry, save)[0]))
    assert (pictures[0] == pictures[1]).all()


def test_previews_have_the_colours_of_the_picture(host: Host, info: dict):
    """ComfyUI's own preview of these latents, which comes once at the end, does not."""
    prompt, save, _ = dmap_prompt(host, info, steps=4, seed=3, match=False)
    with host.listen() as messages:
        entry = host.run(prompt)
    saved = pixels(host.images(entry, save)[0])
    previews = [Image.open(io.BytesIO(m[1][8:])) for m in messages if isinstance(m, tuple) and int.from_bytes(m[1][:4], "big") == 1]
    near = [psnr(np.asarray(preview.convert("RGB").resize((SMALL, SMALL), Image.BOX)), saved) for preview in previews]
    assert len(near) == 4 + 2
    assert near[-1] > 25 > 20 > near[-2]


def test_interrupt_ends_the_run_and_leaves_the_server_usable(host: Host, info: dict):
    long, _, _ = dmap_prompt(host, info, steps=200)
    run = titled(long, "DMAP: run")
    kept = set(host.output.glob("dmap-cancelled_*"))
    with host.listen() as messages:
        prompt_id = host.queue(long)

        def progress() -> list[int]:
            own = [message["data"] for message in messages if isinstance(message, dict) and message["type"] == "progress"]
            return [data["value"] for data in own if data["prompt_id"] == prompt_id and data["node"] == run]

        deadline = time.monotonic() + 60
        while not progress():
            assert time.monotonic() < deadline, host.tail()
            time.sleep(0.05)
        host.interrupt()
        started = time.monotonic()
        with pytest.raises(PromptFailed, match=rf"interrupted at node {run} \(SamplerCustomAdvanced\)"):
            host.wait(prompt_id, timeout=60)
        assert time.monotonic() - started < 10
        assert max(progress()) < 200
    (picture,) = set(host.output.glob("dmap-cancelled_*")) - kept
    assert re.fullmatch(r"dmap-cancelled_\d{5}_\.png", picture.name) and pixels(picture).shape == (SMALL, SMALL, 3)
    assert [text for node, text in texts(messages) if node == run][-1].endswith(f"the last picture is in output/{picture.name}")
    short, save, _ = dmap_prompt(host, info)
    assert host.images(host.run(short), save)


def test_failing_run_names_the_guider_and_leaves_the_server_usable(host: Host, info: dict):
    prompt, save, report = dmap_prompt(host, info)
    broken = copy.deepcopy(prompt)
    guider = of_class(broken, "DMAP_DPSGuider")
    guider["class_type"], inputs = "BasicGuider", guider["inputs"]
    guider["inputs"] = {"model": inputs["model"], "conditioning": inputs["positive"]}
    with host.listen() as messages, pytest.raises(PromptFailed, match=r"\(SamplerCustomAdvanced\): ValueError: .*DPSGuider"):
        host.run(upstream(broken, [save]))
    assert "execution_error" in [message["type"] for message in messages if isinstance(message, dict)]
    assert host.images(host.run(prompt), save)


def test_latent_of_the_wrong_size_names_the_node_that_makes_the_right_one(host: Host, info: dict):
    prompt, save, _ = dmap_prompt(host, info)
    latent = of_class(prompt, "DMAP_EmptyMeasurementLatent")
    latent["class_type"], latent["inputs"] = "EmptyLatentImage", {"width": 128, "height": 64, "batch_size": 1}
    with pytest.raises(PromptFailed, match=r"128x64 picture.*16x16.*64x64.*Empty Measurement Latent"):
        host.run(upstream(prompt, [save]))


def test_guided_runs_leave_the_model_as_it_was(host: Host, info: dict):
    guided, _, _ = dmap_prompt(host, info)
    loader = next(key for key, node in guided.items() if node["class_type"] == "CheckpointLoaderSimple")
    stock = {
        loader: guided[loader],
        "empty": {"class_type": "DMAP_DMAPUnconditional", "inputs": {"model": [loader, 0]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": SMALL, "height": SMALL, "batch_size": 1}},
        "sampled": {
            "class_type": "KSampler",
            "inputs": {"seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
            | {"model": [loader, 0], "positive": ["empty", 0], "negative": ["empty", 0], "latent_image": ["latent", 0]},
        },
        "picture": {"class_type": "VAEDecode", "inputs": {"samples": ["sampled", 0], "vae": [loader, 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["picture", 0], "filename_prefix": "stock"}},
    }
    (before,) = host.images(host.run(stock), "save")
    host.run(guided)
    entry = host.run(stock)
    assert loader in cached(entry)  # the very model that was guided
    assert not {"sampled", "picture", "save"} & cached(entry)
    (after,) = host.images(entry, "save")
    assert before != after
    assert before.read_bytes() == after.read_bytes()


# demo/run.py several times in one process, on the server of the tests if its port is given. After each run: what it printed and when its
# pictures were written. What the last call is refused with ends the program.
DEMO_PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path
demo, out, port, base, *calls = sys.argv[1:]
sys.path.insert(0, demo)
import run

class Running(run.Host):
    def __init__(self):
        super().__init__(base=Path(base), port=int(port))

    def __enter__(self):
        return self

    def _check_alive(self):
        pass

if port:
    run.Host = Running
for arguments in calls:
    sys.argv[1:] = json.loads(arguments)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.main()
    written = {str(path): path.stat().st_mtime_ns for path in Path(out).glob("*/*")}
    print(json.dumps([printed.getvalue(), written, Path(out, "summary.json").read_text()]), flush=True)
"""


@pytest.mark.parametrize("server", ["running", pytest.param("its own", marks=pytest.mark.nightly)])
def test_demo_program(host: Host, tmp_path: Path, server: str):
    """And it lists the operators it knows."""
    operator, stem, out = "super-resolution-x8", ORIGINAL.stem, tmp_path / "out"
    arguments = ["--n", "1", "--operators", operator, "--steps", "4", "--out", str(out)]
    refused = ["--operators", "motion-blur,inpainting", "--out", str(tmp_path / "refused")]
    python = os.environ.get("DMAP_TESTS_PYTHON", sys.executable)
    where = [ROOT / "demo", out, *((host.port, host.base) if server == "running" else ("", ""))]
    command = [python, "-c", DEMO_PROGRAM, *where, *map(json.dumps, (arguments, arguments, refused))]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert len(done.stdout.splitlines()) == 2, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())

    assert done.returncode != 0
    assert "unknown motion-blur" in done.stderr
    for name in DEMO:
        assert name.removeprefix("demo-") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    rows = json.loads((out / "summary.json").read_text())
    assert [(row["operator"], row["solver"], row["n"], row["seed"]) for row in rows] == [(operator, "DPS", 1, 0), (operator, "DMAP", 1, 0)]
    assert [row["denoiser_calls"] for row in rows] == [4, 2 + 1 * K]
    original = pixels(ORIGINAL)
    degraded = Image.open(out / operator / f"{stem}-degraded.png")
    assert degraded.size == (16, 16)
    baseline = np.asarray(degraded.convert("RGB").resize((128, 128), Image.BICUBIC))
    for row in rows:
        restored = pixels(out / operator / f"{stem}-{row['solver']}.png")
        assert row["psnr"] == pytest.approx(psnr(restored, original), abs=6e-4)  # rounded to 3 places
        assert row["psnr_baseline"] == pytest.approx(psnr(baseline, original), abs=6e-4)
        assert row["seconds"] > 0
    columns = ("degraded", "bicubic", "DPS", "DMAP", "original")
    assert Image.open(out / "sheet.png").size == (150 + 136 * len(columns), 24 + 152)
    table = (out / "table.md").read_text()
    assert f"{rows[1]['psnr']:.2f}" in table
    assert str(out / "sheet.png") in first[0]

    assert first[1] == second[1] and first[1].keys() == {str(path) for path in (out / operator).iterdir()}
    assert json.loads(first[2]) == json.loads(second[2]) == rows
