"""The split of the demo data, and what ships of it."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

DEMO = Path(__file__).resolve().parents[2] / "demo"
sys.path.insert(0, str(DEMO))

import data  # noqa: E402


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("1f44d", "1f44d"),
        ("1f44d-1f3fc", "1f44d"),
        ("0023-fe0f-20e3", "0023"),
        ("1f1e6-1f1f1", "1f1e6-1f1f1"),
        ("1f468-200d-1f33e", "1f468"),
    ],
)
def test_concept(name, concept):
    assert data.concept(name) == concept


def test_split_keeps_variants_together():
    names = [f"{0x1F300 + i:x}{suffix}" for i in range(400) for suffix in ("", "-1f3fb", "-1f3fc", "-200d-2642-fe0f")]
    held_out, training = data.split(names)
    assert len(held_out) == data.HELD_OUT_CONCEPTS
    assert not set(held_out) & set(training)
    assert {data.concept(n) for n in names} == set(held_out) | set(training)
    assert data.split(list(reversed(names))) == (held_out, training), "the split must not depend on the order of the files"
    chosen = data.held_out_names(names)
    assert [data.concept(n) for n in chosen] == held_out


def test_held_out_pictures():
    files = sorted((DEMO / "held-out").glob("*.png"))
    assert len(files) >= 64
    for file in files:
        picture = Image.open(file)
        assert picture.size == (128, 128)
        assert picture.mode == "RGB"


def test_prior_is_small_and_says_what_it_is():
    file = DEMO.parent / "models" / "checkpoints" / "dmap-demo-prior.safetensors"
    assert file.stat().st_size < 60e6
    with safe_open(file, "pt") as f:
        keys = list(f.keys())
        metadata = f.metadata()
    assert any(k.startswith("model.diffusion_model.") for k in keys)
    assert any(k.startswith("first_stage_model.taesd_decoder.") for k in keys)
    assert "unet_samples" in metadata, json.dumps(metadata)
