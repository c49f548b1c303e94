"""dlc profile: what it reads of a trace, and a run that it leaves as it is."""

import gzip
import json

import pytest

from dlc_jax import cli
from dlc_jax.cli.profile import Spent, part_of, spent, table


def event(name, start, length, *, thread=1, process=1, op=True):
    args = {"hlo_op": name} if op else {}
    place = {"pid": process, "tid": thread, "ts": start, "dur": length}
    return {"ph": "X", "name": name, "args": args, **place}


def test_an_operation_spends_what_others_within_it_do_not():
    rows = [
        event("dot.1", 12, 3),  # not in order
        event("while", 10, 20),
        event("dot.1", 16, 4),
        event("inner", 20, 10),
        event("add", 21, 2),
        event("dot.1", 30, 5),  # begins where the loop ends
        event("dot.1", 12, 100, thread=2),
        event("python", 0, 500, op=False),
    ]
    assert spent({"traceEvents": rows}) == {
        "dot.1": Spent(3 + 4 + 5 + 100, 4),
        "while": Spent(20 - 3 - 4 - 10, 1),
        "inner": Spent(8, 1),
        "add": Spent(2, 1),
    }


def test_of_a_device_nothing_is_left_out_and_nothing_counted_twice():
    def named(kind, name, **place):
        return {"ph": "M", "name": kind, "args": {"name": name}, **place}

    rows = [
        named("process_name", "/device:GPU:0", pid=7),
        named("thread_name", "Stream #14(Compute)", pid=7, tid=1),
        named("thread_name", "XLA Modules", pid=7, tid=2),
        event("fusion.2", 0, 5, process=7),
        event("ncclKernel", 5, 7, process=7, op=False),
        event("jit_train_step", 0, 12, process=7, thread=2, op=False),
    ]
    assert spent({"traceEvents": rows}) == {"fusion.2": Spent(5, 1), "ncclKernel": Spent(7, 1)}


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [
        (
            "jit(train_step)/transpose(jvp(DiT.all))/DiT._outputs/while/body/closed_call/checkpoint"
            "/rematted_computation/blocks.body/blocks/attention/qkv/dot_general",
            ("recomputed", "blocks/attention/qkv"),
        ),
        (
            "jit(train_step)/transpose(jvp(DiT.all))/while/body/closed_call/checkpoint"
            "/blocks.body/blocks/mlp/mul",
            ("backward", "blocks/mlp"),
        ),
        (
            "jit(train_step)/jvp(DiT.all)/while/body/jit(dynamic_index_in_dim)/dynamic_slice",
            ("forward", "(loop)"),
        ),
        ("jit(train_step)/optimizer/mul", ("no gradient", "optimizer")),
        ("", ("no gradient", "(other)")),
    ],
)
def test_names_of_jax_become_pass_and_part(scope, wanted):
    assert part_of(scope) == wanted


def test_shares_are_of_all_and_times_of_a_step():
    rows = [("backward", "mlp", 3000.0, 20), ("forward", "mlp", 1000.0, 10)]
    lines = table(("pass", "part"), rows, 10_000.0, 10).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["backward", "mlp", "0.30", "30.0%", "2"],
        ["forward", "mlp", "0.10", "10.0%", "1"],
    ]


@pytest.mark.slow
def test_it_goes_on_from_the_checkpoint_and_leaves_the_run_as_it_is(quickstart, tmp_path, capsys):
    def listing():
        paths = (path for path in (quickstart / "run").rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in paths}

    before = listing()
    line = ["profile", str(quickstart / "run"), "--step", "prior", "--steps", "2"]
    assert cli.main([*line, "--out", str(tmp_path / "trace")]) == 0
    out = capsys.readouterr().out
    assert f"prior of {quickstart}/run, from step 24: " in out
    assert listing() == before
    parts, operations = (part.splitlines()[1:] for part in out.split("\n\n")[1:3])
    names = {tuple(row.split()[:2]) for row in parts}
    assert {("forward", "blocks/mlp"), ("backward", "blocks/mlp")} <= names
    assert 10 < len(operations) <= 20
    traces = list((tmp_path / "trace").rglob("*.trace.json.gz"))
    assert len(traces) == 1 and str(traces[0]) in out
    assert json.loads(gzip.open(traces[0]).read())["traceEvents"]
