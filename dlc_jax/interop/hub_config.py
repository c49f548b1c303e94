"""The config.json of each part of an exported folder, and which recipes PyTorch's code can follow.

Sections are those of a run's config, as plain dicts or not.
"""

from collections.abc import Mapping

from dlc_jax.errors import UserError

METHODS = ("euler", "heun", "ddim", "ancestral")  # of `modeling_dlc.py`
PLAIN = {"linear": "heun", "edm": "heun", "ddpm": "ancestral"}
BACKBONE = (
    "width depth heads image patch channels registers mlp_ratio pos pos_resize qk_norm layer_scale"
)
SIMPLICIAL = "positions values readout"
PRIOR = "positions values width depth heads mlp_ratio per_position sigma_conditioning classes"
GENERATOR = (
    "image channels patch width depth heads positions values out_channels mlp_ratio qk_norm "
    "classes embedding block context cross early route head_width head_depth"
)


def dinov2(backbone: Mapping, name: str) -> dict:
    """That of transformers' Dinov2 or Dinov2WithRegisters, of a backbone section."""
    ratio = backbone["mlp_ratio"]
    config = {
        "architectures": [f"{name}Model"],
        "model_type": {"Dinov2": "dinov2", "Dinov2WithRegisters": "dinov2_with_registers"}[name],
        "hidden_size": backbone["width"],
        "num_hidden_layers": backbone["depth"],
        "num_attention_heads": backbone["heads"],
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": backbone["mlp"] == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": backbone["layer_scale"] or 1.0,
        "image_size": backbone["image"],
        "patch_size": backbone["patch"],
        "num_channels": backbone["channels"],
        "qkv_bias": True,
        "dtype": "float32",
    }
    registers = backbone["registers"]
    return config | ({"num_register_tokens": registers} if registers else {})


def encoder(model: Mapping, size: int, dtype: str) -> dict:
    """That of an encoder, which transformers finds too where its backbone is one of DINOv2.

    Args:
      size: side of the images that it reads.
    """
    backbone, head = model["backbone"], model["simplicial"]
    ours = {name: backbone[name] for name in BACKBONE.split()}
    ours |= {name: head[name] for name in SIMPLICIAL.split()}
    ours |= {"gated": backbone["mlp"] == "swiglu", "size": size}
    if backbone["pos"] != "learned" or backbone["qk_norm"]:
        return {"architectures": ["DLCEncoder"], "dlc": ours}
    name = "Dinov2WithRegisters" if backbone["registers"] else "Dinov2"
    found = dinov2(backbone, name) | {"dtype": dtype, "dlc": ours}
    return found | {"auto_map": {"AutoModel": f"transformers_dlc.DLC{name}Model"}}


def prior(section: Mapping, sampler: Mapping) -> dict:
    """That of a prior.

    Args:
      sampler: {"steps", "temperature"}, how codes are drawn unless a call says otherwise.
    """
    process = {"name": "masked", "noise": dict(section["process"]["noise"])}
    model = {name: section["model"][name] for name in PRIOR.split()}
    return {"architectures": ["DLCPrior"], "model": model, "process": process, "sampler": sampler}


def generator(section: Mapping, outputs: int, sampler: Mapping, normalizer: dict | None) -> dict:
    """That of a generator.

    Args:
      outputs: channels of its output.
      sampler: the keywords of `modeling_dlc.draw_images`.
      normalizer: {"mean", "std", "deviation"} of scaled latents. None leaves them as they are.
    """
    model = {name: section["model"][name] for name in GENERATOR.split()}
    model["out_channels"] = outputs
    found = {"architectures": ["DLCGenerator"], "model": model, "process": dict(section["process"])}
    latents = {"latents": section["latents"], "normalizer": normalizer}
    return found | {"sampler": sampler, **latents}


def autoencoder(model: Mapping, image: int) -> dict:
    """That of diffusers' AutoencoderKL, or of the tiny one, whose decoder is in modeling_dlc.py.

    Args:
      model: the section, with its `name`.
      image: side of the images that it was used for.
    """
    if model["name"] == "tiny":
        fields = {key: value for key, value in model.items() if key != "name"}
        return {"_class_name": "DLCTinyDecoder", "model": fields}
    return kl(model, image)


def kl(model: Mapping, image: int) -> dict:
    """That of diffusers' AutoencoderKL, of a `model` section of it, used for images of a side."""
    levels = len(model["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(model["channels"]),
        "layers_per_block": model["residuals"],
        "act_fn": "silu",
        "latent_channels": model["latent"],
        "norm_num_groups": model.get("groups", 32),
        "sample_size": image,
        "scaling_factor": model.get("scaling", 0.18215),
    }


def check_prior(section: Mapping, where: str) -> None:
    """Refuses a prior that modeling_dlc.py cannot draw with.

    Raises:
      UserError: a process other than the masked one.
    """
    if (name := section["process"]["name"]) != "masked":
        raise UserError(
            f"{where}.process.name={name!r}: PyTorch's code draws codes of masked processes alone; "
            "leave the prior out with --steps"
        )


def code_sampler(section: Mapping, where: str, *, plain: bool) -> dict:
    """How codes are drawn, of a `code_sampler` section.

    Args:
      plain: takes first_hitting in place of a method that PyTorch's code has not.

    Raises:
      UserError: another method, or a nucleus, and not `plain`.
    """
    found = {"steps": section["calls"] or None, "temperature": section["temperature"]}
    method = section["method"]
    if method == "auto" and not section["calls"]:
        method = "first_hitting"
    usual = {"method": (method, "first_hitting"), "nucleus": (section["nucleus"], 1.0)}
    _refuse(usual, f"{where}.code_sampler", plain)
    return found


def sampler(section: Mapping, process: str, where: str, *, plain: bool) -> dict:
    """How images are drawn, of a `sampler` section and the name of a process.

    Args:
      plain: takes heun, or ancestral of DDPM, in place of what PyTorch's code has not.

    Raises:
      UserError: another method, churn, or guidance by another generator, and not `plain`.
    """
    guidance, method = dict(section["guidance"]), section["method"]
    base = guidance["base"] if guidance["scale"] != 1 else ""
    other = base not in ("", "internal")
    usual = {
        "method": (method, method if method in METHODS else PLAIN[process]),
        "churn": (section["churn"], 0.0),
        "guidance.base": (base, "" if other else base),
    }
    _refuse(usual, f"{where}.sampler", plain)
    return {
        "method": usual["method"][1],
        "steps": section["steps"],
        "times": section["times"],
        "eta": section["eta"] if method == "ddim" else 0.0,
        "guidance": 1.0 if other else guidance["scale"],
        "interval": list(guidance["interval"]),
        "channels": guidance["channels"],
        "base": usual["guidance.base"][1],
    }


def _refuse(usual: dict, where: str, plain: bool) -> None:
    for field, (value, known) in usual.items():
        if value != known and not plain:
            raise UserError(
                f"{where}.{field}={value!r} is not in PyTorch's code; --plain-samplers takes "
                f"{known!r} in its place"
            )
