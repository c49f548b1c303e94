"""The encoder: a backbone with a simplicial embedding, trained by self-distillation.

Source: arXiv 2507.12318, DINOv2 (arXiv 2304.07193).

    global crops, some with masks, and local crops ──► student ──► scores of crops and of masked
                                                                   patches ──┐
    global crops, unmasked ──► teacher (the state's average) ──► centering or Sinkhorn ──► cross-
                                                                   entropy: DINO, iBOT

KoLeo keeps the vectors of different images apart. With one kind of crops this is the paper's
encoder. With several, the positions of a code are shared out among the kinds, in the order of their
names, as many to each as its `share` says. A kind's prototypes are read from its own positions
alone, and (`consistency`) each of those positions must take the same value in all crops of its
kind. So what a kind's augmentation destroys cannot be kept in its positions: crops of turned hue
make positions that do not know the color, blurred ones make positions that do not know the shape.
Codes come apart by what they ignore.

Crops agree to a part only, and the rest of what a position says of an image that is not augmented
follows what it should ignore. So an encoder may have another as its `teacher`, and learn to say of
the image itself (`plain`) what that one says of its crops in the mean.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlc_jax import checkpoint, checkup, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.composition import groups
from dlc_jax.data import loader, masks, transforms
from dlc_jax.data.sources import DataSet
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.errors import UserError
from dlc_jax.models.encoder import Encoder
from dlc_jax.optim import AdamW
from dlc_jax.recipe import former
from dlc_jax.stage import Plan, Stage
from dlc_jax.stages.encoder import distillation
from dlc_jax.stages.encoder.objective import Objective
from dlc_jax.stages.encoder.setup import Setup, flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of an encoder.

    Attributes:
      encoded: cuts crops from whole images, decoded as coarsely as no crop loses by. Otherwise they
        are cut from the images of `data`, which are cropped to their centers.
      threads: that read ahead.
      teacher: another step that is an encoder, which starts this one and stays its teacher, frozen;
        "" is the average of this one.
      model: the network.
      objective: what it is trained for.
      crops: kinds of crops by name; each kind has its own share of the positions.
      optimizer: of the student.
      monitor: a checkup of the teacher on the way.
      train: how long and how.
    """

    encoded: bool = True
    threads: int = 8
    teacher: str = ""
    model: Encoder = Encoder()
    objective: Objective = Objective()
    crops: Mapping[str, MultiCrop]
    optimizer: AdamW = AdamW(
        learning_rate=7.071067811865475e-05,
        schedule="cosine",
        warmup=12_500,
        final=0.014142135623730949,
        weight_decay=0.04,
        weight_decay_final=10.0,
        decayed="(?!.*(bias$|norm|gamma)).*|simplicial/bias",
        layer_decay=0.9,
        multipliers=(("vit/patch_embed/.*", 0.2),),
        freeze=(("(patch_)?head/(direction|gain)", 1250),),
    )
    monitor: checkup.Monitor = checkup.Monitor(every=6250, count=10_000)
    train: Plan = Plan(
        steps=125_000,
        batch=512,
        clip=3.0,
        clip_separately=("(patch_)?head/.*",),
        dtype="bfloat16",
    )


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    crops = config[step].crops
    section, frozen, reads = recipe.build(Section, config[step]), {}, {}
    if section.teacher:
        section, frozen, reads = taught(section, config, step=step, workdir=workdir)
    model, objective, plan = section.model, section.objective, section.train
    check(section, crops, step)
    setup = Setup(model, objective, crops, plan.steps)
    spec, data = batch_spec(setup, plan.batch), DataSet(**config.data)
    view = {"image": "encoded"} if section.encoded else {}
    return Stage(
        init=functools.partial(distillation.init, setup),
        prepare=functools.partial(distillation.prepare, setup),
        loss=functools.partial(distillation.loss, setup),
        after_update=functools.partial(distillation.after_update, setup),
        ema_decay=functools.partial(distillation.ema_decay, setup),
        batch_spec=spec,
        batches=functools.partial(batches, data, config.seed, setup, section, view, spec),
        optimizer=section.optimizer.make(plan.steps, model.layer),
        plan=plan,
        rules=model.rules,
        tables=model.tables,
        evals=checkup.evaluators(config, section.monitor, step=step, workdir=workdir),
        group=math.lcm(*objective.groups().values()),
        flops=plan.batch * flops(setup),
        **frozen,
        identity={
            "model": config[step].model.to_dict(),
            "crops": crops.to_dict(),
            "view": view,
            **home.lasting({"data": config.data.to_dict()}),
            **({"teacher": section.teacher} if section.teacher else {}),
        },
        former=former_identity,
        reads=lambda: {
            "source": data.identity("train"),
            **{name: checkpoint.identity_of(place) for name, place in reads.items()},
        },
    )


def taught(section: Section, config, *, step: str, workdir):
    """(section that starts from its teacher, what its stage has of it, {"teacher": where it is}).

    Raises:
      UserError: the teacher is no other encoder, or of another model.
    """
    teacher = section.teacher
    if teacher == step or teacher not in recipe.of_stage(config, "encoder"):
        raise UserError(f"{step}.teacher={teacher!r} is not another step that is an encoder")
    own, other = (recipe.build(Section, config[name]).model for name in (step, teacher))
    if own != other:
        raise UserError(
            f"{step}.model is not that of its teacher {teacher}; with {step}.like={teacher} it is"
        )
    place = recipe.trained(config, workdir, teacher)
    if not section.train.init_from:
        plan = dataclasses.replace(section.train, init_from=str(place))
        section = dataclasses.replace(section, train=plan)
    image = jnp.zeros((1, own.backbone.image, own.backbone.image, own.backbone.channels))
    shapes = {"teacher": jax.eval_shape(own.init, jax.random.key(0), image)["params"]}

    def load(mesh):
        shardings = parallel.shardings(shapes, mesh, rules=own.rules, strict=False)
        abstract = parallel.abstract(shapes, shardings)["teacher"]
        return {"teacher": checkpoint.load_params(place / "checkpoints", abstract)}

    return section, {"frozen_spec": shapes, "load_frozen": load}, {"teacher": place / "checkpoints"}


def batch_spec(setup: Setup, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch: `position`, and of each kind KIND/global, KIND/local and KIND/masked."""
    spec = {"position": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    for kind in setup.kinds:
        crops = setup.crops[kind]
        for name in ("global", "local"):
            number, size = crops[f"{name}_crops"], crops[f"{name}_size"]
            if number:
                shape = (batch, number, size, size, 3)
                spec[f"{kind}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    if setup.objective.plain:
        shape = (batch, setup.size, setup.size, 3)
        spec["plain"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    for kind in setup.kinds if setup.objective.ibot else ():
        shape = (batch, setup.crops[kind].global_crops, setup.side(kind) ** 2)
        spec[f"{kind}/masked"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    return spec


def batches(data, seed: int, setup: Setup, section: Section, view, spec, split: str, rows=None):
    """The iterator of a split: crops, and with iBOT masks drawn for whole groups."""
    objective = setup.objective
    drawn = None
    if objective.ibot:
        grids = {kind: (setup.crops[kind].global_crops, setup.side(kind)) for kind in setup.kinds}
        drawn = masks.GroupMasks(
            grids,
            group=objective.mask_group,
            share=objective.mask_share,
            ratio=objective.mask_ratio,
            seed=seed,
        )
    return loader.batches(
        data.source(split, **view),
        batch=section.train.batch,
        seed=seed,
        transform=transforms.Views(section.crops, plain=setup.size if objective.plain else 0),
        threads=section.threads,
        fields=tuple(name for name in spec if name != "position" and "/masked" not in name),
        grouped=drawn,
        rows=rows,
    )


def check(section: Section, crops, step: str) -> None:
    """Refuses fields that do not go together.

    Raises:
      UserError: groups that a microbatch would cut, fewer positions than the kinds of crops can
        share, or crops that cannot be cut into patches.
    """
    objective, plan = section.objective, section.train
    positions = section.model.simplicial.positions
    for name, size in objective.groups().items():
        if size < 1 or plan.batch % (plan.accumulate * size):
            raise UserError(
                f"{step}.train.batch={plan.batch} in {plan.accumulate} microbatch(es) does not "
                f"divide into groups of {step}.objective.{name}={size}; set {name} to a number of "
                "examples that does"
            )
    if objective.koleo and not objective.koleo_group and plan.accumulate > 1:
        raise UserError(
            f"{step}.objective.koleo_group=0 compares the whole batch: set "
            f"{step}.train.accumulate=1, or a group"
        )
    field = f"{step}.model.simplicial.positions"
    if positions < 1:
        raise UserError(f"{field}={positions} must be at least 1")
    try:
        groups.shared_out(crops, positions)
    except UserError as error:
        raise UserError(f"{field}: {error}; raise it, or change {step}.crops.KIND.share") from None
    check_crops(crops, section.model.backbone.stride, step)


def check_crops(crops, patch: int, step: str) -> None:
    """UserError if patches do not divide the crops of a section `crops`."""
    if patch < 1:
        raise UserError(f"{step}.model.backbone.patch={patch} must be at least 1")
    for kind, one in crops.items():
        for name in ("global", "local"):
            size = one[f"{name}_size"]
            if one[f"{name}_crops"] and (size % patch or size < patch):
                field = f"{step}.crops.{kind}.{name}_size"
                raise UserError(
                    f"{field}={size} cannot be cut into patches of {patch}; give "
                    f"--config.{field}={max(1, size // patch) * patch}"
                )


def former_identity(saved: Mapping) -> dict:
    """An earlier version's identity of a checkpoint, with the fields of this one."""
    model = recipe.complete(Encoder, former.encoder_model(saved["model"]))
    kinds = saved.get("crops", {})  # dlc import writes the model alone
    crops = {kind: recipe.complete(MultiCrop, one) for kind, one in kinds.items()}
    return {**saved, "model": model, "crops": crops}
