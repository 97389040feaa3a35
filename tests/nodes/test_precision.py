"""Gradients in half precision point where those in float32 do: the full shape of Stable Diffusion 2.0, with and without a full-shape CSE.

Seeded random weights, rounded to fp16 once; 64x64 pixels. Products are summed in float32 and rounded once, as a GPU's matrix units do.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.hosts("one"),
]  # minutes of one core, and 4 GiB; tests/core/test_half_precision.py has what it rests on

COSINE = 0.999
HARDEST = (14.0, True)  # the one that falls below the bound without scaling
SIGMAS = (0.1, 1.0, 5.0, 14.0)
REST = [(sigma, cse) for sigma in SIGMAS for cse in (False, True) if (sigma, cse) != HARDEST]
PRECISIONS = [("fp16", "fp16"), ("fp16", "bf16"), ("bf16", "bf16")]  # of UNet and VAE; bf16 last, as the weights stay rounded
UNSCALED = ("fp16", "fp16")
FIRST = [UNSCALED]
SMALLER = 1 / 8  # the cotangents of 512x512 pixels, 786432 values, to those of 64x64


@pytest.fixture(scope="module")
def precision(comfyui):
    """benchmarks.precision, whose folder is not on the path."""
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("benchmarks.precision")


def measured(precision, cases, kinds, unscaled=()):
    """The cosine to float32 by (UNet, VAE, sigma, CSE); of the cases `unscaled` also by "unscaled", for UNSCALED with cotangents as they come."""
    with torch.inference_mode(False), torch.no_grad():
        networks = precision.Networks().to("fp32", "fp32")
        exact = {case: networks.gradient(*case) for case in cases}
        found = {}
        for precisions in kinds:
            networks.to(*precisions)
            for case in cases:
                found[(*precisions, *case)] = precision.cosine(networks.gradient(*case), exact[case])
            for case in unscaled if precisions == UNSCALED else ():
                with precision.unscaled():
                    found[("unscaled", *case)] = precision.cosine(networks.gradient(*case, SMALLER), exact[case])
        return found


@pytest.fixture(scope="module")
def hardest(precision):
    return measured(precision, [HARDEST], FIRST, unscaled=[HARDEST])


@pytest.fixture(scope="module")
def every(precision):
    return measured(precision, [*REST, HARDEST], PRECISIONS)


@pytest.mark.parametrize("precisions", FIRST, ids="-".join)
def test_cosine_to_float32_where_it_is_hardest(hardest, precisions):
    assert hardest[(*precisions, *HARDEST)] > COSINE


def test_unscaled_cotangents_lose_more(hardest):
    """Measured: a cosine of 0.99899, below the bound, in place of 0.99999."""
    assert 1 - hardest[("unscaled", *HARDEST)] > 20 * (1 - hardest[(*UNSCALED, *HARDEST)])


@pytest.mark.parametrize("precisions", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("sigma, cse", [*REST, HARDEST])
def test_cosine_to_float32(every, precisions, sigma, cse):
    assert every[(*precisions, sigma, cse)] > COSINE
