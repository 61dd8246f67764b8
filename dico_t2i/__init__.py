"""Distributed text-to-image training of DiCo, a purely convolutional diffusion backbone."""

__version__ = "0.1.0"
