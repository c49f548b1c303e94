"""Your own images: codes, a prior and a generator, at 28 to 64 pixels or for 256 on one GPU.

    python -m dlc_jax.main --config=configs/image_folder.py --config.data.path=PATH

PATH: see docs/data.md. At 32 pixels some 20 minutes on two CPU cores; docs/results.md ("Real
images") has what comes of it. Words: 28px, 32px or 64px; `:tiny` (a minute: does everything run?);
`:long` (two hours: codes that know more); `:latent256`, a ViT-B/14 and a DiT-B/2 for 256 pixels
on one GPU, which needs `dlc import vae FILE --out DIR` and `--config.autoencoder.path=DIR`.
"""

RECIPE = {
    "like": "quickstart.py",
    "data.name": "images",
    "data.image": 32,
    "*.model*.image": 32,
    "*.model*positions": 32,
    "*.model*values": 32,
    "encoder.model.dino.prototypes": 256,
    "encoder.model.dino.hidden": 512,
    "encoder.model.dino.bottleneck": 128,
    "encoder.objective.dino": 1.0,
    "encoder.objective.koleo": 0.1,
    "encoder.objective.consistency": 1.0,
    "encoder.crops": None,  # one kind: nobody knows what should come apart
    "encoder.crops.all.global_size": 32,
    "encoder.crops.all.global_scale": (0.5, 1.0),
    "encoder.crops.all.local_crops": 0,
    "encoder.crops.all.local_size": 32,
    "encoder.crops.all.local_scale": (0.1, 0.5),
    "encoder.crops.all.blur": (0.0, 0.0, 0.0),
    "encoder.crops.all.blur_quirk": False,
    "encoder.crops.all.blur_sigma": (0.1, 1.0),
    "encoder.crops.all.solarize": (0.0, 0.0, 0.0),
    "encoder.crops.all.interpolation": "bilinear",
    "encoder.train.steps": 1000,
    "encoder.train.batch": 128,
    "codes.splits": ("train", "validation"),
    "probe.splits": ("validation",),
    "prior.train.steps": 1500,
    "prior_scores.count": 2000,  # to be run by --config.steps="('prior_scores',)"
    "generator.train.steps": 5000,
    "without_codes": None,
    "samples_without_codes": None,
}
VARIANTS = {
    "32px": {},
    "28px": {"data.image": 28, "*.model*.image": 28, "*.model*.patch": 7, "*.crops.*_size": 28},
    "64px": {"data.image": 64, "*.model*.image": 64, "encoder.crops.*_size": 64},
    "latent256": {
        "*": None,
        "data.image": 256,
        "*.model*.width": 768,
        "*.model*.depth": 12,
        "*.model*.heads": 12,
        "*.model*positions": 128,
        "encoder.model.dino.prototypes": 16_384,
        "encoder.objective.teacher_temperature": (0.04, 0.07, 10_000),
        "encoder.optimizer.learning_rate": 5e-5,
        "encoder.optimizer.warmup": 2500,
        "encoder.optimizer.final": 0.02,
        # as in the paper for 1 % of the steps
        "encoder.optimizer.freeze": (("(patch_)?head/(direction|gain)", 300),),
        "encoder.monitor.*": 5000,
        "encoder.train.steps": 30_000,
        "codes.image": 224,  # what the encoder was trained on
        "codes.autoencoder": "autoencoder",
        "codes.flip": True,
        "autoencoder.path": "",
        "prior.train.steps": 200_000,
        "*.train.batch": 256,
        "generator.latents": True,
        "generator.normalize": True,
        "generator.grid.every": 10_000,
        "generator.train.steps": 400_000,
        "generator.train.clip": 1.0,
        "*.sampler.steps": 25,
    },
    "long": lambda lines: {
        "*.model*positions": 64,
        "encoder.crops.all.global_scale": (0.4, 1.0),
        "encoder.crops.all.local_crops": 4,
        "encoder.crops.all.local_size": lines["data.image"] // 2,
        "encoder.crops.all.local_scale": (0.1, 0.4),
        "encoder.monitor.every": 400,
        "encoder.monitor.count": 2000,
        "encoder.train.steps": 3000,
        "encoder.train.save_every": 200,
        "encoder.train.validate_every": 400,
    },
    "tiny": {
        "*.train.steps": 24,
        "*.train.batch": 32,
        "*.train.*_every": 8,
        "*.train.validate_every": 12,
        "*.train.validate_batches": 2,
        "encoder.objective.koleo_group": 32,
        "encoder.monitor.count": 64,
        "probe.count": 512,
        "prior_scores.count": 64,
        "*.every": 12,
        "generator.grid.count": 8,
        "*.sampler.steps": 4,
        "samples.count": 64,
        "samples.pairs": 32,
        "samples.batch": 64,
    },
}
