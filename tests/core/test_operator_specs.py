"""spec() and from_spec(), and what operators say when they cannot work."""

import json
import math

import pytest
import torch

from dmap_core.operators import (
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    KernelBlur,
    MotionBlur,
    SuperResolution,
    centred_box,
    from_spec,
)


def random_mask(*shape, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4).float()


def roundtrip(f):
    return from_spec(json.loads(json.dumps(f.spec(), allow_nan=False)))


SPECS = [
    SuperResolution(2),
    SuperResolution(4),
    GaussianBlur(),
    GaussianBlur(5, 0.1 + 0.2),
    KernelBlur(((1, 2, 1),)),
    KernelBlur(((0.1, 0.2, 0.7), (0.3, 0.0, 1.9), (0.0, 0.4, 0.31))),
    MotionBlur(),
    MotionBlur(7 / 3, -12.1),
    Grayscale(),
    Inpainting(random_mask(16, 16)),
    Inpainting(random_mask(1, 1, 16, 16)),
    Inpainting(random_mask(2, 1, 16, 16)),
    Compose([SuperResolution(2)]),
    Compose(
        [
            Grayscale(),
            GaussianBlur(9, 1.5),
            Compose([Compose([Inpainting(random_mask(16, 16, seed=4))]), MotionBlur(3, 8)]),
            SuperResolution(4),
        ]
    ),
]


@pytest.mark.parametrize("f", SPECS, ids=lambda f: f.describe()[:40])
def test_spec_survives_json_to_the_bit(f):
    again = roundtrip(f)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert type(again) is type(f) and again.spec() == f.spec() and again.describe() == f.describe()
    assert torch.equal(again(x), f(x))
    assert torch.equal(again.adjoint(f(x), (16, 16)), f.adjoint(f(x), (16, 16)))


@pytest.mark.parametrize("shape", [(1, 2), (3, 3), (5, 7), (64, 48), (31, 1), (1, 1, 9, 4), (3, 1, 5, 6)])
def test_masks_of_all_shapes_survive_json(shape):
    mask = random_mask(*shape, seed=sum(shape))
    for sample in mask.reshape(-1, *shape[-2:]):
        sample[0, 0], sample[-1, -1] = 0, 1
    again = roundtrip(Inpainting(mask))
    assert torch.equal(again.mask, mask.reshape(-1, 1, *shape[-2:]))
    assert again.mask.dtype == torch.float32


@pytest.mark.parametrize("side", [3, 5, 7])
def test_kernels_survive_json_to_the_bit(side):
    generator = torch.Generator().manual_seed(side)
    for _ in range(50):
        f = KernelBlur(torch.rand(side, side, generator=generator, dtype=torch.float64).tolist())
        assert torch.equal(roundtrip(f).kernel_tensor(), f.kernel_tensor())


def test_a_mask_of_a_large_picture_stays_small_in_json():
    assert len(json.dumps(Inpainting(centred_box((512, 512), (128, 128))).spec())) < 1000


@pytest.mark.parametrize(
    "f, name",
    [
        (SuperResolution(4), "Super-Resolution (scale 4)"),
        (GaussianBlur(61, 3.0), "Gaussian Blur (kernel_size 61, sigma 3.0)"),
        (Grayscale(), "Grayscale"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_describe(f, name):
    assert f.describe() == name


def test_describe_tells_how_much_is_missing():
    assert Inpainting(centred_box((4, 8), (2, 4))).describe() == "Inpainting (8x4, 25.0 % missing)"


def test_equal_settings_make_equal_operators():
    assert SuperResolution(4) == SuperResolution(4) != SuperResolution(2)
    assert KernelBlur([[1, 1, 1]]) == KernelBlur(((1, 1, 1),))
    assert Compose([Grayscale(), SuperResolution(2)]) == Compose((Grayscale(), SuperResolution(2)))
    assert hash(GaussianBlur()) == hash(GaussianBlur(61, 3.0))


def test_operators_cannot_be_changed():
    with pytest.raises(AttributeError):
        SuperResolution(4).scale = 2


def test_a_whole_number_may_be_written_with_a_point():
    x = torch.rand(1, 3, 35, 35, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(SuperResolution(7.0)(x), SuperResolution(7)(x))
    assert SuperResolution(7.0).measurement_size((35, 35)) == (5, 5)
    assert torch.equal(GaussianBlur(9.0, 1.7)(x), GaussianBlur(9, 1.7)(x))


NAN, INF = math.nan, math.inf
BAD_SETTINGS = [
    ("SuperResolution", {"scale": 1}, r"SuperResolution: scale is 1;.*at least 2"),
    ("SuperResolution", {"scale": 0}, r"SuperResolution: scale is 0"),
    ("SuperResolution", {"scale": -4}, r"SuperResolution: scale is -4"),
    ("SuperResolution", {"scale": 2.5}, r"SuperResolution: scale is 2\.5.*whole number"),
    ("SuperResolution", {"scale": NAN}, r"SuperResolution.*scale"),
    ("SuperResolution", {"scale": INF}, r"SuperResolution.*scale"),
    ("SuperResolution", {"scale": "eight"}, r"SuperResolution.*scale"),
    ("SuperResolution", {"scale": None}, r"SuperResolution.*scale"),
    ("SuperResolution", {"factor": 4}, r"SuperResolution.*factor"),
    ("GaussianBlur", {"kernel_size": 60}, r"GaussianBlur: kernel_size is 60; it must be odd"),
    ("GaussianBlur", {"kernel_size": 1}, r"GaussianBlur: kernel_size is 1;.*at least 3"),
    ("GaussianBlur", {"kernel_size": -5}, r"GaussianBlur: kernel_size is -5"),
    ("GaussianBlur", {"kernel_size": 6.5}, r"GaussianBlur: kernel_size is 6\.5"),
    ("GaussianBlur", {"sigma": 0}, r"GaussianBlur: sigma is 0 .*above 0"),
    ("GaussianBlur", {"sigma": -1.0}, r"GaussianBlur: sigma is -1\.0"),
    ("GaussianBlur", {"sigma": NAN}, r"GaussianBlur: sigma is nan"),
    ("GaussianBlur", {"sigma": INF}, r"GaussianBlur: sigma is inf"),
    ("GaussianBlur", {"sigma": "wide"}, r"GaussianBlur.*sigma"),
    ("KernelBlur", {"kernel": [[1, 1], [1, 1]]}, r"KernelBlur: kernel has shape \(2, 2\).*odd"),
    ("KernelBlur", {"kernel": [[1, 1, 1], [1, 1, 1]]}, r"KernelBlur: kernel has shape \(2, 3\)"),
    ("KernelBlur", {"kernel": [1, 2, 1]}, r"KernelBlur: kernel has shape \(3,\)"),
    ("KernelBlur", {"kernel": [[1, NAN, 1]]}, r"KernelBlur: .*finite"),
    ("KernelBlur", {"kernel": [[1, INF, 1]]}, r"KernelBlur: .*finite"),
    ("KernelBlur", {"kernel": [[-1, 0, 1]]}, r"KernelBlur: .*sum above 0"),
    ("KernelBlur", {"kernel": [[1, 1, 1], [1]]}, r"KernelBlur.*kernel"),
    ("KernelBlur", {"kernel": "box"}, r"KernelBlur.*kernel"),
    ("KernelBlur", {}, r"KernelBlur.*kernel"),
    ("MotionBlur", {"length": 1}, r"MotionBlur: length is 1 .*above 1"),
    ("MotionBlur", {"length": NAN}, r"MotionBlur: length is nan"),
    ("MotionBlur", {"length": INF}, r"MotionBlur: length is inf"),
    ("MotionBlur", {"angle": NAN}, r"MotionBlur: angle is nan"),
    ("MotionBlur", {"angle": "up"}, r"MotionBlur.*angle"),
    ("Inpainting", {"shape": [4, 4]}, r"Inpainting.*mask"),
    ("Inpainting", {"mask": "eNpjAAAAAQAB"}, r"Inpainting.*shape"),
    ("Inpainting", {"shape": [1, 1, 4, 4], "mask": "not base64!"}, r"Inpainting.*mask"),
    ("Inpainting", {"shape": [1, 1, 4, 4], "mask": "AAAAAAAA"}, r"Inpainting.*mask"),
    ("Inpainting", {"shape": [1, 1, 0, 4], "mask": "eNpjAAAAAQAB"}, r"Inpainting.*shape"),
    ("Inpainting", {"shape": [1, 1, -4, -4], "mask": "eNpjAAAAAQAB"}, r"Inpainting.*shape"),
    ("Inpainting", {"shape": ["four", 4], "mask": "eNpjAAAAAQAB"}, r"Inpainting.*shape"),
    ("Grayscale", {"weights": [1, 0, 0]}, r"Grayscale.*weights"),
    ("Compose", {"operators": []}, r"Compose: needs at least one operator"),
    ("Compose", {}, r"Compose.*operators"),
    ("Compose", {"operators": 3}, r"Compose.*operators"),
    ("Compose", {"operators": [{"operator": "Sharpen"}]}, r"unknown operator 'Sharpen'"),
    ("Compose", {"operators": [{"operator": "SuperResolution", "scale": 1}]}, r"SuperResolution: scale is 1"),
]


@pytest.mark.parametrize("name, settings, message", BAD_SETTINGS, ids=[f"{name}-{settings}"[:60] for name, settings, _ in BAD_SETTINGS])
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        from_spec({"operator": name, **settings})


@pytest.mark.parametrize("spec", [{"operator": "Sharpen"}, {"operator": None}, {}, {"scale": 4}])
def test_an_unknown_operator_is_named_beside_the_known_ones(spec):
    with pytest.raises(ValueError, match=f"unknown operator {spec.get('operator')!r}; known are SuperResolution, GaussianBlur, .*Compose"):
        from_spec(spec)


@pytest.mark.parametrize("height, width", [(9, 5), (5, 7), (40, 1)])
def test_a_mask_that_does_not_fill_its_shape_is_refused(height, width):
    """A spec that lost part of its mask must not quietly know every pixel that was lost."""
    spec = Inpainting(random_mask(4, 4)).spec()
    with pytest.raises(ValueError, match="Inpainting"):
        from_spec({**spec, "shape": [1, 1, height, width]})


def test_from_spec_leaves_the_spec_alone():
    spec = Compose([Grayscale(), SuperResolution(2)]).spec()
    before = json.dumps(spec)
    from_spec(spec)
    assert json.dumps(spec) == before


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (7, 7), (3, 8)])
def test_a_scale_that_does_not_divide(size):
    height, width = size
    expected = rf"SuperResolution: a picture of {width}x{height} .*reduced 4 times.*crop it to {width // 4 * 4}x{height // 4 * 4}"
    f = SuperResolution(4)
    for attempt in (
        lambda: f(torch.zeros(1, 3, *size)),
        lambda: f.measurement_size(size),
        lambda: f.adjoint(torch.zeros(1, 3, 2, 2), size),
    ):
        with pytest.raises(ValueError, match=expected):
            attempt()


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(4, 5), r"Inpainting: mask is empty"),
        (torch.full((4, 5), 0.4), r"Inpainting: mask is empty"),
        (torch.ones(4, 5), r"Inpainting: mask is full"),
        (torch.stack([torch.eye(4), torch.zeros(4, 4)]).unsqueeze(1), r"Inpainting: mask is empty"),
        (torch.stack([torch.eye(4), torch.ones(4, 4)]).unsqueeze(1), r"Inpainting: mask is full"),
        (torch.tensor([[0.0, 1.0, NAN]]), r"Inpainting: mask holds NaN"),
        (torch.tensor([[0.0, 1.0, INF]]), r"Inpainting: mask holds NaN or inf"),
        (torch.ones(4), r"Inpainting: mask has shape \(4,\)"),
        (torch.ones(2, 4, 4), r"Inpainting: mask has shape \(2, 4, 4\); it must be \(H, W\) or \(B, 1, H, W\)"),
        (torch.ones(2, 3, 4, 4), r"Inpainting: mask has shape \(2, 3, 4, 4\)"),
    ],
)
def test_masks_without_meaning(mask, message):
    with pytest.raises(ValueError, match=message):
        Inpainting(mask)


def test_a_mask_of_another_size():
    f = Inpainting(random_mask(6, 9))
    y = torch.zeros(1, 3, 5, 8)
    for attempt in (lambda: f(y), lambda: f.adjoint(y, (5, 8)), lambda: f.measurement_size((5, 8)), lambda: f.image_size(y)):
        with pytest.raises(ValueError, match=r"Inpainting: the mask is 9x6 and the picture 8x5"):
            attempt()


def test_masks_for_another_batch():
    f = Inpainting(random_mask(2, 1, 6, 9))
    with pytest.raises(ValueError, match=r"Inpainting: 2 masks for a batch of 3"):
        f(torch.zeros(3, 3, 6, 9))


@pytest.mark.parametrize(
    "f, radius",
    [(GaussianBlur(61, 3.0), 12), (GaussianBlur(7, 3.0), 3), (KernelBlur([[1.0] * 5] * 5), 2), (MotionBlur(9, 10.0), 4)],
    ids=lambda value: str(value)[:12],
)
def test_a_kernel_too_large_for_the_picture(f, radius):
    f.measurement_size((radius + 1, radius + 1))
    assert torch.isfinite(f(torch.ones(1, 3, radius + 1, radius + 1))).all()
    for size in ((radius, 40), (40, radius)):
        message = rf"{f.name}: a picture of {size[1]}x{size[0]} is too small for a kernel that reaches {radius} pixels"
        for attempt in (
            lambda size=size: f(torch.ones(1, 3, *size)),
            lambda size=size: f.measurement_size(size),
            lambda size=size: f.image_size(torch.ones(1, 3, *size)),
        ):
            with pytest.raises(ValueError, match=message):
                attempt()


def test_compose_checks_every_part():
    f = Compose([GaussianBlur(9, 1.0), SuperResolution(4), KernelBlur([[1.0] * 5] * 5)])
    assert f.measurement_size((16, 12)) == (4, 3)
    with pytest.raises(ValueError, match="KernelBlur: a picture of 2x2"):
        f.measurement_size((8, 8))
    with pytest.raises(ValueError, match="SuperResolution: a picture of 10x8"):
        f.measurement_size((8, 10))


def test_grayscale_needs_colour():
    with pytest.raises(ValueError, match="Grayscale: the picture has 1 channels; it must have 3"):
        Grayscale()(torch.zeros(1, 1, 4, 4))
