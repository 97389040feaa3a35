"""The training script on random pictures: both stages write a checkpoint that ComfyUI's stock loader opens, and resume where they were."""

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "demo"

# The script with a handful of random pictures in place of the download, once for each list of arguments: what takes long is to import ComfyUI.
# A call has nothing of the one before but its files. The last one is refused, and what it says is printed.
PROGRAM = """
import json, sys
sys.path[:0] = [{demo!r}, {tests!r}]
import numpy as np, data
names = [f"{{0x1F300 + i:x}}" for i in range(10)]
data.HELD_OUT_CONCEPTS = 1
data.pictures = lambda cache, size: (np.random.default_rng(0).integers(0, 255, (10, size, size, 3), dtype=np.uint8), names)
import train
*runs, refused, file = sys.argv[1:]
for run in runs:
    sys.argv[1:] = json.loads(run)
    train.main()
sys.argv[1:] = json.loads(refused)
try:
    train.main()
except SystemExit as error:
    print("refused:", error.code)

import comfy.sd, comfy.supported_models, torch
model, _, vae, _ = comfy.sd.load_checkpoint_guess_config(file, output_vae=True, output_clip=False)
assert isinstance(model.model.model_config, comfy.supported_models.SD20), model.model.model_config
assert type(vae.first_stage_model).__name__ == "TAESD"
picture = vae.decode(torch.zeros(1, 4, 4, 4))
assert picture.shape == (1, 32, 32, 3) and torch.isfinite(picture).all()
print("loaded")
"""


def test_train_both_stages_and_resume(comfyui_tree, tmp_path):
    """And unet needs an autoencoder."""
    autoencoder, unet = tmp_path / "autoencoder.safetensors", tmp_path / "unet.safetensors"
    common = ("--batch", 2, "--cache", tmp_path, "--threads", 1)
    on_it = ("unet", "--init", autoencoder, "--out", unet, *common)
    runs = [("autoencoder", "--steps", 2, "--out", autoencoder, *common), ("--steps", 1, *on_it), ("--steps", 2, *on_it)]
    runs.append(("unet", "--out", tmp_path / "x.safetensors"))
    code = PROGRAM.format(demo=str(DEMO), tests=str(DEMO.parent / "tests"))
    result = subprocess.run(
        [sys.executable, "-c", code, *(json.dumps([str(part) for part in run]) for run in runs), str(unet)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    log = result.stderr.split("done: ")
    assert [done.split(",")[0] for done in log[1:]] == ["step 2", "step 1", "step 2"]
    assert ["resumed" in before for before in log[:3]] == [False, False, True]
    assert log[3].startswith("step 2, 4 samples")
    refused, loaded = result.stdout.splitlines()[-2:]
    assert refused.startswith("refused: ") and "needs --init" in refused and loaded == "loaded"
    assert not list(tmp_path.glob("*.part"))
