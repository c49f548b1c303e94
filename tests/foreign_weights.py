"""State dicts as other programs have them, by hand from the published names and shapes.

Their entries are random.
"""

import numpy as np

WIDTH, DEPTH, PATCH, SIDE, POSITIONS, VALUES = 128, 2, 4, 3, 6, 8


def official(
    *,
    registers=4,
    mlp="gelu",
    readout="",
    positions=POSITIONS,
    values=VALUES,
    head=0,
    dtype=np.float32,
    depth=DEPTH,
    seed=0,
):
    """DINOv2's names.

    With a `readout` those of the simplicial head too, with `head` those of one or two DINO heads.
    """
    d, joint = WIDTH, positions * values
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + SIDE * SIDE, d), "mask_token": (1, d)}
    if registers:
        shapes["register_tokens"] = (1, registers, d)
    shapes |= {"patch_embed.proj.weight": (d, 3, PATCH, PATCH), "patch_embed.proj.bias": (d,)}
    for number in range(depth):
        block = {"norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
        block |= {
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
        }
        block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
        if mlp == "gelu":
            block |= {
                "mlp.fc1.weight": (4 * d, d),
                "mlp.fc1.bias": (4 * d,),
                "mlp.fc2.weight": (d, 4 * d),
                "mlp.fc2.bias": (d,),
            }
        else:
            h = 344  # two thirds of 512, rounded up to a multiple of 8
            block |= {
                "mlp.w12.weight": (2 * h, d),
                "mlp.w12.bias": (2 * h,),
                "mlp.w3.weight": (d, h),
                "mlp.w3.bias": (d,),
            }
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    if readout:
        shapes |= {
            "sem_embed.weight": (joint, (1 + registers) * d),
            "sem_norm.weight": (joint,),
            "sem_norm.bias": (joint,),
        }
        shapes |= {"sem_out.weight": (d, joint if readout == "plain" else values)}
        shapes |= {"sem_cls_norm.weight": (d,), "sem_cls_norm.bias": (d,)}
        if readout == "pos-shared":
            shapes |= {"sem_bias": (positions, d)}
    for name in ("dino_head", "ibot_head")[: int(head)]:
        shapes |= {f"{name}.mlp.0.weight": (24, d), f"{name}.mlp.0.bias": (24,)}
        shapes |= {f"{name}.mlp.2.weight": (24, 24), f"{name}.mlp.2.bias": (24,)}
        shapes |= {f"{name}.mlp.4.weight": (16, 24), f"{name}.mlp.4.bias": (16,)}
        shapes |= {f"{name}.last_layer.weight_g": (40, 1), f"{name}.last_layer.weight_v": (40, 16)}
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()
    }


def transformers(state):
    """The same vision transformer by transformers' names."""
    renamed = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    renamed |= {
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
    }
    found = {}
    for name, tensor in state.items():
        kind = name.rpartition(".")[2]
        if name in renamed:
            found[renamed[name]] = tensor
        elif name.startswith("patch_embed.proj"):
            found[f"embeddings.patch_embeddings.projection.{kind}"] = tensor
        elif name.startswith("norm."):
            found[f"layernorm.{kind}"] = tensor
        elif name.startswith("blocks."):
            _, number, inner = name.split(".", 2)
            layer = f"encoder.layer.{number}"
            if inner.startswith("attn.qkv"):
                for part, third in zip(("query", "key", "value"), np.split(tensor, 3)):
                    found[f"{layer}.attention.attention.{part}.{kind}"] = np.ascontiguousarray(
                        third
                    )
            else:
                new = (
                    inner.replace("attn.proj", "attention.output.dense")
                    .replace("w12", "weights_in")
                    .replace("w3", "weights_out")
                )
                new = new.replace("ls1.gamma", "layer_scale1.lambda1").replace(
                    "ls2.gamma", "layer_scale2.lambda1"
                )
                found[f"{layer}.{new}"] = tensor
    return found
