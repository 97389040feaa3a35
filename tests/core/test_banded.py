"""Separable operators multiply blocks along a diagonal: what the dense matrices give, in lengths of one block and of many."""

import pytest
import torch
from torch.autograd import gradcheck

from dmap_core.operators import Compose, GaussianBlur, Inpainting, Jpeg, KernelBlur, MotionBlur, SuperResolution
from dmap_core.operators.kept import Kept, size_in_bytes


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


CASES = [
    (GaussianBlur(), (127, 129)),  # one block, and two
    (GaussianBlur(), (13, 500)),
    (GaussianBlur(61, 0.1), (300, 2)),  # of one tap
    (GaussianBlur(3, 5.0), (257, 385)),
    (GaussianBlur(255, 60.0), (128, 700)),  # blocks as wide as the kernel is
    (SuperResolution(2), (130, 514)),
    (SuperResolution(3), (129, 381)),
    (SuperResolution(8), (8, 1032)),
    (SuperResolution(64), (64, 704)),
]
every_case = pytest.mark.parametrize("f, size", CASES, ids=lambda v: v.describe() if not isinstance(v, tuple) else "x".join(map(str, v)))


@every_case
@pytest.mark.parametrize("batch, channels", [(1, 3), (2, 1), (2, 5)])
def test_against_the_dense_matrices(f, size, batch, channels):
    rows, columns = (f.matrix(n) for n in size)
    x = randn(batch, channels, *size)
    y = f(x)
    torch.testing.assert_close(y, rows @ x @ columns.mT, rtol=0, atol=1e-13)
    back = f.adjoint(y, size)
    torch.testing.assert_close(back, rows.mT @ y @ columns, rtol=0, atol=1e-13)
    assert y.is_contiguous() and back.is_contiguous()


@every_case
def test_adjoint_is_the_gradient(f, size):
    x = randn(1, 2, *size).requires_grad_()
    y = f(x)
    cotangent = randn(*y.shape, seed=1)
    torch.testing.assert_close(torch.autograd.grad(y, x, cotangent)[0], f.adjoint(cotangent, size), rtol=0, atol=1e-13)
    assert gradcheck(f, x, fast_mode=True) and gradcheck(lambda y: f.adjoint(y, size), cotangent.requires_grad_(), fast_mode=True)


@every_case
def test_second_and_forward_derivatives(f, size):
    """match's Gauss-Newton takes the latter of a blur after a nonlinear one."""
    x, v = randn(1, 1, *size), randn(1, 1, *size, seed=1)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], f(v))
    x.requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum() / 2, x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, x, v)[0], f.adjoint(f(v), size))


@every_case
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_lower_precision(f, size, dtype, tolerance):
    x = randn(1, 3, *size).clamp(-1, 1).to(dtype)
    y = f(x)
    assert y.dtype == f.adjoint(y, size).dtype == dtype
    torch.testing.assert_close(y.double(), f(x.double()), rtol=0, atol=tolerance)


@every_case
def test_what_is_hidden(f, size):
    before = torch.zeros(1, 1, *size)
    before[..., : size[0] // 2, size[1] // 2 :] = 1
    rows, columns = ((f.matrix(n) != 0).double() for n in size)
    expected = (rows @ (1 - before.double()) @ columns.mT < 0.5).float()
    assert torch.equal(f.hidden(before) if expected.any() else expected, expected)


def test_one_block_has_the_bits_of_the_dense_product():
    for f in (GaussianBlur(), SuperResolution(4)):
        x, m = randn(2, 3, 128, 128, dtype=torch.float32), f.matrix(128).float()
        assert torch.equal(f(x), m @ x @ m.mT)


def test_bands_are_small():
    f = GaussianBlur()
    f(torch.zeros(1, 1, 4096, 4096))
    assert f.kept.bytes() < 2**22  # the dense matrix in float32: 2^26


ONCE = [GaussianBlur(9, 2.0), SuperResolution(2), MotionBlur(9.0), KernelBlur(torch.rand(33, 33)), Jpeg(10), Inpainting(torch.eye(64))]


@pytest.mark.parametrize("f", [*ONCE, Compose([Inpainting(torch.eye(64)), GaussianBlur(9, 2.0)])], ids=lambda f: f.name)
def test_everything_is_made_once_and_outlives_inference_mode(f, monkeypatch):
    made = []
    original = Kept.__call__

    def counted(self, key, make):
        return original(self, key, lambda: made.append(key) or make())

    monkeypatch.setattr(Kept, "__call__", counted)
    x = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        y = f(x)
        f.distance(y, y)
        f.linear and f.adjoint(y, (64, 64))
    before = list(made)
    x = x.requires_grad_()
    f.distance(f(x), y.clone() + 1).sum().backward()
    assert made == before and made
    f(x.detach().double())
    assert len(made) > len(before)


def test_the_end_of_a_run_leaves_nothing_on_its_device():
    f = GaussianBlur(9, 2.0)
    for device in ("cpu", "meta"):
        f(torch.zeros(1, 3, 64, 64, device=device))
    both = f.kept.bytes()
    assert f.to("cpu") is f and f.kept.bytes() == both / 2
    Compose([f]).to("meta")
    assert f.kept.bytes() == 0


def test_what_is_kept_is_bounded_and_the_last_stay():
    kept = Kept(most=1000)
    assert size_in_bytes((torch.zeros(3), [torch.zeros(2, dtype=torch.float64)], 7)) == 28

    def ask(name, elements):
        return kept(name, lambda: torch.full((elements,), float(elements)))

    a, b = ask("a", 100), ask("b", 100)
    assert ask("a", 1) is a and kept.bytes() == 800
    ask("c", 100)  # b was used least
    assert ask("a", 1) is a and kept.bytes() == 800
    assert ask("b", 100) is not b
    assert len(ask("large", 251)) == 251 and kept.bytes() == 800  # what is larger than all of it takes no room
