"""A Gaussian mixture: the prior whose denoiser, score and posterior are known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _level(sigma: float | Tensor, ndim: int) -> float | Tensor:
    """Levels (B,) as they go with a tensor of that many dimensions."""
    return sigma.view(-1, *[1] * (ndim - 1)) if isinstance(sigma, Tensor) and sigma.ndim else sigma


@dataclass(frozen=True)
class GaussianMixture:
    """p(z0) = sum_k w_k N(mean_k, std^2 I), with the identity as decoder.

    means: (K, *shape) where a batch of latents is (B, *shape); weights: (K,), positive; std: the common standard deviation sigma_0.
    The toy example of A.4 is `GaussianMixture(tensor([[-1., -1.], [1., 1.]]), std=0.3)`.
    """

    means: Tensor
    std: float
    weights: Tensor | None = None

    def _log_weights(self) -> Tensor:
        weights = torch.ones(len(self.means)) if self.weights is None else self.weights
        return (weights / weights.sum()).log().to(self.means)

    def responsibilities(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """p(k | z), (B, K), of z = z0 + sigma * eps; sigma: a number, or (B,)."""
        sigma = _level(sigma, 2)
        distance = (z.unsqueeze(1) - self.means.unsqueeze(0)).flatten(2).square().sum(2)
        return torch.softmax(self._log_weights() - distance / (2 * (self.std**2 + sigma**2)), dim=1)

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        weights, sigma = self.responsibilities(z, sigma), _level(sigma, z.ndim)
        shrink = self.std**2 / (self.std**2 + sigma**2)
        mean = torch.einsum("bk,kd->bd", weights, self.means.flatten(1)).view_as(z)
        return mean + shrink * (z - mean)

    def decode(self, z0: Tensor) -> Tensor:
        return z0

    def encode(self, image: Tensor) -> Tensor:
        return image

    def networks(self):
        return ()

    def blocks(self):
        return ()

    def free_memory(self) -> float:
        return float("inf")

    def posterior(self, matrix: Tensor, y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor, Tensor]:
        """p(z0 | y) for y = matrix @ z0 + sigma_y * eps with z0 flattened to (d,): again a mixture.

        matrix: (m, d), y: (m,). Returns weights (K,), means (K, d) and the common covariance (d, d).
        """
        d = self.means[0].numel()
        means = self.means.flatten(1)
        eye = torch.eye(d, dtype=means.dtype, device=means.device)
        s = self.std**2 * matrix @ matrix.mT + sigma_y**2 * torch.eye(len(y), dtype=means.dtype, device=means.device)
        gain = torch.linalg.solve(s, self.std**2 * matrix).mT
        error = y - means @ matrix.mT
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance_matrix=s).log_prob(error)
        weights = torch.softmax(self._log_weights() + evidence, 0)
        return weights, means + error @ gain.mT, self.std**2 * (eye - gain @ matrix)
