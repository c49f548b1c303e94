"""The autoencoders that a recipe can name, and what each of them offers.

An autoencoder is a linen module whose fields are a recipe's section. It has

    encode(images in [-1, 1])       {"mean", "logvar"} of a Gaussian, or "mean" alone, float32
    latents(mean, logvar, noise)    draws, scaled: what a generator learns
    decode(latents)                 images, about in [-1, 1], of scaled latents
    stride, latent, scaling         sides of an image in latents, channels, and the scale

Adding one is a module here and a line below. `recipe.latents` knows their strides without jax.
"""

from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.tiny_autoencoder import TinyAutoencoder

AUTOENCODERS = {"kl": Autoencoder, "tiny": TinyAutoencoder}
