"""The training script on random pictures: both stages write a checkpoint that ComfyUI's stock loader opens, and resume where they were."""

import os
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "demo"

# the script with a handful of random pictures in place of the download
TRAIN = """
import sys
sys.path.insert(0, {demo!r})
import numpy as np, data
names = [f"{{0x1F300 + i:x}}" for i in range(10)]
data.HELD_OUT_CONCEPTS = 4
data.pictures = lambda cache, size: (np.random.default_rng(0).integers(0, 255, (10, size, size, 3), dtype=np.uint8), names)
import train
train.main()
"""

LOAD = """
import sys
sys.path.insert(0, {tests!r})
from host import import_comfy
import_comfy()
import comfy.sd, comfy.supported_models, torch
model, _, vae, _ = comfy.sd.load_checkpoint_guess_config({file!r}, output_vae=True, output_clip=False)
assert isinstance(model.model.model_config, comfy.supported_models.SD20), model.model.model_config
assert type(vae.first_stage_model).__name__ == "TAESD"
picture = vae.decode(torch.zeros(1, 4, 4, 4))
assert picture.shape == (1, 32, 32, 3) and torch.isfinite(picture).all()
print("loaded")
"""


def python(code: str, *args: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_train_both_stages_and_resume(comfyui_tree, tmp_path):
    code = TRAIN.format(demo=str(DEMO))
    autoencoder, unet = tmp_path / "autoencoder.safetensors", tmp_path / "unet.safetensors"
    common = ("--batch", 2, "--cache", tmp_path)
    assert "done: step 2" in python(code, "autoencoder", "--steps", 2, "--out", autoencoder, *common)
    assert "done: step 1" in python(code, "unet", "--steps", 1, "--init", autoencoder, "--out", unet, *common)
    resumed = python(code, "unet", "--steps", 2, "--init", autoencoder, "--out", unet, *common)
    assert "resumed" in resumed
    assert "done: step 2, 4 samples" in resumed
    assert "loaded" in python(LOAD.format(tests=str(DEMO.parent / "tests"), file=str(unet)))
    assert not list(tmp_path.glob("*.part"))


def test_unet_needs_an_autoencoder(comfyui_tree, tmp_path):
    code = TRAIN.format(demo=str(DEMO))
    result = subprocess.run(
        [sys.executable, "-c", code, "unet", "--out", str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "needs --init" in result.stderr
