"""The whole pipeline on embedded data: 16-pixel shapes, minutes on two CPU cores.

    ./launch/local.sh python -m dlc_jax.main --config=configs/quickstart.py

What it reaches, where and in what time: docs/results.md. Words: 32px, half an hour; ablation, the
same generator without codes, beside it; tiny, a minute: does all run (but the student)?
"""

RECIPE = {
    "steps": ("encoder", "student", "codes", "probe", "prior", "generator", "samples"),
    "data.name": "shapes",
    "*.model*.image": 16,
    "*.model*.patch": 8,
    "*.model*.width": 128,
    "*.model*.depth": 4,
    "*.model*.heads": 4,
    "*.model*.remat": "none",
    "*.model*.unroll": 0,  # four layers compile as quickly as a loop over them
    "*.model*positions": 36,
    "*.model*values": 16,
    "*.optimizer.learning_rate": 2e-3,
    "*.optimizer.warmup": 100,
    "*.optimizer.b2": 0.99,
    "*.optimizer.final": 0.02,
    "*.train.clip": 1.0,
    "*.train.dtype": "float32",
    "encoder.encoded": False,  # nothing to decode
    "*.threads": 1,
    "encoder.model.backbone.registers": 2,
    "encoder.model.backbone.layer_scale": None,  # suits a small model trained from scratch
    "encoder.model.dino.prototypes": 512,
    "encoder.model.dino.hidden": 256,
    "encoder.model.dino.bottleneck": 64,
    "encoder.objective.teacher": "sinkhorn",  # no center to wait for
    "encoder.objective.teacher_temperature": (0.05, 0.05, 1),
    "encoder.objective.simplex_temperature": ((0.3, 0.3, 1), (0.3, 0.3, 1)),
    "encoder.objective.momentum": (0.97, 1.0),
    "encoder.objective.dino": 0.1,
    "encoder.objective.ibot": 0.0,
    "encoder.objective.koleo": 0.02,
    "encoder.objective.drop_path": 0.0,
    "encoder.objective.consistency": 3.0,  # positions agree between crops
    "encoder.objective.consistency_temperature": (0.7, 0.35),
    "encoder.crops.*_size": 16,
    "encoder.crops.*.global_scale": (0.8, 1.0),
    "encoder.crops.*.local_crops": 0,
    "encoder.crops.*.ratio": (0.85, 1.15),
    "encoder.crops.*.jitter_probability": 1.0,
    "encoder.crops.*.gray": 0.0,
    "encoder.crops.*.jitter": (0.0, 0.0, 0.0, 0.5),
    "encoder.crops.*.lightness": 0.5,
    "encoder.crops.*.blur": (1.0, 1.0, 1.0),
    "encoder.crops.*.blur_quirk": False,
    "encoder.crops.*.blur_sigma": (16 / 6, 16 / 3),
    "encoder.crops.*.solarize": (0.0, 0.0, 0.0),
    "encoder.crops.*.interpolation": "bilinear",
    "encoder.crops.form.blur": (0.0, 0.0, 0.0),  # a kind's positions cannot know what its crops
    "encoder.crops.ground.lightness": 0.0,  # change: all but sharpness, lightness and hue
    "encoder.crops.tint.jitter": (0.0, 0.0, 0.0, 0.0),
    "encoder.crops.form.share": 3,  # of the positions: a shape is harder to say than a color
    "encoder.crops.ground.share": 2,
    "encoder.optimizer.final": 0.05,
    "encoder.optimizer.weight_decay_final": 1.0,
    "encoder.optimizer.decayed": "(.*/)?kernel",
    "encoder.optimizer.layer_decay": 1.0,
    "encoder.optimizer.multipliers": (),
    "encoder.optimizer.freeze": (),
    "encoder.monitor.*": 260,
    "encoder.train.steps": 520,
    "encoder.train.batch": 192,
    "encoder.train.clip_separately": (),
    "student.like": "encoder",  # says of images what the encoder says of their crops in the mean
    "student.teacher": "encoder",
    "student.objective.dino": 0.0,
    "student.objective.koleo": 0.0,
    "student.objective.consistency": 0.0,
    "student.objective.plain": 1.0,
    "student.train.steps": 320,
    "*.encoder": "student",
    "codes.splits": ("train", "validation", "held_out"),
    "probe.splits": ("validation", "held_out"),
    "prior.ema_decay": 0.99,
    "prior.optimizer.schedule": "cosine",
    "prior.train.steps": 1600,
    "prior.train.batch": 64,
    "generator.model.channels": 3,
    "generator.model.width": 192,
    "generator.model.qk_norm": True,
    "generator.process.prediction": "x",  # few patches of many pixels
    "generator.process.mean": 0.8,
    "generator.objective.drop_positions": 0.4,  # for codes put together from several images
    "generator.objective.foreign": 0.4,
    "generator.ema_decay": 0.998,
    "generator.grid.every": 1000,
    "*.sampler.steps": 12,
    "samples.sampler.guidance.scale": 1.0,
    "samples.operator.name": "chosen",
    "samples.operator.groups": ("form+ground", "tint"),
    "generator.optimizer.schedule": "linear",
    "generator.train.steps": 7000,
    "generator.train.batch": 32,
    "without_codes.like": "generator",
    "without_codes.codes": "",
    "without_codes.model.positions": 0,
    "without_codes.model.values": 0,
    "samples_without_codes.like": "samples",
    "samples_without_codes.codes": "",
    "samples_without_codes.generator": "without_codes",
}
VARIANTS = {
    "ablation": {"steps": ("without_codes", "samples_without_codes")},
    "32px": {
        "data.image": 32,
        "generator.model.image": 32,  # the encoder still sees 16: there is more time for it
        "encoder.train.steps": 2000,
        "student.train.steps": 640,
        "prior.train.steps": 2400,
        "generator.train.steps": 16000,
    },
    "demo": {"*.model*.depth": 3, "*.model*.width": 88, "generator.model.width": 128},  # shipped
    "tiny": {
        "steps": ("encoder", "codes", "probe", "prior", "generator", "samples"),
        "*.encoder": "encoder",
        "*.count": 64,
        "data.count": 1024,
        "*.train.steps": 24,
        "*.train.*_every": 8,
        "*.train.validate_every": 12,
        "*.train.validate_batches": 2,
        "probe.count": 512,
        "*.every": 12,
        "*.grid.count": 8,
        "*.sampler.steps": 4,
        "samples*.pairs": 32,
        "samples*.batch": 64,
    },
}
