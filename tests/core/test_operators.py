"""What holds for every operator: adjoints, linearity, gradients, shapes, hints and distances."""

import pytest
import torch
from torch.autograd import gradcheck

from dmap_core.operators import (
    OPERATORS,
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    KernelBlur,
    MotionBlur,
    Noisy,
    Operator,
    SuperResolution,
)

LOPSIDED = ((0.1, 0.7, 0.0, 0.2, 0.3), (0.0, 1.0, 0.5, 0.0, 0.1), (0.4, 0.0, 0.0, 0.2, 0.6))


def hole(height, width):
    mask = torch.zeros(height, width)
    mask[1 : height // 2 + 1, width // 3 :] = 1
    return mask


def two_holes(height, width):
    return torch.stack([hole(height, width), hole(height, width).flip(0)]).unsqueeze(1)


# name, operator of an image's size, sizes (height, width) it takes, channels it takes
CASES = [
    ("sr2", lambda h, w: SuperResolution(2), [(8, 6), (2, 10), (16, 16)], (1, 3)),
    ("sr3", lambda h, w: SuperResolution(3), [(9, 15), (3, 6)], (1, 3)),
    ("sr8", lambda h, w: SuperResolution(8), [(8, 24)], (1, 3)),
    ("gaussian", lambda h, w: GaussianBlur(61, 1.0), [(9, 12), (5, 7), (16, 6)], (1, 3)),
    ("gaussian-short", lambda h, w: GaussianBlur(5, 3.0), [(3, 8), (7, 7)], (1, 3)),
    ("kernel", lambda h, w: KernelBlur(LOPSIDED), [(5, 8), (9, 3), (10, 11)], (1, 3)),
    ("kernel-1x1", lambda h, w: KernelBlur(((2.0,),)), [(1, 1), (4, 5)], (1, 3)),
    ("motion", lambda h, w: MotionBlur(5.5, 30.0), [(7, 4), (8, 9)], (1, 3)),
    ("motion-vertical", lambda h, w: MotionBlur(4, 90.0), [(5, 6)], (1, 3)),
    ("inpainting", lambda h, w: Inpainting(hole(h, w)), [(6, 9), (7, 5)], (1, 3)),
    ("inpainting-per-sample", lambda h, w: Inpainting(two_holes(h, w)), [(6, 9)], (1, 3)),
    ("grayscale", lambda h, w: Grayscale(), [(4, 5), (1, 3)], (3,)),
    ("noisy", lambda h, w: Noisy(GaussianBlur(9, 1.0), 0.1), [(6, 7)], (1, 3)),
    ("compose", lambda h, w: Compose([Grayscale(), GaussianBlur(9, 1.0), SuperResolution(2)]), [(10, 6)], (3,)),
    ("compose-colour-last", lambda h, w: Compose([SuperResolution(3), Grayscale()]), [(9, 6)], (3,)),
    (
        "compose-nested",
        lambda h, w: Compose([Compose([Inpainting(hole(h, w)), KernelBlur(LOPSIDED)]), Compose([SuperResolution(2)]), MotionBlur(3, 60.0)]),
        [(12, 8)],
        (1, 3),
    ),
]
PARAMS = [
    pytest.param(make(*size), size, channels, id=f"{name}-{size[0]}x{size[1]}-{channels}ch")
    for name, make, sizes, allowed in CASES
    for size in sizes
    for channels in allowed
]
every_operator = pytest.mark.parametrize("f, size, channels", PARAMS)
every_operator_on_colour = pytest.mark.parametrize("f, size, channels", [p for p in PARAMS if p.values[2] == 3])
every_operator_for_any_batch = pytest.mark.parametrize("f, size, channels", [p for p in PARAMS if "per-sample" not in p.id])
BATCH = 2


def picture(size, channels, seed=0, dtype=torch.float64, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def noise_like(x, seed=7):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def test_the_cases_cover_every_linear_operator_class():
    def classes(f):
        return {type(f)}.union(*(classes(g) for g in getattr(f, "operators", (f.operator,) if isinstance(f, Noisy) else ())))

    assert set().union(*(classes(param.values[0]) for param in PARAMS)) == {cls for cls in OPERATORS.values() if cls.linear is not False}


@every_operator
def test_adjoint_identity(f, size, channels):
    x = picture(size, channels)
    y = noise_like(f(x))
    back = f.adjoint(y, size)
    assert back.shape == x.shape and back.dtype == torch.float64
    left, right = (f(x) * y).sum(), (x * back).sum()
    assert abs(left - right) <= 1e-10 * max(1.0, float(f(x).norm() * y.norm()))


@every_operator
def test_adjoint_equals_autograd(f, size, channels):
    x = picture(size, channels).requires_grad_()
    out = f(x)
    cotangent = noise_like(out.detach())
    (vjp,) = torch.autograd.grad(out, x, cotangent)
    torch.testing.assert_close(f.adjoint(cotangent, size), vjp, rtol=1e-12, atol=1e-12)


@every_operator
def test_linearity(f, size, channels):
    assert f.linear
    a, b = picture(size, channels, 1), picture(size, channels, 2)
    torch.testing.assert_close(f(2.5 * a - 0.75 * b), 2.5 * f(a) - 0.75 * f(b), rtol=1e-12, atol=1e-12)
    assert not f(torch.zeros_like(a)).any()


@every_operator
def test_gradcheck(f, size, channels):
    x = picture(size, channels).requires_grad_()
    assert gradcheck(f, (x,), fast_mode=True)
    y = noise_like(f(x).detach()).requires_grad_()
    assert gradcheck(lambda y: f.adjoint(y, size), (y,), fast_mode=True)


@pytest.mark.parametrize(
    "f",
    [
        SuperResolution(2),
        GaussianBlur(3, 1.0),
        KernelBlur(LOPSIDED),
        MotionBlur(3, 45.0),
        Grayscale(),
        Inpainting(hole(4, 6)),
        Compose([Grayscale(), SuperResolution(2)]),
    ],
    ids=lambda f: f.name,
)
def test_gradcheck_of_every_entry(f):
    x = picture((4, 6), 3, batch=1).requires_grad_()
    assert gradcheck(f, (x,), fast_mode=False)


@every_operator_for_any_batch
def test_every_sample_is_treated_alone(f, size, channels):
    x = picture(size, channels)
    for i in range(BATCH):
        torch.testing.assert_close(f(x[i : i + 1]), f(x)[i : i + 1], rtol=1e-13, atol=1e-13)


def test_one_mask_per_sample():
    masks = two_holes(6, 9)
    x = picture((6, 9), 3)
    y = Inpainting(masks)(x)
    for i in range(2):
        assert torch.equal(y[i : i + 1], Inpainting(masks[i, 0])(x[i : i + 1]))


@every_operator
def test_sizes_and_channels_agree_with_the_output(f, size, channels):
    y = f(picture(size, channels))
    assert y.shape == (BATCH, f.channels(channels), *f.measurement_size(size))
    assert tuple(f.image_size(y)) == tuple(size)


@every_operator
def test_input_is_left_alone(f, size, channels):
    x = picture(size, channels)
    before = x.clone()
    y = f(x)
    measured = y.clone()
    f.adjoint(y, size), f.hint(y), f.distance(y, y + 1)
    assert torch.equal(x, before) and torch.equal(y, measured)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(f, size, channels, dtype):
    x = picture(size, channels, dtype=dtype)
    y = f(x)
    assert y.dtype == dtype and f.adjoint(y, size).dtype == dtype
    tolerance = {torch.float16: 5e-3, torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), f(x.double()), rtol=tolerance, atol=tolerance)


@every_operator_on_colour
def test_hint_is_a_picture_of_the_images_size(f, size, channels):
    y = f(picture(size, channels, dtype=torch.float32))
    hint = f.hint(y)
    assert hint.shape == (BATCH, 3, *size) and hint.dtype == y.dtype
    # Bicubic upsampling (a = -0.75) has weights of absolute sum 1.375 at most along one axis: it may overshoot by that, squared.
    assert hint.abs().max() <= 1.375**2 * y.abs().max() + 1e-6


@pytest.mark.parametrize("value", [-1.0, 0.25, 1.0])
@pytest.mark.parametrize(
    "f",
    [
        SuperResolution(4),
        GaussianBlur(9, 2.0),
        KernelBlur(LOPSIDED),
        MotionBlur(5, 20.0),
        Grayscale(),
        Compose([Grayscale(), SuperResolution(2)]),
    ],
    ids=lambda f: f.name,
)
def test_constants_are_preserved_and_the_hint_keeps_the_range(f, value):
    x = torch.full((2, 3, 12, 16), value, dtype=torch.float64)
    y = f(x)
    torch.testing.assert_close(y, torch.full_like(y, value), rtol=0, atol=1e-13)
    torch.testing.assert_close(f.hint(y), x, rtol=0, atol=1e-13)


def test_hint_of_super_resolution_is_the_bicubic_enlargement():
    y = picture((4, 5), 3)
    expected = torch.nn.functional.interpolate(y, size=(12, 15), mode="bicubic", align_corners=False)
    torch.testing.assert_close(SuperResolution(3).hint(y), expected, rtol=1e-12, atol=1e-12)


def test_hint_of_grayscale_repeats_the_channel():
    y = picture((3, 4), 1)
    assert torch.equal(Grayscale().hint(y), torch.cat([y, y, y], 1))


def test_grayscale_is_bt601():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        x = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
        x[:, channel] = 1
        torch.testing.assert_close(Grayscale()(x), torch.full((1, 1, 2, 2), weight, dtype=torch.float64), rtol=0, atol=1e-15)


def test_inpainting_zeroes_what_is_missing_and_keeps_the_rest():
    mask = hole(6, 9)
    x = picture((6, 9), 3)
    y = Inpainting(mask)(x)
    missing = mask.bool()
    assert not y[..., missing].any() and torch.equal(y[..., ~missing], x[..., ~missing])


@pytest.mark.parametrize("value, missing", [(0.0, False), (0.49, False), (0.5, True), (0.51, True), (1.0, True)])
def test_masks_are_binary(value, missing):
    mask = torch.tensor([[0.0, 1.0, value]])
    assert bool(Inpainting(mask)(torch.ones(1, 3, 1, 3))[0, 0, 0, 2] == 0) is missing


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_dtype(dtype):
    x = picture((6, 9), 3)
    assert torch.equal(Inpainting(hole(6, 9).to(dtype))(x), Inpainting(hole(6, 9))(x))


def test_compose_runs_in_the_order_of_the_list():
    x = picture((9, 12), 3)
    f, g = KernelBlur(LOPSIDED), SuperResolution(3)
    assert torch.equal(Compose([f, g])(x), g(f(x)))
    assert not torch.allclose(Compose([f, g])(x), f(g(x)), atol=1e-3)


class Squared(Operator):
    linear = False

    def __call__(self, image):
        return image**2

    def distance(self, y_hat, y):
        return (y_hat - y).abs().flatten(1).sum(1)


def test_compose_is_linear_only_if_all_its_parts_are():
    assert Compose([SuperResolution(2), Grayscale()]).linear
    assert not Compose([SuperResolution(2), Squared()]).linear
    assert not Compose([Squared(), SuperResolution(2)]).linear


def test_compose_measures_with_the_last_parts_distance():
    a, b = picture((4, 4), 3), picture((4, 4), 3, seed=1)
    assert torch.equal(Compose([Grayscale(), Squared()]).distance(a, b), Squared().distance(a, b))


def test_a_nonlinear_operator_says_that_it_has_no_adjoint():
    with pytest.raises(NotImplementedError, match="Squared has no adjoint.*not linear"):
        Squared().adjoint(torch.ones(1, 3, 2, 2), (2, 2))


DISTANCES = [
    SuperResolution(3),
    GaussianBlur(5),
    KernelBlur(LOPSIDED),
    MotionBlur(3),
    Inpainting(hole(6, 9)),
    Grayscale(),
    Compose([Grayscale()]),
]
every_distance = pytest.mark.parametrize("f", DISTANCES, ids=lambda f: f.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)


@every_distance
@every_dtype
def test_distance_is_the_plain_norm_of_every_sample(f, dtype):
    a, b = f(picture((6, 9), 3, 1, dtype, batch=3)), f(picture((6, 9), 3, 2, dtype, batch=3))
    b[2] = a[2]
    distance = f.distance(a, b)
    expected = (a.double() - b.double()).square().sum((1, 2, 3)).sqrt().float()
    assert distance.dtype == torch.float32
    assert distance.shape == (3,)
    # half inputs are subtracted in half: 2^-11 relative per element
    torch.testing.assert_close(distance, expected, rtol=5e-4 if dtype == torch.float16 else 1e-6, atol=0)
    assert distance[2] == 0


def test_distance_of_a_large_half_residual_does_not_overflow():
    a, b = torch.full((1, 3, 512, 512), 1.0, dtype=torch.float16), torch.full((1, 3, 512, 512), -1.0, dtype=torch.float16)
    assert float(SuperResolution(8).distance(a, b)) == pytest.approx(2 * (3 * 512 * 512) ** 0.5, rel=1e-5)


@every_distance
@every_dtype
def test_gradient_of_the_distance_is_finite_at_zero(f, dtype):
    y = f(picture((6, 9), 3, dtype=dtype))
    y_hat = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f.distance(y_hat, y).sum(), y_hat)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("masks", [hole(6, 9), two_holes(6, 9)], ids=["one", "per-sample"])
def test_what_a_damaged_picture_shows_in_its_holes_does_not_count(masks):
    f = Inpainting(masks)
    y, y_hat = f(picture((6, 9), 3, 1)), f(picture((6, 9), 3, 2))
    painted_over = y + 5 * f.mask.double()
    assert torch.equal(f.distance(y_hat, painted_over), f.distance(y_hat, y))
    assert torch.equal(f.hint(painted_over), y)
    assert f.distance(y, painted_over).max() == 0


def test_gradient_of_the_distance_is_the_unit_residual():
    y, y_hat = picture((4, 5), 3, 1), picture((4, 5), 3, 2).requires_grad_()
    (grad,) = torch.autograd.grad(GaussianBlur(3).distance(y_hat, y).sum(), y_hat)
    residual = (y_hat - y).detach()
    torch.testing.assert_close(grad, residual / residual.flatten(1).norm(dim=1).view(-1, 1, 1, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SuperResolution(2),
        lambda: GaussianBlur(9, 1.234),
        lambda: KernelBlur(LOPSIDED),
        lambda: MotionBlur(3.21, 43.2),
        lambda: Inpainting(hole(22, 26)),
        Grayscale,
    ],
    ids=["SuperResolution", "GaussianBlur", "KernelBlur", "MotionBlur", "Inpainting", "Grayscale"],
)
def test_operators_made_and_used_under_inference_mode_give_gradients_later(make):
    with torch.inference_mode():
        f = make()
        y = f(picture((22, 26), 3))  # a size of no other test: matrices are cached
    x = picture((22, 26), 3, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(f.distance(f(x), y).sum(), x)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
