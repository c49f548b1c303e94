"""ImageNet at 512 pixels: imagenet256.py with latents of 64 x 64, 1024 tokens (not in the paper).

    python -m dlc_jax.main --config=configs/imagenet512.py --config.autoencoder.path=VAE

Encoder, codes and prior are those of imagenet256.py: `--config.codes.path` takes another run's, if
its latents are of 512 pixels. A step of the generator costs about six times that of 256 pixels.
"""

RECIPE = {
    "like": "imagenet256.py",
    "data.image": 512,
    "generator.model.image": 64,
}
