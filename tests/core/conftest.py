"""A small nonlinear prior, schedules and an operator on points of the plane, as fixtures."""

from dataclasses import dataclass

import pytest
import torch
from forks import Forks
from torch import nn
from torch.nn import functional as F

from dmap_core.operators import Operator


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, gain=1.0):
        return x + gain * self.conv(F.silu(self.norm(x)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.silu(self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))


class Denoiser(nn.Module):
    def __init__(self, latent_channels, width, depth):
        super().__init__()
        self.first = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.last = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, z, sigma):
        x = self.first(z / (1 + sigma**2) ** 0.5)
        for block in self.blocks:
            x = block(x, gain=1 + 0.1 * sigma)
        return z / (1 + sigma**2) + sigma / (1 + sigma**2) ** 0.5 * self.last(x).tanh()


class Decoder(nn.Module):
    def __init__(self, latent_channels, width, depth):
        super().__init__()
        self.first = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.up = Upsample(width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z0):
        x = self.first(z0)
        for block in self.blocks:
            x = block(x)
        return self.last(self.up(x))


class ConvPrior:
    """Latents (B, 2, h, w), images (B, 3, 2h, 2w), random weights, float64 unless said otherwise."""

    latent_channels = 2

    def __init__(self, denoiser_depth=2, decoder_depth=1, width=4, dtype=torch.float64, trainable=True, free=float("inf")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.denoiser = Denoiser(self.latent_channels, width, denoiser_depth).to(dtype)
            self.decoder = Decoder(self.latent_channels, width, decoder_depth).to(dtype)
        for network in self.networks():
            network.requires_grad_(trainable)
        self.free = free
        self.denoised_at = []  # (sigma, with gradient) of every call
        self.decoded = self.decoded_with_gradient = 0
        self.asked_for_memory = 0

    def denoise(self, z, sigma):
        self.denoised_at.append((sigma, torch.is_grad_enabled()))
        return self.denoiser(z, sigma)

    def decode(self, z0):
        self.decoded += 1
        self.decoded_with_gradient += torch.is_grad_enabled()
        return self.decoder(z0)

    def encode(self, image):
        raise NotImplementedError

    def networks(self):
        return (self.denoiser, self.decoder)

    def blocks(self):
        return [m for network in self.networks() for m in network.modules() if isinstance(m, (ResBlock, Upsample))]

    def free_memory(self):
        self.asked_for_memory += 1
        return self.free


class ConvAutoencoder(ConvPrior):
    """The same with a random encoder, which counts its calls."""

    def __init__(self, **settings):
        super().__init__(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Conv2d(3, self.latent_channels, 3, stride=2, padding=1).double()
        self.encoded = self.encoded_with_gradient = 0

    def encode(self, image):
        self.encoded += 1
        self.encoded_with_gradient += torch.is_grad_enabled()
        return self.encoder(image).tanh()


@pytest.fixture
def conv_prior():
    return ConvPrior


@pytest.fixture
def conv_autoencoder():
    return ConvAutoencoder


@dataclass(frozen=True)
class FirstCoordinate(Operator):
    """The toy example's inpainting: points (B, 2) lose their second coordinate."""

    def __call__(self, image):
        return image * torch.tensor([1.0, 0.0]).to(image)


@pytest.fixture
def first_coordinate():
    return FirstCoordinate()


def karras(steps, sigma_min, sigma_max, rho=7):
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@pytest.fixture(name="karras")
def karras_fixture():
    return karras


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="session")
def forks():
    """Processes of the command line."""
    with Forks() as forks:
        yield forks
