"""What an autoencoder keeps of an image: PSNR of 256-pixel crops, as a markdown table.

    python benchmarks/autoencoders.py IMAGES DIR [DIR ...]

IMAGES is a folder, such as Kodak's; a DIR is what `dlc import vae FILE --out DIR` made. Crops are
of the middle; what comes back is rounded to 8 bits. PSNR is 10 log10(255^2 / mean squared error).
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dlc_jax import parallel, recipe
from dlc_jax.cli import weights
from dlc_jax.networks.autoencoder import AutoencoderNetwork

SIDE = 256


def crops(folder: str | Path, side: int = SIDE) -> dict[str, np.ndarray]:
    """{name: the middle of the image, uint8 [side, side, 3]} of a folder's PNG files."""
    found = {}
    for path in sorted(Path(folder).glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        top, left = ((size - side) // 2 for size in pixels.shape[:2])
        found[path.stem] = pixels[top : top + side, left : left + side]
    return found


def network(directory: str | Path) -> AutoencoderNetwork:
    """An imported autoencoder."""
    model = weights.record(Path(directory))["model"]
    lines = {f"autoencoder.model.{name}": value for name, value in model.items()}
    lines |= {"data.name": "shapes", "autoencoder.path": str(directory)}
    config = recipe.expand(lines)
    return AutoencoderNetwork(config, "autoencoder", parallel.make_mesh(devices=jax.devices()[:1]))


def reconstructed(coder: AutoencoderNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 from their latents' means, these latents) of uint8 [b, y, x, 3]."""

    @jax.jit
    def both(params, images):
        latents = coder.scaling * coder.encode(params, images)["mean"]
        return coder.decode(params, latents), latents

    pairs = [both(coder.params, image[None]) for image in images]
    pictures, latents = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return np.clip(np.round((pictures + 1) * 127.5), 0, 255).astype(np.uint8), latents


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each image of two batches."""
    error = (one.astype(np.float64) - other) ** 2
    return 10 * np.log10(255**2 / error.mean((1, 2, 3)))


def table(folder: str | Path, directories: list[str]) -> str:
    """The images' PSNR, a column for each autoencoder."""
    images = crops(folder)
    pixels, columns = np.stack(list(images.values())), {}
    for directory in directories:
        back, latents = reconstructed(network(directory), pixels)
        columns[Path(directory).name] = psnr(pixels, back)
        print(f"{directory}: latents of mean {latents.mean():.3f}, std {latents.std():.3f}")
    rows = [["image", *columns], ["---", *["---:"] * len(columns)]]
    for number, name in enumerate(images):
        rows.append([name, *(f"{each[number]:.2f}" for each in columns.values())])
    rows.append(["mean", *(f"{each.mean():.2f}" for each in columns.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table(sys.argv[1], sys.argv[2:]))
