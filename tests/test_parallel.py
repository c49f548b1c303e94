"""The mesh, where arrays live on it, and how a product with a shared-out kernel is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax import parallel
from dlc_jax.errors import UserError

RULES = (
    (r"a/table$", -1, "fsdp"),
    (r"attention/qkv/(kernel|bias)$", -2, "tensor"),
    (r"mlp/fc2/kernel$", 0, "tensor"),
)
LARGE = {"data": 1, "fsdp": 16, "tensor": 1}


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")


def mesh(**sizes):
    return parallel.make_mesh(**sizes, devices=jax.devices()[:8])


def test_one_size_is_inferred():
    assert dict(mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert set(mesh(fsdp=8, data=1).devices.ravel()) == set(jax.devices()[:8])


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            dict(data=-1, fsdp=3),
            r"mesh.fsdp=3 does not divide the 8 devices; sizes that do: 1, 2, 4, 8$",
        ),
        (dict(data=-1, fsdp=-1), "at most one -1"),
        (dict(data=0), "at most one -1"),
        (
            dict(data=2, fsdp=2, tensor=1),
            "data 2 x fsdp 2 x tensor 1 is 4, not the 8 devices here; set one of them to -1",
        ),
        (
            dict(data=-1, fsdp=4, tensor=4),
            "fsdp 4 x tensor 4 is 16, which does not divide the 8 devices; make one of them "
            "smaller",
        ),
        (dict(data=4, fsdp=2, dcn_data=3), "mesh.dcn_data=3 does not divide mesh.data=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        mesh(**sizes)
    assert "\n" not in str(error.value)


def test_slices_stay_whole():
    """Two slices of four: the halves of `data` are the slices, whatever order their inside has."""
    devices = mesh(data=4, fsdp=2, dcn_data=2).devices
    assert {device.id for device in devices[:2].ravel()} == {0, 1, 2, 3}
    devices = mesh(data=2, fsdp=4, dcn_fsdp=2).devices
    assert {device.id for device in devices[:, :2].ravel()} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "name, shape, sizes, spec",
    [
        ("a/kernel", (1152, 4608), LARGE, P(None, "fsdp")),
        ("a/kernel", (1152, 1152), LARGE, P("fsdp")),
        ("a/kernel", (1000, 4600), LARGE, P()),  # nothing to divide
        ("a/bias", (4608,), LARGE, P()),  # too small
        ("a/embed", (512, 257, 384), LARGE, P("fsdp")),
        ("a/table", (512, 257, 384), LARGE, P(None, None, "fsdp")),  # by a rule
        ("a/table", (512, 257, 380), LARGE, P("fsdp")),  # which cannot be kept
        (
            "blocks/attention/qkv/kernel",
            (1152, 3, 16, 72),
            LARGE | {"tensor": 4},
            P("fsdp", None, "tensor"),
        ),
        ("blocks/attention/qkv/bias", (3, 16, 72), LARGE | {"tensor": 4}, P(None, "tensor")),
        ("blocks/mlp/fc2/kernel", (4608, 1152), LARGE | {"tensor": 4}, P("tensor", "fsdp")),
        ("blocks/mlp/fc2/kernel", (4608, 1152), LARGE, P("fsdp")),
    ],
)
def test_placement(name, shape, sizes, spec):
    assert parallel.placement(name, shape, sizes, RULES) == spec


def test_heads_that_tensor_does_not_divide_are_refused():
    with pytest.raises(
        UserError,
        match=r"mesh.tensor=3 does not divide the 16 heads of blocks/attention/qkv/kernel; "
        r"sizes that do: 1, 2, 4, 8, 16$",
    ):
        parallel.placement(
            "blocks/attention/qkv/kernel", (1152, 3, 16, 72), LARGE | {"tensor": 3}, RULES
        )


def test_axis_of_layers_is_never_split_and_moments_follow_their_parameters():
    kernel = jax.ShapeDtypeStruct((4096, 256, 512), jnp.float32)
    tree = {
        "params": {"blocks": {"fc1": {"kernel": kernel}}},
        "opt_state": ({"blocks": {"fc1": {"kernel": kernel}}},),
    }
    specs = [leaf.spec for leaf in jax.tree.leaves(parallel.shardings(tree, mesh(fsdp=8, data=1)))]
    assert specs == [P(None, None, "fsdp")] * 2


def test_a_rule_that_matches_nothing_is_refused():
    tree = {"attention": {"qkv": {"kernel": jax.ShapeDtypeStruct((64, 3, 2, 32), jnp.float32)}}}
    with pytest.raises(UserError, match="mlp/fc2"):
        parallel.shardings(tree, mesh(data=-1, tensor=2), rules=RULES)
    parallel.shardings(tree, mesh(data=-1, tensor=2), rules=RULES, strict=False)
    parallel.shardings(tree, mesh(data=-1), rules=RULES)


def test_constrain_pins_the_batch_and_leaves_alone_what_does_not_divide():
    with jax.set_mesh(mesh(data=2, fsdp=4)):
        text = jax.jit(parallel.constrain).lower(jnp.zeros((16, 3))).as_text()
        assert "sharding_constraint" in text
        assert (
            "sharding_constraint"
            not in jax.jit(parallel.constrain).lower(jnp.zeros((1, 3))).as_text()
        )
    assert (
        "sharding_constraint" not in jax.jit(parallel.constrain).lower(jnp.zeros((16, 3))).as_text()
    )


@pytest.fixture
def product(monkeypatch):
    """(mesh) -> value, gradients and compiled text of a loss over `matmul`.

    The kernel lies where `placement` puts it.
    """
    monkeypatch.setattr(parallel, "SMALLEST", 64)
    key = jax.random.key(0)
    x, kernel = jax.random.normal(key, (16, 24)), jax.random.normal(key, (24, 3, 4, 8))

    def run(sizes):
        found = parallel.make_mesh(
            **sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))]
        )
        placed = NamedSharding(
            found,
            parallel.placement(
                "qkv/kernel", kernel.shape, found.shape, ((r"qkv/kernel$", -2, "tensor"),)
            ),
        )
        rows = NamedSharding(found, parallel.BATCH)

        def loss(x, kernel):
            y = parallel.matmul(x, kernel, "qkv/kernel", ((r"qkv/kernel$", -2, "tensor"),))
            return jnp.sum(jnp.sin(y)), y

        gradient = jax.jit(
            jax.value_and_grad(loss, (0, 1), has_aux=True),
            in_shardings=(rows, placed),
            out_shardings=((None, rows), (rows, placed)),
        )
        with jax.set_mesh(found):
            compiled = gradient.lower(x, kernel).compile()
            return jax.device_get(
                compiled(jax.device_put(x, rows), jax.device_put(kernel, placed))
            ), compiled.as_text()

    return run


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_matmul_is_the_product_and_so_is_its_gradient(product, sizes):
    alone, _ = product(dict(data=1, fsdp=1, tensor=1))
    together, _ = product(dict(zip(parallel.AXES, sizes)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), alone, together
    )


def test_matmul_scatters_the_gradient_and_replicas_add_shares_only(product):
    _, text = product(dict(data=2, fsdp=4, tensor=1))
    assert len(re.findall(r" reduce-scatter\(", text)) == 1
    sums = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(", text)
    assert sums == ["6,3,4,8"]  # a quarter of the kernel


def test_matmul_is_plain_without_a_mesh_or_for_rows_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(parallel, "SMALLEST", 64)
    x, kernel = jnp.ones((3, 24)), jnp.ones((24, 32))
    np.testing.assert_array_equal(parallel.matmul(x, kernel, "kernel"), x @ kernel)
    with jax.set_mesh(mesh(data=1, fsdp=8)):
        np.testing.assert_array_equal(
            jax.jit(lambda x, kernel: parallel.matmul(x, kernel, "kernel"))(x, kernel), x @ kernel
        )
