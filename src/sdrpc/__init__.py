"""Stable Diffusion on whatever devices are free on the network, over ggml's RPC protocol."""

__version__ = "0.1.0"
