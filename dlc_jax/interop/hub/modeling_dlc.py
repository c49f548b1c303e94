"""Discrete Latent Codes (arXiv 2507.12318) in PyTorch, as `dlc export torch` wrote them.

    from modeling_dlc import DLCPipeline
    p = DLCPipeline.from_pretrained("DIR")                    # dtype=torch.bfloat16, device="cuda"
    codes = p.encode(images)                                  # uint8 [b, y, x, 3] -> int64 [b, l]
    images = p.decode(codes, steps=12, guidance=1.5, seed=0)  # and back
    images = p.sample(16, seed=0)                             # new ones
    images = p.decode(p.compose([a, b], "coin", seed=0))      # a and b: images, or their codes

It needs torch and safetensors, and diffusers where an AutoencoderKL makes images of latents. Images
are [b, y, x, c]; a code is l numbers in 0..v-1. All that is random comes from `seed`, a number or a
torch.Generator of the CPU, so that it is the same on all devices.
"""

import json
import math
from pathlib import Path

import torch
from torch import nn

try:
    from networks_dlc import Component, DLCEncoder, DLCGenerator, DLCPrior
except ImportError:  # as a part of a package, which hubs make of it
    from .networks_dlc import Component, DLCEncoder, DLCGenerator, DLCPrior

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1


def generator_of(seed):
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


# ---- codes: masked diffusion ----


def log_p(prior, noisy, share, labels=None):
    """log chances [b, l, v] of the values of codes of which a share [b] is hidden."""
    noise, most = prior.config["process"]["noise"], 1 - 2.0**-24
    if noise["schedule"] == "log_linear":
        most = 1 - noise["eps"]
    elif noise["schedule"] == "geometric":
        most = min(most, -math.expm1(-noise["largest"]))
    if prior.classes:
        none = torch.full((len(noisy),), prior.classes)
        labels = torch.as_tensor(none if labels is None else labels, device=prior.device)
    sigma = -torch.log1p(-share.float().clamp(max=most))
    return prior(noisy, sigma, labels)[..., : prior.values].log_softmax(-1)


def noise_of_codes(prior, count, seed):
    """What a draw is made of: uniform [b, l], for the order, and Gumbel [b, l, v]."""
    generator = generator_of(seed)
    uniform = torch.rand(count, prior.length, generator=generator)
    wide = torch.empty(count, prior.length, prior.values, dtype=torch.float64)
    return uniform, -wide.exponential_(generator=generator).log().float()


@torch.no_grad()
def draw_codes(prior, codes, known, noise, *, steps=None, temperature=1.0, labels=None):
    """Codes [b, l] with values drawn where they are not known (first hitting, 2409.02908).

    An equal share of the positions in each of `steps` calls, in random order. One position a call,
    which None is, is exact. Temperature 0 takes the likeliest values.
    """
    uniform, gumbel, known, codes = (each.to(prior.device) for each in (*noise, known, codes))
    codes, steps = torch.where(known, codes, prior.values), min(steps or prior.length, prior.length)
    moment = torch.where(known, -1.0, 1 - uniform)  # the share that is hidden at its turn
    rank = moment.argsort(-1, descending=True).argsort(-1)
    count = (~known).sum(-1, keepdim=True).clamp(min=1)
    turn = ((rank + 1) * count.clamp(max=steps) - 1) // count
    for index in range(steps):
        now = ~known & (turn == index)
        if not now.any():
            continue
        share = torch.where(now, moment, 0.0).amax(-1) * (~known).float().mean(-1)
        logs = log_p(prior, codes, share, labels)
        if temperature not in (0, 1):
            logs = (logs / temperature).log_softmax(-1)
        codes = torch.where(now, (logs + gumbel if temperature else logs).argmax(-1), codes)
    return codes


@torch.no_grad()
def surprise(prior, codes, order, *, calls=8, labels=None):
    """-log2 p [b, l] of each value given others: each is hidden once, with 1 / calls of the code.

    `order` is a permutation of the positions for each code, [b, l].
    """
    codes, order = codes.to(prior.device), order.to(prior.device)
    found = torch.zeros(codes.shape, device=prior.device)
    for index in range(calls):
        hidden = order % calls == index
        noisy = torch.where(hidden, prior.values, codes)
        logs = log_p(prior, noisy, hidden.float().mean(-1), labels)
        found = torch.where(hidden, -logs.gather(-1, codes[..., None])[..., 0], found)
    return found / math.log(2)


# ---- images: processes x_t = alpha(t) data + sigma(t) noise, from t=1 to 0 ----


def spaced(times, steps):
    """steps + 1 times from 1 to 0."""
    part = [n / steps for n in range(steps + 1)]
    inner = [1 - p if times == "uniform" else math.cos(math.pi / 2 * p) for p in part[1:-1]]
    return [1.0, *inner, 0.0]


class Linear:
    """alpha = 1 - t, sigma = t; the network gives the velocity or the data (arXiv 2209.03003)."""

    def __init__(self, c):
        self.c = c

    def path(self, t):
        """(alpha, sigma)."""
        return 1 - t, t

    def inputs(self, x, t):
        """What the network reads."""
        return x, t

    def predict(self, output, x, t):
        """(data, noise, mix) of the network's output; mix is the variance's place in its range."""
        if self.c["prediction"] == "v":
            return x - t * output, x + (1 - t) * output, None
        return output, (x - (1 - t) * output) / max(t, 1e-4), None

    def grid(self, times, steps, elements):
        """Times of a sampler, from noise to 0."""
        factor = self.c["shift"] or math.sqrt(elements / 4096)
        return [factor * t / (1 + (factor - 1) * t) for t in spaced(times, steps)]


class DDPM:
    """DiT's path of discrete steps whose variances rise linearly; the network gives the noise."""

    def __init__(self, c):
        self.c, self.steps = c, c["steps"]
        beta = torch.linspace(c["beta_first"], c["beta_last"], self.steps, dtype=torch.float64)
        self.log_kept = [0.0, *torch.log1p(-beta).cumsum(0).tolist()]

    def path(self, t):
        kept = self.log_kept[round(t * self.steps)]
        return math.exp(kept / 2), math.sqrt(-math.expm1(kept))

    def inputs(self, x, t):
        return x, (round(t * self.steps) - 1) / 1000

    def predict(self, output, x, t):
        noise, mix = output, None
        if self.c["learned_variance"]:
            noise, mix = output.chunk(2, -1)
            mix = (mix + 1) / 2
        alpha, sigma = self.path(t)
        return (x - sigma * noise) / alpha, noise, mix

    def grid(self, times, steps, elements):
        shares = spaced(times, max(steps - 1, 1))[:steps]
        rows = [round(share * (self.steps - 1)) + 1 for share in shares]
        if len(set(rows)) < steps:
            raise ValueError(f"{steps} steps do not fit into the {self.steps} of the process")
        return [row / self.steps for row in [*rows, 0]]


class EDM:
    """alpha = 1; the network is preconditioned (arXiv 2206.00364, table 1)."""

    def __init__(self, c):
        self.c = c

    def path(self, t):
        low, high = (self.c[end] ** (1 / self.c["rho"]) for end in ("sigma_min", "sigma_max"))
        return 1.0, (low + t * (high - low)) ** self.c["rho"] if t > 0 else 0.0

    def inputs(self, x, t):
        sigma = self.path(t)[1]
        return x / math.hypot(sigma, self.c["sigma_data"]), math.log(sigma) / 4

    def predict(self, output, x, t):
        sigma, data = self.path(t)[1], self.c["sigma_data"]
        root = math.hypot(sigma, data)
        clean = (data / root) ** 2 * x + sigma * data / root * output
        return clean, sigma / root**2 * x - data / root * output, None

    def grid(self, times, steps, elements):
        return [max(t, 1e-9) for t in spaced(times, max(steps - 1, 1))[:steps]] + [0.0]


def along(process, x, t, s, data, noise):
    """x at time s, where data and noise stay as predicted."""
    (alpha, sigma), (alpha_s, sigma_s) = process.path(t), process.path(s)
    return x + (alpha_s - alpha) * data + (sigma_s - sigma) * noise


def stepped(process, predict, x, t, s, method, eta, fresh):
    """x at time s < t; `fresh()` is new noise, which only "ddim" and "ancestral" draw.

    Sources: EDM's algorithm 1 (heun), DDIM (arXiv 2010.02502), DDPM's algorithm 2 with the learned
    variance of arXiv 2102.09672 (ancestral).
    """
    data, noise, mix = predict(x, t)
    if method == "euler":
        return along(process, x, t, s, data, noise)
    if method == "heun":
        guess = along(process, x, t, s, data, noise)
        if s == 0:
            return guess
        data2, noise2, _ = predict(guess, s)
        return along(process, x, t, s, (data + data2) / 2, (noise + noise2) / 2)
    (alpha, sigma), (alpha_s, sigma_s) = process.path(t), process.path(s)
    kept, share = alpha / alpha_s, sigma_s / sigma
    upper = (sigma - kept * sigma_s) * (sigma + kept * sigma_s)  # the noise between s and t
    lower = upper * share**2  # the posterior's
    if method == "ddim":
        left = math.sqrt(max(sigma_s**2 - eta**2 * lower, 0))
        return alpha_s * data + left * noise + eta * math.sqrt(lower) * fresh()
    if method != "ancestral":
        raise ValueError(f"method {method!r} is none of euler, heun, ddim, ancestral")
    mean = alpha_s * data + kept * sigma_s * share * noise
    deviation = lower**0.5 if mix is None or not share else lower**0.5 * share ** (-mix)
    return mean + deviation * fresh()


@torch.no_grad()
def draw_images(model, given, noise, fresh, *, method, steps, times, eta, guidance, interval,
                channels, base):  # fmt: skip
    """Images or latents [b, y, x, c] from standard normal noise, which `fresh()` adds to.

    `given` are the keywords of `DLCGenerator.embed`. Guidance is weak + scale (found - weak), at
    times within `interval`, of the first `channels`; the weak prediction is that of the null
    condition, or of the early head if base is "internal".
    """
    section = model.config["process"]
    process = {"linear": Linear, "ddpm": DDPM, "edm": EDM}[section["name"]](section)
    guided = guidance != 1 and bool(given or base)
    internal = guided and base == "internal"
    condition, null = model.embed(**given), model.embed() if guided and not internal else None

    def call(x, t, condition, early=False):
        inputs, time = process.inputs(x, t)
        times = torch.full((len(x),), time, device=x.device)
        found = model(inputs, times, condition, early)
        return [process.predict(each, x, t) for each in (found if early else [found])]

    def predict(x, t):
        found, *weak = call(x, t, condition, early=internal)
        if not guided or not interval[0] <= t <= interval[1]:
            return found
        weak = weak[0] if internal else call(x, t, null)[0]
        moved = []
        for strong, less in zip(found[:2], weak[:2]):
            out = less + guidance * (strong - less)
            size = channels or out.shape[-1]
            moved.append(torch.cat([out[..., :size], strong[..., size:]], -1))
        return *moved, found[2]

    grid = process.grid(times, steps, noise[0].numel())
    x = process.path(grid[0])[1] * noise
    for t, s in zip(grid[:-1], grid[1:]):
        x = stepped(process, predict, x, t, s, method, eta, fresh)
    return x


class TinyBlock(nn.Module):
    def __init__(self, width, groups=0):
        super().__init__()
        wide, one = 4 * width, {"kernel_size": 1, "bias": False}
        if groups:
            first, last = nn.Conv2d(width, wide, **one), nn.Conv2d(wide, width, **one)
            self.pool = nn.Sequential(first, nn.GroupNorm(groups, wide), nn.ReLU(), last)
        conv = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return torch.relu(x + self.conv(x))


class Squash(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


class DLCTinyDecoder(Component):
    """The decoder of a tiny autoencoder (TAESD, TAEF2): latents [b, y, x, c] to images."""

    PART = "decoder."

    def __init__(self, config):
        super().__init__()
        c, self.scaling = config["model"], config["model"]["scaling"]
        width, parts = c["channels"], [Squash()]
        parts += [nn.Conv2d(c["latent"], width, 3, padding=1), nn.ReLU()]
        for level in range(3):
            parts += [TinyBlock(width, 0 if level else c["groups"]) for _ in range(c["blocks"])]
            parts += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
            ]
        self.decoder = nn.Sequential(*parts, TinyBlock(width), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents):
        dtype = next(self.parameters()).dtype
        x = (latents / self.scaling).permute(0, 3, 1, 2).to(dtype)
        return 2 * self.decoder(x).permute(0, 2, 3, 1).float() - 1


class KLDecoder(nn.Module):
    """The decoder of diffusers' AutoencoderKL: latents [b, y, x, c] to images."""

    def __init__(self, folder, dtype):
        super().__init__()
        from diffusers import AutoencoderKL

        self.model = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).eval()

    def forward(self, latents):
        x = (latents / self.model.config.scaling_factor).permute(0, 3, 1, 2)
        return self.model.decode(x.to(self.model.dtype)).sample.permute(0, 2, 3, 1).float()


class DLCPipeline:
    """The networks of a folder; those that it lacks are None."""

    PARTS = {"encoder": DLCEncoder, "prior": DLCPrior, "generator": DLCGenerator}

    def __init__(self, encoder=None, prior=None, generator=None, autoencoder=None):
        self.encoder, self.prior = encoder, prior
        self.generator, self.autoencoder = generator, autoencoder

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """Weights keep the dtype of their files if none is given."""
        folder = Path(folder)
        parts = {
            name: kind.from_pretrained(folder / name, dtype).to(device)
            for name, kind in cls.PARTS.items()
            if (folder / name).is_dir()
        }
        place = folder / "autoencoder"
        if place.is_dir():
            config = json.loads((place / "config.json").read_text())
            tiny = config["_class_name"] == "DLCTinyDecoder"
            made = DLCTinyDecoder.from_pretrained(place, dtype) if tiny else KLDecoder(place, dtype)
            parts["autoencoder"] = made.to(device)
        return cls(**parts)

    def to(self, device):
        for part in (self.encoder, self.prior, self.generator, self.autoencoder):
            if part is not None:
                part.to(device)
        return self

    @torch.no_grad()
    def logits(self, images):
        """float32 [b, l, v] of images [b, y, x, 3], uint8 or float in 0..1, of the encoder's size.

        Raises:
          ValueError: images of another shape.
        """
        images, side = torch.as_tensor(images), self.encoder.size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            shape = f"[b, {side}, {side}, 3]"
            raise ValueError(f"images are {shape}, resized and cropped; got {list(images.shape)}")
        x = images.float() / (255 if images.dtype == torch.uint8 else 1)
        x = (x - x.new_tensor(MEAN)) / x.new_tensor(DEVIATION)
        return self.encoder(x.permute(0, 3, 1, 2).to(self.encoder.device))["logits"]

    def encode(self, images):
        """Images, see `logits`, to codes int64 [b, l]: the likeliest value of every position."""
        return self.logits(images).argmax(-1)

    def simplices(self, images, temperature=1.0):
        """Soft codes float32 [b, l, v]: softmax of logits / temperature."""
        return (self.logits(images) / temperature).softmax(-1)

    def sample_codes(self, count, *, seed=0, **how):
        """New codes [count, l]; `how` is as in `complete`."""
        blank = torch.zeros(count, self.prior.length, dtype=torch.int64)
        return self.complete(blank, blank.bool(), seed=seed, **how)

    def complete(self, codes, keep, *, seed=0, **how):
        """Codes whose positions outside of `keep` are drawn given the others.

        `keep` are positions, or bool [l] or [b, l]. `how` is steps, temperature and labels of
        `draw_codes`; the first two are those of the run's recipe if not given.
        """
        codes, noise = torch.as_tensor(codes), noise_of_codes(self.prior, len(codes), seed)
        how = self.prior.config["sampler"] | how
        return draw_codes(self.prior, codes, kept(keep, codes), noise, **how)

    def surprise(self, codes, *, calls=8, labels=None, seed=0):
        """-log2 p [b, l] of each value given the others, in so many calls."""
        codes = torch.as_tensor(codes)
        order = torch.rand(codes.shape, generator=generator_of(seed)).argsort(-1)
        return surprise(self.prior, codes, order, calls=calls, labels=labels)

    def redraw(self, codes, share=0.1, *, keep=(), calls=8, seed=0, labels=None, **how):
        """Codes of which a share of the positions, the least likely ones, is drawn anew."""
        codes, seed = torch.as_tensor(codes), generator_of(seed)
        bits = self.surprise(codes, calls=calls, labels=labels, seed=seed)
        known = kept(keep, codes).to(bits.device)
        rank = (-bits).masked_fill(known, 1.0).argsort(-1).argsort(-1)
        known = known | (rank >= math.ceil(round(share * codes.shape[1], 6)))
        return self.complete(codes, known, seed=seed, labels=labels, **how)

    def compose(self, parents, operator="coin", *, weights=None, keep=(), share=None, rounds=4,
                seed=0, **how):  # fmt: skip
        """Codes [b, l] of several images or codes, of which `keep` are always the first's.

        "coin" copies each position from one parent, drawn by weights. "infill" then keeps a share
        (1/2) of what it copied from each parent, and the prior draws the rest. "refine" draws the
        least likely share (1/10) anew, in so many rounds. `how` is of `draw_codes`.
        """
        if operator not in ("coin", "infill", "refine"):
            raise ValueError(f"operator {operator!r} is none of coin, infill, refine")
        if odd := how.keys() - {"calls", "labels", "steps", "temperature"}:
            raise TypeError(f"compose() got unexpected keyword arguments {sorted(odd)}")
        parents = [torch.as_tensor(parent) for parent in parents]
        parents = [self.encode(each) if each.ndim == 4 else each for each in parents]
        parents, seed = torch.stack([each.cpu() for each in parents]), generator_of(seed)
        chance = torch.ones(len(parents)) if weights is None else torch.as_tensor(weights)
        known, shape = kept(keep, parents[0]), parents.shape[1:]
        chosen = chance.double().multinomial(shape.numel(), replacement=True, generator=seed)
        chosen = chosen.reshape(shape).masked_fill(known, 0)
        codes = parents.gather(0, chosen[None])[0]
        if operator == "infill":
            lot = torch.rand(shape, generator=seed)
            for parent in range(len(parents)):
                mine = (chosen == parent) & ~known
                rank = lot.masked_fill(~mine, 2.0).argsort(-1).argsort(-1)
                part = (mine.sum(-1, keepdim=True) * (0.5 if share is None else share)).ceil()
                known = known | (mine & (rank < part))
            codes = self.complete(codes, known, seed=seed, **how)
        for _ in range(rounds if operator == "refine" else 0):
            part = 0.1 if share is None else share
            codes = self.redraw(codes.cpu(), part, keep=keep, seed=seed, **how)
        return codes

    def decode(self, codes=None, *, count=None, labels=None, noise=None, fresh=None, seed=0, **how):
        """Codes int [b, l], or soft ones float [b, l, v], to images uint8 [b, y, x, c].

        `how` is as in `draw_images`: method, steps, times, eta, guidance (1 is none), interval,
        channels, base; what is not given is as in the recipe of the run. Without codes a `count`
        is drawn. `noise` [b, y, x, c] starts it, and `fresh` are further noises, step by step.
        """
        model, seed, given = self.generator, generator_of(seed), {}
        if (codes is None) == bool(model.c["positions"]):
            raise ValueError("codes are for a generator that was trained with codes, and needed")
        if model.config["latents"] and self.autoencoder is None:
            raise ValueError("the generator draws latents, and the folder has no autoencoder")
        if codes is not None:
            given["codes"] = torch.as_tensor(codes).to(model.device)
            count = len(given["codes"])
        if labels is not None:
            given["label"] = torch.as_tensor(labels).to(model.device)
        shape = (count, model.c["image"], model.c["image"], model.c["channels"])
        drawn = iter(fresh) if fresh is not None else None

        def normal():
            return next(drawn) if drawn else torch.randn(shape, generator=seed).to(model.device)

        noise = normal() if noise is None else noise.to(model.device)
        x = draw_images(model, given, noise, normal, **model.config["sampler"] | how)
        if model.config["latents"]:
            unit = model.config["normalizer"]
            if unit is not None:
                mean, std = (torch.tensor(unit[key], device=x.device) for key in ("mean", "std"))
                x = x * (std / unit["deviation"]) + mean
            with torch.no_grad():
                x = self.autoencoder(x)
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def sample(self, count, *, seed=0, labels=None, code_how=None, **how):
        """New images uint8 [count, y, x, c]; `how` is of `decode`, and `code_how` of `complete`.

        Without labels a generator that reads no codes draws of classes at random.
        """
        codes, seed = None, generator_of(seed)
        if self.generator.c["positions"]:
            known = {"labels": labels if self.prior.classes else None}
            codes = self.sample_codes(count, seed=seed, **known, **(code_how or {}))
        elif labels is None and self.generator.c["classes"]:
            labels = torch.randint(self.generator.c["classes"], (count,), generator=seed)
        labels = labels if self.generator.c["classes"] else None
        return self.decode(codes, count=count, labels=labels, seed=seed, **how)


def kept(keep, codes):
    """Positions, or bool [l] or [b, l], as bool [b, l]."""
    found = torch.as_tensor(keep)
    if found.dtype == torch.bool:
        return found.to(codes.device).expand(codes.shape)
    known = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    known[:, found.long()] = True
    return known
