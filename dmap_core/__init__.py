"""Diffusion posterior sampling with latent diffusion models: operators, posteriors and solvers of the DMAP paper (ICLR 2025), in torch."""

__version__ = "0.1.0"
