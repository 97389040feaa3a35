"""Priors: a closed-form one for tests and the toy example. ComfyUI's models are wrapped in nodes/host.py."""
