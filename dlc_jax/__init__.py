"""Discrete Latent Codes in JAX: images to short sequences of tokens, a prior over them, and a diffusion model back to images."""
