"""dlc evaluate SAMPLES… REFERENCE: FID and other metrics of images, as a table and as JSON."""

from pathlib import Path

from dlc_jax.cli import networks, scoring, sweep
from dlc_jax.errors import UserError
from dlc_jax.evaluation import names

EXAMPLE = (
    "dlc evaluate samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is "
    "--weights pt_inception-2015-12-05-6726825d.pth --out results.json"
)
DEFAULT = "inception"


def arguments(parser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="places of images to score, each by itself: a folder, an archive, an .npz, records; "
        "the last is the reference if a metric needs one and --reference is not given",
    )
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="images, or their statistics (.npz of ADM, pytorch-fid or this verb); with no other "
        "path its statistics are written to --out",
    )
    parser.add_argument("--metrics", metavar="A,B", help="which; see docs/evaluation.md")
    group = parser.add_argument_group("networks")
    group.add_argument("--network", default=DEFAULT, metavar="NAME", help=f"features; {DEFAULT}")
    group.add_argument("--weights", metavar="FILE", help="of the network, as published")
    group.add_argument("--protocol", metavar="NAME", help="how images are resized; the network's")
    group.add_argument(
        "--made-with", metavar="NAME", help="protocol of an .npz of statistics that does not say"
    )
    group.add_argument("--lpips", default="alex", metavar="TRUNK", help="alex, vgg, squeeze; alex")
    group.add_argument("--lpips-weights", metavar="FILE", help="of that trunk")
    group.add_argument("--lpips-heads", metavar="FILE", help="heads of that trunk")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--count", type=networks.whole, metavar="N", help="samples; all, of a sweep 1000"
    )
    group.add_argument(
        "--image", type=networks.whole, metavar="N", help="scale the short side, crop the center"
    )
    group.add_argument("--gray", action="store_true", help="score images that are all gray")
    group.add_argument("--field", default="image", metavar="NAME", help="column or array; image")
    group.add_argument("--cache", metavar="DIR", help="of statistics and of slow archives")
    group = parser.add_argument_group("a sweep")
    group.add_argument("-w", "--workdir", metavar="W", help="folder of a run that draws the images")
    group.add_argument(
        "--sweep",
        metavar="scale=A,B",
        help="guidance scales; the reference is one path, or the run's own training images",
    )
    group.add_argument(
        "--codes",
        choices=sweep.CODES,
        default="prior",
        help="whose codes the run draws from: the prior's, those of held-out images (oracle), "
        "which shows what the generator alone can do, or both; prior",
    )
    parser.add_argument(
        "--batch", type=networks.whole, default=64, metavar="N", help="images at a time; 64"
    )
    parser.add_argument(
        "--seed", type=networks.seed, default=0, metavar="S", help="of what is drawn; 0"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="results as JSON (of a sweep, beside it a .png), or statistics as .npz",
    )


def run(arguments, rest) -> None:
    kinds, samples, reference = _work(arguments)
    scales = sweep.scales(arguments.sweep)
    if arguments.out:
        networks.prepare(Path(arguments.out), Path(arguments.out).parent)
    if arguments.workdir:
        networks.check(arguments, rest)
    elif rest:
        raise UserError(f"dlc evaluate: unexpected argument {rest[0]!r}; see dlc evaluate --help")
    from absl import logging

    from dlc_jax.hosts import cluster  # and jax: seconds, which a mistake need not wait for

    logging.set_verbosity(logging.ERROR)
    cluster.join()
    if arguments.workdir:
        sweep.run(arguments, kinds, reference, scales, rest)
    elif kinds:
        _score(arguments, kinds, samples, reference)
    else:
        _write_statistics(arguments, reference)
    cluster.leave()


def _work(arguments) -> tuple[list[str], list[str], str | None]:
    """(kinds of metrics, samples, reference); no kinds where statistics are to be written."""
    samples, reference = list(arguments.paths), arguments.reference
    if arguments.sweep and not arguments.workdir:
        raise UserError("dlc evaluate: --sweep draws images of a run; give its folder, -w W")
    if arguments.codes != "prior" and not arguments.workdir:
        raise UserError("dlc evaluate: --codes draws images of a run; give its folder, -w W")
    if reference and not samples and not arguments.workdir:
        if not (arguments.out or "").endswith(".npz") or arguments.metrics:
            raise UserError(
                "dlc evaluate: --reference alone writes its statistics, and to that belongs "
                "--out=FILE.npz and no metric; to score images, give them"
            )
        return [], [], reference
    kinds = names.parse(arguments.metrics or names.usual(arguments.network), arguments.network)
    if samples and not reference and names.refers(kinds):
        reference = samples.pop()
    if arguments.workdir and samples:
        raise UserError(
            f"dlc evaluate: images are drawn by {arguments.workdir}; leave out {samples[0]}"
        )
    if not samples and not arguments.workdir:
        need = "; these metrics compare with a reference: give SAMPLES REFERENCE" * bool(reference)
        raise UserError(f"dlc evaluate: no images to score{need}")
    if (arguments.out or ".json").rpartition(".")[2] != "json":
        raise UserError(f"dlc evaluate: --out={arguments.out} is not a .json file")
    return kinds, samples, reference if names.refers(kinds) else None


def _score(arguments, kinds, samples, place) -> None:
    from dlc_jax.evaluation import results
    from dlc_jax.evaluation.images import open_set

    scorer, lpips = scoring.networks_of(arguments, kinds)
    sets = [
        open_set(path, count=arguments.count, **scoring.images_as(arguments)) for path in samples
    ]
    reference = scoring.reference_of(arguments, kinds, place, scorer) if place else None
    shared = {"reference": reference, "scorer": scorer, "lpips": lpips, "seed": arguments.seed}
    found = []
    for images in sets:
        found.append(results.scored(images, kinds, batch=arguments.batch, **shared))
        scoring.say(scoring.table(found[-1]))
    scoring.write(arguments, results.document(found, image=arguments.image, **shared))


def _write_statistics(arguments, place) -> None:
    from dlc_jax.evaluation import reference
    from dlc_jax.evaluation.images import open_set

    scorer, _ = scoring.networks_of(arguments, [])
    images = open_set(place, count=arguments.count, **scoring.images_as(arguments))
    found = reference.of_images(images, scorer, cache=arguments.cache)
    with networks.writing(Path(arguments.out)):
        reference.save(found, arguments.out, scorer.extractor)
    scoring.say(f"wrote {arguments.out}: statistics of {found.count} images")
