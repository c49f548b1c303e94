"""ImageNet at 256 pixels, with the sizes of the paper (arXiv 2507.12318): they are the defaults.

    python -m dlc_jax.main --config=configs/imagenet256.py --workdir=DIR
    ... --config=configs/imagenet256.py:generator      one step: encoder, codes, probe, prior, ...
    ... --config=configs/imagenet256.py:B              another DiT: S, B, L, XL, 8B (not the paper's)
    ... --config=configs/imagenet256.py:32x4096        another code: 32x4096, 128x1024, 512x256
    ... --config=configs/imagenet256.py:512px          images of 512 pixels, latents of 64

Words combine in any order: `:generator,8B,512px,128x1024`. ImageNet is read through TFDS, prepared
as ArrayRecord: `--config.data.data_dir=DIR`. The generator works on latents of a VAE (`dlc import
vae`, then `--config.autoencoder.path=DIR`); this version does not train it on them yet. Every step
builds and compiles at these sizes. The paper: encoder about a day on two A100, prior two days and
generator ten days on four H100.
"""

RECIPE = {
    "mesh.data": 1,
    "mesh.fsdp": -1,  # parameters are shared out over all devices
    "data.name": "tfds",
    "*.train.log_every": 100,
    "*.train.save_every": 5000,
    "*.train.validate_every": 5000,
    "*.train.keep": 3,
    "*.train.patience": 20,
    "codes.batch": 128,
    "codes.shard_size": 16_384,
    "codes.image": 224,  # what the encoder was trained on
    "codes.autoencoder": "autoencoder",
    "codes.flip": True,
    "autoencoder.path": "",
    # the paper's probe, but on codes of the codes step's view, not of augmented crops
    "probe.count": 1_300_000,
    "probe.fit.rates": (
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
        2e-2,
        5e-2,
        0.1,
    ),
    "probe.fit.epochs": 10,
    "probe.fit.batch": 1024,
    "probe.fit.deviation": 0.01,
    "probe.fit.held": 0.02,
    "probe.fit.memory_gb": 40.0,
    "generator.latents": True,
    "generator.grid.every": 50_000,
    "samples.pairs": 64,
    "samples.batch": 512,
}
VARIANTS = {
    "S": {"generator.model.width": 384, "generator.model.depth": 12, "generator.model.heads": 6},
    "B": {"generator.model.width": 768, "generator.model.depth": 12, "generator.model.heads": 12},
    "L": {"generator.model.width": 1024, "generator.model.depth": 24, "generator.model.heads": 16},
    "XL": {},
    "8B": {"generator.model.width": 3584, "generator.model.depth": 36, "generator.model.heads": 28},
    "32x4096": {"*.model*positions": 32, "*.model*values": 4096},
    "128x1024": {"*.model*positions": 128, "*.model*values": 1024},
    "512x256": {},
    "256px": {},
    "512px": {"data.image": 512, "generator.model.image": 64},
}
