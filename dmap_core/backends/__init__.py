"""Priors: diffusers' networks, and one in closed form. ComfyUI's are wrapped in the nodes' adapter."""
