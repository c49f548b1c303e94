"""Your own images: codes, a prior and a generator, at 28 to 64 pixels on one machine, or at the sizes for 256 pixels on one GPU.

    ./launch/local.sh python -m dlc_jax.main --config=configs/image_folder.py --config.data.path=PATH --workdir=DIR
    … --config=configs/image_folder.py:28px …         # images of 28, 32 (the default) or 64 pixels; 64 needs an accelerator
    … --config=configs/image_folder.py:tiny …         # a minute on two cores: does everything run?
    … --config=configs/image_folder.py:long …         # codes of 64 positions that know more, from two hours of the encoder
    … --config=configs/image_folder.py:latent256 …    # 256 pixels, one GPU

PATH is a folder, an archive, IDX or Parquet files, ArrayRecord shards or tfds:NAME; see docs/data.md. Classes, where there are any,
serve the probe alone. At 32 pixels all steps take some 20 minutes on two CPU cores; what comes of that is in docs/results.md ("Real
images"): recognizable clothes, colors and layouts of photographs but no objects. Longer training is the first thing to give it:
`--config.encoder.train.steps=20000 --config.generator.train.steps=100000`.

`:latent256` is a ViT-B/14 with registers, the shape of DINOv2's: `dlc import dinov2` prints the flags that start it from those weights. Codes have
128 positions and 256 values; beside them the codes step writes latents of 4 x 32 x 32 (`dlc import vae`, then `--config.autoencoder.path=DIR`), for a
DiT-B/2 that this version does not train yet. `dlc plan --topology h200:1` compiles each step
(nothing was run): encoder 51 GiB at batch 256 and 0.40 s a step, prior 8 GiB and 0.04 s, generator 18 GiB and 0.09 s; by the steps below 3.3,
2.4 and 9.9 hours. The times are model FLOPs at 40 % of peak. On a GPU of 24 GB: `--config.encoder.train.batch=64`, and 3 to 6 times the hours.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

PATCHES = {"28px": 7, "32px": 8, "64px": 8}
SIZES = (*PATCHES, "latent256")
WORDS = (*SIZES, "tiny", "long")


def get_config(variant: str = "") -> ConfigDict:
    words = [word for word in variant.split(",") if word]
    for word in words:
        if word not in WORDS:
            raise ValueError(f"unknown variant {word!r}; configs/image_folder.py has {', '.join(WORDS)}")
    sizes = [word for word in words if word in SIZES] or ["32px"]
    if len(sizes) > 1 or (len(words) > 1 and "latent256" in words):
        raise ValueError(f"{variant!r} does not go together: one of {', '.join(SIZES)}; tiny and long with the first three")
    if sizes == ["latent256"]:
        return latent256()
    config = pixels(int(sizes[0].removesuffix("px")), PATCHES[sizes[0]])
    if "long" in words:
        lengthen(config)
    if "tiny" in words:
        shorten(config)
    return config


def pixels(image: int, patch: int) -> ConfigDict:
    positions, values = 32, 32
    encoder = dict(
        stage="encoder",
        view=dict(),
        threads=1,
        model=dict(
            image=image, patch=patch, width=128, depth=4, heads=4, positions=positions, values=values, prototypes=256,
            relaxation="softmax", readout="plain", hidden=512, bottleneck=128, separate_head=False, channels=3, registers=2, mlp_ratio=4.0,
            mlp="gelu", pos="learned", pos_resize="antialias", layer_scale=placeholder(float), qk_norm=False, remat="none", unroll=0,
            implementation=None,
        ),
        objective=dict(
            teacher="sinkhorn", student_temperature=0.1, teacher_temperature=(0.05, 0.05, 1),
            simplex_temperature=((0.3, 0.3, 1), (0.3, 0.3, 1)), center_momentum=0.9, momentum=(0.97, 1.0), dino=1.0, ibot=0.0, mask_share=0.5,
            mask_ratio=(0.1, 0.5), mask_group=64, koleo=0.1, koleo_group=64, drop_path=0.0, drop_path_group=64, consistency=1.0,
            consistency_temperature=(0.7, 0.35),
        ),
        crops=dict(all=dict(
            global_crops=2, global_size=image, global_scale=(0.5, 1.0), local_crops=0, local_size=image, local_scale=(0.1, 0.5),
            ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, lightness=0.0, gray=0.2,
            blur=(0.0, 0.0, 0.0), blur_quirk=False, blur_sigma=(0.1, 1.0), solarize=(0.0, 0.0, 0.0), shift=0.0,
            interpolation="bilinear",
        )),
        optimizer=optimizer(2e-3, schedule="cosine", final=0.05, weight_decay=0.04),
        monitor=dict(every=100, count=1000),
        train=train(steps=1000, batch=128),
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
        train=train(steps=1500, batch=64),
    )  # fmt: skip
    generator = dict(
        stage="generator",
        codes="codes",
        latents=False,
        model=dict(
            image=image, channels=3, patch=patch, width=192, depth=4, heads=4, positions=positions, values=values, out_channels=None,
            mlp_ratio=4.0, qk_norm=True, remat="none", unroll=0, implementation=None,
        ),
        objective=dict(prediction="x", floor=0.1, time=(0.8, 1.0), drop=0.1, drop_positions=0.4, foreign=0.4),
        ema_decay=0.998,
        grid=dict(every=1000, count=16, sampling_steps=12, guidance=1.5, method="heun"),
        optimizer=optimizer(2e-3, schedule="linear", final=0.02),
        train=train(steps=5000, batch=32),
    )  # fmt: skip
    return recipe(image, view=dict(), encoder=encoder, prior=prior, generator=generator, sampling_steps=12)


def latent256() -> ConfigDict:
    positions, values = 128, 256
    encoder = dict(
        stage="encoder",
        view=dict(image="encoded"),  # crops are cut from whole images, not from their centers
        threads=8,
        model=dict(
            image=224, patch=14, width=768, depth=12, heads=12, positions=positions, values=values, prototypes=16_384,
            relaxation="softmax", readout="plain", hidden=2048, bottleneck=256, separate_head=False, channels=3, registers=4, mlp_ratio=4.0,
            mlp="gelu", pos="learned", pos_resize="antialias", layer_scale=1e-5, qk_norm=False, remat="dots", unroll=1, implementation=None,
        ),
        objective=dict(
            teacher="centering", student_temperature=0.1, teacher_temperature=(0.04, 0.07, 10_000),
            simplex_temperature=((1.0, 1.0, 1), (1.0, 1.0, 1)), center_momentum=0.9, momentum=(0.992, 1.0), dino=1.0, ibot=1.0, mask_share=0.5,
            mask_ratio=(0.1, 0.5), mask_group=64, koleo=0.1, koleo_group=64, drop_path=0.3, drop_path_group=64, consistency=0.0,
            consistency_temperature=(1.0, 0.5),
        ),
        crops=dict(all=dict(
            global_crops=2, global_size=224, global_scale=(0.32, 1.0), local_crops=8, local_size=98, local_scale=(0.05, 0.32),
            ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, lightness=0.0, gray=0.2,
            blur=(1.0, 0.1, 0.5), blur_quirk=True, blur_sigma=(0.1, 2.0), solarize=(0.0, 0.2, 0.0), shift=0.0,
            interpolation="bicubic",
        )),
        optimizer=optimizer(5e-5, schedule="cosine", final=0.02, warmup=2500, weight_decay=0.04, b2=0.999) | dict(
            weight_decay_final=10.0, decayed="(?!.*(bias$|norm|gamma)).*|simplicial/bias", layer_decay=0.9,
            multipliers=(("vit/patch_embed/.*", 0.2),), freeze=(("(patch_)?head/(direction|gain)", 300),),  # 1 % of the run, as in the paper
        ),
        monitor=dict(every=5000, count=5000),
        train=train(steps=30_000, batch=256, clip=3.0, clip_separately=("(patch_)?head/.*",), dtype="bfloat16"),
    )  # fmt: skip
    prior = dict(
        stage="prior",
        codes="codes",
        model=dict(
            positions=positions, values=values, width=768, depth=12, heads=12, mlp_ratio=4.0, per_position=False, sigma_conditioning=False,
            remat="dots", unroll=1, implementation=None,
        ),
        ema_decay=0.9999,
        optimizer=optimizer(3e-4, schedule="constant", final=0.0, warmup=2500, b2=0.999),
        train=train(steps=200_000, batch=256, clip=1.0, dtype="bfloat16"),
    )  # fmt: skip
    generator = dict(
        stage="generator",
        codes="codes",
        latents=True,
        model=dict(
            image=32, channels=4, patch=2, width=768, depth=12, heads=12, positions=positions, values=values, out_channels=None,
            mlp_ratio=4.0, qk_norm=False, remat="dots", unroll=1, implementation=None,
        ),
        objective=dict(prediction="v", floor=0.1, time=(0.0, 1.0), drop=0.1, drop_positions=0.0, foreign=0.0),
        ema_decay=0.9999,
        grid=dict(every=10_000, count=16, sampling_steps=25, guidance=1.5, method="heun"),
        optimizer=optimizer(1e-4, schedule="constant", final=0.0, warmup=0, b2=0.999),
        train=train(steps=400_000, batch=256, clip=1.0, dtype="bfloat16"),
    )  # fmt: skip
    config = recipe(256, view=dict(image=224), encoder=encoder, prior=prior, generator=generator, sampling_steps=25)
    config.codes.update(dict(autoencoder="autoencoder", flip=True))
    config.autoencoder = ConfigDict(  # sd-vae-ft-ema; `path` is where `dlc import vae FILE --out DIR` put it
        dict(path="", model=dict(channels=(128, 256, 512, 512), residuals=2, latent=4, groups=32, scaling=0.18215))
    )
    return config


def recipe(image: int, *, view: dict, encoder: dict, prior: dict, generator: dict, sampling_steps: int) -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            steps=("encoder", "codes", "probe", "prior", "generator", "samples"),
            mesh=dict(data=-1, fsdp=1, tensor=1, dcn_data=1, dcn_fsdp=1),
            log=dict(tensorboard=True, wandb=""),
            data=dict(
                name="images", path=placeholder(str), image=image, crop="center", validation=0.1, limit=100, cache=placeholder(str),
                cache_gb=20.0, field="image",
            ),
            encoder=encoder,
            codes=dict(
                stage="codes", path="", encoder="encoder", autoencoder="", flip=False, view=view, splits=("train", "validation"), batch=256,
                dtype="float32", shard_size=4096,
            ),
            probe=dict(
                stage="probe", encoder="encoder", codes="codes", splits=("validation",), count=5000, baselines=False,
                fit=dict(
                    rates=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0), epochs=50, batch=128, deviation=0.0,
                    held=0.2, memory_gb=4.0,
                ),
            ),
            prior=prior,
            generator=generator,
            samples=dict(
                stage="samples", prefix="", encoder="encoder", prior="prior", generator="generator", codes="codes", held_out=False,
                count=512, pairs=512, batch=128, calls=0, sampling_steps=sampling_steps, guidance=1.5, method="heun",
            ),
        )
    )  # fmt: skip


def lengthen(config: ConfigDict) -> None:
    crops = config.encoder.crops["all"]
    crops.update(dict(global_scale=(0.4, 1.0), local_crops=4, local_size=crops.global_size // 2, local_scale=(0.1, 0.4)))
    config.encoder.train.update(dict(steps=3000, save_every=200, validate_every=400))
    config.encoder.monitor.update(dict(every=400, count=2000))
    for name in ("encoder", "prior", "generator"):
        config[name].model.positions = 64


def shorten(config: ConfigDict) -> None:
    for name in ("encoder", "prior", "generator"):
        config[name].train.update(dict(steps=24, batch=32, log_every=8, save_every=8, validate_every=12, validate_batches=2))
    config.encoder.objective.koleo_group = 32
    config.generator.grid.update(dict(every=12, count=8, sampling_steps=4))
    config.samples.update(dict(count=64, pairs=32, batch=64, sampling_steps=4))
    config.encoder.monitor.update(dict(every=12, count=64))
    config.probe.count = 512


def optimizer(
    learning_rate: float, *, schedule: str, final: float, warmup: int = 100, weight_decay: float = 0.0, b2: float = 0.99
) -> dict:
    return dict(
        learning_rate=learning_rate, schedule=schedule, warmup=warmup, final=final, weight_decay=weight_decay, weight_decay_final=1.0,
        decayed="(.*/)?kernel", layer_decay=1.0, multipliers=(), freeze=(), b1=0.9, b2=b2, eps=1e-8,
    )  # fmt: skip


def train(*, steps: int, batch: int, clip: float = 1.0, clip_separately: tuple = (), dtype: str = "float32") -> dict:
    return dict(
        steps=steps, batch=batch, accumulate=1, clip=clip, clip_separately=clip_separately, dtype=dtype, log_every=50,
        save_every=max(1, steps // 4), validate_every=max(1, steps // 4), validate_batches=8, keep=2, patience=10, init_from="", init_new=(),
    )  # fmt: skip
