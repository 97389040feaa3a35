"""Blurs: a Gaussian, any kernel, and the motion of a camera."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Operator, Separable, Size
from .boundary import reflect_index

TRUNCATE = 4.0  # the paper's kernel comes from scipy's gaussian_filter, which cuts at 4 sigma


def gaussian_taps(kernel_size: int, sigma: float) -> Tensor:
    """Normalised samples of a Gaussian, float64, cut at 4 sigma and at the kernel's size."""
    radius = min((kernel_size - 1) // 2, int(TRUNCATE * sigma + 0.5))
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-(x**2) / (2 * sigma**2))
    return taps / taps.sum()


def convolution_matrix(length: int, taps: Tensor) -> Tensor:
    """(length, length) float64 matrix of a correlation with `taps`, reflect padding."""
    radius = len(taps) // 2
    index = reflect_index(length, radius).unfold(0, len(taps), 1)
    return torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, index, taps.expand(length, -1).contiguous())


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a host may call this under inference mode, and the cache outlives that
def gaussian_matrix(length: int, kernel_size: int, sigma: float) -> Tensor:
    return convolution_matrix(length, gaussian_taps(kernel_size, sigma))


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
    """Gaussian blur of standard deviation `sigma` pixels, `kernel_size` (odd) taps at most, cut at 4 sigma, reflect padding (B.1)."""

    kernel_size: int = 61
    sigma: float = 3.0

    def __post_init__(self):
        if not isinstance(self.sigma, Real) or not 0 < self.sigma < math.inf:
            raise ValueError(f"GaussianBlur: sigma is {self.sigma} pixels; it must be a number above 0")
        if self.kernel_size % 2 != 1 or self.kernel_size < 3:
            raise ValueError(f"GaussianBlur: kernel_size is {self.kernel_size}; it must be odd and at least 3")
        object.__setattr__(self, "kernel_size", int(self.kernel_size))

    def matrix(self, length: int) -> Tensor:
        return gaussian_matrix(length, self.kernel_size, self.sigma)

    def measurement_size(self, size: Size) -> Size:
        radius = len(gaussian_taps(self.kernel_size, self.sigma)) // 2
        return _check_room(self.name, size, (radius, radius))

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(tuple(y.shape[-2:]))


class Correlation(Operator):
    """f(x) = x correlated with one 2-D kernel of odd sides, per channel, reflect padding, same size."""

    def kernel_tensor(self) -> Tensor:
        """(k_h, k_w) float64."""
        raise NotImplementedError

    def _weight(self, x: Tensor) -> Tensor:
        kernel = self.kernel_tensor()
        return kernel.to(x).expand(x.shape[1], 1, *kernel.shape)

    def _padding(self, size: Size, device: torch.device) -> list[Tensor]:
        radii = [k // 2 for k in self.kernel_tensor().shape]
        return [reflect_index(n, radius).to(device) for n, radius in zip(size, radii, strict=True)]

    def __call__(self, image: Tensor) -> Tensor:
        self.measurement_size(tuple(image.shape[-2:]))
        rows, columns = self._padding(tuple(image.shape[-2:]), image.device)
        padded = image.index_select(-2, rows).index_select(-1, columns)
        return F.conv2d(padded, self._weight(image), groups=image.shape[1])

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        rows, columns = self._padding(size, y.device)
        padded = F.conv_transpose2d(y, self._weight(y), groups=y.shape[1])
        folded = padded.new_zeros(*padded.shape[:-1], size[1]).index_add(-1, columns, padded)
        return folded.new_zeros(*folded.shape[:-2], *size).index_add(-2, rows, folded)

    def measurement_size(self, size: Size) -> Size:
        height, width = self.kernel_tensor().shape
        return _check_room(self.name, size, (height // 2, width // 2))

    def image_size(self, y: Tensor) -> Size:
        return self.measurement_size(tuple(y.shape[-2:]))


@dataclass(frozen=True)
class KernelBlur(Correlation):
    """Blur with a kernel of one's own: rows of numbers with odd sides; it is scaled to sum 1."""

    kernel: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        try:
            kernel = torch.as_tensor(self.kernel, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"KernelBlur: the kernel is not made of rows of numbers of one length: {error}") from error
        if kernel.ndim != 2 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
            raise ValueError(f"KernelBlur: kernel has shape {tuple(kernel.shape)}; it must have two odd sides")
        if not torch.isfinite(kernel).all() or not kernel.sum() > 0:
            raise ValueError("KernelBlur: the kernel's values must be finite and their sum above 0")
        if abs(float(kernel.sum()) - 1) > 1e-9:  # a kernel that was scaled before stays as it is to the bit
            kernel = kernel / kernel.sum()
        object.__setattr__(self, "kernel", tuple(map(tuple, kernel.tolist())))

    def kernel_tensor(self) -> Tensor:
        return torch.tensor(self.kernel, dtype=torch.float64)

    def describe(self) -> str:
        return f"KernelBlur({len(self.kernel)}x{len(self.kernel[0])})"


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
    """Straight camera motion over `length` pixels (> 1) at `angle` degrees (0 = horizontal, counter-clockwise)."""

    length: float = 15.0
    angle: float = 45.0

    def __post_init__(self):
        if not (math.isfinite(self.length) and self.length > 1):
            raise ValueError(f"MotionBlur: length is {self.length} pixels; it must be above 1")
        if not math.isfinite(self.angle):
            raise ValueError(f"MotionBlur: angle is {self.angle}; it must be a number of degrees")

    def kernel_tensor(self) -> Tensor:
        return motion_kernel(self.length, self.angle)
