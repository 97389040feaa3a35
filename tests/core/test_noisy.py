"""Noisy: no guidance inside the ball that the noise fills, the plain one outside."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch.autograd import gradcheck

from dmap_core.operators import (
    Compose,
    GaussianBlur,
    Grayscale,
    Inpainting,
    Noisy,
    Operator,
    Segmentation,
    SuperResolution,
    from_spec,
)

SIGMA = 0.05


def hole(height, width):
    mask = torch.zeros(height, width)
    mask[1 : height // 2 + 1, width // 3 :] = 1
    return mask


WRAPPED = [SuperResolution(2), GaussianBlur(5, 1.0), Inpainting(hole(8, 10)), Grayscale(), Compose([Grayscale(), SuperResolution(2)])]
every_operator = pytest.mark.parametrize("operator", WRAPPED, ids=lambda f: f.name)


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).sub(1)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual_of(length, *shape, seed=2):
    """A tensor whose every sample has that norm."""
    r = noise(*shape, seed=seed)
    return r * (length / r.flatten(1).norm(dim=1)).view(-1, *[1] * (r.ndim - 1))


def gradient(f, y_hat, y):
    y_hat = y_hat.clone().requires_grad_()
    return torch.autograd.grad(f.distance(y_hat, y).sum(), y_hat)[0]


@every_operator
def test_the_true_measurement_is_hardly_more_than_the_noise_away(operator):
    """The norm of m normal numbers is sqrt(m) but for a normal number of deviation 1 / sqrt(2), nearly: what is above is 0.28 on average."""
    draws = 3000
    f = Noisy(operator, SIGMA)
    clean = f(picture(1, 3, 8, 10)).expand(draws, -1, -1, -1)
    distance = f.distance(clean, clean + f.noise * noise(*clean.shape)).double() / f.noise
    assert distance.mean() == pytest.approx(1 / (2 * math.sqrt(math.pi)), abs=0.04)
    assert (distance == 0).double().mean() == pytest.approx(0.5, abs=0.05)
    assert distance.max() < 4


@every_operator
@pytest.mark.parametrize("wrong_by", [2.0, 10.0])
def test_a_wrong_picture_is_as_far_as_it_is_beyond_the_noise(operator, wrong_by):
    f = Noisy(operator, SIGMA)
    y = f(picture(2, 3, 8, 10))
    radius = 2 * SIGMA * operator.elements(y).sqrt()
    y_hat = y + operator(residual_of(10.0, 2, 3, 8, 10)) * wrong_by
    plain = operator.distance(y_hat, y)
    assert (plain > radius).all()
    torch.testing.assert_close(f.distance(y_hat, y), plain - radius)


@every_operator
def test_no_gradient_inside_and_the_plain_one_outside(operator):
    f = Noisy(operator, SIGMA)
    y = f(picture(3, 3, 8, 10))
    r = y.clone()
    r[:] = operator(picture(3, 3, 8, 10, seed=5))  # within the known pixels of a mask
    radius = 2 * SIGMA * operator.elements(y).sqrt().double()
    length = torch.stack([0.0 * radius[0], 0.99 * radius[1], 1.01 * radius[2]])  # the truth itself, inside, outside
    y_hat = y + r / r.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * length.view(-1, 1, 1, 1)
    distance, grad = f.distance(y_hat, y), gradient(f, y_hat, y)
    assert distance.dtype == torch.float32 and distance.shape == (3,)
    assert distance[0] == 0 and distance[1] == 0
    assert float(distance[2]) == pytest.approx(0.01 * float(radius[2]), rel=1e-3)
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
    assert torch.equal(grad[2], gradient(operator, y_hat, y)[2])
    assert grad[2].norm() == pytest.approx(1, rel=1e-5)


@dataclass(frozen=True)
class InDouble(Operator):
    """The distance in float64, which finite differences need."""

    def __call__(self, image):
        return image

    def distance(self, y_hat, y):
        return torch.linalg.vector_norm((y_hat - y).flatten(1), dim=1)


def test_gradcheck_outside():
    f = Noisy(InDouble(), SIGMA)
    y = picture(2, 3, 3, 4)
    y_hat = (y + residual_of(3.0, 2, 3, 3, 4)).requires_grad_()
    assert f.distance(y_hat, y).min() > 0
    assert gradcheck(lambda y_hat: f.distance(y_hat, y), (y_hat,), fast_mode=False)


def test_only_known_pixels_count():
    mask = hole(8, 10)
    f = Noisy(Inpainting(mask), SIGMA)
    y = f(picture(1, 3, 8, 10))
    known = 3 * int((1 - mask).sum())
    assert float(f.elements(y)) == known
    residual = f(residual_of(1.0, 1, 3, 8, 10))
    residual = 5.0 * residual / residual.norm()
    expected = 5.0 - math.sqrt(known) * 2 * SIGMA
    assert expected > 0
    painted_over = y + 7 * mask.double()
    for shown in (y, painted_over):
        assert float(f.distance(y + residual, shown)) == pytest.approx(expected, rel=1e-6)
    assert not gradient(f, y, painted_over).any()


def test_one_mask_per_sample_makes_one_ball_per_sample():
    masks = torch.zeros(2, 1, 8, 10)
    masks[0, 0, 0, 0], masks[1, 0, :, 1:] = 1, 1
    f = Noisy(Inpainting(masks), SIGMA)
    y = torch.zeros(2, 3, 8, 10)
    y_hat = f(torch.full_like(y, 0.2))
    counts = torch.tensor([3 * 79.0, 3 * 8.0])
    torch.testing.assert_close(f.distance(y_hat, y), counts.sqrt() * 0.2 - counts.sqrt() * 0.1)


def test_counts_that_half_cannot_hold():
    mask = torch.zeros(300, 300)
    mask[0, 0] = 1
    f = Noisy(Inpainting(mask), 0.1)
    y = torch.zeros(1, 3, 300, 300, dtype=torch.float16)
    expected = math.sqrt(3 * (300**2 - 1)) * (0.5 - 0.2)
    assert float(f.distance(f(y + 0.5), y)) == pytest.approx(expected, rel=1e-3)


def test_guidance_sees_no_noise_and_the_measurement_knows_of_it():
    x = picture(2, 3, 8, 10)
    f = Noisy(GaussianBlur(5, 1.0), 5 / 255)
    assert torch.equal(f(x), GaussianBlur(5, 1.0)(x)) and torch.equal(f.measure(x), f(x))
    assert f.noise == pytest.approx(10 / 255)
    assert GaussianBlur().noise == 0


class Scores(Operator):
    """Everything an operator may do in a way of its own."""

    linear = False

    def __init__(self, device="cpu"):
        self.device = device

    def __call__(self, image):
        return image.sum(1, keepdim=True)[..., ::2, ::4].repeat(1, 2, 1, 1)

    def measure(self, image):
        return self(image) + 1

    def check(self, size, batch=1):
        if batch == 9:
            raise ValueError("Scores: nine")

    def to(self, device):
        return Scores(device)

    def measurement_size(self, size):
        return size[0] // 2, size[1] // 4

    def image_size(self, y):
        return y.shape[-2] * 2, y.shape[-1] * 4

    def channels(self, image_channels=3):
        return 2

    def hint(self, y):
        return y + 2

    def picture(self, y):
        return y + 3

    def read(self, picture, channels=None):
        return picture + 4


def test_everything_else_is_the_operators_own():
    operator = Scores()
    f, x = Noisy(operator, SIGMA), picture(2, 3, 8, 12)
    y = operator(x)
    assert torch.equal(f(x), y)
    for method in ("measure", "hint", "picture", "read", "elements"):
        assert torch.equal(getattr(f, method)(y), getattr(operator, method)(y)), method
    assert f.channels() == 2 and f.measurement_size((8, 12)) == (4, 3) and f.image_size(y) == (8, 12) and not f.linear
    f.check((8, 12), 2)
    with pytest.raises(ValueError, match="Scores: nine"):
        f.check((8, 12), 9)
    moved = f.to("meta")
    assert moved.operator.device == "meta" and moved.sigma == f.sigma and f.operator.device == "cpu"


def test_a_linear_operator_keeps_its_adjoint():
    operator = Compose([Grayscale(), SuperResolution(2)])
    f = Noisy(operator, SIGMA)
    y = operator(picture(1, 3, 8, 10))
    assert f.linear
    assert torch.equal(f.adjoint(y, (8, 10)), operator.adjoint(y, (8, 10)))


@dataclass(frozen=True)
class Labels(Operator):
    """A distance that is no norm."""

    def __call__(self, image):
        return image

    def elements(self, y):
        raise ValueError("Labels: a cross-entropy has no noise level")


def test_an_operator_that_compares_no_values_is_refused_before_sampling():
    with pytest.raises(
        ValueError, match=r"operator: known noise belongs to measured values, and Labels does not compare any: Labels: a cross-entropy"
    ):
        Noisy(Labels(), SIGMA).check((8, 10))


def test_check_refuses_what_the_operator_cannot_take():
    Noisy(SuperResolution(2), SIGMA).check((8, 10), 4)
    with pytest.raises(ValueError, match="^SuperResolution: a picture of 9x8"):
        Noisy(SuperResolution(2), SIGMA).check((8, 9))
    two = Inpainting(torch.stack([hole(8, 10), hole(8, 10).flip(0)]).unsqueeze(1))
    Noisy(two, SIGMA).check((8, 10), 2)
    with pytest.raises(ValueError, match="^Inpainting: 2 masks for a batch of 3"):
        Noisy(two, SIGMA).check((8, 10), 3)


@pytest.mark.parametrize("operator", [SuperResolution(2), Compose([Grayscale(), GaussianBlur(9, 1.5)])], ids=lambda f: f.name)
def test_spec_survives_json(operator):
    f = Noisy(operator, 0.1 + 0.2)
    spec = f.spec()
    before = json.dumps(spec, allow_nan=False)
    again = from_spec(json.loads(before))
    assert again == f and again.describe() == f.describe() and again.sigma == 0.1 + 0.2
    from_spec(spec)
    assert json.dumps(spec) == before


def test_describe():
    assert Noisy(SuperResolution(4), 0.02).describe() == "Known Noise (Super-Resolution (scale 4), sigma 0.02)"


def test_noise_comes_last():
    with pytest.raises(ValueError, match="Compose: Known Noise cannot be a part; noise comes last"):
        Compose([Grayscale(), Noisy(SuperResolution(2), SIGMA)])
    with pytest.raises(ValueError, match="Compose: Known Noise cannot be a part"):
        Compose([Noisy(SuperResolution(2), SIGMA)])


SR = {"operator": "SuperResolution", "scale": 2}
NOISY = {"operator": "Noisy", "of": SR, "sigma": 0.1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"of": SR, "sigma": 0}, r"Noisy: sigma is 0 \(picture values 0\.\.1\); it must be a number above 0"),
        ({"of": SR, "sigma": -0.1}, r"Noisy: sigma is -0\.1"),
        ({"of": SR, "sigma": math.nan}, r"Noisy: sigma is nan"),
        ({"of": SR, "sigma": math.inf}, r"Noisy: sigma is inf"),
        ({"of": SR, "sigma": "loud"}, r"Noisy: sigma is 'loud'"),
        ({"of": SR, "sigma": None}, r"Noisy: sigma is None"),
        ({"of": SR}, r"Noisy.*sigma"),
        ({"sigma": 0.1}, r"Noisy.*of"),
        ({"of": SR, "sigma": 0.1, "colour": "pink"}, r"Noisy.*colour"),
        ({"of": {"operator": "Sharpen"}, "sigma": 0.1}, r"unknown operator 'Sharpen'"),
        ({"of": {**SR, "scale": 1}, "sigma": 0.1}, r"SuperResolution: scale is 1"),
        ({"of": NOISY, "sigma": 0.1}, r"Noisy: Known Noise \(Super-Resolution \(scale 2\), sigma 0\.1\) is noisy already"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_spec({"operator": "Noisy", **settings})


def test_something_that_is_no_operator_is_refused():
    with pytest.raises(ValueError, match="Noisy: operator is 'SuperResolution'; it must be the operator"):
        Noisy("SuperResolution", SIGMA)


def test_masks_are_read_by_the_operator_within():
    masks = torch.zeros(5, 2, 3)
    masks[3] = 1
    assert torch.equal(Noisy(Segmentation(None), SIGMA).read_masks(masks), torch.full((1, 1, 2, 3), 3.0))
    with pytest.raises(ValueError, match="measures a picture, and a mask was given"):
        Noisy(SuperResolution(2), SIGMA).read_masks(masks)
