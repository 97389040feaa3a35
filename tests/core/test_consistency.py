"""Match: a projection, what it promises about every picture that has the measurement, noise, holes, sizes, and what is refused."""

import math

import pytest
import torch

from dmap_core.consistency import (
    LEAST,
    MISFIT,
    NEWTON_LAM,
    ROUNDING,
    Match,
    find_lam,
    gauss_newton,
    match,
    matchable,
    mismatch,
    project,
    proximal,
    solve,
    verdict,
)
from dmap_core.operators import (
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Jpeg,
    KernelBlur,
    MotionBlur,
    Noisy,
    NonlinearBlur,
    Segmentation,
    SuperResolution,
    centred_box,
)
from dmap_core.operators.nonlinear_blur import random_kernel_wizard
from dmap_core.operators.segmentation import random_room_layout

SIZE = (16, 20)
KERNEL = ((0.0, 0.1, 0.0), (0.2, 0.4, 0.2), (0.0, 0.1, 0.0))
LINEAR = [
    SuperResolution(2),
    SuperResolution(4),
    GaussianBlur(7, 1.2),
    KernelBlur(KERNEL),
    MotionBlur(5.0, 30.0),
    Grayscale(),
    Compose((Grayscale(), GaussianBlur(5, 0.8), SuperResolution(2))),
    Compose((Inpainting(centred_box(SIZE, (6, 6))), SuperResolution(2))),
    Inpainting(centred_box(SIZE, (6, 8))),
]
every_linear = pytest.mark.parametrize("f", LINEAR, ids=lambda f: f.describe()[:40])
LEVEL = 2 / 255


def smooth(batch=1, size=SIZE, seed=0, dtype=torch.float64):
    """Pictures with content at all scales, in [-1, 1]."""
    noise = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return 0.9 * (0.3 * noise + 2 * torch.nn.functional.avg_pool2d(noise, 5, 1, 2)).tanh()


def distance(a, b):
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)


def dense(f, size, dtype=torch.float64):
    """(m, n) matrix of f on pictures of a size, what is hidden left out."""
    basis = torch.eye(3 * size[0] * size[1], dtype=dtype).view(-1, 3, *size)
    return f.difference(f(basis), f(torch.zeros_like(basis))).flatten(1).T


@every_linear
def test_it_comes_closer_to_every_picture_with_that_measurement(f):
    """||match(x) - x*|| <= ||x - x*|| for x* with f(x*) = y: pictures that differ from x* by what f does not see have the same measurement."""
    truth = 0.8 * smooth(seed=1)
    y, matrix = f(truth), dense(f, SIZE)
    null = torch.eye(matrix.shape[1], dtype=torch.float64) - torch.linalg.pinv(matrix, rtol=1e-9) @ matrix
    for seed in range(3):
        x = smooth(seed=10 + seed)
        found = match(f, x, y)
        assert not found.short() and float(found.after.max()) <= LEVEL / 2
        for other in range(3):
            same = truth + 0.05 * (null @ smooth(seed=20 + other).flatten()).view_as(truth)  # within the range of pictures
            assert same.abs().max() <= 1
            torch.testing.assert_close(f.difference(f(same), y), torch.zeros_like(y), atol=1e-6, rtol=0)
            assert (distance(found.image, same) <= distance(x, same) * (1 + 1e-9)).all()


@every_linear
def test_a_second_time_changes_nothing(f):
    y, x = f(smooth(seed=1)), smooth(seed=2)
    once = match(f, x, y).image
    assert torch.equal(match(f, once, y).image, once)
    assert torch.equal(match(f, smooth(seed=1), y).image, smooth(seed=1))  # a picture that has the measurement stays as it is


@pytest.mark.parametrize("lam", [1e-3, 0.3])
@every_linear
def test_a_step_of_given_lam_is_the_minimum(f, lam):
    """argmin_u ||A u - y||^2 / (2 lam) + ||u - x||^2 / 2 by a dense solve, for samples that have y already, too; clamped before and after."""
    y = f(smooth(seed=1))
    x = torch.cat([smooth(seed=1), 1.3 * smooth(seed=2)])
    found = proximal(f, x, y, lam)
    A = dense(f, SIZE)
    start = x.clamp(-1, 1)
    b = -f.difference(f(start), y).flatten(1)
    u = torch.linalg.solve(A @ A.T + lam * torch.eye(len(A), dtype=A.dtype), b.T)
    expected = (start + (A.T @ u).T.view_as(x)).clamp(-1, 1)
    # conjugate gradients end at a tenth of the noise, of which A^T (A A^T + lam)^-1 leaves 1 / (2 sqrt(lam)) at most
    allowed = 0.1 * ROUNDING * math.sqrt(float(f.elements(y).max())) / (2 * math.sqrt(lam))
    assert (distance(found, expected) <= allowed).all()
    assert (distance(expected, start)[1:] > 10 * allowed).all()


def test_a_step_without_lam_is_a_projection_or_a_match():
    x, f = 1.3 * smooth(2, seed=2), Noisy(GaussianBlur(7, 1.2), 0.02)
    y = f.operator(smooth(2, seed=1))
    assert torch.equal(proximal(f, x, y), project(f.operator, x.clamp(-1, 1), y, f.noise).clamp(-1, 1))
    jpeg = Jpeg(50)
    y = jpeg(smooth(2, seed=1)).detach()
    assert torch.equal(proximal(jpeg, x, y), match(jpeg, x, y).image)
    with pytest.raises(ValueError, match="lam is 0.1: JPEG .* is not linear, and has no such step; leave it out"):
        proximal(jpeg, x, y, 0.1)


@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize("f", [f for f in LINEAR if not isinstance(f, Inpainting)], ids=lambda f: f.describe()[:40])
def test_it_is_the_regularised_least_squares_solution(f, noise):
    """The dense oracle: x + A^T (A A^T + lam)^-1 (y - A x) with the lam whose residual is the noise's."""
    truth = smooth(seed=1)
    y = f(truth)
    y = y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = smooth(seed=2)
    A = dense(f, SIZE)
    b = -f.difference(f(x), y).flatten()
    count = float(f.elements(y))
    gram = A @ A.T
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T @ b
    low, high = 1e-12, 1e6
    for _ in range(200):
        lam = math.sqrt(low * high)
        left = lam * torch.linalg.vector_norm(turned / (values + lam))
        low, high = (low, lam) if left > 0.99 * math.sqrt(count) * noise else (lam, high)
    lam = max(low, LEAST * float(values[-1]))
    expected = x + (A.T @ (vectors @ (turned / (values + lam)))).view_as(x)
    found = project(f, x, y, noise)
    # the equation is solved to a tenth of the noise
    assert distance(found, expected) <= 0.15 * distance(x, expected)
    assert float(mismatch(f, found, y)) == pytest.approx(noise, rel=0.05)
    assert float(match(f, x, y, noise).after) < float(mismatch(f, x, y))


@every_linear
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float64, 1e-9)])
def test_a_batch_is_as_many_singles(f, dtype, tolerance):
    y, x = f(smooth(3, seed=1, dtype=dtype)), smooth(3, seed=2, dtype=dtype)
    whole = match(f, x, y)
    assert whole.image.dtype == dtype
    for i in range(3):
        torch.testing.assert_close(match(f, x[i : i + 1], y[i : i + 1]).image, whole.image[i : i + 1], rtol=0, atol=tolerance)
    one = match(f, x, y[:1])  # one measurement for all
    torch.testing.assert_close(one.image[:1], whole.image[:1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (33, 21), (64, 48)])
@pytest.mark.parametrize("f", [Grayscale(), KernelBlur(((1.0,),)), GaussianBlur(3, 0.5), SuperResolution(3)], ids=lambda f: f.name)
def test_any_size(f, size):
    try:
        f.check(size)
    except ValueError:
        return  # too small for it
    found = match(f, smooth(size=size, seed=2), f(smooth(size=size, seed=1)))
    assert found.image.shape[-2:] == size and float(found.after) <= LEVEL / 2


@pytest.mark.parametrize("f", [SuperResolution(4), GaussianBlur(61, 3.0)], ids=lambda f: f.name)
def test_a_thousand_pixels(f):
    x = smooth(size=(512, 1024), dtype=torch.float32)
    found = match(f, x, f(smooth(size=(512, 1024), seed=5, dtype=torch.float32)))
    assert float(found.after) <= LEVEL / 2 and torch.isfinite(found.image).all()


def test_known_pixels_are_the_given_ones():
    f = LINEAR[-1]
    truth, x = smooth(seed=1).float(), smooth(seed=2).float()
    y = f.measure(truth) + f.mask * 0.7  # whatever the damaged picture shows in its hole
    found = match(f, x, y).image
    assert torch.equal(found, torch.where(f.mask > 0, x, truth))
    feathered = match(f, x, y, feather=3.0).image
    assert torch.equal(feathered.where(f.mask == 0, x), found)  # the known pixels as well
    inside = f.mask.expand_as(x) > 0
    assert (feathered != x)[inside].any()


def test_a_feather_fades():
    """A constant difference at the edge is taken over there, and is gone in the middle of a large hole."""
    f = Inpainting(centred_box((65, 65), (41, 41)))
    x = torch.zeros(1, 3, 65, 65)
    found = match(f, x, f(torch.full_like(x, 0.5)), feather=4.0).image[0, 0, 32]
    assert 0.3 < found[12] <= 0.5 and found[20] < 0.2 and abs(float(found[32])) < 1e-3
    steps = found[12:33].diff()
    assert (steps <= 1e-6).all()


def test_noise_of_an_inpainting_is_not_put_back():
    f = LINEAR[-1]
    found = match(Noisy(f, 0.1), smooth(seed=1), f(smooth(seed=1)))
    assert torch.equal(found.image, smooth(seed=1)) and found.noise == pytest.approx(0.2)
    noisy = match(Noisy(f, 0.1), smooth(seed=2), f(smooth(seed=1)))
    assert float(noisy.after) == pytest.approx(0.2, rel=0.05)


def test_less_noise_than_rounding_is_taken_as_rounding():
    f = SuperResolution(2)
    y, x = f(smooth(seed=1)), smooth(seed=2)
    assert match(f, x, y, 1e-6).noise == match(f, x, y, 0.0).noise == match(f, x, y).noise == ROUNDING
    assert pytest.approx(255 / 2 * ROUNDING, abs=1e-3) == 1 / math.sqrt(12)


def test_a_measurement_that_contradicts_the_operator_says_how_far_it_came():
    """A blur makes no noise: no picture has that measurement, and no picture is blown up to have it."""
    f = GaussianBlur(13, 2.0)
    y = smooth(seed=1) + torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = match(f, smooth(seed=2), y)
    assert found.short() and ROUNDING < float(found.after) < float(found.before)
    assert float(project(f, smooth(seed=2), y, ROUNDING).abs().max()) < 100
    assert not match(f, smooth(seed=2), f(smooth(seed=1))).short()


def test_conjugate_gradients_against_a_dense_solution():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    A = A @ A.mT
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    lam = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    u, alphas, betas = solve(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b, lam, torch.full((3,), 1e-10, dtype=torch.float64))
    expected = torch.linalg.solve(A + lam.view(3, 1, 1) * torch.eye(12, dtype=torch.float64), b)
    torch.testing.assert_close(u, expected)
    assert len(alphas) == len(betas) <= 40
    target = torch.linalg.vector_norm(b, dim=1) * torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    found = find_lam(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b, target)
    left = found.view(3, 1) * torch.linalg.solve(A + found.view(3, 1, 1) * torch.eye(12, dtype=torch.float64), b)
    torch.testing.assert_close(torch.linalg.vector_norm(left, dim=1), target, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "f",
    [
        Compose((Jpeg(20), GaussianBlur(3, 0.5))),
        Compose((Inpainting(centred_box((16, 16), (6, 6))), Jpeg(20))),
        Segmentation(random_room_layout(0, (1, 1, 1, 1), 4, 3)),
    ],
    ids=lambda f: f.name,
)
def test_what_is_refused_by_name(f):
    with pytest.raises(ValueError, match="operator: .* is not linear: there is no nearest picture"):
        match(f, torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nonlinear_blur(dtype):
    """Gauss-Newton: against its equation with the dense derivative, and nearer to the picture that was blurred."""
    network = random_kernel_wizard(0, 4, 1, 2).to(dtype).requires_grad_(False)
    f = NonlinearBlur(network)
    truth = 0.8 * smooth(2, (128, 128), seed=1, dtype=dtype)
    x = (truth + 0.2 * smooth(2, (128, 128), seed=2, dtype=dtype)).clamp(-1, 1)
    y = f(truth)
    with torch.inference_mode():  # as in a host
        found = match(f, x, y)
    assert (found.after < found.before / 3).all() and (distance(found.image, truth) < distance(x, truth)).all()
    assert not found.image.requires_grad and all(p.grad is None for p in network.parameters())
    one = match(f, x[:1], y[:1])
    torch.testing.assert_close(one.image, found.image[:1], rtol=0, atol=0.02 if dtype == torch.float32 else 1e-6)
    assert matchable(Compose((f, SuperResolution(2)))) is None is matchable(Noisy(f, 0.1))
    stays = match(f, truth, y)
    assert torch.equal(stays.image, truth)


class Bent(KernelBlur):
    """A blur whose values saturate."""

    linear = False

    def __call__(self, image):
        return super().__call__(image).tanh()


def test_gauss_newton_is_a_regularised_least_squares_step():
    f, size = Bent(KERNEL), (12, 14)
    truth = 0.5 * smooth(size=size, seed=1)
    x = truth + 0.02 * smooth(size=size, seed=2)
    y = f(truth)
    J = torch.autograd.functional.jacobian(f, x).view(y.numel(), x.numel())
    b = (y - f(x)).flatten()
    lam = NEWTON_LAM * (J.T @ b).square().sum() / b.square().sum()
    expected = x + (J.T @ torch.linalg.solve(J @ J.T + lam * torch.eye(len(b), dtype=torch.float64), b)).view_as(x)
    with torch.no_grad():
        found = gauss_newton(f, x, y, 0.0)
    assert distance(found, expected) < 0.1 * distance(x, expected)
    assert float(mismatch(f, found, y)) < 0.1 * float(mismatch(f, x, y))
    unreachable = torch.full_like(y, 3.0)
    far = gauss_newton(f, 3 * x, unreachable, ROUNDING)
    assert float(mismatch(f, far, unreachable)) <= float(mismatch(f, 3 * x, unreachable))


def test_wrong_inputs_are_named():
    f, x = SuperResolution(2), smooth()
    y = f(x)
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"noise is {noise}"):
            match(f, x, y, noise)
        with pytest.raises(ValueError, match=f"feather is {noise}"):
            match(f, x, y, feather=noise)
    with pytest.raises(ValueError, match="image: it is 20x16, and the measurement is that of a picture of 16x16; both"):
        match(f, x, y[..., :8])
    with pytest.raises(ValueError, match="2 measurements for a batch of 1"):
        match(f, x, y.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"measurement: it has 1 channel"):
        match(f, x, y[:, :1])


def test_nothing_outside_changes():
    f, x = GaussianBlur(5, 1.0), smooth(seed=2)
    y = f(smooth(seed=1))
    before, given = x.clone(), y.clone()
    with torch.inference_mode():
        found = match(f, x, y)
    assert isinstance(found, Match) and torch.equal(x, before) and torch.equal(y, given) and not found.image.requires_grad
    torch.testing.assert_close(found.before, mismatch(f, x, y))
    torch.testing.assert_close(found.after, mismatch(f, found.image, y))


def test_verdicts():
    assert verdict(0.3) == "explains your picture to within 1 level"
    assert verdict(1.7) == "explains your picture to within 2 levels"
    assert verdict(4.9, 5.0) == "explains your picture to within 5 levels, which its noise of 5.0 covers"
    assert verdict(6.2).startswith("close to your picture, off by 7 levels")
    assert verdict(54.0) == "off by 54 levels: more steps, or the wrong operator"
    assert verdict(MISFIT + 5.1, 5.0).startswith("off by 21 levels") and not verdict(MISFIT + 4.9, 5.0).startswith("off")


def test_white_stays_white():
    """Much of a picture is at the end of the range: cut off there, the one projection would no longer explain the measurement."""
    f = SuperResolution(4)
    truth = (3 * smooth(size=(32, 32), seed=1, dtype=torch.float32)).clamp(-1, 1)
    x, y = (truth + 0.3 * smooth(size=(32, 32), seed=2, dtype=torch.float32)), f(truth)
    once = project(f, x, y, ROUNDING).clamp(-1, 1)
    assert float(mismatch(f, once, y)) > 3 * ROUNDING
    found = match(f, x, y)
    assert float(found.after) <= LEVEL / 2 and found.image.abs().max() <= 1
    assert distance(found.image, truth) <= distance(x, truth)
