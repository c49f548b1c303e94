"""The encoder's crops, in crops per second and core: ours beside a plain chain of Pillow.

    python benchmarks/crops.py [--images 24] [--rounds 7]
    python benchmarks/crops.py --picture crops.png       # what the crops look like

Both make the paper's crops (2 of 224 pixels, 8 of 98, arXiv 2507.12318) of JPEGs of 500 x 375
pixels, from the same bytes. The plain chain is what torchvision does with Pillow images, written
here: the file decoded in full, each crop cut and resized, ImageEnhance and HSV for the jitter,
Pillow's Gaussian blur, then floats from 0 to 1, normalized. Ours is the loader's transform; uint8
goes to the device and is normalized there.

They take turns, one thread each, and the clock is that thread's time on the processor, so that
other work on the machine slows both. The loader's threads are measured by wall-clock time, which is
only meaningful on an idle machine. Files are those of ../shared/data/imagenet_samples where they
exist, otherwise made of random patches. Prints markdown tables.
"""

import argparse
import contextlib
import io
import math
import pathlib
import statistics
import tarfile
import time

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from dlc_jax.data import colors, decoder, transforms
from dlc_jax.data.loader import batches

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = DATA / "imagenet_samples" / "imagenet_144x1.tar"
PAPER = dict(
    global_crops=2,
    global_size=224,
    global_scale=(0.32, 1.0),
    local_crops=8,
    local_size=98,
    local_scale=(0.05, 0.32),
    blur=(1.0, 0.1, 0.5),
    blur_quirk=True,
)
CROPS = 10
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def files(count):
    """(JPEGs of 500 x 375 pixels, what they are)."""
    if SAMPLES.exists():
        with tarfile.open(SAMPLES) as archive:
            found = [archive.extractfile(member).read() for member in archive if member.isfile()]
        found = [data for data in found if Image.open(io.BytesIO(data)).size == (500, 375)][:count]
        return found, f"{len(found)} of ImageNet's own"
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        layers = []
        for s in (3, 12, 48):
            layer = rng.integers(0, 256, (375 // s + 1, 500 // s + 1, 3), np.uint8)
            large = Image.fromarray(layer).resize((500, 375), Image.Resampling.BICUBIC)
            layers.append(np.asarray(large, float))
        file = io.BytesIO()
        mixed = np.mean(layers, 0).astype(np.uint8)
        Image.fromarray(mixed).save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found, f"{count} made of random patches"


def plain(data, rng):
    """The same crops, as they are usually written."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    settings = [(224, (0.32, 1.0), 0.0, 0.0), (224, (0.32, 1.0), 0.9, 0.2)]
    settings += [(98, (0.05, 0.32), 0.5, 0.0)] * 8
    return [plain_crop(image, *each, rng) for each in settings]


def plain_crop(image, size, scale, blur, solarize, rng):
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    w, h = min(w, width), min(h, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.8:
        for change in rng.permutation(4):
            if change == 0:
                image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
            elif change == 1:
                image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
            elif change == 2:
                image = ImageEnhance.Color(image).enhance(rng.uniform(0.8, 1.2))
            else:
                hue, saturation, value = image.convert("HSV").split()
                turned = np.asarray(hue) + np.uint8(round(255 * rng.uniform(-0.1, 0.1)) % 256)
                image = Image.merge("HSV", (Image.fromarray(turned), saturation, value))
                image = image.convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < solarize:
        image = ImageOps.solarize(image, 128)
    floats = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255
    return (floats - MEAN[:, None, None]) / STD[:, None, None]


MULTI_CROP = transforms.MultiCrop(**PAPER)


def ours(data, rng):
    return MULTI_CROP({"image": data}, rng)


def seconds(make, data):
    """Seconds of this thread for one image."""
    start = time.thread_time()
    for index, file in enumerate(data):
        make(file, np.random.default_rng(index))
    return (time.thread_time() - start) / len(data)


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def speed(data, rounds):
    times = {"plain Pillow and floats": [], "ours": []}
    for _ in range(rounds):
        for name, make in zip(times, (plain, ours)):
            times[name].append(seconds(make, data))
    first = statistics.median(times["plain Pillow and floats"])
    rows = []
    for name, found in times.items():
        middle = statistics.median(found)
        spread = f"{CROPS / max(found):.0f} to {CROPS / min(found):.0f}"
        row = (name, f"{CROPS / middle:.0f}", spread, f"{1 / middle:.0f}")
        rows.append((*row, f"{1e3 * middle:.2f}", f"{first / middle:.2f}"))
    head = ("one thread", "crops/s, median", "of all rounds", "images/s")
    table((*head, "ms an image", "times plain"), rows)
    ratios = [before / after for before, after in zip(*times.values())]
    print(f"Ratio in each round: {min(ratios):.2f} to {max(ratios):.2f}.\n")


class Files:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {"image": self.data[index], "index": index}


def scaling(data, rounds):
    """Images a second through the loader, whose batches are arrays in the order of the index."""
    found = {threads: [] for threads in (1, 2)}
    for _ in range(rounds):
        for threads, rates in found.items():
            iterator = batches(
                Files(data),
                batch=8,
                seed=0,
                transform=MULTI_CROP,
                threads=threads,
                fields=("global", "local"),
                process_index=0,
                process_count=1,
            )
            for _ in range(2 * threads + 2):  # what was read ahead while the threads started
                next(iterator)
            start = time.perf_counter()
            for _ in range(12):
                next(iterator)
            rates.append(96 / (time.perf_counter() - start))
            iterator.close()
    one = statistics.median(found[1])
    rows = []
    for threads, rates in found.items():
        middle = statistics.median(rates)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        rows.append((threads, f"{middle:.0f}", spread, f"{middle / one:.2f}"))
    table(("loader threads", "images/s, median", "of all rounds", "times one"), rows)


@contextlib.contextmanager
def timed(owner, name, spent):
    """Adds up in `spent` the seconds in a function of ours, which is put back afterward."""
    function = getattr(owner, name)

    def measured(*args, **kwargs):
        start = time.thread_time()
        result = function(*args, **kwargs)
        spent.append(time.thread_time() - start)
        return result

    setattr(owner, name, measured)
    yield
    setattr(owner, name, function)


def profile(data, rounds):
    parts = {
        "decoding": (decoder.Picture, "decode"),
        "boxes": (transforms.MultiCrop, "boxes"),
        "cutting and resizing": (transforms.RandomResizedCrop, "cut"),
        "jitter": (colors.ColorJitter, "__call__"),
        "gray": (colors.Gray, "__call__"),
        "blur": (colors.Blur, "__call__"),
        "solarize": (colors.Solarize, "__call__"),
    }
    spent = {name: [] for name in parts}
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in parts.items():
            stack.enter_context(timed(owner, method, spent[name]))
        whole = statistics.mean(seconds(ours, data) for _ in range(rounds))
    each = {name: sum(times) / rounds / len(data) for name, times in spent.items()}
    each["the rest: flips, copies, dispatch"] = whole - sum(each.values())
    head = ("where ours spends its time", "ms an image", "%")
    rows = ((name, 1e3 * part, 100 * part / whole) for name, part in each.items())
    table(head, [(name, f"{part:.2f}", f"{share:.0f}") for name, part, share in rows])


def picture(data, path, images=4):
    """A PNG: every row an image and its crops, the global ones first."""
    tile, gap, head = 112, 4, 16
    titles = ("image", "global 1", "global 2", *(f"local {k}" for k in range(1, 9)))
    size = (len(titles) * (tile + gap) + gap, head + images * (tile + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (tile + gap), 2), title, fill="black")
    for row, file in enumerate(data[:images]):
        found = ours(file, np.random.default_rng(row))
        shown = [decoder.decode_image(file), *found["global"], *found["local"]]
        for column, pixels in enumerate(shown):
            small = ImageOps.contain(Image.fromarray(pixels), (tile, tile))
            sheet.paste(small, (gap + column * (tile + gap), head + row * (tile + gap)))
    sheet.save(path, "PNG")
    print(f"wrote {path}: {images} images")
    print("global 1 is never blurred, global 2 mostly, and a fifth of global 2 is solarized")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picture", metavar="PATH", help="write a sheet of crops and stop")
    arguments = parser.parse_args()
    data, what = files(arguments.images)
    if arguments.picture:
        picture(data, arguments.picture)
        return
    size = statistics.median(len(file) for file in data) / 1e3
    print(f"JPEGs of 500 x 375: {what}, {size:.0f} kB in the median. {arguments.rounds} rounds.\n")
    for make in (plain, ours):  # warm
        seconds(make, data[:4])
    speed(data, arguments.rounds)
    profile(data, arguments.rounds)
    scaling(data, arguments.rounds)


if __name__ == "__main__":
    main()
