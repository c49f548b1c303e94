"""ImageNet at 256 pixels, with the sizes of the paper (arXiv 2507.12318): they are the defaults.

    python -m dlc_jax.main --config=configs/imagenet256.py --workdir=DIR
    ... --config=configs/imagenet256.py:generator,B,128x1024,512px       words in any order

Words: a step to run alone; DiT S, B, L, XL or 8B (not the paper's); codes 32x4096, 128x1024 or
512x256; 256px or 512px; small, the smaller prior; sedd, the prior with the paper's score entropy;
heads128, XL with 9 heads of 128. `--config.data.data_dir=DIR` has ImageNet by TFDS. Latents:
`dlc import vae FILE --out DIR`, `--config.autoencoder.path=DIR`. Newer: imagenet256_fast.py.
"""

RECIPE = {
    "mesh.data": 1,
    "mesh.fsdp": -1,  # parameters are shared out over all devices
    "data.name": "tfds",
    "*.train.*_every": 5000,
    "*.train.log_every": 100,
    "*.train.keep": 3,
    "*.train.patience": 20,
    "codes.batch": 128,
    "codes.shard_size": 16_384,
    "codes.image": 224,  # what the encoder was trained on
    "codes.autoencoder": "autoencoder",
    "codes.flip": True,
    "autoencoder.path": "",
    "probe.count": 1_300_000,  # the paper's probe, on the codes of images instead of crops
    "probe.fit.rates": (*(float(f"{m}e{e}") for e in range(-5, -1) for m in (1, 2, 5)), 0.1),
    "probe.fit.epochs": 10,
    "probe.fit.batch": 1024,
    "probe.fit.deviation": 0.01,
    "probe.fit.held": 0.02,
    "probe.fit.memory_gb": 40.0,
    "prior_scores.count": 10_000,  # to be run by --config.steps="('prior_scores',)"
    "generator.latents": True,
    "generator.process.name": "ddpm",
    "*.sampler.method": "ancestral",
    "*.sampler.steps": 250,
    "*.guidance.channels": 3,  # of four, as DiT guides them
    "samples.sampler.guidance.scale": 1.4,
    "generator.grid.every": 50_000,
    "samples.pairs": 64,
    "samples.batch": 512,
}
VARIANTS = {
    **dict.fromkeys(("XL", "512x256", "256px"), {}),  # the defaults
    "S": {"generator.model.width": 384, "generator.model.depth": 12, "generator.model.heads": 6},
    "B": {"generator.model.width": 768, "generator.model.depth": 12, "generator.model.heads": 12},
    "L": {"generator.model.width": 1024, "generator.model.depth": 24, "generator.model.heads": 16},
    "heads128": {"generator.model.heads": 9},  # fill a matrix unit; not for mesh.tensor of 2 or 4
    "8B": {"generator.model.width": 3584, "generator.model.depth": 36, "generator.model.heads": 28},
    "32x4096": {"*.model*positions": 32, "*.model*values": 4096},
    "128x1024": {"*.model*positions": 128, "*.model*values": 1024},
    "512px": {"data.image": 512, "generator.model.image": 64},
    "small": {"prior.model.width": 768, "prior.model.depth": 12, "prior.model.heads": 12},
    "sedd": {
        "prior.model.sigma_conditioning": True,
        "prior.model.dropout": 0.1,
        "prior.process.objective": "score",
        "prior.process.noise.schedule": "log_linear",
    },
}
