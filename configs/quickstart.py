"""The whole pipeline on embedded data: 16-pixel shapes, minutes on two CPU cores.

    ./launch/local.sh python -m dlc_jax.main --config=configs/quickstart.py
    ./launch/local.sh python -m dlc_jax.main --config=configs/quickstart.py:ablation    # the same generator without codes, beside it
    ./launch/local.sh python -m dlc_jax.main --config=configs/quickstart.py:tiny        # under a minute: does everything run?

What it reaches, on what machine and in what time, is in docs/results.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

VARIANTS = ("", "ablation", "tiny", "tiny_ablation")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; configs/quickstart.py has {', '.join(VARIANTS[1:])}")
    image, positions, values = 16, 36, 16

    encoder = dict(
        stage="encoder",
        view=dict(),
        threads=1,
        model=dict(
            image=image, patch=8, width=128, depth=4, heads=4, positions=positions, values=values, prototypes=512, relaxation="softmax",
            readout="plain", hidden=256, bottleneck=64, separate_head=False, channels=3, registers=2, mlp_ratio=4.0, mlp="gelu",
            pos="learned", pos_resize="antialias", layer_scale=placeholder(float), qk_norm=False, remat="none", unroll=0, implementation=None,
        ),
        objective=dict(
            teacher="sinkhorn", student_temperature=0.1, teacher_temperature=(0.05, 0.05, 1),
            simplex_temperature=((0.3, 0.3, 1), (0.3, 0.3, 1)), center_momentum=0.9, momentum=(0.97, 1.0), dino=0.1, ibot=0.0, mask_share=0.5,
            mask_ratio=(0.1, 0.5), mask_group=64, koleo=0.02, koleo_group=64, drop_path=0.0, drop_path_group=64, consistency=3.0,
            consistency_temperature=(0.7, 0.35),
        ),
        # A third of the positions each: hue and lightness changed leave the form, hue changed and blurred the ground, blurred and lightness
        # changed the tint.
        crops=dict(
            form=crops(image, hue=0.5, lightness=0.5, blur=0.0),
            ground=crops(image, hue=0.5, lightness=0.0, blur=1.0),
            tint=crops(image, hue=0.0, lightness=0.5, blur=1.0),
        ),
        optimizer=optimizer(2e-3, schedule="cosine", final=0.05, weight_decay=0.04),
        monitor=dict(every=100, count=1000),
        train=train(steps=320, batch=192),
    )  # fmt: skip
    probe = dict(
        stage="probe", encoder="encoder", codes="codes", splits=("validation", "held_out"), count=5000, baselines=False,
        fit=dict(
            rates=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0), epochs=50, batch=128, deviation=0.0, held=0.2,
            memory_gb=4.0,
        ),
    )  # fmt: skip
    prior = dict(
        stage="prior",
        codes="codes",
        model=dict(
            positions=positions, values=values, width=128, depth=4, heads=4, mlp_ratio=4.0, per_position=False, sigma_conditioning=False,
            remat="none", unroll=0, implementation=None,
        ),
        ema_decay=0.99,
        optimizer=optimizer(2e-3, schedule="cosine", final=0.02),
        train=train(steps=1600, batch=64),
    )  # fmt: skip
    generator = dict(
        stage="generator",
        codes="codes",
        latents=False,
        model=dict(
            image=image, channels=3, patch=8, width=192, depth=4, heads=4, positions=positions, values=values, out_channels=None,
            mlp_ratio=4.0, qk_norm=True, remat="none", unroll=0, implementation=None,
        ),
        objective=dict(prediction="x", floor=0.1, time=(0.8, 1.0), drop=0.1, drop_positions=0.4, foreign=0.4),
        ema_decay=0.998,
        grid=dict(every=1000, count=16, sampling_steps=12, guidance=1.5, method="heun"),
        optimizer=optimizer(2e-3, schedule="linear", final=0.02),
        train=train(steps=7000, batch=32),
    )  # fmt: skip
    samples = dict(
        stage="samples", prefix="", encoder="encoder", prior="prior", generator="generator", codes="codes", held_out=True,
        count=512, pairs=512, batch=128, calls=0, sampling_steps=12, guidance=1.5, method="heun",
    )  # fmt: skip
    config = ConfigDict(
        dict(
            seed=0,
            steps=("encoder", "codes", "probe", "prior", "generator", "samples"),
            mesh=dict(data=-1, fsdp=1, tensor=1, dcn_data=1, dcn_fsdp=1),
            log=dict(tensorboard=True, wandb=""),
            data=dict(name="shapes", image=image, count=20_000, seed=0, positions=False),
            encoder=encoder,
            codes=dict(
                stage="codes",
                path="",
                dtype="float32",
                encoder="encoder",
                autoencoder="",
                flip=False,
                view=dict(),
                splits=("train", "validation", "held_out"),
                batch=256,
                shard_size=4096,
            ),
            probe=probe,
            prior=prior,
            generator=generator,
            samples=samples,
            without_codes=generator | dict(codes="", model=generator["model"] | dict(positions=0, values=0)),
            samples_without_codes=samples | dict(prefix="without_codes/", generator="without_codes", codes=""),
        )
    )
    if variant.endswith("ablation"):
        config.steps = ("without_codes", "samples_without_codes")
    if variant.startswith("tiny"):
        config.data.count = 1024
        for name in ("encoder", "prior", "generator", "without_codes"):
            config[name].train.update(dict(steps=24, log_every=8, save_every=8, validate_every=12, validate_batches=2))
        for name in ("generator", "without_codes"):
            config[name].grid.update(dict(every=12, count=8, sampling_steps=4))
        for name in ("samples", "samples_without_codes"):
            config[name].update(dict(count=64, pairs=32, batch=64, sampling_steps=4))
        config.encoder.monitor.update(dict(every=12, count=64))
        config.probe.count = 512
    return config


def crops(image: int, *, hue: float, lightness: float, blur: float) -> dict:
    return dict(
        global_crops=2, global_size=image, global_scale=(0.8, 1.0), local_crops=0, local_size=image, local_scale=(0.4, 0.8),
        ratio=(0.85, 1.15), flip=0.5, jitter=(0.0, 0.0, 0.0, hue), jitter_probability=1.0, lightness=lightness, gray=0.0,
        blur=(blur, blur, blur), blur_quirk=False, blur_sigma=(image / 6, image / 3), solarize=(0.0, 0.0, 0.0), shift=0.0,
        interpolation="bilinear",
    )  # fmt: skip


def optimizer(learning_rate: float, *, schedule: str, final: float, weight_decay: float = 0.0) -> dict:
    return dict(
        learning_rate=learning_rate, schedule=schedule, warmup=100, final=final, weight_decay=weight_decay, weight_decay_final=1.0,
        decayed="(.*/)?kernel", layer_decay=1.0, multipliers=(), freeze=(), b1=0.9, b2=0.99, eps=1e-8,
    )  # fmt: skip


def train(*, steps: int, batch: int) -> dict:
    return dict(
        steps=steps, batch=batch, accumulate=1, clip=1.0, clip_separately=(), dtype="float32", log_every=50,
        save_every=max(1, steps // 4), validate_every=max(1, steps // 4), validate_batches=8, keep=2, patience=10, init_from="", init_new=(),
    )  # fmt: skip
