"""The same networks in PyTorch, written from their equations, to compare speed with.

DiT (arXiv 2212.09748): tokens of patches, adaLN-zero blocks, a class and a time as their condition.
ViT (arXiv 2010.11929): a class token and patches, pre-norm blocks. Attention is PyTorch's fused
one. Modules have the names of ours, so that `copy` needs no table.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dlc_jax.models.positions import sincos_2d

EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, width = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, width))


class Mlp(nn.Module):
    def __init__(self, width, hidden, out, activation):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


def modulate(x, shift, scale):
    """x (1 + scale) + shift, of vectors an example."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.width = (width,)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        y = modulate(F.layer_norm(x, self.width, eps=EPS), shift1, scale1)
        x = torch.addcmul(x, gate1[:, None], self.attention(y))
        y = modulate(F.layer_norm(x, self.width, eps=EPS), shift2, scale2)
        return torch.addcmul(x, gate2[:, None], self.mlp(y))


class DiT(nn.Module):
    """(x [b, y, x, c], t [b] in 0..1, label [b]; the label `classes` is null) -> [b, y, x, c]."""

    def __init__(self, *, width, depth, heads, classes, image=32, channels=4, patch=2):
        super().__init__()
        self.width, self.patch, self.side = (width,), patch, image // patch
        features = patch**2 * channels
        self.patch_embed = nn.Linear(features, width)
        self.time_embed = Mlp(256, width, width, nn.SiLU())
        self.label_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, features)
        positions = torch.from_numpy(sincos_2d(self.side, self.side, width))
        self.register_buffer("positions", positions)
        frequency = 1e4 ** (-np.arange(128) / 128)
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.float32))

    def forward(self, x, t, label):
        h = self.patch_embed(patchify(x, self.patch))
        h = h + self.positions.to(h.dtype)  # bfloat16 from here on under autocast, as ours
        angle = 1000 * t[:, None] * self.frequency
        time = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        c = F.silu(time + self.label_table(label))
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        h = self.final(modulate(F.layer_norm(h, self.width, eps=EPS), shift, scale))
        b, side, patch = len(x), self.side, self.patch
        h = h.view(b, side, side, patch, patch, -1).transpose(2, 3)
        return h.reshape(b, side * patch, side * patch, -1)


def patchify(x, patch):
    """[b, y, x, c] to [b, n, patch^2 c], by row, column, channel."""
    b, y, _, c = x.shape
    side = y // patch
    x = x.view(b, side, patch, side, patch, c).transpose(2, 3)
    return x.reshape(b, side * side, patch * patch * c)


class ViTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width, width, nn.GELU())

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images [b, y, x, 3] to the normalized class token [b, d]."""

    def __init__(self, *, width, depth, heads, image=224, patch=16):
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Linear(patch**2 * 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1 + (image // patch) ** 2, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images):
        patches = self.patch_embed(patchify(images, self.patch))
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class Training:
    """A step of flow matching with AdamW and an average, as well as PyTorch does it.

    The velocity noise - data is learned at logit-normal times, and the class is hidden from a tenth
    of the examples. On a GPU products are bfloat16 by autocast.
    """

    def __init__(self, model, *, rate=1e-4, decay=0.9999, drop=0.1, compile=False):
        self.model, self.decay, self.drop = model, decay, drop
        self.params = list(model.parameters())
        self.average = [param.detach().clone() for param in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=rate, weight_decay=0.0, fused=True)
        self.device = self.params[0].device.type
        self.loss = torch.compile(self.plain_loss) if compile else self.plain_loss

    def plain_loss(self, x, label, t, noise):
        at = t[:, None, None, None]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            output = self.model((1 - at) * x + at * noise, t, label)
        return F.mse_loss(output.float(), noise - x)

    def __call__(self, x, label):
        t = torch.sigmoid(torch.randn(len(x), device=x.device))
        null = self.model.label_table.num_embeddings - 1
        hidden = torch.rand(len(x), device=x.device) < self.drop
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x, label.masked_fill(hidden, null), t, torch.randn_like(x))
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.params, 1 - self.decay)
        return loss.detach()


@torch.no_grad()
def copy(params, model) -> None:
    """Our parameters, a tree of dicts, into a model; each of its own must be there."""
    wanted = dict(model.named_parameters())
    for name, value in _leaves(params):
        parts = name.split("/")
        kind = {"kernel": "weight", "scale": "weight", "table": "weight"}.get(parts[-1], parts[-1])
        stacked = parts[0] == "blocks"
        for number, layer in enumerate(value) if stacked else [("", value)]:
            place = ".".join(filter(None, [parts[0], str(number), *parts[1:-1], kind]))
            if len(parts) == 1:
                place = name
            if place == "mask_token":  # of training alone
                continue
            target = wanted.pop(place)
            if parts[-1] == "kernel":  # [in, *out] to [out, in]
                layer = layer.reshape(len(layer), -1).T
            target.copy_(torch.from_numpy(np.array(layer)).reshape(target.shape))
    if wanted:
        raise ValueError(f"no values for {', '.join(wanted)}")


def _leaves(tree, before=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{name}/")
        else:
            yield f"{before}{name}", np.asarray(value, np.float32)
