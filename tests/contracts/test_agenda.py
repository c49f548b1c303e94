"""What the same command does again in a workdir.

Nothing, or what another setting asks for, or it says why it must not.
"""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict
from recipes import load
from throwaway import coupled

from dlc_jax import agenda, main, parallel
from dlc_jax import workdir as home
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.stage import Evaluator, Job


class Rooms:
    """Steps that write down that they ran; `reads` is what the stages find on disk."""

    def __init__(self):
        self.ran, self.reads = [], {"store": {"encoder": "a"}}
        self.STAGES = {"trained": self.trained, "job": self.job}

    def trained(self, config, *, step, workdir):
        train = {"save_every": 2, "log_every": 2, **config[step].train}
        stage = coupled(**train)

        def batches(split, rows=None):
            self.ran += [step] if split == "train" else []
            return stage.batches(split, rows)

        identity = {"width": config[step].width}
        reads = {"batches": batches, "reads": lambda: self.reads}
        return dataclasses.replace(stage, identity=identity, **reads)

    def job(self, config, *, step, workdir):
        def run(mesh, directory):
            self.ran.append(step)
            return {f"{step}/guidance": config[step].guidance}

        return Job(run=run, settings=("guidance",))


@pytest.fixture
def rooms(monkeypatch):
    return installed(monkeypatch)


def installed(monkeypatch):
    """Its steps in place of the real ones, and one device: more of them only compile longer."""
    made, whole = Rooms(), parallel.make_mesh
    monkeypatch.setattr(agenda, "STAGES", made.STAGES)
    one = jax.devices()[:1]
    monkeypatch.setattr(parallel, "make_mesh", lambda **sizes: whole(devices=one, **sizes))
    return made


def config(**changes):
    """encoder -> codes -> prior -> samples; `changes` by dotted names with __ for dots."""
    job = dict(stage="job", guidance=1.0)
    made = ConfigDict(
        dict(
            seed=0,
            steps=("encoder", "codes", "prior", "samples"),
            mesh=dict(data=1, fsdp=1, tensor=1),
            log=dict(tensorboard=False, wandb=""),
            encoder=dict(stage="trained", width=8, train=dict(steps=2, batch=8)),
            codes=dict(job, encoder="encoder", path=""),
            prior=dict(stage="trained", codes="codes", width=8, train=dict(steps=2, batch=8)),
            samples=dict(job, prior="prior"),
        )
    )
    flat = {name.replace("__", "."): value for name, value in changes.items()}
    made.update_from_flattened_dict(flat)
    return made


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    directory = tmp_path_factory.mktemp("complete") / "W"
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = installed(monkeypatch)
        main.run(config(), directory)
    assert made.ran == ["encoder", "codes", "prior", "samples"]
    return directory


@pytest.fixture
def workdir(complete, tmp_path):
    return Path(shutil.copytree(complete, tmp_path / "W"))


def history(workdir):
    path = workdir / "config_history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["changed"] for line in lines]


def test_again_it_does_nothing(workdir, rooms, capsys):
    capsys.readouterr()
    main.run(config(), workdir)
    assert rooms.ran == [] and history(workdir) == []
    steps = ("encoder", "codes", "prior", "samples")
    assert capsys.readouterr().out.splitlines()[:-1] == [f"{name}: complete" for name in steps]
    assert json.loads((workdir / "results.json").read_text())["device"].endswith("cpu")


def test_asked_to_stop_at_the_last_step_it_ends_before_the_next_one(tmp_path, rooms, capsys):
    """The loop has nothing more to stop, but a job would go on for hours."""
    trained = rooms.STAGES["trained"]

    def asking(config, *, step, workdir):
        stage = trained(config, step=step, workdir=workdir)

        def measure(*_):
            os.kill(os.getpid(), signal.SIGTERM)
            return {}

        return dataclasses.replace(stage, evals=(Evaluator("last", 0, measure),))

    rooms.STAGES["trained"] = asking
    said = "stopped; what is complete is kept, the same command goes on"
    with pytest.raises(Interrupted, match=said):
        main.run(config(), tmp_path / "W")
    assert rooms.ran == ["encoder"]
    rooms.STAGES["trained"] = trained
    capsys.readouterr()
    main.run(config(), tmp_path / "W")
    assert capsys.readouterr().out.startswith("encoder: complete\n")


def test_what_a_kill_left_half_deleted_goes_although_the_step_is_complete(workdir, rooms):
    (workdir / "prior" / "checkpoints" / "1.deleting").mkdir()
    main.run(config(), workdir)
    assert rooms.ran == [] and not (workdir / "prior" / "checkpoints" / "1.deleting").exists()


def test_a_start_that_cannot_be_is_refused_before_the_folder_is_of_this_recipe(
    complete, tmp_path, rooms
):
    """Else the corrected command would be one of another config."""

    def started(place, new=(), **more):
        made = config(**more)
        made.encoder.train.update(init_from=str(place), init_new=new)
        return made

    for made, words in (
        (started(tmp_path / "nowhere"), "encoder.train.init_from=.*nowhere: no good checkpoint"),
        (started(complete), "encoder.train.init_from"),
        (
            started(complete / "encoder", new=("hed.*",)),
            "encoder.train.init_new: 'hed.*' names no parameter",
        ),
    ):
        with pytest.raises(UserError, match=words):
            main.run(made, tmp_path / "W")
        assert not (tmp_path / "W").exists()
    start = Path(shutil.copytree(complete / "encoder", tmp_path / "start"))
    main.run(started(start), tmp_path / "W")
    shutil.rmtree(start)  # need not be there for ever
    main.run(started(start), tmp_path / "W")
    own = config()  # nor already, if this run makes it
    own.prior.train.update(init_from=str(tmp_path / "U" / "encoder"), init_new=())
    main.run(own, tmp_path / "U")


def test_a_jobs_setting_runs_that_job_again(workdir, rooms):
    main.run(config(samples__guidance=2.0), workdir)
    assert rooms.ran == ["samples"] and history(workdir) == [{"samples.guidance": [1.0, 2.0]}]
    assert json.loads((workdir / "results.json").read_text())["samples/guidance"] == 2.0
    rooms.ran.clear()
    main.run(config(samples__guidance=2.0), workdir)
    assert rooms.ran == []


def test_a_longer_stage_goes_on_and_what_reads_it_runs_again(workdir, rooms):
    main.run(config(prior__train__steps=4), workdir)
    assert rooms.ran == ["prior", "samples"]
    assert history(workdir) == [{"prior.train.steps": [2, 4]}]
    rooms.ran.clear()
    main.run(config(), workdir)  # the shorter command again: what is there is longer, and good
    assert rooms.ran == []


def test_what_others_have_learned_from_is_not_changed_under_them(workdir, rooms):

    def files():
        return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(UserError) as caught:
        main.run(config(encoder__train__steps=4), workdir)
    said = str(caught.value)
    assert "prior learned from what encoder gave after 2 steps, and encoder is to have 4" in said
    assert "set encoder.train.steps=2" in said and f"move prior of {workdir} away" in said
    assert rooms.ran == [] and files() == before
    (workdir / "prior").rename(workdir.parent / "old")
    main.run(config(encoder__train__steps=4), workdir)
    assert rooms.ran == ["encoder", "codes", "prior", "samples"]


def test_another_store_is_refused_by_the_stage_that_goes_on(workdir, rooms):
    rooms.reads = {"store": {"encoder": "b"}}
    with pytest.raises(UserError, match=r'store\.encoder: "a" -> "b"'):
        main.run(config(prior__train__steps=4), workdir)
    rooms.reads = {"store": {"encoder": "a"}}
    main.run(config(prior__train__steps=4), workdir)


def test_another_model_is_refused_and_a_mistake_is_not_remembered(workdir, rooms, tmp_path):
    with pytest.raises(UserError, match="prior.width: 8 -> 16"):
        main.run(config(prior__width=16), workdir)
    with pytest.raises(UserError, match="train.batch=0"):
        main.run(config(prior__train__batch=0), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    main.run(config(), tmp_path / "new")


def test_a_metric_to_keep_the_best_by_that_nothing_measures_is_refused_at_once(rooms, tmp_path):
    """And which checkpoints stay may change under a workdir."""
    misspelt = config(prior__train=dict(steps=2, batch=8, keep_best="-probe/shape"))
    words = r"prior.train.keep_best='-probe/shape' is not measured .* validation/loss, of validati"
    with pytest.raises(UserError, match=words):
        main.run(misspelt, tmp_path / "new")
    assert not (tmp_path / "new").exists() and rooms.ran == []
    main.run(config(prior__train=dict(steps=2, batch=8, keep_best="")), tmp_path / "new")
    kept = dict(steps=4, batch=8, keep=3, keep_period=2, keep_best="validation/loss")
    main.run(config(prior__train=kept), tmp_path / "new")
    assert (tmp_path / "new" / "prior" / "checkpoints" / "4").is_dir()


def test_codes_that_are_elsewhere_need_no_encoder(rooms, workdir, tmp_path, capsys):
    main.run(config(codes__path=str(workdir / "codes")), tmp_path / "W2")
    assert rooms.ran == ["codes", "prior", "samples"]
    assert not (tmp_path / "W2" / "encoder").exists()
    said = f"encoder: not needed, codes are those of {workdir / 'codes'}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("steps, skip", [(12, "complete"), (50, "")])
def test_settings_of_an_earlier_version_are_compared_by_their_meaning(tmp_path, steps, skip):
    """A sampler was spread over its step; a job that was run with today's is not run again."""
    recipe = load("quickstart.py")
    (tmp_path / "samples").mkdir()
    settings = {"count": 512, "pairs": 512, "held_out": True, "calls": 0}
    settings |= {"sampling_steps": steps, "guidance": 1.0, "method": "heun"}
    home.mark_done(tmp_path / "samples", {"steps": 0, "settings": settings})
    made = {"samples": Job(run=None, settings=("count", "pairs", "sampler", "code_sampler"))}
    (entry,) = agenda.read(recipe, tmp_path, made)
    assert entry.skip == skip
