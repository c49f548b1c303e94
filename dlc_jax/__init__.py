"""Discrete Latent Codes in JAX: images to short sequences of tokens, and back.

An encoder, a prior over the tokens, and a diffusion model that draws images from them.
"""
