"""Specs and metadata from strangers: bounded before anything is allocated, and every wrong one a ValueError that says what is wrong."""

import base64
import json
import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from dmap_core.cse.metadata import KEY, CSEMetadata, read_metadata
from dmap_core.operators import (
    OPERATORS,
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Jpeg,
    KernelBlur,
    MotionBlur,
    Noisy,
    SuperResolution,
    centred_box,
    from_spec,
)

HUGE = 10**400
BEYOND_PRINTING = 10**5000  # repr() of it raises


def packed(byte_count, value=0):
    return base64.b64encode(zlib.compress(bytes([value]) * byte_count, 1)).decode()


def inpainting(height, width, **more):
    return {"operator": "Inpainting", "size": [height, width], "box": [1, 1]} | more


def nested(depth, inner):
    for _ in range(depth):
        inner = {"operator": "Compose", "operators": [inner]}
    return inner


GRAY = {"operator": "Grayscale"}
WRONG = {
    "a list for a name": ({"operator": ["x"]}, r"unknown operator \['x'\]; known are"),
    "a mapping for a name": ({"operator": {}}, "unknown operator {}; known are"),
    "a number for a name": ({"operator": 3}, "unknown operator 3; known are"),
    "a very long name": ({"operator": "x" * 10**6}, "unknown operator 'xxx"),
    "a number for a setting's name": ({"operator": "SuperResolution", 3: 1}, "SuperResolution: it has a setting called 3"),
    "names of two kinds": ({"operator": "SuperResolution", 3: 1, "scale": 4, None: 2}, "SuperResolution: it has a setting called 3"),
    "no mapping": ([GRAY], "must map names to settings"),
    "text": ("Grayscale", "must map names to settings"),
    "nothing": (None, "must map names to settings"),
    "scale": ({"operator": "SuperResolution", "scale": 65}, "SuperResolution: scale is 65; .*at most 64"),
    "scale 10^400": ({"operator": "SuperResolution", "scale": HUGE}, "SuperResolution: scale is 1000"),
    "scale that cannot be printed": ({"operator": "SuperResolution", "scale": BEYOND_PRINTING}, "SuperResolution: scale is a int too long"),
    "scale true": ({"operator": "SuperResolution", "scale": True}, "SuperResolution: scale is True"),
    "scale of a list": ({"operator": "SuperResolution", "scale": [4]}, r"SuperResolution: scale is \[4\]"),
    "sigma 1e30": ({"operator": "GaussianBlur", "sigma": 1e30}, r"GaussianBlur: sigma is 1e\+30 pixels; .*at most 1023"),
    "sigma 1e300": ({"operator": "GaussianBlur", "sigma": 1e300}, "GaussianBlur: sigma is"),
    "sigma 10^400": ({"operator": "GaussianBlur", "sigma": HUGE}, "GaussianBlur: sigma is"),
    "sigma of a list": ({"operator": "GaussianBlur", "sigma": [3]}, "GaussianBlur: sigma is"),
    "kernel_size": ({"operator": "GaussianBlur", "kernel_size": 10**9 + 1}, "GaussianBlur: kernel_size is 1000000001; .*at most 1023"),
    "kernel_size of text": ({"operator": "GaussianBlur", "kernel_size": "61"}, "GaussianBlur: kernel_size is '61'"),
    "kernel_size infinite": ({"operator": "GaussianBlur", "kernel_size": float("inf")}, "GaussianBlur: kernel_size is inf"),
    "length": ({"operator": "MotionBlur", "length": 1e6}, "MotionBlur: length is 1000000.0 pixels; .*at most 1023"),
    "length 10^400": ({"operator": "MotionBlur", "length": HUGE}, "MotionBlur: length is"),
    "length of text": ({"operator": "MotionBlur", "length": "15"}, "MotionBlur: length is '15'"),
    "angle 10^400": ({"operator": "MotionBlur", "angle": HUGE}, "MotionBlur: angle is"),
    "angle none": ({"operator": "MotionBlur", "angle": None}, "MotionBlur: angle is None"),
    "kernel rows": ({"operator": "KernelBlur", "kernel": [[1.0]] * 1025}, "KernelBlur: .*1025 rows of 1 numbers; sides may be 1023"),
    "kernel columns": ({"operator": "KernelBlur", "kernel": [[1.0] * 1025]}, "KernelBlur: .*1 rows of 1025 numbers"),
    "kernel of a cube": ({"operator": "KernelBlur", "kernel": [[[1.0] * 1000] * 1000] * 999}, "KernelBlur: .*one row is"),
    "kernel 10^400": ({"operator": "KernelBlur", "kernel": [[1, HUGE, 1]]}, "KernelBlur"),
    "kernel's sum infinite": ({"operator": "KernelBlur", "kernel": [[1e308, 1e308, 1e308]]}, "KernelBlur: .*sum"),
    "kernel's sum tiny": ({"operator": "KernelBlur", "kernel": [[-1e300, 1e300, 5e-324]]}, "KernelBlur: .*sum"),
    "kernel empty": ({"operator": "KernelBlur", "kernel": []}, "KernelBlur: kernel has shape"),
    "kernel of empty rows": ({"operator": "KernelBlur", "kernel": [[]]}, "KernelBlur: kernel has shape"),
    "quality": ({"operator": "Jpeg", "quality": 101}, "Jpeg: quality is 101; .*at most 100"),
    "quality 10^400": ({"operator": "Jpeg", "quality": HUGE}, "Jpeg: quality is"),
    "subsampling of a list": ({"operator": "Jpeg", "quality": 5, "subsampling": ["4:2:0"]}, "Jpeg: subsampling is"),
    "rounding of a mapping": ({"operator": "Jpeg", "quality": 5, "rounding": {}}, "Jpeg: rounding is"),
    "noise 1e30": ({"operator": "Noisy", "of": GRAY, "sigma": 1e30}, r"Noisy: sigma is 1e\+30"),
    "noise 10^400": ({"operator": "Noisy", "of": GRAY, "sigma": HUGE}, "Noisy: sigma is"),
    "noise of nothing": ({"operator": "Noisy", "sigma": 0.1}, "Noisy: the settings sigma do not|Noisy: the settings 'sigma' do not"),
    "noise of a list": ({"operator": "Noisy", "of": [GRAY], "sigma": 0.1}, "must map names to settings"),
    "weights of a number": ({"operator": "NonlinearBlur", "weights": 5, "sha256": "", "seed": 0}, "NonlinearBlur"),
    "weights of a list": ({"operator": "Segmentation", "weights": [5], "sha256": ""}, "Segmentation"),
    "compose of text": ({"operator": "Compose", "operators": "Grayscale"}, "Compose: its settings are"),
    "compose of a mapping": ({"operator": "Compose", "operators": GRAY}, "Compose: its settings are"),
    "compose of numbers": ({"operator": "Compose", "operators": [3]}, "an operator is 3"),
    "compose with more": ({"operator": "Compose", "operators": [GRAY], "seed": 1}, "Compose: its settings are"),
    "too deep": (nested(9, GRAY), "too many operators; 32 are the most, and 8 inside each other"),
    "very deep": (nested(900, GRAY), "too many operators"),
    "too many": ({"operator": "Compose", "operators": [{"operator": "MotionBlur"}] * 33}, "too many operators"),
    "a million": ({"operator": "Compose", "operators": [{"operator": "MotionBlur"}] * 10**6}, "too many operators"),
    "20,000 squared": (inpainting(20_000, 20_000), "Inpainting: the spec asks for masks of .*400000000 pixels; 16777216 are the most"),
    "300,000 squared": (inpainting(300_000, 300_000), "Inpainting: "),
    "10^400 squared": (inpainting(HUGE, HUGE), "Inpainting: size is 1000"),
    "masks together": ({"operator": "Compose", "operators": [inpainting(4096, 2049), inpainting(4096, 2049)]}, "pixels together"),
    "packed 20,000 squared": (
        {"operator": "Inpainting", "shape": [1, 1, 20_000, 20_000], "mask": packed(50_000_000)},
        "Inpainting: the spec asks for masks of",
    ),
    "a packed bomb": ({"operator": "Inpainting", "shape": [1, 1, 64, 64], "mask": packed(200_000_000)}, "more or fewer bytes than the 512"),
    "packed too short": ({"operator": "Inpainting", "shape": [1, 1, 64, 64], "mask": packed(511)}, "more or fewer bytes"),
    "packed one too many": ({"operator": "Inpainting", "shape": [1, 1, 64, 64], "mask": packed(513)}, "more or fewer bytes"),
    "mask of a number": ({"operator": "Inpainting", "shape": [1, 1, 4, 4], "mask": 5}, "Inpainting: the spec's mask is 5; it must be text"),
    "mask of other letters": ({"operator": "Inpainting", "shape": [1, 1, 4, 4], "mask": "\u00e9"}, "Inpainting: the spec's mask cannot be read"),
    "shape of text": ({"operator": "Inpainting", "shape": "1144", "mask": packed(2)}, "Inpainting: shape is '1144'"),
    "shape infinite": ({"operator": "Inpainting", "shape": [1, 1, 4, float("inf")], "mask": packed(2)}, "Inpainting: shape is inf"),
    "size of text": ({"operator": "Inpainting", "size": "44", "box": [1, 1]}, "Inpainting: size is '44'"),
    "settings of two kinds": (inpainting(4, 4, shape=[1, 1, 4, 4], mask=packed(2)), "it must have shape and mask, or size and box"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_is_named_at_once_and_takes_no_memory(name):
    spec, message = WRONG[name]
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        from_spec(spec)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert seconds < 2 and peak < 20_000_000


def test_aliases_of_a_config_do_not_multiply():
    """YAML may name one list many times: few characters that stand for millions of operators."""
    spec = {"operator": "MotionBlur"}
    for _ in range(8):
        spec = {"operator": "Compose", "operators": [spec] * 10}
    with pytest.raises(ValueError, match="too many operators"):
        from_spec(spec)


def test_the_huge_mask_is_refused_before_it_exists():
    spec = json.loads('{"operator":"Inpainting","size":[20000,20000],"box":[1,1]}')
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        with pytest.raises(ValueError, match="16777216 are the most"):
            from_spec(spec)
        best = min(best, time.perf_counter() - started)
    assert best < 2e-3  # the mask alone would take seconds


def test_random_specs_end_in_an_operator_or_a_named_error():
    """2,000 mutations of good specs: values of other kinds, missing and surplus settings, nested at random."""
    rng = random.Random(0)
    good = [f.spec() for f in (SuperResolution(4), GaussianBlur(9, 1.5), MotionBlur(5, 9), Grayscale(), Jpeg(30), Inpainting(torch.eye(6)))]
    good += [KernelBlur([[1, 2, 1]]).spec(), inpainting(8, 8), {"operator": "Segmentation", "weights": "a", "sha256": "b"}]
    values = [
        None,
        True,
        -1,
        0,
        3,
        2**70,
        HUGE,
        1e30,
        float("nan"),
        float("inf"),
        "",
        "x",
        [],
        [1],
        [[1]],
        {},
        {"a": 1},
        {3: 4},
        b"x",
        (),
        {1},
    ]

    def mutated(depth=0):
        spec = dict(rng.choice(good))
        if depth < 3 and rng.random() < 0.3:
            spec = {"operator": "Compose", "operators": [mutated(depth + 1) for _ in range(rng.randrange(3))]}
        if depth < 3 and rng.random() < 0.2:
            spec = {"operator": "Noisy", "of": mutated(depth + 1), "sigma": rng.choice([0.1, *values])}
        for _ in range(rng.randrange(3)):
            key = rng.choice([*spec, "scale", "more", 3, None]) if spec else "operator"
            if rng.random() < 0.2:
                spec.pop(key, None)
            else:
                spec[key] = rng.choice(values)
        return spec if rng.random() < 0.95 else rng.choice(values)

    made = 0
    for _ in range(2000):
        spec = mutated()
        try:
            made += type(from_spec(spec)).__name__ in OPERATORS
        except ValueError as error:
            assert len(str(error)) < 1000
    assert made > 200


@pytest.mark.parametrize("parts", [(3,), [Grayscale(), "blur"], (None,), [[Grayscale()]]])
def test_parts_that_are_no_operators(parts):
    with pytest.raises(ValueError, match="Compose: .* cannot be a part; only operators can"):
        Compose(parts)


@pytest.mark.parametrize("operators", [3, None, "blur", Grayscale()])
def test_parts_that_are_no_list(operators):
    with pytest.raises(ValueError, match="Compose: operators is .*; it must be a list of operators"):
        Compose(operators)


def test_what_cannot_be_read_again_cannot_be_made():
    f = Grayscale()
    for _ in range(8):
        f = Compose([f])
    assert from_spec(f.spec()).spec() == f.spec()
    for make in (lambda: Compose([f]), lambda: Noisy(f, 0.1), lambda: Compose([SuperResolution(2)] * 33)):
        with pytest.raises(ValueError, match="made of too many operators; 32 are the most, and 8 inside each other"):
            make()
    thirty_two = Compose([GaussianBlur()] * 32)
    assert from_spec(thirty_two.spec()).spec() == thirty_two.spec()


@pytest.mark.parametrize("mask", [torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(0, 1, 4, 4), torch.zeros(1, 1, 0, 4)])
def test_a_mask_of_no_pixels(mask):
    with pytest.raises(ValueError, match="Inpainting: mask has shape .* no pixel at all"):
        Inpainting(mask)


@pytest.mark.parametrize("mask", ["hole", None, [[0, 1], [1]], object()])
def test_a_mask_of_no_numbers(mask):
    with pytest.raises(ValueError, match="Inpainting: mask is .*it must be numbers"):
        Inpainting(mask)


def test_masks_may_be_of_any_kind_of_number():
    """Also a list of lists, and bool masks, which have no order of their own."""
    wanted = Inpainting(torch.eye(4)).mask
    for mask in (torch.eye(4).bool(), torch.eye(4).int(), torch.eye(4).half(), torch.eye(4).tolist(), np.eye(4)):
        assert torch.equal(Inpainting(mask).mask, wanted)


# ---- metadata


def test_a_writer_writes_nothing_that_a_reader_refuses():
    """64 random masks of 512x512 are 16.8 million bits: too long to be read, so not written either."""
    noise = torch.rand(64, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="would be .* characters long.*train with a single mask"):
        CSEMetadata(operator=Inpainting(noise).spec()).write()
    boxes = centred_box((512, 512), (100, 100)).expand(64, 1, -1, -1)
    described = CSEMetadata(operator=Inpainting(boxes).spec())
    assert read_metadata(described.write()) == described
    assert isinstance(from_spec(described.operator), Inpainting)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "x" * 10_001}, "a base of 10001 characters; 10000 are the most"),
        ({"operator": nested(100, GRAY)}, "more than 40 inside each other"),
        ({"licence": "\ud800"}, "text that cannot be printed"),
        ({"operator": {"operator": "Grayscale", "x": "\udfff"}}, "text that cannot be printed"),
    ],
)
def test_metadata_that_would_break_later(values, message):
    with pytest.raises(ValueError, match=message):
        read_metadata({KEY: json.dumps(values)})
    with pytest.raises(ValueError, match=message):
        CSEMetadata(**values).write()


def test_a_strange_operator_is_described_in_few_words():
    found = read_metadata({KEY: json.dumps({"operator": {"operator": "x" * 5000, "y": "z" * 5000, "n": HUGE}})})
    assert len(found.summary()) < 500
    with pytest.raises(ValueError, match="unknown operator"):
        from_spec(found.operator)
