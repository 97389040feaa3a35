"""The constants of dmap_core/costs.py are what the benchmarks count, and the benchmarks run the networks as the nodes do."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from variants import some_at_once

from dmap_core import costs

pytestmark = pytest.mark.hosts("one")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmarks(comfyui):
    """The package `benchmarks`, whose folder is not on the path."""
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    for name in ("shapes", "live", "memory", "flops", "precision"):
        setattr(package, name, importlib.import_module(f"benchmarks.{name}"))
    with torch.inference_mode(False):
        yield package


def test_the_same_blocks_recompute_as_in_the_nodes(lab, benchmarks):
    assert importlib.import_module("dmap_pack.nodes.host.prior").BLOCKS == benchmarks.shapes.BLOCKS


STEPS = [
    *[("demo prior", "TAESD", dtype, 256, plan, None, "exact") for dtype in ("fp16", "fp32") for plan in ("fast", "lean", "checkpoint")],
    ("demo prior", "TAESD", "fp32", 256, "fast", 24, "exact"),
    ("demo prior", "TAESD", "bf16", 256, "checkpoint", None, "none"),
    *[("SD 2.0", "KL", "fp16", 512, plan, None, "exact") for plan in ("fast", "checkpoint")],
    ("SD 1.5", "KL", "bf16", 768, "checkpoint", 64, "exact"),
    ("SDXL", "KL", "fp16", 1024, "checkpoint", None, "exact"),
]


@pytest.mark.parametrize(
    "step", some_at_once(STEPS, [STEPS[3], STEPS[5], STEPS[6], STEPS[7]], nightly=[*STEPS[1:3], STEPS[8], *STEPS[-2:]]), ids=str
)
def test_memory_of_a_whole_step(benchmarks, step):
    family, decoder, dtype, size, plan, tile, jacobian = step
    with torch.inference_mode(False):
        counted = benchmarks.memory.counted(*step)["peak_gib"] * 2**30
    expected = costs.peak(family, decoder, (size, size), dtype, plan, tile, jacobian)
    assert counted == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("plan", some_at_once(["fast", "lean", "checkpoint"], ["checkpoint"]))
def test_memory_of_a_step_through_the_encoder(benchmarks, plan):
    """As PSLD takes it, on the demo prior."""
    with torch.inference_mode(False), benchmarks.live.fake():
        prior = benchmarks.shapes.build("demo prior", "TAESD", "fp32", weights=False)
        counted = benchmarks.live.weight_bytes(prior.networks()) + benchmarks.memory.posterior_bytes(prior, 256, plan, encoder=True)
    step = costs.Cost(denoiser=1, denoiser_gradients=1, decoder=1, decoder_gradients=1, encoder=1, encoder_gradients=1)
    assert counted == pytest.approx(costs.run_peak("demo prior", "TAESD", (256, 256), step, "fp32", plan), rel=1e-3)


@pytest.mark.parametrize("family", some_at_once(costs.FAMILIES, ["demo prior"], nightly=["SD 1.5", "SDXL"]))
def test_operations_of_a_denoiser(benchmarks, family):
    with torch.inference_mode(False):
        forward, back = benchmarks.flops.denoiser_flop(family, 512)
    assert forward == pytest.approx(costs.denoiser_flop(family, (512, 512)), rel=0.02)
    whole = costs.flop(family, "TAESD", (512, 512)) - costs.flop(family, "TAESD", (512, 512), jacobian="none")
    assert back == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("decoder", some_at_once(costs.DECODERS, ["TAESD"]))
def test_operations_of_a_decoder(benchmarks, decoder):
    with torch.inference_mode(False):
        counted = sum(benchmarks.flops.decoder_flop(decoder, 256))
    step = costs.flop("SD 2.0", decoder, (256, 256), jacobian="none") - costs.denoiser_flop("SD 2.0", (256, 256))
    assert counted == pytest.approx(step, rel=0.02)


@pytest.mark.parametrize("decoder", some_at_once(costs.DECODERS, ["TAESD"]))
def test_operations_of_an_encoder(benchmarks, decoder):
    with torch.inference_mode(False):
        forward, back = benchmarks.flops.encoder_flop(decoder, 256)
    none = costs.Cost(denoiser=0, denoiser_gradients=0, decoder=0, decoder_gradients=0)
    plain, guided = (replace(none, encoder=1, encoder_gradients=gradients) for gradients in (0, 1))
    assert forward == pytest.approx(costs.run_flop("SD 2.0", decoder, (256, 256), plain), rel=1e-3)
    assert forward + back == pytest.approx(costs.run_flop("SD 2.0", decoder, (256, 256), guided), rel=1e-3)


def run(*arguments):
    """python -m benchmarks, on a machine without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_needs_a_gpu_says_so(tmp_path):
    done = run("gpu", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 1 and "there is no CUDA device here; --tiny runs" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough  # a minute
def test_the_report_of_a_gpu_in_small(tmp_path):
    done = run("gpu", "--tiny", "--runs", "1", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(row["cosine"] > 0.999 for row in report["precision"])
    assert [row["how"] for row in report["steps"]] == ["lean", "checkpoint", "fast"]
    assert all(row["weights_unchanged"] and row["seconds"] > 0 and row["peak_gib"] > row["counted_gib"] > 0 for row in report["steps"])
    assert "| fp16, bf16 | 0.1 | no |" in done.stdout and "| tiny | fp32, fp32 | 96 | 1 | fast | 8 |" in done.stdout


JOB = {"family": "demo prior", "decoder": "TAESD", "size": 64, "dtype": "fp32", "device": "cpu", "threads": 1, "matrix": 256}


@pytest.mark.thorough  # some seconds
@pytest.mark.parametrize("how", ["plain", "published", "checkpoint", "ReSample", "PSLD"])
def test_a_line_of_the_benchmark(benchmarks, how):
    """One of them as the benchmark has it, in a process of its own."""
    if how == "published":
        done = run("one", json.dumps(JOB | {"how": how}))
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout.splitlines()[-1])
    else:
        with torch.inference_mode(False), torch.enable_grad():
            row = importlib.import_module("benchmarks.step").measure(JOB | {"how": how})
    assert row["seconds"] > 0 and row["peak_gib"] >= row["before_gib"] > row["weights_gib"]
