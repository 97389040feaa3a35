"""Blurs: a Gaussian, any kernel, and the motion of a camera."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Operator, Separable, Size, nothing_left, real, shown, size_of, whole
from .boundary import reflect_index

TRUNCATE = 4.0  # the paper's kernel comes from scipy's gaussian_filter, which cuts at 4 sigma

LARGEST = 1023  # pixels, of the sides of kernels and of what makes them
# Taps of the largest kernel that is convolved directly; above, by Fourier transforms. On a CPU these win from about 100 taps on (colour pictures of 128 to
# 1024 pixels, there and back, one core: 9 x 9 is even at 512; 23 x 23 takes a tenth of the time, 41 x 41 a thirtieth). The two differ by rounding.
DIRECT = 10 * 10


def gaussian_radius(kernel_size: int, sigma: float) -> int:
    """Taps of a Gaussian on either side of its centre: cut at 4 sigma and at the kernel's size."""
    return min((kernel_size - 1) // 2, int(TRUNCATE * sigma + 0.5))


def gaussian_taps(kernel_size: int, sigma: float) -> Tensor:
    """Normalised samples of a Gaussian, float64."""
    radius = gaussian_radius(kernel_size, sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    if radius == 0:  # where sigma may be so small that its square is 0
        return torch.ones_like(x)
    taps = torch.exp(-(x**2) / (2 * sigma**2))
    return taps / taps.sum()


def _check_room(name: str, size: Size, radii: tuple[int, int]) -> Size:
    """A reflection needs more pixels than the kernel reaches past an edge."""
    for length, radius in zip(size, radii, strict=True):
        if length <= radius:
            raise ValueError(
                f"{name}: a picture of {size[1]}x{size[0]} is too small for a kernel that reaches {radius} pixels past its centre; "
                "it needs more pixels than that along that side"
            )
    return size


@dataclass(frozen=True)
class GaussianBlur(Separable):
    """Gaussian blur of standard deviation `sigma` pixels, `kernel_size` (odd) taps at most, cut at 4 sigma, reflect padding (B.1).

    sigma: above 0 and at most 1023. kernel_size: 3 to 1023. Raises ValueError for other settings.
    """

    kernel_size: int = 61
    sigma: float = 3.0

    title = "Gaussian Blur"

    def __post_init__(self):
        object.__setattr__(self, "sigma", real("GaussianBlur: sigma", self.sigma, LARGEST, unit="pixels"))
        object.__setattr__(self, "kernel_size", whole("GaussianBlur: kernel_size", self.kernel_size, 3, LARGEST, odd=True))

    def taps(self, length: int) -> tuple[Tensor, Tensor]:
        taps = gaussian_taps(self.kernel_size, self.sigma)
        return reflect_index(length, len(taps) // 2).unfold(0, len(taps), 1), taps.expand(length, -1)

    def measurement_size(self, size: Size) -> Size:
        radius = gaussian_radius(self.kernel_size, self.sigma)
        return _check_room(self.name, size, (radius, radius))

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(size_of(y))


def fast_length(n: int) -> int:
    """The least number of at least n without prime factors above 5: Fourier transforms of other lengths may take several times longer."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


class Correlation(Operator):
    """f(x) = x correlated with one 2-D kernel of odd sides, per channel, reflect padding, same size.

    Kernels of more than `DIRECT` taps go by Fourier transforms, in float32 at least: the same to rounding, adjoint and gradient included.
    """

    def kernel_tensor(self) -> Tensor:
        """(k_h, k_w) float64, made once."""
        raise NotImplementedError

    def _radii(self) -> tuple[int, int]:
        height, width = self.kernel_tensor().shape
        return height // 2, width // 2

    def _padding(self, size: Size, device: torch.device) -> tuple[Tensor, ...]:
        def make() -> tuple[Tensor, ...]:
            return tuple(reflect_index(n, radius).to(device) for n, radius in zip(size, self._radii(), strict=True))

        return self.kept(("padding", *size, device), make)

    def _kernel(self, size: Size, like: Tensor) -> Tensor:
        """The kernel or, if it is large, its spectrum for pictures of `size` with their padding."""
        kernel = self.kernel_tensor()
        if kernel.numel() <= DIRECT:
            return self.kept(("kernel", like.dtype, like.device), lambda: kernel.to(like))
        padded = (size[0] + kernel.shape[0] - 1, size[1] + kernel.shape[1] - 1)
        wide = torch.promote_types(like.dtype, torch.float32)  # there are no Fourier transforms of half precision on a CPU
        return self.kept(("spectrum", *padded, wide, like.device), lambda: spectrum(kernel.to(like.device, wide), padded))

    def _padded(self, image: Tensor) -> Tensor:
        rows, columns = self._padding(size_of(image), image.device)
        return image.index_select(-2, rows).index_select(-1, columns)

    def __call__(self, image: Tensor) -> Tensor:
        size = self.measurement_size(size_of(image))
        return correlate(self._padded(image), self._kernel(size, image), size)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        self.check_size(y, size)
        rows, columns = self._padding(size, y.device)
        padded = spread(y, self._kernel(size, y), (len(rows), len(columns)))
        folded = padded.new_zeros(*padded.shape[:-1], size[1]).index_add(-1, columns, padded)
        return folded.new_zeros(*folded.shape[:-2], *size).index_add(-2, rows, folded)

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        if before is None:
            return None
        size = self.measurement_size(size_of(before))
        touched = (self.kernel_tensor() != 0).double()  # on the CPU, where masks are
        known = self._padded(1 - before).double()
        if touched.numel() > DIRECT:
            touched = spectrum(touched, size_of(known))
        return nothing_left(correlate(known, touched, size))

    def measurement_size(self, size: Size) -> Size:
        return _check_room(self.name, size, self._radii())

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(size_of(y))


def spectrum(kernel: Tensor, size: Size) -> Tensor:
    """The Fourier transform of a kernel (k_h, k_w) for products with pictures that are of `size` with their padding."""
    return torch.fft.rfft2(kernel, [fast_length(n) for n in size])


def correlate(x: Tensor, kernel: Tensor, size: Size) -> Tensor:
    """(B, c, H, W) -> (B, c, *size): every channel correlated with a kernel, or with one of this spectrum, where it fits into the picture."""
    if not kernel.is_complex():
        return F.conv2d(x, kernel.expand(x.shape[1], 1, *kernel.shape), groups=x.shape[1])
    return _filtered(x, kernel.conj(), size_of(x), size)


def spread(y: Tensor, kernel: Tensor, size: Size) -> Tensor:
    """The transpose of `correlate`: (B, c, h, w) -> (B, c, *size)."""
    if not kernel.is_complex():
        return F.conv_transpose2d(y, kernel.expand(y.shape[1], 1, *kernel.shape), groups=y.shape[1])
    return _filtered(y, kernel, size, size)


def _filtered(x: Tensor, factors: Tensor, padded: Size, size: Size) -> Tensor:
    lengths = [fast_length(n) for n in padded]
    product = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)), lengths) * factors
    return torch.fft.irfft2(product, lengths)[..., : size[0], : size[1]].to(x.dtype)


def _rows(kernel: Any) -> Any:
    """The rows of a kernel. Raises ValueError, before anything is allocated, where they cannot make one."""
    if isinstance(kernel, (Tensor, np.ndarray)):
        sides = tuple(kernel.shape)
        if max(sides, default=0) > LARGEST:
            raise ValueError(f"it has shape {sides}; sides may be {LARGEST} pixels at most")
        return kernel
    if not isinstance(kernel, (list, tuple)):
        raise ValueError(f"it is {shown(kernel)}")
    if all(isinstance(value, Real) for value in kernel[:LARGEST]):  # a row without rows: its shape is told to people
        return kernel[:LARGEST]
    for row in kernel[: LARGEST + 1]:
        if (
            not isinstance(row, (list, tuple))
            or len(row) != len(kernel[0])
            or not all(isinstance(value, Real) for value in row[: LARGEST + 1])
        ):
            raise ValueError(f"one row is {shown(row)}")
        if max(len(row), len(kernel)) > LARGEST:
            raise ValueError(f"it has {len(kernel)} rows of {len(row)} numbers; sides may be {LARGEST} pixels at most")
    return kernel


@dataclass(frozen=True)
class KernelBlur(Correlation):
    """Blur with a kernel of one's own: rows of numbers with odd sides of at most 1023; it is scaled to sum 1. Raises ValueError for others."""

    kernel: tuple[tuple[float, ...], ...]

    title = "Kernel Blur"

    def __post_init__(self):
        try:
            kernel = torch.as_tensor(_rows(self.kernel), dtype=torch.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"KernelBlur: the kernel is not made of rows of numbers of one length: {error}") from error
        if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"KernelBlur: kernel has shape {tuple(kernel.shape)}; it must have two odd sides")
        total = kernel.sum()
        if not torch.isfinite(kernel).all() or not 0 < total < math.inf:
            raise ValueError("KernelBlur: the kernel's values must be finite and their sum above 0")
        if abs(float(total) - 1) > 1e-9:  # a kernel that was scaled before stays as it is to the bit
            kernel = kernel / total
        if not torch.isfinite(kernel).all():
            raise ValueError("KernelBlur: the kernel's sum is too small for its values to be scaled to sum 1")
        object.__setattr__(self, "kernel", tuple(map(tuple, kernel.tolist())))

    @cached_property
    def _tensor(self) -> Tensor:
        with torch.inference_mode(False):  # a host may call this under inference mode, and the cache outlives that
            return torch.tensor(self.kernel, dtype=torch.float64)

    def kernel_tensor(self) -> Tensor:
        return self._tensor

    def describe(self) -> str:
        return f"{self.title} ({len(self.kernel)}x{len(self.kernel[0])})"


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a host may call this under inference mode, and the cache outlives that
def motion_kernel(length: float, angle: float) -> Tensor:
    """A line of `length` pixels through the centre, `angle` degrees counter-clockwise from the x axis, bilinear, sum 1."""
    radius = max(1, math.ceil((length - 1) / 2))
    samples = max(2, 8 * math.ceil(length))
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, samples, dtype=torch.float64)
    x = radius + along * math.cos(math.radians(angle))
    y = radius - along * math.sin(math.radians(angle))
    grid = torch.arange(2 * radius + 1, dtype=torch.float64)
    kernel = torch.einsum("sy,sx->yx", (1 - (y[:, None] - grid).abs()).clamp(min=0), (1 - (x[:, None] - grid).abs()).clamp(min=0))
    return kernel / kernel.sum()


@dataclass(frozen=True)
class MotionBlur(Correlation):
    """Straight camera motion over `length` pixels (above 1, at most 1023) at `angle` degrees (0 = horizontal, counter-clockwise).

    Raises ValueError for other lengths, and for angles of more than ten turns.
    """

    length: float = 15.0
    angle: float = 45.0

    title = "Motion Blur"

    def __post_init__(self):
        object.__setattr__(self, "length", real("MotionBlur: length", self.length, LARGEST, above=1, unit="pixels"))
        object.__setattr__(self, "angle", real("MotionBlur: angle", self.angle, 3600, above=None, unit="degrees"))

    def kernel_tensor(self) -> Tensor:
        return motion_kernel(self.length, self.angle)
