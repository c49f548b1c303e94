"""Reading compiled programs: small pieces of real HLO, and one tiny FSDP step for each machine."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.plan import hlo, machine, program
from dlc_jax.plan.program import Collective

needs = {
    "libtpu": pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install '.[tpu]'"
    ),
    "cuda": pytest.mark.skipif(
        machine._cuda_plugin() is None, reason="no CUDA plug-in: pip install '.[cuda-plan]'"
    ),
}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in machine.SETTINGS.items():
        monkeypatch.setenv(name, value)


def module(entry: str, *computations: str) -> str:
    """HLO text: computations as "name: line; line", the entry last."""
    blocks = []
    for name, _, lines in [each.partition(":") for each in (*computations, f"ENTRY main:{entry}")]:
        name = name if name.startswith("ENTRY") else f"%{name}"
        lines = [f"  {line.strip()}" for line in lines.split(";") if line.strip()]
        blocks.append("\n".join([f"{name} (p: f32[8]) -> f32[8] {{", *lines, "}"]))
    return "HloModule jit_step, is_scheduled=true\n\n" + "\n\n".join(blocks) + "\n"


PLAIN = """
%p = bf16[2,64]{1,0:T(8,128)(2,1)S(1)} parameter(0);
%all-gather.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0};
%q = f32[8]{0} parameter(1);
%all-reduce.2 = (bf16[2,64]{1,0:T(8,128)(2,1)}, /*index=1*/f32[8]{0}) all-reduce(%p, \
/*index=1*/%q), channel_id=2, to_apply=%add;
%reduce-scatter.3 = f32[2]{0} reduce-scatter(%q), channel_id=3, dimensions={0}, to_apply=%add;
%all-to-all.4 = f32[8]{0} all-to-all(%q), channel_id=4, dimensions={0};
ROOT %collective-permute.5 = pred[3,5]{1,0} collective-permute(%mask), channel_id=5, \
source_target_pairs={{0,1},{1,0}};
%mask = pred[3,5]{1,0} parameter(2)
"""
PAIRS = """
%p = bf16[2,64]{1,0} parameter(0); %q = bf16[4]{0} parameter(1);
%ag = ((bf16[2,64]{1,0}, bf16[4]{0}), (bf16[8,64]{1,0}, bf16[16]{0})) all-gather-start(%p, %q), \
channel_id=1, dimensions={0};
%agd = (bf16[8,64]{1,0}, bf16[16]{0}) all-gather-done(%ag);
%rs = ((bf16[2,64]{1,0}), (bf16[1,64]{1,0})) reduce-scatter-start(%p), channel_id=2, \
dimensions={0}, to_apply=%add;
%rsd = bf16[1,64]{1,0} reduce-scatter-done(%rs);
%ar = bf16[4]{0} all-reduce-start(%q), channel_id=3, to_apply=%add;
ROOT %ard = bf16[4]{0} all-reduce-done(%ar)
"""
# A v5e runs a gather beside other work: it starts in one fusion, steps in another, ends in a third,
# always under its own name.
CONFIG = 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
BESIDE = (
    """%p = bf16[2,64]{1,0} parameter(0);
    %start = (bf16[2,64]{1,0}, bf16[8,64]{1,0}) fusion(%p), kind=kCustom, calls=%starting;
    %work = (bf16[8,64]{1,0}, bf16[8,64]{1,0}) fusion(%start), kind=kOutput, calls=%working;
    ROOT %done = bf16[8,64]{1,0} fusion(%work), kind=kCustom, calls=%ending""",
    f"""starting: %i = bf16[2,64]{{1,0}} parameter(0);
    %all-gather.1 = bf16[8,64]{{1,0}} all-gather(%i), channel_id=7, dimensions={{0}}, {CONFIG};
    ROOT %c = (bf16[2,64]{{1,0}}, bf16[8,64]{{1,0}}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart" """,
    f"""working: %i = bf16[2,64]{{1,0}} parameter(0);
    ROOT %all-gather.2 = bf16[8,64]{{1,0}} all-gather(%i), channel_id=7, dimensions={{0}}, \
{CONFIG}""",
    f"""ending: %i = bf16[2,64]{{1,0}} parameter(0);
    %all-gather.3 = bf16[8,64]{{1,0}} all-gather(%i), channel_id=7, dimensions={{0}}, {CONFIG};
    ROOT %c = bf16[8,64]{{1,0}} custom-call(%i, %all-gather.3), \
custom_call_target="AsyncCollectiveDone" """,
)
SCATTER = (
    "%p = f32[8]{0} parameter(0); "
    "ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.clone.1",
    """all-reduce-scatter.clone.1: %i = f32[8]{0} parameter(0); %all-reduce.9 = f32[8]{0} \
all-reduce(%i), channel_id=2, to_apply=%add;
    ROOT %d = f32[2]{0} dynamic-slice(%all-reduce.9, %k), dynamic_slice_sizes={2}""",
)
SPARSE_CORE = (
    """%p = f32[8]{0} parameter(0);
    %s = ((f32[8]{0}, token[]), f32[2]{0}) call-start(%p, %t), \
async_execution_thread="sparsecore", to_apply=%called;
    ROOT %d = f32[2]{0} call-done(%s)""",
    "called: %i = f32[8]{0} parameter(0); "
    "ROOT %rs = f32[2]{0} reduce-scatter(%i), channel_id=3, to_apply=%add",
)
SLICES = """
%p = bf16[64]{0} parameter(0); %t = token[] after-all();
%send.1 = (bf16[64]{0}, u32[], token[]) send(%p, %t), channel_id=10, is_host_transfer=true,
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_transfer_type="ALL_REDUCE"};
%recv.1 = (bf16[64]{0}, u32[], token[]) recv(%t), channel_id=9, is_host_transfer=true,
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_transfer_type="ALL_REDUCE"};
ROOT %d = token[] send-done(%send.1), channel_id=10
""".replace(",\nfrontend", ", frontend")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            module(PLAIN),
            {
                "all-gather": Collective(1, 8 * 64 * 2),  # the whole, after the gather
                "all-reduce": Collective(1, 2 * 64 * 2 + 8 * 4),
                "all-to-all": Collective(1, 32),
                "collective-permute": Collective(1, 15),
                "reduce-scatter": Collective(1, 32),  # the whole, before the scatter
            },
        ),
        (
            module(PAIRS),
            {
                "all-gather": Collective(1, (8 * 64 + 16) * 2),
                "all-reduce": Collective(1, 8),
                "reduce-scatter": Collective(1, 2 * 64 * 2),
            },
        ),
        (module(*BESIDE), {"all-gather": Collective(1, 8 * 64 * 2)}),
        (module(*SCATTER), {"reduce-scatter": Collective(1, 32)}),
        (module(*SPARSE_CORE), {"reduce-scatter": Collective(1, 32)}),
        (module(SLICES), {"all-reduce between slices": Collective(1, 128)}),
        (module("ROOT %p = f32[8]{0} parameter(0)"), {}),
        (None, None),
    ],
    ids=[
        "plain",
        "pairs",
        "beside",
        "all-reduce-scatter",
        "sparse-core",
        "between-slices",
        "none",
        "no-text",
    ],
)
def test_collectives(text, expected):
    assert program.collectives(text) == expected


BODY = """body: %b = (s32[], f32[8]{{0}}) parameter(0); %i = s32[] get-tuple-element(%b), index=0; \
%x = f32[8]{{0}} get-tuple-element(%b), index=1;
    %one = s32[] constant({step}); %next = s32[] add(%i, %one);
    %all-reduce.1 = f32[8]{{0}} all-reduce(%x), channel_id=1, to_apply=%add, \
backend_config={{"estimated_cycles":"1000"}};
    ROOT %r = (s32[], f32[8]{{0}}) tuple(%next, %all-reduce.1)"""
CONDITION = """condition: %c = (s32[], f32[8]{{0}}) parameter(0); %n = s32[] constant({bound}); %j \
= s32[] get-tuple-element(%c), index=0;
    ROOT %lt = pred[] compare(%j, %n), direction={direction}"""
LOOP = """%p = f32[8]{{0}} parameter(0); %zero = s32[] constant({first}); %copy = s32[] copy(%zero);
    %init = (s32[], f32[8]{{0}}) tuple(%copy, %p);
    %after = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%inner, \
backend_config={{"estimated_cycles":"7"}};
    ROOT %w = (s32[], f32[8]{{0}}) while(%init), condition=%condition, body=%body{told}"""
INNER = (
    "inner: %p = f32[8]{0} parameter(0); "
    'ROOT %n = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"50"}'
)


def loop(first=0, bound=28, step=1, direction="LT", told="") -> str:
    parts = (
        LOOP.format(first=first, told=told),
        CONDITION.format(bound=bound, direction=direction),
        BODY.format(step=step),
    )
    return module(*parts, INNER)


@pytest.mark.parametrize(
    ("trips", "told"),
    [
        (28, {}),
        (27, {"first": 1}),  # a loop whose first trip was peeled off
        (10, {"step": 3}),
        (50, {"told": ', backend_config={"known_trip_count":{"n":"50"}}'}),
        (0, {"bound": 0}),
        (1, {"direction": "GE"}),  # not understood
    ],
)
def test_loops_count_by_their_trips(trips, told):
    text = loop(**told)
    assert program.collectives(text)["all-reduce"] == Collective(trips, 32 * trips)
    # a fusion's cycles are its own, not those of what is in it
    assert program.cycles(text) == 7 + 1000 * trips


def test_loops_in_loops_and_branches():
    """A loop of 3 around the one of 28, a call, and both branches of a conditional."""
    inner = loop().split("ENTRY")[0]
    outer = """
%outer (p: f32[8]) -> f32[8] {
  %b = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%b), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"28"}}
}

%aside (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"123"}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[8]{0} call(%p), to_apply=%inner
  %s = ((f32[8]{0}), f32[8]{0}) call-start(%p), async_execution_thread="sparsecore", to_apply=%aside
  ROOT %k = f32[8]{0} conditional(%i, %p, %p), branch_computations={%inner, %inner}
}
"""
    assert program.collectives(inner + outer)["all-reduce"].count == 84
    assert program.cycles(inner + outer) == 84 * 1000 + 3 * 50
    one = outer.replace("branch_computations={%inner, %inner}", "true_computation=%inner")
    assert program.cycles(inner + one) == 84 * 1000 + 100


def test_cycles_that_mean_unknown_are_left_out():
    unknown = 'backend_config={"estimated_cycles":"9223372036854775807"}'
    line = f"ROOT %n = f32[8]{{0}} negate(%p), {unknown}"
    assert program.cycles(module(line)) is None and program.cycles(None) is None


def test_kernels_count_three_times_their_products():
    call = """%k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"1970000",\
"transcendentals":"5","bytes_accessed":"7"}}}"""
    v5e = made("v5e", count=1)  # 197 TFLOP/s at 1.5 GHz
    assert program.kernel_cycles(module(f"ROOT {call}"), v5e) == pytest.approx(45)
    looped = loop().replace("  %all-reduce.1 =", f"  {call}\n  %all-reduce.1 =")
    assert program.kernel_cycles(looped, v5e) == pytest.approx(28 * 45)
    seconds, how = program.seconds(v5e, flops=1, text=looped)
    assert seconds == pytest.approx((28_007 + 28 * 45) / 1.5e9 + 28 * 2 * 32 / 200e9)
    assert "inside of Pallas kernels, which are taken for 3 times" in how
    assert program.kernel_cycles(loop(), v5e) == program.kernel_cycles(None, v5e) == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("(s32[], /*index=1*/(pred[7]{0}, u4[6]{0}), token[])", 4 + 7 + 3),
        ("f8e4m3fn[16]{0}", 16),
        ("c64[2]{0}", 16),
    ],
)
def test_sizes(shape, size):
    assert hlo.size(shape) == size


def test_a_text_that_cannot_be_read():
    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure … async")

    assert program.text(types.SimpleNamespace(as_text=broken)) is None
    with pytest.raises(AttributeError):  # but not any error
        program.text(None)


def made(kind: str, *, count: int, slices: int = 1) -> machine.Machine:
    """A machine whose devices nobody compiles for."""
    chip = (machine.TPU | machine.GPU)[kind]
    devices = tuple(
        types.SimpleNamespace(process_index=index // (count // slices)) for index in range(count)
    )
    return machine._machine(
        kind,
        kind,
        "tpu" if kind in machine.TPU else "gpu",
        devices,
        chip,
        chips=count,
        slices=slices,
    )


def test_seconds():
    v5e = made("v5e", count=4)
    text = loop()  # 28 all-reduces of 32 bytes, 28,007 cycles
    found, how = program.seconds(v5e, flops=1e6, text=text)
    assert found == pytest.approx(28_007 / 1.5e9 + 28 * 2 * 32 / 200e9)
    assert (
        "0.0 M cycles at 1.5 GHz" in how
        and "88-98 %" in how
        and "not overlapped" in how
        and "Pallas" not in how
    )
    # never above peak
    assert program.seconds(v5e, flops=197e12, text=text)[0] == pytest.approx(1.0, abs=1e-4)
    found, how = program.seconds(v5e, flops=197e12, text=None)
    assert found == pytest.approx(1 / 0.4) and "collectives left out" in how and "40 %" in how
    found, how = program.seconds(
        made("h200", count=8), flops=989.4e12, text=loop().replace("estimated_cycles", "x")
    )
    assert found == pytest.approx(1 / 0.4) and "788 of 989" in how
    between = program.seconds(made("v5e", count=4, slices=2), flops=0, text=module(SLICES))[0]
    assert between == pytest.approx(2 * 128 / 6.25e9)


@pytest.mark.parametrize(
    ("groups", "rate"),
    [
        ("replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", 450e9),  # within a host
        ("replica_groups={{0,8},{1,9}}", 50e9),  # one of each host: by its own network
        ("replica_groups={{0,1,2,8,9,10}}", 150e9),
        ("replica_groups={}", 400e9),  # all: by the networks of all eight
        ("source_target_pairs={{0,1},{1,0}}", 450e9),
        ("source_target_pairs={{7,8},{8,9}}", 50e9),
        ("replica_groups=[2,8]<=[16]", 450e9),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 50e9),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 450e9),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0'}", 50e9),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 400e9),
        (
            "replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], "
            "device_ids=([2,8]T(1,0)) {'axis_0'}",
            450e9,
        ),
        ("replica_groups=a_form_of_tomorrow", 450e9),
    ],
)
def test_the_network_between_hosts(groups, rate):
    permute = f"collective-permute(%p), channel_id=1, {groups}"
    text = module(f"%p = f32[1024]{{0}} parameter(0); ROOT %a = f32[1024]{{0}} {permute}")
    hosts = made("h200", count=16, slices=2)
    assert program.seconds(hosts, flops=0, text=text)[0] == pytest.approx(4096 / rate)
    if groups == "replica_groups={{0,8},{1,9}}":  # a mesh in which these are neighbors
        order = [
            hosts.devices[index] for index in (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
        ]
        assert program.seconds(hosts, flops=0, text=text, order=order)[0] == pytest.approx(
            4096 / 450e9
        )


LAYERS, WIDTH = 3, 256


def fsdp_step(found: machine.Machine):
    """A residual MLP in a scan, data 2 x fsdp 4.

    The weights are gathered for use, and their gradients scattered over fsdp.
    """
    mesh = Mesh(np.array(found.devices).reshape(2, 4), ("data", "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = {
        "up": array((LAYERS, WIDTH, 4 * WIDTH), P(None, "fsdp")),
        "down": array((LAYERS, 4 * WIDTH, WIDTH), P(None, None, "fsdp")),
    }

    def layer(x, w):
        x = jax.lax.with_sharding_constraint(x, rows)
        up, down = w["up"].astype(x.dtype), w["down"].astype(x.dtype)
        return x + jax.nn.gelu(x @ up) @ down, None

    def loss(weights, x):
        return jnp.mean(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)

    def step(weights, x):
        value, gradients = jax.value_and_grad(loss)(weights, x)
        gradients = jax.tree.map(
            lambda each, like: jax.lax.with_sharding_constraint(each, like.sharding),
            gradients,
            placed,
        )
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), value

    placed = weights
    x = array((4096, WIDTH), P(("data", "fsdp")), jnp.bfloat16)
    return (
        jax.jit(step, donate_argnums=0)
        .lower(weights, x)
        .compile(compiler_options=found.compiler_options or None)
    )


TINY = {
    "v4": "2x2x2",
    "v5e": "2x4",
    "v5p": "2x2x2",
    "v6e": "2x4",
    "tpu7x": "2x2x1",
    "2*v5e": "2x2",
    "h200": "8",
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=needs["cuda" if kind == "h200" else "libtpu"]) for kind in TINY],
)
def test_a_compiled_step(kind):
    """Counts and bytes follow from the model; a miscounted form or loop is off by a factor."""
    found = machine.find(f"{kind}:{TINY[kind]}")
    compiled = fsdp_step(found)
    text = program.text(compiled)
    moved = program.collectives(text)
    weights = LAYERS * 2 * WIDTH * 4 * WIDTH  # entries, of all layers
    assert moved["all-gather"].bytes == 2 * weights * 2  # forward and backward, in bf16
    assert moved["all-gather"].count in (2 * 2 * LAYERS, 2 * LAYERS)  # each weight, or both at once
    if kind != "tpu7x":  # which reduces over both axes at once, and slices
        assert moved["reduce-scatter"] == Collective(LAYERS, weights * 2)
        shares = 2 * weights // 4 + 4  # what is left to sum over data; and the loss
        between = moved.get("all-reduce between slices", moved["all-reduce"]).bytes
        assert between in (shares, shares - 4 + 512)  # the loss padded to a register
    assert not set(moved) - {*program.KINDS, "all-reduce between slices"}

    held = program.memory(compiled)
    batch = 4096 * WIDTH * 2 // 8
    assert held.arguments == weights * 4 // 4 + batch
    assert weights <= held.aliased <= held.outputs < weights + 4096
    assert held.peak == held.arguments + held.outputs - held.aliased + held.temporaries + held.code
    assert batch < held.peak < found.hbm_bytes

    flops = 3 * 2 * weights * 4096 / 8
    taken, how = program.seconds(found, flops=flops, text=text)
    assert taken > flops / found.flops
    assert (program.cycles(text) is None) == (kind == "h200")
    assert ("cycles" in how) == (kind != "h200")
