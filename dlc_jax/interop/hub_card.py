"""The model card of an exported folder: data, metrics, license, commit, files, how to load them."""

from collections.abc import Collection, Mapping

LOAD = """```python
from modeling_dlc import DLCPipeline  # its folder is on sys.path

p = DLCPipeline.from_pretrained("DIR")
{lines}
```"""
LINES = {  # what they need, and they
    ("encoder",): "codes = p.encode(images)  # uint8 [b, y, x, 3] -> int64 [b, l]",
    ("generator",): "images = p.decode(codes, seed=0)  # uint8 [b, y, x, 3]",
    ("encoder", "generator"): 'images = p.decode(p.compose([a, b], "coin", seed=0))',
    ("prior", "generator"): "images = p.sample(16, seed=0)",
}
FILES = {
    "encoder": "images to codes: a vision transformer by the names of transformers' "
    "`Dinov2WithRegistersModel`, and a simplicial head (`sem_…`)",
    "prior": "masked diffusion of codes",
    "generator": "codes to images, or to latents",
    "autoencoder": "latents to images",
}
CODE = {
    "modeling_dlc.py": "`DLCPipeline` and all samplers",
    "networks_dlc.py": "the networks",
    "transformers_dlc.py": "the encoder for `AutoModel`",
    "pipeline.py": "the folder for `DiffusionPipeline`",
}
RUN = """`run.json` is the recipe, in full: `dlc train --config=run.json --workdir=W` trains it.
With dlc_jax the folder opens as the run did: `dlc compose -w DIR a.png b.png`."""
QUIET = ("seconds/", "commit", "device", "version")  # results that are not of the model


def text(
    parts: Mapping[str, str],
    data: Mapping,
    results: Mapping,
    commit: str,
    license: str,
    code: Collection[str] = tuple(CODE),
) -> str:
    """Markdown.

    Args:
      parts: {name: its size, in words}.
      data: {field: value} of what it was trained on.
      results: of the run, flat.
      commit: of the code that trained it.
      license: of the weights; "" if nobody said.
      code: files of PyTorch's code that are in the folder.
    """
    front = ["---", "library_name: pytorch", "tags: [discrete-latent-codes, arxiv:2507.12318]"]
    front += [f"license: {license}"] if license else []
    lines = [line for needs, line in LINES.items() if set(needs) <= parts.keys()]
    files = [f"- `{name}/`: {FILES[name]}; {size}" for name, size in parts.items()]
    files += [f"- `{name}`: {CODE[name]}" for name in code]
    files += [] if code else ["- PyTorch's code is not here, but in `dlc_jax/interop/hub`"]
    shown = {
        name: value
        for name, value in sorted(results.items())
        if isinstance(value, int | float) and not name.startswith(QUIET) and "monitor/" not in name
    }
    rows = [f"| {name} | {value:.6g} |" for name, value in shown.items()]
    said = (
        f"The weights: {license}."
        if license
        else ("Nobody has given the weights a license yet; that of the data holds.")
    )
    sections = {
        "Load": LOAD.format(lines="\n".join(lines)),
        "Files": "\n".join(files),
        "Data": ", ".join(f"{key} {value}" for key, value in data.items()),
        "Metrics": "\n".join(["| result | value |", "| --- | ---: |", *rows])
        if rows
        else "No results were measured.",
        "License": f"The code: Apache-2.0. {said}",
        "Recipe": RUN,
        "Commit": f"Trained by dlc_jax at {commit}.",
    }
    body = "\n\n".join(f"## {name}\n\n{part}" for name, part in sections.items())
    return "\n".join([*front, "---", "", "# Discrete Latent Codes", "", body, ""])
