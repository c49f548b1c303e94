"""SEDD over codes as PyTorch has it: states by hand from the published names, and the network.

Entries are random, and nothing is zero.
"""

import numpy as np

from dlc_jax.cli import priors
from dlc_jax.interop import files, sedd_names, slots
from dlc_jax.interop.weights import Weights
from dlc_jax.models.masked_transformer import MaskedTransformer

L, V, WIDTH, DEPTH, HEADS = 6, 5, 32, 2, 4


def state(*, per_position=False, buffer=True, dtype=np.float32, seed=0):
    """{name: array} in the order in which PyTorch registers them."""
    d, c = WIDTH, 128
    table = "embedding_table" if per_position else "embedding"
    rows = (L, V + 1, d) if per_position else (V + 1, d)
    shapes = {"pos_embed": (L, d), f"vocab_embed.{table}": rows}
    shapes |= {"sigma_map.mlp.0.weight": (c, 256), "sigma_map.mlp.0.bias": (c,)}
    shapes |= {"sigma_map.mlp.2.weight": (c, c), "sigma_map.mlp.2.bias": (c,)}
    for number in range(DEPTH):
        block = {"norm1.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d)}
        block |= {"norm2.weight": (d,), "mlp.0.weight": (4 * d, d), "mlp.0.bias": (4 * d,)}
        block |= {"mlp.2.weight": (d, 4 * d), "mlp.2.bias": (d,)}
        block |= {"adaLN_modulation.weight": (6 * d, c), "adaLN_modulation.bias": (6 * d,)}
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    last = {"norm_final.weight": (d,), "linear.weight": (V + 1, d), "linear.bias": (V + 1,)}
    last |= {"adaLN_modulation.weight": (2 * d, c), "adaLN_modulation.bias": (2 * d,)}
    shapes |= {f"output_layer.{name}": shape for name, shape in last.items()}
    random = np.random.default_rng(seed)

    def drawn(name, shape):
        center = float("norm" in name)
        return center + random.normal(size=shape) * (shape[-1] ** -0.5 if shape[1:] else 0.3)

    found = {name: drawn(name, shape).astype(dtype) for name, shape in shapes.items()}
    if buffer:
        head = WIDTH // HEADS
        found["rotary_emb.inv_freq"] = (1e4 ** (-np.arange(0, head, 2) / head)).astype(np.float32)
    return found


def training(*, prefix="", average=1, **settings):
    """What SEDD's training writes: the average is a list without names."""
    model, ema = state(**settings), state(buffer=False, seed=average)
    return {
        "optimizer": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{}]},
        "model": {f"{prefix}{name}": tensor for name, tensor in model.items()},
        "ema": {"decay": 0.9999, "num_updates": 12, "shadow_params": list(ema.values())},
        "step": 500,
    }


def from_state(found, heads=None):
    """(MaskedTransformer, its parameters) of {name: array}."""
    tensors = files.Tensors({n: t.shape for n, t in found.items()}, found.__getitem__, {})
    opened = Weights("here", sedd_names.clean, lambda _: tensors)
    model = MaskedTransformer(**sedd_names.section(opened.shapes, "here", heads))
    shapes = slots.shapes_of(priors.abstract(model))
    table = sedd_names.table(shapes)
    return model, slots.nested(opened.params(table, shapes, unused=[sedd_names.BUFFER]))


def network(*, per_position=False):
    """The network in PyTorch, from its description; `forward(codes, sigma)` are raw outputs."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return functional.layer_norm(x, (WIDTH,), self.weight, eps=1e-5)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            if per_position:
                self.embedding_table = nn.Parameter(torch.zeros(L, V + 1, WIDTH))
            else:
                self.embedding = nn.Parameter(torch.zeros(V + 1, WIDTH))

        def forward(self, codes):
            if per_position:
                return self.embedding_table[torch.arange(L), codes]
            return self.embedding[codes]

    class Sigma(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, 128))

        def forward(self, sigma):
            angle = sigma[:, None] * torch.exp(-torch.arange(128) / 128 * np.log(1e4))
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).float())

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            head = WIDTH // HEADS
            self.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, head, 2) / head))

        def forward(self, x):  # [b, h, l, k]
            angle = torch.outer(torch.arange(L).float(), self.inv_freq)
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
            return x * angle.cos().repeat(1, 2) + turned * angle.sin().repeat(1, 2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = Norm()
            self.attn_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.attn_out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.norm2 = Norm()
            wide = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH)
            self.mlp = nn.Sequential(*wide)
            self.adaLN_modulation = nn.Linear(128, 6 * WIDTH)

        def forward(self, x, c, rotary):
            parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1)
            q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(rotary(q), rotary(k), v)
            x = x + gate1 * self.attn_out(y.transpose(1, 2).flatten(2))
            return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_final = Norm()
            self.linear = nn.Linear(WIDTH, V + 1)
            self.adaLN_modulation = nn.Linear(128, 2 * WIDTH)

        def forward(self, x, c):
            shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
            return self.linear(self.norm_final(x) * (1 + scale) + shift)

    class Sedd(nn.Module):
        def __init__(self):
            super().__init__()
            self.vocab_embed, self.sigma_map, self.rotary_emb = Table(), Sigma(), Rotary()
            self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
            self.output_layer = Last()
            self.pos_embed = nn.Parameter(torch.zeros(L, WIDTH))

        def forward(self, codes, sigma):
            x = self.vocab_embed(codes) + self.pos_embed
            c = functional.silu(self.sigma_map(sigma))
            for block in self.blocks:
                x = block(x, c, self.rotary_emb)
            return self.output_layer(x, c)

    return Sedd()
