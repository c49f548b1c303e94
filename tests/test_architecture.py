"""The architecture's rules, read from the source with `ast`: nothing of the package is imported.

A rule is a function of a tree, {path: source}, that returns what breaks it, one line each.
`test_rule_goes_red` gives every rule snippets that it must refuse: no rule can pass by being blind.
"""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Layers, and what each room may import of ours beside its own files. `typing`, `errors` and
# `checksum` are allowed to everybody.
LAYERS = [
    ["typing", "errors", "stop", "checksum", "memory"],
    ["hosts", "parallel", "diffusion", "data", "metrics", "optim", "workdir", "recipe", "remote"],
    ["kernels", "checkpoint", "command"],
    ["models", "losses", "interop"],
    ["stage", "step", "features"],
    ["evals"],
    ["evaluation"],
    ["composition"],
    ["networks"],
    ["checkup"],
    ["stages"],
    ["train", "pipeline"],
    ["report", "plan", "agenda"],
    ["main", "cli"],
]
LAYER = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
ALL = set(LAYER)


def below(layer):
    return {room for room in LAYER if LAYER[room] < layer}


MAY_IMPORT = {
    **{room: set() for room in ["typing", "errors", *LAYERS[1], "stage"]},
    "stop": {"errors"},
    "hosts": {"stop", "remote"},  # what hears signals; what processes share
    "workdir": {"remote"},
    "data": {"remote"},
    "parallel": {"stop"},
    "checksum": set(),
    "memory": {"errors"},
    "recipe": {"workdir", "remote"},  # constructors it reads as source, and imports to build
    "command": {"stop", "memory", "recipe", "hosts", "remote"},
    "step": {"stage"},  # the contract that it steps; it has no logic
    "kernels": {"parallel"},
    "checkpoint": {"parallel", "checksum", "hosts", "remote"},
    "models": {"kernels", "parallel"},  # of parallel only two names, see models_place_nothing
    "losses": {"diffusion"},
    "interop": {"diffusion"},
    "features": {"models", "interop"},
    "evals": below(5),
    "evaluation": below(6),
    "composition": set(),
    "networks": {
        *("recipe", "remote", "parallel", "data", "diffusion", "checkpoint", "models", "stage"),
        *("interop", "checksum", "workdir"),
    },
    "checkup": {"parallel", "data", "stage", "evals", "networks", "composition"},
    "stages": below(10),
    "pipeline": {"recipe", "workdir", "parallel", "diffusion", "composition", "networks"},
    "train": {"stage", "step", "parallel", "checkpoint", "metrics", "stop", "hosts"},
    "report": below(12) - {"train", "pipeline"},
    "plan": below(12) - {"pipeline"},  # it compiles what `train` runs
    "agenda": below(11),
    "main": ALL,
    "cli": ALL,
}
# Rooms whose files, or folders, never import each other; their __init__ may list them.
SEPARATE = {"evals", "stages"}

# Outside libraries by import name. Everything else must be the standard library.
OUTSIDE = {
    "typing": {"jax", "jaxtyping"},
    "errors": set(),
    "stop": set(),
    "checksum": set(),
    "memory": {"jax"},
    "hosts": {"jax"},
    "parallel": {"jax", "numpy"},
    "diffusion": {"jax", "jaxtyping", "numpy"},
    "data": set(
        "jax numpy ml_dtypes grain PIL tensorflow_datasets array_record pyarrow pillow_heif".split()
    ),
    "metrics": {"jax", "numpy", "clu", "tensorboardX", "wandb"},
    "optim": {"jax", "numpy", "optax"},
    "workdir": {"jax"},
    "remote": {"fsspec"},
    "recipe": {"ml_collections"},
    "command": set(),
    "kernels": {"jax", "jaxtyping", "numpy", "tokamax"},  # the last within a function
    "checkpoint": {"jax", "orbax"},
    "models": {"jax", "flax", "jaxtyping", "einops", "numpy"},
    "losses": {"jax", "jaxtyping", "optax", "numpy"},
    # torch within functions, for its own files
    "interop": {"jax", "jaxtyping", "numpy", "ml_dtypes", "safetensors", "torch"},
    "features": {"jax", "flax", "jaxtyping", "numpy", "PIL"},
    "composition": {"numpy"},
    "stage": {"jax", "optax"},
    "step": {"jax", "optax"},
}
ANYWHERE = set(  # scipy and ml_dtypes come with jax
    "jax numpy scipy ml_dtypes optax grain einops PIL absl ml_collections array_record jaxtyping "
    "tensorflow_datasets tensorboardX".split()
)
OUTSIDE["cli"] = ANYWHERE | {"gradio"}  # the page of dlc demo
FORBIDDEN_NAMES = {"utils", "common", "helpers", "core", "base", "misc"}
LONGEST = 300  # lines of a file
LONGEST_FUNCTION = 80
WIDEST = 100  # columns
# Shipped as data: `dlc export torch` copies it to those who have PyTorch and not dlc_jax, so it
# imports torch and nothing of ours. No module of ours imports it.
DATA = "dlc_jax/interop/hub/"


def read_tree():
    paths = [*ROOT.glob("dlc_jax/**/*.py"), *ROOT.glob("configs/*.py")]
    tree = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    return {path: source for path, source in tree.items() if not path.startswith(DATA)}


def module_name(path):
    name = path.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def room_of(module):
    """dlc_jax.data.shapes -> data; dlc_jax itself -> ''."""
    return (module.split(".") + [""])[1]


def library(tree):
    return {path: source for path, source in tree.items() if path.startswith("dlc_jax/")}


def imports(path, source, modules):
    """Every module that `path` imports, lazily or not, as (line, module, name).

    Relative imports and import_module are included.
    """
    is_package = path.endswith("__init__.py")
    package = module_name(path) if is_package else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parent = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = inner in modules or (module == "dlc_jax" and alias.name in LAYER)
                yield (node.lineno, inner, None) if is_module else (node.lineno, module, alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name, target = ast.unparse(node.func).split(".")[-1], node.args[0].value
            if name in {"import_module", "__import__"} and isinstance(target, str):
                yield node.lineno, target, None


def edges(tree):
    """(path, line, importing module, imported module, imported name) of the library's imports."""
    modules = {module_name(path) for path in tree}
    for path, source in library(tree).items():
        for line, target, name in imports(path, source, modules):
            yield path, line, module_name(path), target, name


def known_rooms(tree):
    return [
        f"{path}: '{room_of(module_name(path))}' has no layer; add it to LAYERS and say why in "
        "docs/decisions.md"
        for path in library(tree)
        if room_of(module_name(path)) not in ALL | {""}
    ]


def one_direction(tree):
    bad = []
    for path, line, module, target, _ in edges(tree):
        room, other = room_of(module), room_of(target)
        if target.split(".")[0] != "dlc_jax" or room == other:
            continue
        everybody = {"typing", "errors", "checksum"} if LAYER.get(room, 0) > 0 else set()
        if other not in MAY_IMPORT.get(room, set()) | everybody:
            bad.append(
                f"{path}:{line}: {room or 'the package'} may not import {other or 'the package'}"
            )
    return bad


def files_kept_apart(tree):
    bad = []
    for path, line, module, target, _ in edges(tree):
        room = room_of(module)
        if room not in SEPARATE or path == f"dlc_jax/{room}/__init__.py":
            continue
        part, other = (name.split(".")[1:3] for name in (module, target))
        if target.startswith("dlc_jax.") and other[0] == room and other != part:
            bad.append(f"{path}:{line}: files of {room} never import each other")
    return bad


def no_cycles(tree):
    graph = {}
    for _, _, module, target, _ in edges(tree):
        if target.startswith("dlc_jax"):
            graph.setdefault(module, set()).add(target)
    bad, done = [], set()

    def visit(module, trail):
        if module in trail:
            bad.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return bad


def models_place_nothing(tree):
    bad = []
    for path, line, module, target, name in edges(tree):
        if room_of(module) != "models" or room_of(target) != "parallel":
            continue
        if target != "dlc_jax.parallel":
            bad.append(f"{path}:{line}: models may not use {target}")
        used = {name} if name else set()
        for node in ast.walk(ast.parse(tree[path])):
            if isinstance(node, ast.Attribute):
                if ast.unparse(node.value) in {"parallel", "dlc_jax.parallel"}:
                    used.add(node.attr)
        extra = sorted(used - {"constrain", "matmul"})
        bad += [
            f"{path}:{line}: models may use parallel.constrain and parallel.matmul only, not {name}"
            for name in extra
        ]
    return bad


def outside_libraries(tree):
    bad = []
    for path, line, module, target, _ in edges(tree):
        top, room = target.split(".")[0], room_of(module)
        if top in sys.stdlib_module_names or top == "dlc_jax":
            continue
        if top not in OUTSIDE.get(room, ANYWHERE):
            bad.append(f"{path}:{line}: {room or 'the package'} may not import {top}")
    return bad


def configs_are_data(tree):
    return [
        f"{path}:{line}: a recipe imports nothing, not {target}"
        for path, source in tree.items()
        if path.startswith("configs/")
        for line, target, _ in imports(path, source, set())
    ]


def short_files(tree):
    counts = {path: len(source.splitlines()) for path, source in tree.items()}
    return [
        f"{path}: {count} lines; it wants a second noun"
        for path, count in counts.items()
        if count > LONGEST
    ]


def short_functions(tree):
    bad = []
    for path, source in tree.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > LONGEST_FUNCTION:
                    bad.append(f"{path}:{node.lineno}: {node.name} has {count} lines; cut it")
    return bad


def narrow_lines(tree):
    return [
        f"{path}:{number}: {len(line)} columns"
        for path, source in tree.items()
        for number, line in enumerate(source.splitlines(), start=1)
        if len(line) > WIDEST
    ]


def proper_names(tree):
    return [
        f"{path}: a file is named after a noun, not '{part}'"
        for path in library(tree)
        for part in path.removesuffix(".py").split("/")
        if part.strip("_") in FORBIDDEN_NAMES
    ]


def defaults_live_in_constructors(tree):
    """No config.get(...): a misspelt key would silently give the default."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, source in library(tree).items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and "config" in ast.unparse(node.func.value).split(".")
    ]


def present_day_jax(tree):
    """No pmap, no `with mesh:`, no experimental.pjit."""
    bad = []
    for path, source in library(tree).items():
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Attribute | ast.Name):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.With):
                managers = [item.context_expr for item in node.items]
                managers = [each for each in managers if not isinstance(each, ast.Call)]
                names = ["with mesh" for each in managers if ast.unparse(each).endswith("mesh")]
            for name in names:
                if (
                    name == "with mesh"
                    or name.split(".")[-1] == "pmap"
                    or "experimental.pjit" in name
                ):
                    bad.append(f"{path}:{node.lineno}: {name}")
    return bad


RULES = [
    known_rooms,
    one_direction,
    files_kept_apart,
    no_cycles,
    models_place_nothing,
    outside_libraries,
    configs_are_data,
    short_files,
    short_functions,
    narrow_lines,
    proper_names,
    defaults_live_in_constructors,
    present_day_jax,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert rule(read_tree()) == []


RED = [
    (known_rooms, {"dlc_jax/trainer.py": ""}),
    (one_direction, {"dlc_jax/data/shapes.py": "from dlc_jax.models import vit"}),
    (one_direction, {"dlc_jax/data/shapes.py": "from ..models import vit"}),
    (one_direction, {"dlc_jax/diffusion/flow.py": "from dlc_jax import parallel"}),
    (one_direction, {"dlc_jax/typing.py": "import dlc_jax.errors"}),
    (one_direction, {"dlc_jax/train.py": "def f():\n    import dlc_jax.stages.prior"}),
    (
        one_direction,
        {"dlc_jax/train.py": "import importlib\nimportlib.import_module('dlc_jax.diffusion.flow')"},
    ),
    (one_direction, {"dlc_jax/train.py": "from dlc_jax.models.vit import ViT"}),
    (one_direction, {"dlc_jax/step.py": "from .parallel import constrain"}),
    (one_direction, {"dlc_jax/report.py": "from dlc_jax.train import train"}),
    (one_direction, {"dlc_jax/evals/probe.py": "from dlc_jax.stages import STAGES"}),
    (one_direction, {"dlc_jax/recipe/fields.py": "from dlc_jax.stages import STAGES"}),
    (one_direction, {"dlc_jax/stages/samples.py": "from dlc_jax import pipeline"}),
    (one_direction, {"dlc_jax/networks/prior.py": "from dlc_jax import stages"}),
    (one_direction, {"dlc_jax/pipeline.py": "from dlc_jax.stages import STAGES"}),
    (
        files_kept_apart,
        {"dlc_jax/evals/probe.py": "from dlc_jax.evals import codes", "dlc_jax/evals/codes.py": ""},
    ),
    (
        files_kept_apart,
        {"dlc_jax/stages/prior.py": "from .encoder import make", "dlc_jax/stages/encoder.py": ""},
    ),
    (
        files_kept_apart,
        {
            "dlc_jax/stages/encoder/__init__.py": "from dlc_jax.stages.codes import export",
            "dlc_jax/stages/codes/export.py": "",
        },
    ),
    (
        files_kept_apart,
        {
            "dlc_jax/stages/codes/export.py": "from dlc_jax.stages import encoder",
            "dlc_jax/stages/encoder/__init__.py": "",
        },
    ),
    (
        files_kept_apart,
        {
            "dlc_jax/stages/codes/export.py": "from dlc_jax import stages",
            "dlc_jax/stages/__init__.py": "",
        },
    ),
    (
        no_cycles,
        {
            "dlc_jax/data/codes.py": "from . import loader",
            "dlc_jax/data/loader.py": "from . import codes",
        },
    ),
    (models_place_nothing, {"dlc_jax/models/vit.py": "from dlc_jax.parallel import make_mesh"}),
    (
        models_place_nothing,
        {"dlc_jax/models/vit.py": "from dlc_jax import parallel\nparallel.shard(1)"},
    ),
    (
        models_place_nothing,
        {"dlc_jax/models/vit.py": "from dlc_jax.parallel.mesh import make_mesh"},
    ),
    (
        models_place_nothing,
        {
            "dlc_jax/models/vit.py": "from dlc_jax.parallel import mesh",
            "dlc_jax/parallel/mesh.py": "",
        },
    ),
    (outside_libraries, {"dlc_jax/step.py": "import flax.linen as nn"}),
    (outside_libraries, {"dlc_jax/stages/prior.py": "from flax import linen"}),
    (outside_libraries, {"dlc_jax/train.py": "import orbax.checkpoint as ocp"}),
    (outside_libraries, {"dlc_jax/evals/frechet.py": "import torch"}),
    (outside_libraries, {"dlc_jax/data/sources.py": "def f():\n    import tensorflow as tf"}),
    (outside_libraries, {"dlc_jax/main.py": "import pandas"}),
    (configs_are_data, {"configs/quickstart.py": "import os"}),
    (configs_are_data, {"configs/quickstart.py": "from dlc_jax import stages"}),
    (configs_are_data, {"configs/quickstart.py": "from ml_collections import ConfigDict"}),
    (short_files, {"dlc_jax/train.py": "\n" * (LONGEST + 1)}),
    (short_functions, {"dlc_jax/train.py": "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION}),
    (short_functions, {"dlc_jax/a.py": "class A:\n def f():\n" + "  x = 1\n" * LONGEST_FUNCTION}),
    (narrow_lines, {"dlc_jax/train.py": "x = 1\n# " + "x" * (WIDEST - 1)}),
    (proper_names, {"dlc_jax/evals/common.py": ""}),
    (proper_names, {"dlc_jax/core/flow.py": ""}),
    (defaults_live_in_constructors, {"dlc_jax/main.py": "x = config.get('lr', 1)"}),
    (defaults_live_in_constructors, {"dlc_jax/main.py": "x = self.config.prior.get('lr')"}),
    (present_day_jax, {"dlc_jax/train.py": "f = jax.pmap(g)"}),
    (present_day_jax, {"dlc_jax/train.py": "with mesh:\n    pass"}),
    (present_day_jax, {"dlc_jax/train.py": "with self.mesh, other():\n    pass"}),
    (present_day_jax, {"dlc_jax/train.py": "from jax.experimental.pjit import pjit"}),
    (present_day_jax, {"dlc_jax/train.py": "from jax.experimental import pjit"}),
]


@pytest.mark.parametrize("case", range(len(RED)), ids=lambda i: f"{RED[i][0].__name__}-{i}")
def test_rule_goes_red(case):
    rule, tree = RED[case]
    assert rule(tree)


def test_every_rule_has_a_snippet_that_it_refuses():
    assert {rule for rule, _ in RED} == set(RULES)


def test_rules_accept_what_the_architecture_allows():
    tree = {
        "dlc_jax/__init__.py": "",
        "dlc_jax/data/__init__.py": "from dlc_jax.data import shapes",
        "dlc_jax/data/shapes.py": "import numpy as np\nfrom dlc_jax.errors import UserError",
        "dlc_jax/models/vit.py": "import flax\nfrom dlc_jax.parallel import constrain\n"
        "from dlc_jax.kernels import attention",
        "dlc_jax/kernels/attention.py": "import jax",
        "dlc_jax/stages/__init__.py": "from dlc_jax.stages import prior\nSTAGES = {'prior': prior}",
        "dlc_jax/stages/prior.py": "from dlc_jax.models import vit\n"
        "with jax.set_mesh(mesh):\n    pass",
        "dlc_jax/main.py": "from dlc_jax import stages, train",
        "dlc_jax/stages/codes/__init__.py": "from dlc_jax.stages.codes import export",
        "dlc_jax/stages/codes/export.py": "from dlc_jax import recipe\n"
        "from dlc_jax.networks import Networks",
        "dlc_jax/pipeline.py": "from dlc_jax.networks import Networks",
        "configs/quickstart.py": "RECIPE = {}",
    }
    assert [line for rule in RULES for line in rule(tree)] == []


STUBS = ("tensorflow", "torch")
STUB_CHECK = f"import sys, {{}}; print([name for name in {STUBS} if name in sys.modules])"
OURS = ", ".join(sorted(module_name(path) for path in library(read_tree())))


@pytest.mark.parametrize(
    ("modules", "imported"),
    [(OURS, "[]"), ("torch, tensorflow", "['tensorflow', 'torch']")],
    ids=["ours", "red"],
)
def test_no_module_imports_another_framework(tmp_path, modules, imported):
    """Main and every other module.

    Empty stand-ins on the path show a guarded import where the true packages are absent.
    """
    tree = read_tree()
    ours = {module_name(path) for path in tree}
    missing = {target for *_, target, _ in edges(tree) if target.startswith("dlc_jax.")} - ours
    if missing:
        pytest.skip(f"not written yet: {', '.join(sorted(missing))}")
    for name in STUBS:
        (tmp_path / f"{name}.py").write_text("")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", STUB_CHECK.format(modules)]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, imported), out.stderr
