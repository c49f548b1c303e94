"""ImageNet at 256 pixels with what is known of generators in 2026, on the paper's codes.

    python -m dlc_jax.main --config=configs/imagenet256_fast.py --config.autoencoder.path=VAE

Encoder, codes and prior are those of imagenet256.py. Each group of lines is one lever with its
source, and taking the group away gives the generator without it; docs/results_history.md ("Levers")
measures them one at a time. 100,000 steps of 1024 are 80 epochs.
"""

RECIPE = {
    "like": "imagenet256.py",
    # the process: x-prediction (2511.13720) at logit-normal times (2403.03206) on the linear path
    "generator.process.name": "linear",
    "generator.process.prediction": "x",
    "generator.process.time": "logit_normal",
    "generator.normalize": True,
    # the network: RMSNorm, SwiGLU and RoPE (LightningDiT, 2501.01423), bfloat16 kept stable by QK
    # norm, codes in context (RAE, 2510.11690) beside their mean, a wide head (DDT, 2504.05741)
    "generator.model.block": "modern",
    "generator.model.qk_norm": True,
    "generator.model.context": 16,
    "generator.model.head_width": 2048,
    "generator.model.head_depth": 2,
    # internal guidance: a head at block 8 is the weak prediction, no null condition (2605.18324)
    "generator.model.early": 8,
    "generator.objective.drop": 0.0,
    # patches aligned with our own frozen encoder's (iREPA, 2512.10794), first (HASTE, 2505.16792)
    "generator.model.align": 8,
    "generator.model.align_width": 1024,  # of the encoder
    "generator.objective.align": 0.5,
    "generator.objective.align_until": 50_000,
    # 75 % of the tokens dropped in the middle blocks (SPRINT, 2510.21986), all of them at the end
    "generator.model.route": True,
    "generator.objective.route": 0.75,
    "generator.objective.route_until": 90_000,
    # batch 1024, Muon (2502.16982), EMA 0.9995, clip 1 (RAE, 2510.11690)
    "generator.optimizer.name": "muon",
    "generator.optimizer.learning_rate": 2e-4,
    "generator.optimizer.warmup": 1000,
    "generator.optimizer.schedule": "linear",
    "generator.optimizer.final": 0.1,
    "generator.ema_decay": 0.9995,
    "generator.train.batch": 1024,
    "generator.train.steps": 100_000,
    "generator.train.clip": 1.0,
    "*.sampler.method": "heun",
    "*.sampler.steps": 50,
    "*.guidance.channels": None,
    "*.sampler.guidance.base": "internal",
    "*.sampler.guidance.interval": (0.1, 1.0),
    "samples.sampler.guidance.scale": 1.78,
}
VARIANTS = {
    "XL": {},
    "B": {
        "generator.model.width": 768,
        "generator.model.depth": 12,
        "generator.model.heads": 12,
        "generator.model.early": 4,
        "generator.model.align": 4,
        "generator.model.head_width": 1024,
    },
}
