"""Drop path as subsets of fixed groups: which rows are computed, what comes of them, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import apply, drawn, normal, small_encoder, small_vit

from dlc_jax import parallel
from dlc_jax.errors import UserError
from dlc_jax.models import drop_path, layers, vit
from dlc_jax.plan import program

GROUPS, ROWS, KEEP = 3, 4, 2


def subsets(seed, *, depth=2, groups=GROUPS, rows=ROWS, rate=0.4):
    return drop_path.drop_subsets(
        jax.random.split(jax.random.key(seed), groups), depth=depth, rows=rows, rate=rate
    )


def test_subsets_are_rising_places_in_the_group():
    kept = np.asarray(subsets(0, depth=5, groups=7, rows=10, rate=0.3))
    assert kept.shape == (5, 2, 7, 7) and kept.dtype == np.int32
    assert (np.diff(kept, axis=-1) > 0).all() and kept.min() >= 0 and kept.max() < 10
    assert (
        len({tuple(subset) for subset in kept.reshape(-1, 7)}) > 30
    )  # of 70: blocks, residuals and groups draw their own
    assert subsets(0, rows=4, rate=0.99).shape[-1] == 1
    assert subsets(0, rows=10, rate=0.0).shape[-1] == 10


def test_subsets_belong_to_the_group_and_take_every_row_alike():
    keys = jax.random.split(jax.random.key(1), 500)
    kept = drop_path.drop_subsets(keys, depth=1, rows=10, rate=0.3)
    np.testing.assert_array_equal(
        drop_path.drop_subsets(keys[3:5], depth=1, rows=10, rate=0.3), kept[:, :, 3:5]
    )
    share = np.bincount(np.asarray(kept).ravel(), minlength=10) / 1000
    np.testing.assert_allclose(share, 0.7, atol=0.06)  # four deviations


def test_residuals_of_kept_rows_grow_and_others_pass():
    x, kept = normal(0, GROUPS * ROWS, 3, 16), subsets(2)
    block = vit.Block(2, 4.0, 1.0, False, None)
    variables = drawn(block, x)
    p = variables["params"]
    norm = layers.LayerNorm()
    residuals = (
        lambda x: (
            p["gamma1"]
            * apply(
                layers.Attention(2),
                {"params": p["attention"]},
                apply(norm, {"params": p["norm1"]}, x),
            )
        ),
        lambda x: (
            p["gamma2"]
            * apply(layers.Mlp(64), {"params": p["mlp"]}, apply(norm, {"params": p["norm2"]}, x))
        ),
    )
    y = np.asarray(x).reshape(GROUPS, ROWS, 3, 16).copy()
    for residual, subset in zip(residuals, np.asarray(kept[0])):
        for group in range(GROUPS):
            for row in subset[group]:
                y[group, row] += (
                    np.asarray(residual(jnp.asarray(y[group, row][None])))[0] * ROWS / KEEP
                )
    found = apply(block, variables, x, kept=kept[0])
    np.testing.assert_allclose(found, y.reshape(x.shape), atol=1e-5)
    untouched = [
        (g, r)
        for g in range(GROUPS)
        for r in range(ROWS)
        if r not in kept[0, 0, g] and r not in kept[0, 1, g]
    ]
    assert untouched
    for g, r in untouched:
        np.testing.assert_array_equal(found[g * ROWS + r], x[g * ROWS + r])


def test_mean_is_the_whole_residual():
    x = normal(0, 6, 2, 8)
    every = jnp.stack(
        [jnp.array([[a, b]]) for a in range(6) for b in range(a + 1, 6)]
    )  # all pairs of one group of six
    mean = jnp.mean(jax.vmap(lambda kept: drop_path.add_residual(x, jnp.sin, kept))(every), axis=0)
    np.testing.assert_allclose(mean, x + jnp.sin(x), atol=1e-5)
    np.testing.assert_array_equal(drop_path.add_residual(x, jnp.sin), x + jnp.sin(x))


@pytest.mark.parametrize("make", [small_vit, small_encoder])
def test_every_layer_reads_its_own_subsets(make):
    images, kept = normal(0, GROUPS * ROWS, 8, 8, 3), subsets(3)
    model = make()
    variables = drawn(model, images)
    np.testing.assert_allclose(
        apply(model, variables, images, kept=subsets(3, rate=0.0))["vector"],
        apply(model, variables, images)["vector"],
        atol=1e-4,
    )
    vectors = [
        apply(model, variables, images, kept=order)["vector"]
        for order in (kept, kept[::-1], kept[:, ::-1])
    ]
    assert all(np.abs(vectors[0] - other).max() > 1e-3 for other in vectors[1:])
    with pytest.raises(UserError, match="batch of 11 .* 3 groups"):
        apply(model, variables, images[:11], kept=kept)


def test_gradient_is_that_of_the_rows_computed():
    """Of a block's parameters from the rows it kept alone; of images through those that pass."""
    x, kept = normal(0, GROUPS * ROWS, 3, 8), subsets(4)[0, 0]
    weight = normal(1, *x.shape)

    def loss(scale, x, add):
        return (weight * add(x, lambda x: jnp.sin(scale * x))).sum()

    found = jax.grad(loss, (0, 1))(1.3, x, lambda x, f: drop_path.add_residual(x, f, kept))
    chosen = np.zeros((GROUPS, ROWS))
    np.put_along_axis(chosen, np.asarray(kept), ROWS / KEEP, axis=1)
    expected = jax.grad(loss, (0, 1))(1.3, x, lambda x, f: x + f(x) * chosen.reshape(-1, 1, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1)], ids=str)
def test_no_collective_is_added(sizes, monkeypatch):
    """Compiled for eight devices with two groups each, forward and backward have the same
    collectives, of the same bytes, as without.
    """
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    monkeypatch.setattr(parallel, "SMALLEST", 64)
    mesh = parallel.make_mesh(**dict(zip(parallel.AXES, sizes)), devices=jax.devices()[:8])
    model = small_vit()
    found = {}
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        placed = parallel.shardings(shapes, mesh, rules=layers.RULES)
        inputs = {
            "images": jax.ShapeDtypeStruct((64, 8, 8, 3), jnp.float32),
            "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16)),
        }
        inputs = parallel.abstract(inputs, parallel.batch_shardings(inputs, mesh))
        for drop in (False, True):

            def loss(variables, inputs, drop=drop):
                kept = (
                    drop_path.drop_subsets(inputs["keys"], depth=2, rows=4, rate=0.3)
                    if drop
                    else None
                )
                out = model.apply(variables, inputs["images"], kept=kept)
                return jnp.sum(jnp.sin(out["cls"])) + jnp.sum(jnp.sin(out["patches"]))

            gradient = jax.jit(jax.grad(loss), out_shardings=placed)
            compiled = gradient.lower(parallel.abstract(shapes, placed), inputs).compile()
            found[drop] = (
                program.collectives(program.text(compiled)),
                compiled.cost_analysis()["flops"],
            )
    assert found[False][0] == found[True][0] != {}
    assert found[True][1] < 0.75 * found[False][1]  # two of four rows
