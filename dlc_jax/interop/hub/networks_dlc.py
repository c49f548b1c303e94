"""The networks of Discrete Latent Codes (arXiv 2507.12318) in PyTorch; `modeling_dlc` has the rest.

    DLCEncoder      images to logits of codes     DINOv2 with registers, and a simplicial head
    DLCPrior        codes, some hidden, to logits of the hidden values
    DLCGenerator    noisy images and codes to what its process asks for (DiT, arXiv 2212.09748)

Parameters have the names of the safetensors files. A module computes in the dtype of its weights;
norms, rotations and the softmax are float32 inside. Time is 1 at noise and 0 at data.
"""

import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

EDGE = 2  # blocks before and after those that may skip patches (SPRINT, arXiv 2510.21986)


def group(**parts):
    """A module that only holds others, by their names."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def empty(*shape):
    return nn.Parameter(torch.empty(*shape))


class Dense(nn.Linear):
    """A linear map in the dtype of its weight."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.Module):
    """In float32, with a weight and a bias or without; the result has the dtype of the input."""

    def __init__(self, width=None, eps=1e-6, bias=True):
        super().__init__()
        self.eps = eps
        self.weight = empty(width) if width else None
        self.bias = empty(width) if width and bias else None

    def forward(self, x):
        weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


def rms(x):
    """x over its root mean square, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class RMSNorm(nn.Module):
    """Without a weight (arXiv 1910.07467)."""

    def forward(self, x):
        return rms(x).to(x.dtype)


def attend(module, q, k, v, heads, turn=None):
    """Attention of [b, n, d] to [b, m, d] by heads, with what `module` normalizes q and k by."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if hasattr(module, "q_scale"):
        q, k = rms(q) * module.q_scale.float(), rms(k) * module.k_scale.float()
    if turn is not None:
        q, k = (rotate(x, *(table.to(x.device) for table in turn)) for x in (q, k))
    y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return y.transpose(1, 2).flatten(2)


def rotate(x, cos, sin):
    """Turns each pair (x[i], x[i + k/2]) by its angle (RoFormer, arXiv 2104.09864)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """To itself, or to other tokens if `cross`."""

    def __init__(self, width, heads, bias=True, qk_norm=False, cross=False):
        super().__init__()
        self.heads = heads
        if cross:
            self.q, self.kv = Dense(width, width, bias), Dense(width, 2 * width, bias)
        else:
            self.qkv = Dense(width, 3 * width, bias)
        self.out = Dense(width, width, bias)
        if qk_norm:
            self.q_scale, self.k_scale = empty(width // heads), empty(width // heads)

    def forward(self, x, turn=None, tokens=None):
        if tokens is None:
            return self.out(attend(self, *self.qkv(x).chunk(3, -1), self.heads, turn))
        return self.out(attend(self, self.q(x), *self.kv(tokens).chunk(2, -1), self.heads))


class Mlp(nn.Module):
    """GELU, "none" (exact) or its "tanh" approximation; or SwiGLU (arXiv 2002.05202) if gated.

    The latter has two thirds of the hidden units, rounded up to a multiple of 8.
    """

    def __init__(self, width, ratio, gated=False, bias=True, gelu="tanh", names=("fc1", "fc2")):
        super().__init__()
        self.gated, self.gelu, self.names = gated, gelu, names
        units = (int(int(ratio * width) * 2 / 3) + 7) // 8 * 8 if gated else int(ratio * width)
        setattr(self, names[0], Dense(width, 2 * units if gated else units, bias))
        setattr(self, names[1], Dense(units, width, bias))

    def forward(self, x):
        first, last = (getattr(self, name) for name in self.names)
        if not self.gated:
            return last(F.gelu(first(x), approximate=self.gelu))
        gate, value = first(x).chunk(2, -1)
        return last(F.silu(gate) * value)


class TimeEmbedding(nn.Module):
    """A number an example to a vector: 256 cosines and sines, then an MLP."""

    def __init__(self, width, scale=1000.0):
        super().__init__()
        self.scale, self.fc1, self.fc2 = scale, Dense(256, width), Dense(width, width)

    def forward(self, t):
        angle = (self.scale * t.float())[:, None] * falling(1e4, 128).float().to(t.device)
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], -1))))


class Block(nn.Module):
    """adaLN-zero block (arXiv 2212.09748): shift, scale and gate come from the condition.

    "modern" has RMSNorm, SwiGLU and no biases; "prior" has norms with weights, and may have no
    condition. With `cross`, attention to other tokens stands between self-attention and MLP.
    """

    def __init__(self, width, heads, ratio, kind, condition, qk_norm=False, cross=False):
        super().__init__()
        scaled = functools.partial(LayerNorm, width, 1e-5, bias=False)
        norm = {"dit": LayerNorm, "modern": RMSNorm, "prior": scaled}[kind]
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(width, heads, kind == "dit", qk_norm)
        if cross:
            self.cross_attention = Attention(width, heads, kind == "dit", qk_norm, cross=True)
        self.mlp = Mlp(width, ratio, gated=kind == "modern", bias=kind != "modern")
        if condition:
            self.modulation = Dense(condition, 6 * width)

    def forward(self, x, condition=None, turn=None, tokens=None):
        parts = (0, 0, 1, 0, 0, 1)
        if condition is not None:
            parts = per_token(self.modulation(condition)).chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, turn)
        if tokens is not None:
            x = x + self.cross_attention(self.norm1(x), tokens=tokens)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def falling(base, count):
    """`count` frequencies from 1 to nearly 1 / base, float64."""
    return base ** (-torch.arange(count, dtype=torch.float64) / count)


def per_token(x):
    """What is the same for all tokens of an example, [b, d], as [b, 1, d]."""
    return x[:, None] if x.ndim == 2 else x


def modulated(norm, x, modulation=None):
    """norm(x), shifted and scaled as a condition says, if there is one."""
    if modulation is None:
        return norm(x)
    shift, scale = per_token(modulation).chunk(2, -1)
    return norm(x) * (1 + scale) + shift


@functools.lru_cache
def sincos(side, width, extent):
    """Positions of a grid [side^2, width], stretched over one of `extent`: columns, then rows."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) * extent / side - 0.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    angle = torch.stack([x, y], -1).reshape(-1, 2, 1) * falling(1e4, width // 4)
    return torch.stack([angle.sin(), angle.cos()], 2).reshape(side * side, width).float()


@functools.lru_cache
def rope(length, k):
    """Cosines and sines [length, k/2] of rotary positions of heads of width k."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * falling(1e4, k // 2)
    return angle.cos().float(), angle.sin().float()


@functools.lru_cache
def axial_rope(side, k, before=0):
    """Of a grid's rows and columns (DINOv3, arXiv 2508.10104), after tokens that are not turned."""
    place = 2 * (torch.arange(side, dtype=torch.float64) + 0.5) / side - 1
    center = torch.stack(torch.meshgrid(place, place, indexing="ij"), -1).reshape(-1, 2, 1)
    angle = (2 * math.pi * center * falling(100.0, k // 4)).reshape(-1, k // 2)
    angle = torch.cat([angle.new_zeros(before, k // 2), angle])
    return angle.cos().float(), angle.sin().float()


class Layer(nn.Module):
    """A block of DINOv2, whose parts have the names of transformers' Dinov2WithRegistersModel."""

    def __init__(self, c):
        super().__init__()
        d, self.heads = c["width"], c["heads"]
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        inner = group(query=Dense(d, d), key=Dense(d, d), value=Dense(d, d))
        if c["qk_norm"]:
            inner.q_scale, inner.k_scale = empty(d // self.heads), empty(d // self.heads)
        self.attention = group(attention=inner, output=group(dense=Dense(d, d)))
        self.layer_scale1, self.layer_scale2 = group(lambda1=empty(d)), group(lambda1=empty(d))
        names = ("weights_in", "weights_out") if c["gated"] else ("fc1", "fc2")
        self.mlp = Mlp(d, c["mlp_ratio"], c["gated"], gelu="none", names=names)

    def forward(self, x, turn=None):
        inner, h = self.attention.attention, self.norm1(x)
        y = attend(inner, inner.query(h), inner.key(h), inner.value(h), self.heads, turn)
        x = x + self.layer_scale1.lambda1 * self.attention.output.dense(y)
        return x + self.layer_scale2.lambda1 * self.mlp(self.norm2(x))


class Component(nn.Module):
    """What all components share: they are loaded from a folder."""

    PART = ""  # of the file: the start of the names that are read

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """Of a folder with config.json and a safetensors file, whose dtype is kept if not given."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(json.loads((folder / "config.json").read_text()))
        weights = {
            name: tensor.to(dtype or tensor.dtype)
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith(cls.PART)
        }
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    @property
    def device(self):
        return next(self.parameters()).device


class DLCEncoder(Component):
    """Images to codes: DINOv2 with registers, and a simplicial head on its summary tokens."""

    def __init__(self, config):
        super().__init__()
        self.c = c = config["dlc"]
        d, side = c["width"], c["image"] // c["patch"]
        self.size, self.length, self.values = c["size"], c["positions"], c["values"]
        parts = {"cls_token": empty(1, 1, d), "mask_token": empty(1, d)}
        if c["registers"]:
            parts["register_tokens"] = empty(1, c["registers"], d)
        if c["pos"] == "learned":
            parts["position_embeddings"] = empty(1, 1 + side * side, d)
        patches = group(projection=nn.Conv2d(c["channels"], d, c["patch"], c["patch"]))
        self.embeddings = group(**parts, patch_embeddings=patches)
        self.encoder = group(layer=nn.ModuleList(Layer(c) for _ in range(c["depth"])))
        self.layernorm = LayerNorm(d)
        joint = self.length * self.values
        self.sem_embed = Dense((1 + c["registers"]) * d, joint, bias=False)
        self.sem_norm = LayerNorm(joint)
        self.sem_out = Dense(joint if c["readout"] == "plain" else self.values, d, bias=False)
        if c["readout"] == "pos-shared":
            self.sem_bias = empty(self.length, d)

    def forward(self, pixel_values):
        """Normalized images [b, 3, y, x] to logits [b, l, v], and tokens before the last norm."""
        e, c, side = self.embeddings, self.c, pixel_values.shape[-1] // self.c["patch"]
        x = e.patch_embeddings.projection(pixel_values.to(e.cls_token.dtype))
        x, cls, turn = x.flatten(2).transpose(1, 2), e.cls_token, None
        if c["pos"] == "rope":
            turn = axial_rope(side, c["width"] // c["heads"], 1 + c["registers"])
        elif c["pos"] == "sincos":
            x = x + sincos(side, c["width"], c["image"] // c["patch"]).to(x)
        else:
            x, cls = x + self._positions(side).to(x), cls + e.position_embeddings[:, :1]
        first = [cls, e.register_tokens] if c["registers"] else [cls]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], 1)
        for layer in self.encoder.layer:
            x = layer(x, turn)
        joint = self.sem_norm(self.sem_embed(x[:, : 1 + c["registers"]].flatten(1)).float())
        return {"logits": joint.unflatten(1, (self.length, self.values)), "tokens": x}

    def _positions(self, side):
        """Of the patches; other sizes than the encoder was made for get them resized."""
        table, base = self.embeddings.position_embeddings[:, 1:], self.c["image"] // self.c["patch"]
        if side == base:
            return table
        grid = table.float().transpose(1, 2).unflatten(2, (base, base))
        how = {"mode": "bicubic", "antialias": self.c["pos_resize"] == "antialias"}
        return F.interpolate(grid, (side, side), **how).flatten(2).transpose(1, 2)

    def vector(self, simplices):
        """The vector [b, d] that simplices [b, l, v] stand for, normalized."""
        plain = self.c["readout"] == "plain"
        y = self.sem_out(simplices.flatten(1) if plain else simplices.mean(1))
        return self.layernorm(y + self.sem_bias.mean(0) if hasattr(self, "sem_bias") else y)


class DLCPrior(Component):
    """Masked diffusion of codes: logits of hidden values given the visible ones."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config["model"]
        self.length, self.values, self.classes = c["positions"], c["values"], c["classes"]
        d, self.sigma, self.each = c["width"], c["sigma_conditioning"], c["per_position"]
        rows = (self.length, self.values + 1) if self.each else (self.values + 1,)
        self.token_embed, self.pos_embed = empty(*rows, d), empty(self.length, d)
        if self.sigma:
            self.sigma_embed = TimeEmbedding(128, scale=1.0)
        if self.classes:
            self.label_table = group(table=empty(self.classes + 1, 128))
        condition = 128 if self.sigma or self.classes else 0
        settings = d, c["heads"], c["mlp_ratio"], "prior", condition
        self.blocks = nn.ModuleList(Block(*settings) for _ in range(c["depth"]))
        self.final_norm, self.k = LayerNorm(d, 1e-5, bias=False), d // c["heads"]
        if condition:
            self.final_modulation = Dense(condition, 2 * d)
        self.final = Dense(d, self.values + 1 if self.sigma else self.values)

    def forward(self, codes, sigma=None, label=None):
        """Logits float32 [b, l, v] (v + 1 with sigma) of codes in 0..v, where v is the mask."""
        place = torch.arange(self.length, device=codes.device)
        x = self.token_embed[place, codes] if self.each else self.token_embed[codes]
        x, parts = x + self.pos_embed, []
        if self.sigma:
            parts.append(self.sigma_embed(sigma))
        if self.classes:
            parts.append(self.label_table.table[label])
        condition = F.silu(sum(parts)) if parts else None
        for block in self.blocks:
            x = block(x, condition, rope(self.length, self.k))
        modulation = None if condition is None else self.final_modulation(condition)
        return self.final(modulated(self.final_norm, x, modulation)).float()


class CodeTable(nn.Module):
    """Codes to a vector, the mean over positions i of E[i, c_i]; row v of E is the null value."""

    def __init__(self, length, values, width):
        super().__init__()
        self.values, self.table = values, empty(length, values + 1, width)

    def rows(self, codes):
        """[b, l, d] of codes int [b, l], of soft ones float [b, l, v], or of none."""
        if codes is None:
            return self.table[None, :, self.values]
        if codes.ndim == 2:
            return self.table[torch.arange(len(self.table), device=codes.device), codes]
        return torch.einsum("blv,lvd->bld", codes.to(self.table), self.table[:, : self.values])

    def forward(self, codes):
        return self.rows(codes).float().mean(1).to(self.table.dtype)

    def tokens(self, codes, count):
        """Of `count` runs of neighboring positions, [b, count, d]."""
        rows = self.rows(codes)
        size = (rows.shape[2] * rows.shape[1] / count) ** 0.5
        rows = rows.unflatten(1, (count, -1)).float().mean(2)
        return (rows * size).to(self.table.dtype)


class CodeTokens(nn.Module):
    """Tokens of codes as blocks read them; with `null` a learned token comes last."""

    def __init__(self, count, width, null=False):
        super().__init__()
        self.position, self.dense = empty(count, width), Dense(width, width)
        self.null = empty(width) if null else None

    def forward(self, tokens):
        tokens = self.dense(tokens) + self.position
        if self.null is None:
            return tokens
        return torch.cat([tokens, self.null.expand(len(tokens), 1, -1)], 1)


class DLCGenerator(Component):
    """What a process asks for, of noisy images [b, y, x, c], times and codes."""

    def __init__(self, config):
        super().__init__()
        c, self.config = config["model"], config
        self.c, d, patch = c, c["width"], c["patch"]
        pixels, features = patch**2 * c["channels"], patch**2 * c["out_channels"]
        self.patch_embed, self.time_embed = Dense(pixels, d), TimeEmbedding(d)
        if c["positions"]:
            self.code_table = CodeTable(c["positions"], c["values"], d)
        if c["classes"]:
            self.label_table = group(table=empty(c["classes"] + 1, d))
        if c["embedding"]:
            dense = Dense(c["embedding"], d, bias=False)
            self.embedding_input = group(null=empty(c["embedding"]), dense=dense)
        if c["context"]:
            self.context_tokens = CodeTokens(c["context"], d)
        if c["cross"]:
            self.cross_tokens = CodeTokens(c["cross"], d, null=True)

        def blocks(count, width, cross=False):
            how = c["heads"], c["mlp_ratio"], c["block"], width, c["qk_norm"], cross
            return nn.ModuleList(Block(width, *how) for _ in range(count))

        self.blocks = blocks(c["depth"], d, bool(c["cross"]))
        if c["route"]:
            self.fusion = group(mask=empty(d), dense=Dense(2 * d, d))
        if c["early"]:
            self.early_head = group(modulation=Dense(d, 2 * d), out=Dense(d, features))
        if wide := c["head_width"]:  # DDT (arXiv 2504.05741)
            head = {"project": Dense(d, wide), "patch_embed": Dense(pixels, wide)}
            self.head = group(**head, blocks=blocks(c["head_depth"], wide))
        self.final_norm = RMSNorm() if c["block"] == "modern" else LayerNorm()
        wide = wide or d
        self.final_modulation, self.final = Dense(wide, 2 * wide), Dense(wide, features)

    def embed(self, codes=None, label=None, embedding=None):
        """(vector, tokens for cross-attention, tokens in context); what is not given is null."""
        c, parts, tokens, context = self.c, [], None, None
        if c["positions"]:
            parts.append(self.code_table(codes))
            if c["context"]:
                context = self.context_tokens(self.code_table.tokens(codes, c["context"]))
            if c["cross"]:
                tokens = self.cross_tokens(self.code_table.tokens(codes, c["cross"]))
        if c["classes"]:
            table = self.label_table.table
            parts.append(table[c["classes"] :] if label is None else table[label])
        if c["embedding"]:
            part = self.embedding_input
            parts.append(part.dense(part.null[None] if embedding is None else embedding))
        return sum(parts) if parts else None, tokens, context

    def forward(self, x, t, condition, early=False):
        """The prediction float32 [b, y, x, o]; with `early`, that of the early head beside it."""
        c, (vector, tokens, context) = self.c, condition
        side = x.shape[1] // c["patch"]
        patches = x.unflatten(2, (side, -1)).unflatten(1, (side, -1)).transpose(2, 3)
        patches = patches.reshape(len(x), side**2, -1)  # within one: row, column, channel
        h = self.patch_embed(patches)
        h = h + sincos(side, c["width"], c["image"] // c["patch"]).to(h)
        time, wide = self.time_embed(t), c["head_width"]
        on = F.silu(time if vector is None else time + vector)
        h, weak = self._encode(h, on, tokens, context, side)
        if early:
            weak = modulated(self.final_norm, weak, self.early_head.modulation(on))
            weak = self._image(self.early_head.out(weak), side)
        if wide:
            on = F.silu(self.head.project(time[:, None] + h))
            h = self.head.patch_embed(patches)
            h = h + sincos(side, wide, c["image"] // c["patch"]).to(h)
            turn = axial_rope(side, wide // c["heads"]) if c["block"] == "modern" else None
            for block in self.head.blocks:
                h = block(h, on, turn)
        h = self.final(modulated(self.final_norm, h, self.final_modulation(on)))
        return (self._image(h, side), weak) if early else self._image(h, side)

    def _encode(self, h, on, tokens, context, side):
        """Patch tokens after all blocks, and after that of the early head."""
        c, turn, weak = self.c, None, None
        count, middle = c["context"], range(EDGE, c["depth"] - EDGE) if c["route"] else ()
        if c["block"] == "modern":
            turn = axial_rope(side, c["width"] // c["heads"], count)
        if count:
            h = torch.cat([context.expand(len(h), -1, -1), h], 1)
        if tokens is not None:
            tokens = tokens.expand(len(h), -1, -1)
        for number, block in enumerate(self.blocks):
            if middle and number == EDGE:
                begun = h
            h = whole = block(h, on, turn, tokens)
            if number in middle:
                whole = self.fusion.dense(torch.cat([begun, h], -1))
                h = whole if number == middle[-1] else h
            if number + 1 == c["early"]:
                weak = whole[:, count:]
        return h[:, count:], weak

    def _image(self, patches, side):
        x = patches.float().reshape(len(patches), side, side, *[self.c["patch"]] * 2, -1)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
