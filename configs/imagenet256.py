"""ImageNet at 256 pixels, with the sizes of the paper (arXiv 2507.12318): ViT-L/14 with a 512x256 simplicial embedding, DiT-XL/2.

    python -m dlc_jax.main --config=configs/imagenet256.py --workdir=DIR
    python -m dlc_jax.main --config=configs/imagenet256.py:generator --workdir=DIR         # one step
    python -m dlc_jax.main --config=configs/imagenet256.py:generator,B --workdir=DIR       # another DiT: S, B, L, XL, 8B
    python -m dlc_jax.main --config=configs/imagenet256.py:32x4096 --workdir=DIR           # another code: 32x4096, 128x1024, 512x256
    python -m dlc_jax.main --config=configs/imagenet256.py:512px --workdir=DIR             # images of 512 pixels, latents of 64

Words combine in any order: `:generator,8B,512px,128x1024`. 8B is no model of the paper: a generator of 8.8 billion parameters, to plan with.

ImageNet is read through TFDS, prepared as ArrayRecord: `--config.data.data_dir=DIR`. Every step builds and compiles at these sizes
(tests/test_configs.py lowers each, forward and backward). The generator works on latents of a VAE, whose moments the codes step writes
beside the codes (`dlc import vae`, then `--config.autoencoder.path=DIR`); this version does not train a generator on them yet.

The paper: encoder about a day on two A100, prior two days and generator ten days on four H100.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")
# of the generator: width, depth, heads
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16), "8B": (3584, 36, 28)}
CODES = ("32x4096", "128x1024", "512x256")
PIXELS = {"256px": 256, "512px": 512}
LATENT = 8  # pixels on a side of one latent of the VAE
WORDS = (*STEPS, *SIZES, *CODES, *PIXELS)


def get_config(variant: str = "") -> ConfigDict:
    steps, size, code, pixels = [], "XL", "512x256", 256
    for word in filter(None, variant.split(",")):
        if word in STEPS:
            steps.append(word)
        elif word in SIZES:
            size = word
        elif word in CODES:
            code = word
        elif word in PIXELS:
            pixels = PIXELS[word]
        else:
            raise ValueError(f"unknown variant {word!r}; configs/imagenet256.py has {', '.join(WORDS)}")
    positions, values = map(int, code.split("x"))
    width, depth, heads = SIZES[size]
    batch = 512  # of the encoder
    rate = 1e-4 * (batch / 1024) ** 0.5

    encoder = dict(
        stage="encoder",
        view=dict(image="encoded"),  # crops are cut from whole images, not from their centers
        threads=8,
        model=dict(
            image=224, patch=14, width=1024, depth=24, heads=16, positions=positions, values=values, prototypes=65_536,
            relaxation="softmax", readout="plain", hidden=2048, bottleneck=256, separate_head=False, channels=3, registers=4, mlp_ratio=4.0,
            mlp="gelu", pos="learned", pos_resize="antialias", layer_scale=1e-5, qk_norm=False, remat="dots", unroll=1, implementation=None,
        ),
        objective=dict(
            teacher="centering", student_temperature=0.1, teacher_temperature=(0.04, 0.07, 37_500),
            simplex_temperature=((1.0, 1.0, 1), (1.0, 1.0, 1)), center_momentum=0.9, momentum=(0.992, 1.0), dino=1.0, ibot=1.0, mask_share=0.5,
            mask_ratio=(0.1, 0.5), mask_group=64, koleo=0.1, koleo_group=64, drop_path=0.3, drop_path_group=64, consistency=0.0,
            consistency_temperature=(1.0, 0.5),
        ),
        crops=dict(all=dict(
            global_crops=2, global_size=224, global_scale=(0.32, 1.0), local_crops=8, local_size=98, local_scale=(0.05, 0.32),
            ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, lightness=0.0, gray=0.2,
            blur=(1.0, 0.1, 0.5), blur_quirk=True, blur_sigma=(0.1, 2.0), solarize=(0.0, 0.2, 0.0), shift=0.0, interpolation="bicubic",
        )),
        # Decays what DINOv2's code decays: tokens and positions too, those of the simplicial head (its "bias") among them, but no biases,
        # norms or LayerScale.
        optimizer=dict(
            learning_rate=rate, schedule="cosine", warmup=12_500, final=1e-6 / rate, weight_decay=0.04, weight_decay_final=10.0,
            decayed="(?!.*(bias$|norm|gamma)).*|simplicial/bias", layer_decay=0.9, multipliers=(("vit/patch_embed/.*", 0.2),),
            freeze=(("(patch_)?head/(direction|gain)", 1250),), b1=0.9, b2=0.999, eps=1e-8,
        ),
        monitor=dict(every=6250, count=10_000),
        train=train(steps=125_000, batch=batch, clip=3.0, clip_separately=("(patch_)?head/.*",)),
    )  # fmt: skip
    prior = dict(
        stage="prior",
        codes="codes",
        model=dict(
            positions=positions, values=values, width=1024, depth=24, heads=16, mlp_ratio=4.0, per_position=False, sigma_conditioning=False,
            remat="dots", unroll=1, implementation=None,
        ),
        ema_decay=0.9999,
        optimizer=dict(
            learning_rate=3e-4, schedule="constant", warmup=2500, final=0.0, weight_decay=0.0, weight_decay_final=1.0,
            decayed="(.*/)?kernel", layer_decay=1.0, multipliers=(), freeze=(), b1=0.9, b2=0.999, eps=1e-8,
        ),
        train=train(steps=500_456, batch=512, clip=1.0),
    )  # fmt: skip
    generator = dict(
        stage="generator",
        codes="codes",
        latents=True,
        model=dict(
            image=pixels // LATENT, channels=4, patch=2, width=width, depth=depth, heads=heads, positions=positions, values=values,
            out_channels=None, mlp_ratio=4.0, qk_norm=False, remat="dots", unroll=1, implementation=None,
        ),
        objective=dict(prediction="v", floor=0.1, time=(0.0, 1.0), drop=0.1, drop_positions=0.0, foreign=0.0),
        ema_decay=0.9999,
        grid=dict(every=50_000, count=16, sampling_steps=50, guidance=1.5, method="heun"),
        optimizer=dict(
            learning_rate=1e-4, schedule="constant", warmup=0, final=0.0, weight_decay=0.0, weight_decay_final=1.0,
            decayed="(.*/)?kernel", layer_decay=1.0, multipliers=(), freeze=(), b1=0.9, b2=0.999, eps=1e-8,
        ),
        train=train(steps=6_000_000, batch=256, clip=0.0),
    )  # fmt: skip
    return ConfigDict(
        dict(
            seed=0,
            steps=tuple(steps) or STEPS,
            mesh=dict(data=1, fsdp=-1, tensor=1, dcn_data=1, dcn_fsdp=1),
            log=dict(tensorboard=True, wandb=""),
            data=dict(
                name="tfds", dataset="imagenet2012", train="train", validation="validation", image=pixels, field="image",
                data_dir=placeholder(str),
            ),
            encoder=encoder,
            codes=dict(
                stage="codes", path="", encoder="encoder", autoencoder="autoencoder", flip=True, view=dict(image=224),
                splits=("train", "validation"), batch=128, dtype="float32", shard_size=16_384,
            ),
            autoencoder=dict(  # sd-vae-ft-ema; `path` is where `dlc import vae FILE --out DIR` put it
                path="", model=dict(channels=(128, 256, 512, 512), residuals=2, latent=4, groups=32, scaling=0.18215)
            ),
            probe=dict(  # the paper's, but for its training on codes of augmented crops: these are of the codes step's view
                stage="probe", encoder="encoder", codes="codes", splits=("validation",), count=1_300_000, baselines=False,
                fit=dict(
                    rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1), epochs=10, batch=1024,
                    deviation=0.01, held=0.02, memory_gb=40.0,
                ),
            ),
            prior=prior,
            generator=generator,
            samples=dict(
                stage="samples", prefix="", encoder="encoder", prior="prior", generator="generator", codes="codes", held_out=False,
                count=512, pairs=64, batch=512, calls=0, sampling_steps=50, guidance=1.5, method="heun",
            ),
        )
    )  # fmt: skip


def train(*, steps: int, batch: int, clip: float, clip_separately: tuple = ()) -> dict:
    return dict(
        steps=steps, batch=batch, accumulate=1, clip=clip, clip_separately=clip_separately, dtype="bfloat16", log_every=100, save_every=5000,
        validate_every=5000, validate_batches=8, keep=3, patience=20, init_from="", init_new=(),
    )  # fmt: skip
