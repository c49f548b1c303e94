"""50,000 images scored: python tests/soak/evaluate.py [COUNT] [COMPARED]

COUNT images of 64 pixels, made of those of ../shared/data/tiny_imagenet by flips and shifts, are
written once as records, and scored with SqueezeNet's features on 8 simulated devices in batches of
250. COMPARED of them, 2,000 if not given, are also scored in batches of 64 on one device. Prints
time, images per second, the memory that scoring took beside the network, and how far the results of
both ways are apart. Exits with 1 if that is more than 1e-6 relative, or the memory more than 2 GB.
A quarter of an hour on two cores that do nothing else; no part of CI.
"""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data"
SOURCE = DATA / "tiny_imagenet" / "tiny_imagenet_16c_dev.tar.xz"
WEIGHTS = DATA / "weights" / "squeezenet_v1.0_decoded_OIHW.npz"
METRICS = "fd,precision,recall,density,coverage,vendi"
REFERENCE = 1000  # images
DEVICES = "--xla_force_host_platform_device_count"
MOST_GB, CLOSE = 2.0, 1e-6


def changed(read, there, number):
    """JPEG of image `number`: one of those there, shifted and perhaps flipped."""
    image = np.asarray(Image.open(io.BytesIO(read(number % there))).convert("RGB"))
    turn = number // there
    image = np.roll(image, (3 * turn, -5 * turn), (0, 1))[:, :: -1 if turn % 2 else 1]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=92)
    return file.getvalue()


def write(path, count):
    from dlc_jax.data import record_writer
    from dlc_jax.data.files import Place
    from dlc_jax.data.listing import Listing

    found = Place(SOURCE).images()
    names = [f"{number:06d}.jpg" for number in range(count)]
    read = functools.partial(changed, found.read, len(found))
    record_writer.write(path, Listing("folder", names, read, content=str(count)))


def memory(what):
    """GB of this process: "VmRSS" now, "VmHWM" at most."""
    (line,) = [
        line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if what in line
    ]
    return int(line.split()[1]) / 1e6


def score(path, count, batch):
    """In a process of its own: prints results as JSON."""
    from dlc_jax import features
    from dlc_jax.evaluation import names, reference, results
    from dlc_jax.evaluation.images import open_set
    from dlc_jax.evaluation.scoring import Scorer

    network = features.load("squeezenet", weights=WEIGHTS, protocol="stretch")
    scorer = Scorer(network, batch=batch)
    compared = reference.of_images(open_set(SOURCE, count=REFERENCE), scorer, keep=False)
    images = open_set(path, count=count)
    before, started = memory("VmHWM"), time.monotonic()
    kinds = names.parse(METRICS, "squeezenet")
    found = results.scored(images, kinds, reference=compared, scorer=scorer)
    seconds = time.monotonic() - started
    values = {name: entry["value"] for name, entry in found["metrics"].items()}
    about = {"seconds": seconds, "beside": memory("VmHWM") - before, "network": before}
    print(json.dumps(about | {"values": values}))


def run(path, count, batch, devices):
    line = [sys.executable, __file__, "score", str(path), str(count), str(batch)]
    environment = os.environ | {"XLA_FLAGS": f"{DEVICES}={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    pace, name = count / found["seconds"], f"{count} images, batch {batch}, {devices} devices"
    print(
        f"{name}: {found['seconds']:.0f} s, {pace:.1f} images/s, {found['beside']:.2f} GB beside "
        f"the {found['network']:.2f} GB of the network, {found['values']}",
        flush=True,
    )
    return found


def main(count=50_000, compared=2_000):
    with tempfile.TemporaryDirectory() as folder:
        path, started = pathlib.Path(folder) / "images", time.monotonic()
        write(path, count)
        print(f"{count} images written in {time.monotonic() - started:.0f} s", flush=True)
        part = min(count, compared)
        one, eight = run(path, part, 64, 1), run(path, part, 250, 8)
        apart = max(
            abs(eight["values"][name] - value) / abs(value) for name, value in one["values"].items()
        )
        print(f"largest relative difference: {apart:.1e}", flush=True)
        whole = eight if part == count else run(path, count, 250, 8)
    return int(apart > CLOSE or whole["beside"] > MOST_GB)


if __name__ == "__main__":
    if sys.argv[1:2] == ["score"]:
        score(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
