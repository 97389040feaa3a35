"""Match: the picture nearest to a given one that explains its measurement, f(x) = y up to the noise. No network is called.

A restoration shows what the autoencoder can say; what the measurement knew better is put back by a projection. For linear f

    x + f^T (f f^T + lam)^-1 (y - f(x))

by conjugate gradients on the measurement's side, without a matrix, or at once where f acts on rows and columns apart (Separable). With lam = 0 it
is the orthogonal projection onto {x : f(x) = y}; lam > 0 leaves as much residual as the noise explains, sqrt(m) noise for m values (Morozov's discrepancy principle), so that no noise is inverted with a blur.
For every lam and every picture x* with f(x*) = y the distance to x* does not grow: the error e becomes lam (f^T f + lam)^-1 e on f's row space.
For a nonlinear blur the same with its derivative, a few times (Gauss-Newton), which promises nothing and is kept only where it helps.
Of a JPEG the pictures with a measurement are a box of coefficients (`operators/jpeg_cells.py`), onto which the projection is a clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .operators import Compose, Inpainting, Jpeg, Noisy, NonlinearBlur, Operator, Segmentation
from .operators.base import Separable, Size, check_batch, squared_norm
from .operators.jpeg import ROUNDINGS
from .operators.jpeg_cells import nearest_picture, read_file
from .operators.noisy import parts

ROUNDING = 2 / 255 / math.sqrt(12)  # standard deviation, in units of [-1, 1], of rounding to 8 bits: the least noise of a picture file
HALF = 1 / 255  # half a grey level in units of [-1, 1]: a picture that is no further from its measurement is left as it is
MISFIT = 16  # grey levels (RMS), above the noise, from which on a result shows something else than the measurement
REACHED = (
    8 * HALF
)  # what counts as that where f is not linear: some of what a JPEG clipped is a guess, and seen in a whole block; Gauss-Newton ends before half a level
NEWTON, NEWTON_ITERATIONS = 3, 15  # rounds of a nonlinear blur, and of conjugate gradients in each; those few regularise, too
NEWTON_LAM = 1e-3  # of f's squared gain in the residual's direction
FILE_ROUNDS = 100  # the same for a JPEG, where a round is cheap
RELAXED = 1.8  # of the 2 that a step may have; the norm is known to a few per cent
ROUNDS = 20  # of projections onto the measurement and onto the range of pictures, at most
ITERATIONS = 200  # of conjugate gradients, at most
LANCZOS = 80  # of those that look for lam, at most: with 200 the residual of a motion blur is 0.2 % nearer to what is aimed at
AIM = 0.99  # of the noise's norm, so that a matched picture is one that needs no matching
EXACT = 0.1  # of the noise's norm: how well the equation is solved
LEAST = 1e-4  # of f's largest squared singular value: a smaller lam would amplify what is no part of any measurement more than fiftyfold


# From when on matching spoils a picture: moved so many times as far as it missed the measurement, and neighbouring pixels so many times as far apart as before. Where the operator was
# right that was at most 7.9 and 1.5 (a motion of 61 pixels), where matching cost 8 dB and more at least 8 and 2 (docs/troubleshooting.md).
TOO_FAR, TOO_ROUGH = 5.0, 1.75


@dataclass(frozen=True)
class Match:
    """image: (B, 3, H, W) in [-1, 1]. noise: what was assumed, in units of [-1, 1]. before, after: root mean square of f(x) - y per sample, (B,).

    floor: what `after` may be for a measurement to count as reached. moved: root mean square of what matching changed, rougher: how many times as
    far apart neighbouring pixels are as before; per sample, (B,).
    """

    image: Tensor
    noise: float
    before: Tensor
    after: Tensor
    floor: float
    moved: Tensor
    rougher: Tensor

    def doubtful(self) -> Tensor:
        """(B,) of bool: whether matching spoilt it, which a blur or a noise does that is not what was said: what f hides comes back amplified."""
        return (self.moved > TOO_FAR * self.before) & (self.rougher > TOO_ROUGH)

    def short(self) -> bool:
        """Whether some measurement could not be reached: it contradicts the operator, or the noise is larger than said."""
        return bool((self.after > 1.05 * self.floor).any())


def verdict(rms: float, noise: float = 0.0) -> str:
    """One sentence about a mismatch for people. rms and noise in grey levels of 255."""
    if rms > MISFIT + noise:
        return f"off by {rms:.0f} levels: more steps, or the wrong operator"
    within = f"{max(math.ceil(rms), 1)} level{'s' if rms > 1 else ''}"
    if rms <= noise + 2:
        return f"explains your picture to within {within}" + (f", which its noise of {noise:.1f} covers" if 1 < rms <= 1.05 * noise else "")
    return f"close to your picture, off by {within}: Match Measurement closes the gap"


def matchable(operator: Operator) -> str | None:
    """Why pictures cannot be matched to an operator's measurements, for people; None if they can."""
    f = operator.operator if isinstance(operator, Noisy) else operator
    if f.linear or differentiable(f):
        return None
    if split(f) is None:
        return f"{f.describe()} is not linear: there is no nearest picture that can be computed"
    return f"{operator.describe()}: noise on top of a JPEG hides what its file held" if operator is not f else None


def split(f: Operator) -> tuple[Operator | None, Jpeg] | None:
    """(what comes before it, JPEG) of an operator that compresses last what linear ones made of known pixels; None of any other.

    The JPEG is as an encoder and a decoder make it, whatever its gradient would be.
    """
    *before, last = parts(f)
    if not isinstance(last, Jpeg) or not all(g.linear and g.hidden() is None for g in before):
        return None
    return Compose(tuple(before)) if before else None, replace(last, rounding=ROUNDINGS[0])


def differentiable(f: Operator) -> bool:
    """Whether f is a nonlinear blur, or one with linear operators of known pixels."""
    made_of = parts(f)
    return any(isinstance(g, NonlinearBlur) for g in made_of) and all(
        (g.linear or isinstance(g, NonlinearBlur)) and g.hidden() is None for g in made_of
    )


def match(operator: Operator, image: Tensor, y: Tensor, noise: float | None = None, feather: float = 0.0) -> Match:
    """The picture nearest to `image` (B, 3, H, W) in [-1, 1] that explains y (1 or B, c, h, w).

    noise: standard deviation of y's noise in units of [-1, 1]; None: the operator's, which is 0 unless it is known. At least that of 8 bits' rounding is
    assumed. Inpainting: known pixels are y's to the bit where the noise is that of rounding; feather: over how many pixels of the hole the difference at
    its edge fades away. Raises ValueError for operators that cannot be matched, and wrong shapes.
    """
    refused = matchable(operator)
    if refused:
        raise ValueError(f"operator: {refused}")
    noise = operator.noise if noise is None else noise
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is {noise}; it must be a number of at least 0")
    if not (math.isfinite(feather) and feather >= 0):
        raise ValueError(f"feather is {feather}; it must be a number of pixels of at least 0")
    noise = max(float(noise), ROUNDING)
    operator.check_measurement(y, image.shape[1])
    check_batch(y, len(image))
    if operator.image_size(y) != tuple(image.shape[-2:]):
        (h, w), (height, width) = operator.image_size(y), image.shape[-2:]
        raise ValueError(f"image: it is {width}x{height}, and the measurement is that of a picture of {w}x{h}; both must be of one size")
    with torch.inference_mode(False), torch.no_grad():
        x = image.to(torch.promote_types(image.dtype, torch.float32))
        y = y.to(x).expand(len(x), -1, -1, -1)
        f = operator.operator if isinstance(operator, Noisy) else operator
        if file := split(f):
            f = Compose(tuple(g for g in file if g))
        before = mismatch(f, x, y)
        found = fill(f, x, y, feather) if isinstance(f, Inpainting) and noise == ROUNDING else within_range(f, x, y, noise)
        start, after = x.clamp(-1, 1), mismatch(f, found, y)
        moved, rougher = (found - start).square().mean((1, 2, 3)).sqrt(), roughness(found) / roughness(start).clamp(min=1e-6)
        return Match(found.to(image.dtype), noise, before, after, max(noise, HALF if f.linear else REACHED), moved, rougher)


def roughness(image: Tensor) -> Tensor:
    """Root mean square of the differences between neighbouring pixels of pictures (B, C, H, W), (B,)."""
    squares = [image.diff(dim=dim).square().flatten(1) for dim in (-2, -1)]
    return torch.cat(squares, 1).mean(1).sqrt()


def mismatch(operator: Operator, image: Tensor, y: Tensor) -> Tensor:
    """Root mean square of f(image) - y per sample, (B,) float32, over what was measured."""
    difference = operator.difference(operator(image), y).float().flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / operator.elements(y).to(difference).sqrt()


def grey_levels(operator: Operator, y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What y_hat = f(image) and y differ by in grey levels of 255: (root mean square, worst), (B,) each.

    Raises NotImplementedError where the two are not values to subtract.
    """
    levels = (operator.difference(y_hat, y).float() * 127.5).flatten(1)
    rms = torch.linalg.vector_norm(levels, dim=1) / operator.elements(y).to(levels).sqrt()
    return rms, levels.abs().amax(dim=1)


def residual_levels(operator: Operator, residual: Tensor, y: Tensor) -> Tensor | None:
    """What residuals (B,) of `operator.distance` from y (B, c, h, w) are in grey levels of 255, as a root mean square, (B,); None where values are not compared.

    Of known noise, which the residual is without: an upper bound where that is 0.
    """
    if isinstance(parts(operator)[-1], Segmentation):
        return None
    return (residual / operator.elements(y).to(residual).sqrt() + operator.noise) * 127.5


def fill(f: Inpainting, x: Tensor, y: Tensor, feather: float) -> Tensor:
    """y where it is known, x in the hole; there what they differ by at the edge fades away over `feather` pixels."""
    x = x.clamp(-1, 1)
    known = (1 - f.mask.to(x)).expand(len(x), -1, -1, -1)
    if feather > 0:
        weight = _smooth(known, feather / 2)
        x = x + (2 * weight).clamp(max=1) * _smooth(known * (y - x), feather / 2) / weight.clamp(min=1e-6)
    return torch.where(known > 0, y, x)


def _smooth(x: Tensor, sigma: float) -> Tensor:
    """x under a Gaussian of that many pixels, zero outside the picture."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-(torch.arange(-radius, radius + 1).to(x) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    for _ in range(2):
        x = torch.nn.functional.conv2d(x, taps, padding=(0, radius), groups=x.shape[1]).mT
    return x


def within_range(f: Operator, x: Tensor, y: Tensor, noise: float) -> Tensor:
    """A picture in [-1, 1] that explains y, by projections onto the two in turn (POCS): what a projection adds at white and black is cut off in any file.

    Neither projection moves away from any picture in [-1, 1] with that measurement; Gauss-Newton, of a nonlinear blur, may.
    """
    x, found = x.clamp(-1, 1), split(f)
    if found:
        rounds, nearer = FILE_ROUNDS, towards_file(*found, x, y)
    elif f.linear:
        rounds, nearer = ROUNDS, lambda x: project(f, x, y, noise)
    else:
        rounds, nearer = NEWTON, lambda x: gauss_newton(f, x, y, noise)
    for _ in range(rounds):
        missed = mismatch(f, x, y) > max(noise, HALF)
        if not missed.any():
            break
        x = torch.where(_column(missed, x) > 0, nearer(x).clamp(-1, 1), x)
    return x


def gauss_newton(f: Operator, x: Tensor, y: Tensor, noise: float) -> Tensor:
    """The formula above with the derivative J of f at x in the place of f, or x where that explains y no better."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        y_hat = f(at)

    def transposed(u: Tensor) -> Tensor:
        return torch.autograd.grad(y_hat, at, u, retain_graph=True)[0]

    def gram(u: Tensor) -> Tensor:
        with torch.enable_grad():  # without it there are no forward derivatives either
            return torch.func.jvp(f, (x,), (transposed(u),))[1].detach()

    residual = -f.difference(y_hat.detach(), y)
    target = f.elements(y).sqrt().cpu().double() * noise
    lam = NEWTON_LAM * _dot(residual, gram(residual)) / _dot(residual, residual)
    u, *_ = solve(gram, residual, lam, target / 2, NEWTON_ITERATIONS)
    found = (x + transposed(u)).clamp(-1, 1)
    better = mismatch(f, found, y) < mismatch(f, x, y)
    return torch.where(_column(better, x) > 0, found, x)


def towards_file(before: Operator | None, jpeg: Jpeg, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """A step of a picture like x towards those that `before` and `jpeg` make y of: the projection, or x + gamma f^T (P f(x) - f(x)) with P that onto
    the file's cells and gamma < 2 / ||f||^2 (the CQ algorithm; Byrne 2002), after which no picture with that measurement is farther than before.
    """
    kept = read_file(jpeg, y)
    if before is None:
        return lambda x: nearest_picture(jpeg, x, kept)
    size = (x.shape[-2], x.shape[-1])
    gamma = RELAXED / squared_norm(before, size, before(x))

    def step(x: Tensor) -> Tensor:
        w = before(x)
        return x + gamma * before.adjoint(nearest_picture(jpeg, w, kept) - w, size)

    return step


def proximal(operator: Operator, image: Tensor, y: Tensor, lam: float | None = None) -> Tensor:
    """One step of `image` (B, 3, H, W) towards its measurement y (1 or B, c, h, w), in [-1, 1] before and after; of what is no step, `match`.

    lam: that of the formula above, which is then argmin_u ||f(u) - y||^2 / (2 lam) + ||u - image||^2 / 2, for linear f; None: every sample's own, by the
    discrepancy of the operator's noise. Other operators that `matchable` knows take all their rounds. Raises ValueError as `match` does.
    """
    f = operator.operator if isinstance(operator, Noisy) else operator
    if not f.linear:
        if lam is not None:
            raise ValueError(f"lam is {lam}: {operator.describe()} is not linear, and has no such step; leave it out")
        return match(operator, image, y).image
    with torch.inference_mode(False), torch.no_grad():
        x = image.to(torch.promote_types(image.dtype, torch.float32)).clamp(-1, 1)
        return project(f, x, y.to(x).expand(len(x), -1, -1, -1), max(operator.noise, ROUNDING), lam).clamp(-1, 1).to(image.dtype)


def project(f: Operator, x: Tensor, y: Tensor, noise: float, lam: float | None = None) -> Tensor:
    """The formula above for a linear f, with every sample's own lam; a sample that explains its measurement already stays as it is.

    lam: another one, for all; then none stays, and noise only says how well the equation is solved.
    """
    size = (x.shape[-2], x.shape[-1])
    hidden = f.hidden()
    visible = 1.0 if hidden is None else 1 - hidden.to(y)

    def gram(u: Tensor) -> Tensor:
        return visible * f(f.adjoint(visible * u, size))

    residual = visible * -f.difference(f(x), y)
    target = f.elements(y).sqrt().cpu().double() * noise
    if lam is None:
        wanted = _norm(residual) > target
        if not wanted.any():
            return x
        residual = residual * _column(wanted, residual)
    if isinstance(f, Separable):
        u = solve_separable(f, residual, size, target, lam)
    else:
        found = find_lam(gram, residual, target) if lam is None else torch.full_like(target, lam)
        u, *_ = solve(gram, residual, found, EXACT * target)
    return x + f.adjoint(visible * u, size)


def solve(
    A: Callable[[Tensor], Tensor], b: Tensor, lam: Tensor, accuracy: Tensor, most: int = ITERATIONS
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(u, alphas, betas): (A + lam) u = b by conjugate gradients, until ||b - (A + lam) u|| of every sample is at most its accuracy, or `most` times.

    A: linear, symmetric and positive semidefinite, acting on every sample (B, ...) alone. lam, accuracy: (B,) float64 on the CPU, as alphas, betas: (B,) of every
    iteration, 0 of a sample that has finished: the coefficients of Lanczos' tridiagonal matrix.
    """
    u, r = torch.zeros_like(b), b
    p, rr = r, _norm(r) ** 2
    alphas, betas = [], []
    for _ in range(most):
        going = rr.sqrt() > accuracy
        if not going.any():
            break
        q = A(p) + _column(lam, p) * p
        pq = _dot(p, q)
        going &= pq > 0
        alpha = torch.where(going, rr / pq, 0.0)
        u, r = u + _column(alpha, p) * p, r - _column(alpha, p) * q
        new = _norm(r) ** 2
        beta = torch.where(going, new / rr, 0.0)
        p, rr = r + _column(beta, p) * p, torch.where(going, new, 0.0)
        alphas.append(alpha)
        betas.append(beta)
    return u, alphas, betas


def find_lam(A: Callable[[Tensor], Tensor], b: Tensor, target: Tensor) -> Tensor:
    """(B,) lam at which the residual lam ||(A + lam)^-1 b|| is `target` (B,), at least LEAST of A's largest eigenvalue.

    Conjugate gradients without lam make Lanczos' tridiagonal matrix of A and b, whose eigenvalues stand for A's (Golub & Meurant 2010): a whole
    curve of residuals for the price of one solution.
    """
    _, alphas, betas = solve(A, b, torch.zeros_like(target), target / 2, LANCZOS)
    found = torch.ones_like(target)  # where there is nothing to solve
    if not alphas:
        return found
    alpha, beta, aim, size = torch.stack(alphas, 1), torch.stack(betas, 1), AIM * target, _norm(b)
    counts = (alpha > 0).sum(1)
    for n in counts[counts > 0].unique().tolist():
        of = counts == n
        a, c = alpha[of, :n], beta[of, : n - 1]
        diagonal = 1 / a
        diagonal[:, 1:] += c / a[:, :-1]
        beside = c.sqrt() / a[:, :-1]
        matrices = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        values, vectors = torch.linalg.eigh(matrices)
        found[of] = _lam_of(values.clamp(min=0), (size[of, None] * vectors[:, 0]) ** 2, aim[of])
    return found


def _lam_of(values: Tensor, power: Tensor, aim: Tensor) -> Tensor:
    """(B,) lam at which lam ||(A + lam)^-1 b|| is `aim` (B,), or the least allowed: A's eigenvalues (n,) or (B, n), and b's power (B, n) in each's direction."""
    largest = values.amax(-1).expand(len(power))
    low, high = largest * LEAST, largest * 1e6
    for _ in range(60):  # the residual rises with lam
        middle = (low * high).sqrt()
        left = ((middle[:, None] / (values + middle[:, None])) ** 2 * power).sum(1).sqrt()
        low, high = torch.where(left > aim, low, middle), torch.where(left > aim, middle, high)
    return low


def _eigen(f: Separable, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, float64 on the CPU, and eigenvectors of M M^T along an axis of pictures, in the dtype and on the device of `like`."""

    def make() -> tuple[Tensor, Tensor]:
        m = f.matrix(length)
        values, vectors = torch.linalg.eigh(m @ m.mT)
        return values.clamp(min=0), vectors.to(like)

    return f.kept(("eigen", length, like.dtype, like.device), make)


def solve_separable(f: Separable, b: Tensor, size: Size, target: Tensor, lam: float | None = None) -> Tensor:
    """(f f^T + lam)^-1 b, lam as in `find_lam` unless given, for f(x) = M_h x M_w^T: by the eigenvectors of M_h M_h^T and M_w M_w^T, exactly."""
    (rows, into), (columns, across) = (_eigen(f, n, b) for n in size)
    values = rows[:, None] * columns
    turned = into.mT @ b @ across
    if lam is None:
        found = _lam_of(values.flatten(), turned.cpu().double().square().sum(1).flatten(1), AIM * target)
    else:
        found = torch.tensor([lam], dtype=torch.float64)
    damped = values + found.view(-1, 1, 1, 1)
    return into @ (turned / damped.to(b)) @ across.mT


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) float64 on the CPU. Summed where a and b are, in their dtype: not every device has float64."""
    return (a * b).flatten(1).sum(1).cpu().double()


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()
