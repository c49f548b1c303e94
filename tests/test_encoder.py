"""The simplicial and the DINO head, and the encoder that they make with a backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    L,
    V,
    apply,
    drawn,
    normal,
    small_encoder,
    to_bfloat16,
)

from dlc_jax.errors import UserError
from dlc_jax.models import (
    layers,
    simplicial,
)


def test_simplicial_normalizes_positions_jointly():
    tokens = normal(0, 3, 12)
    head = simplicial.Simplicial(L, V)
    variables = head.init(KEY, tokens, width=16)
    logits = np.asarray(apply(head, variables, tokens, width=16)["logits"])
    raw = np.asarray(tokens @ variables["params"]["embed"]["kernel"], np.float64)
    raw = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, raw.reshape(3, L, V), atol=1e-5)
    assert np.abs(logits.mean(-1)).max() > 0.05  # one norm for each position would make this 0


@pytest.mark.parametrize("read", [None, (1, 3)])
@pytest.mark.parametrize("readout", simplicial.READOUTS)
def test_readouts(readout, read):
    tokens = normal(0, 3, 12)
    head = simplicial.Simplicial(L, V, readout=readout)
    variables = drawn(head, tokens, width=16)
    p = variables["params"]
    out = apply(head, variables, tokens, width=16, read=read)
    low, high = read or (0, L)
    kernel = p["out"]["kernel"]
    expected = np.zeros((3, 16))
    for place in range(low, high):
        if readout == "plain":
            assert kernel.shape == (L * V, 16)
            expected += out["simplices"][:, place] @ kernel[place * V : (place + 1) * V]
        else:
            assert kernel.shape == (V, 16)
            expected += out["simplices"][:, place] @ kernel / (high - low)
        if readout == "pos-shared":
            assert p["bias"].shape == (L, 16)
            expected += p["bias"][place] / (high - low)
    assert ("bias" in p) == (readout == "pos-shared")
    np.testing.assert_allclose(out["vector"], expected, atol=1e-5)
    short = tokens.astype(jnp.bfloat16)
    narrow = apply(head, to_bfloat16(variables), short, width=16, read=read)
    assert narrow["vector"].dtype == jnp.bfloat16 and narrow["logits"].dtype == jnp.float32
    logits = np.asarray(narrow["logits"])
    assert (logits != logits.astype(jnp.bfloat16)).any()  # rounding would add ties


def test_readouts_start_as_the_reference():
    head = simplicial.Simplicial(64, 100, readout="pos-shared")
    params = head.init(KEY, jnp.zeros((1, 400)), width=64)["params"]
    assert 0.099 < np.abs(params["out"]["kernel"]).max() <= 0.1
    np.testing.assert_allclose(params["bias"].std(), 0.02, rtol=0.05)


def test_heads_that_cannot_be_are_refused():
    for fields, message in (
        ({"readout": "mean"}, "readout='mean' is not one of plain, shared, pos-shared"),
        ({"values": 2**16 + 1}, "values=65537 is more than 65536"),
    ):
        head = simplicial.Simplicial(**{"positions": 1, "values": 3, **fields})
        with pytest.raises(UserError, match=message) as error:
            head.init(KEY, jnp.zeros((1, 2)), width=2)
        assert "\n" not in str(error.value)


def test_simplicial_init_bounds():
    head = simplicial.Simplicial(32, 32)
    params = head.init(KEY, jnp.zeros((1, 400)), width=64)["params"]
    for kernel, bound in (
        (params["embed"]["kernel"], 400**-0.5),
        (params["out"]["kernel"], 1024**-0.5),
    ):
        assert 0.99 * bound < np.abs(kernel).max() <= bound


def test_dino_head_init():
    """As DINOv2's: dense layers N(0, 0.02), directions uniform as torch's layers are, gains 1."""
    head = simplicial.DinoHead(512, hidden=256, bottleneck=64)
    params = head.init(KEY, jnp.zeros((1, 32)))["params"]
    for name in ("fc1", "fc2", "fc3"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.02, rel=0.05)
        assert not params[name]["bias"].any()
    bound = 64**-0.5
    assert 0.99 * bound < np.abs(params["direction"]).max() <= bound
    assert np.std(params["direction"]) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (params["gain"] == 1).all()


@pytest.mark.parametrize("relaxation", simplicial.RELAXATIONS)
def test_relaxations_give_points_of_the_simplex(relaxation):
    keys = jax.random.split(jax.random.key(0), 3)
    simplices = simplicial.relax(normal(0, 3, L, V), relaxation, keys=keys, temperature=0.7)
    np.testing.assert_allclose(simplices.sum(-1), 1, atol=1e-6)
    assert (simplices >= 0).all()
    hard = np.asarray((simplices == 0) | (simplices == 1)).all()
    assert hard == (relaxation == "straight_through")


def test_softmax_at_low_temperature_is_argmax():
    logits = normal(0, 3, L, V)
    np.testing.assert_array_equal(
        simplicial.relax(logits, "softmax", temperature=1e-5), jax.nn.one_hot(logits.argmax(-1), V)
    )


def test_straight_through_has_the_gradient_of_gumbel():
    logits, weight = normal(0, 3, L, V), normal(1, 3, L, V)
    keys = jax.random.split(jax.random.key(0), 3)

    def weighed(x, name):
        return (weight * simplicial.relax(x, name, keys=keys, temperature=0.7)).sum()

    grads = [jax.grad(weighed)(logits, name) for name in ("straight_through", "gumbel")]
    np.testing.assert_allclose(*grads, atol=1e-6)
    assert np.abs(grads[0]).max() > 1e-3


def test_straight_through_draws_from_the_softmax():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = simplicial.relax(
        jnp.broadcast_to(logits, (4000, 2, 4)), "straight_through", keys=keys, temperature=0.3
    )
    np.testing.assert_allclose(draws.mean((0, 1)), jnp.exp(logits), atol=0.03)
    np.testing.assert_allclose(
        (draws[:, 0] * draws[:, 1]).sum(-1).mean(), (jnp.exp(logits) ** 2).sum(), atol=0.04
    )


def test_noise_has_the_high_range(monkeypatch):
    """The common draw ends at 16: of 4096 values the unlikely ones would come too seldom."""
    asked, draw = [], jax.random.gumbel

    def gumbel(*args, mode=None, **kwargs):
        asked.append(mode)
        return draw(*args, mode=mode, **kwargs)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    for relaxation in ("gumbel", "straight_through"):
        simplicial.relax(
            normal(0, 3, L, V), relaxation, keys=jax.random.split(jax.random.key(0), 3)
        )
    assert asked == ["high", "high"]


def test_noise_belongs_to_the_example():
    logits, keys = normal(0, 3, L, V), jax.random.split(jax.random.key(0), 3)
    whole = simplicial.relax(logits, "gumbel", keys=keys)
    np.testing.assert_allclose(
        whole[1:2], simplicial.relax(logits[1:2], "gumbel", keys=keys[1:2]), atol=1e-6
    )
    same = simplicial.relax(jnp.broadcast_to(logits[:1], logits.shape), "gumbel", keys=keys)
    assert np.abs(same[0] - same[1]).max() > 0.05


def test_temperature_divides_logits_and_noise_alike():
    logits, keys = normal(0, 3, L, V), jax.random.split(jax.random.key(0), 3)
    relax = jax.jit(lambda t: simplicial.relax(logits, "gumbel", keys=keys, temperature=t))
    warm, cold = (np.asarray(relax(temperature), np.float64) for temperature in (1.0, 0.5))
    np.testing.assert_allclose(cold, warm**2 / (warm**2).sum(-1, keepdims=True), atol=1e-5)


def test_dino_head_scores_are_cosines_times_gains():
    x = normal(0, 3, 16)
    head = simplicial.DinoHead(6, hidden=8, bottleneck=4)
    variables = drawn(head, x)
    p = variables["params"]
    h = x
    for name in ("fc1", "fc2"):
        h = jax.nn.gelu(h @ p[name]["kernel"] + p[name]["bias"], approximate=False)
    h = h @ p["fc3"]["kernel"] + p["fc3"]["bias"]
    cosine = (h / jnp.linalg.norm(h, axis=-1, keepdims=True)) @ (
        p["direction"] / jnp.linalg.norm(p["direction"], axis=0)
    )
    np.testing.assert_allclose(apply(head, variables, x), cosine * p["gain"], atol=1e-5)


def test_encoder_outputs():
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder()
    variables = drawn(model, images)
    out = apply(model, variables, images)
    shapes = {name: value.shape for name, value in out.items()}
    assert shapes == {
        "cls": (3, 16),
        "registers": (3, 2, 16),
        "patches": (3, 4, 16),
        "logits": (3, L, V),
        "simplices": (3, L, V),
        "vector": (3, 16),
        "prototypes": (3, 6),
    }
    codes = apply(model, variables, images, method="codes")
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, out["logits"].argmax(-1))
    # the class token is the final norm of the simplices' image, and it is what the DINO head reads
    p = variables["params"]
    raw = out["simplices"].reshape(3, -1) @ p["simplicial"]["out"]["kernel"]
    np.testing.assert_allclose(
        out["vector"], apply(layers.LayerNorm(), {"params": p["vit"]["norm"]}, raw), atol=1e-4
    )
    np.testing.assert_allclose(
        out["prototypes"], apply(model, variables, out["vector"], method="score"), atol=1e-5
    )


def test_encoder_reads_registers_and_class_token_only():
    """The head's input is [class, registers...]; patches reach it through attention alone."""
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder()
    variables = drawn(model, images)
    out = apply(model, variables, images)
    flat = jnp.concatenate([out["cls"], out["registers"][:, 0], out["registers"][:, 1]], axis=-1)
    params = {"params": variables["params"]["simplicial"]}
    head = apply(simplicial.Simplicial(L, V), params, flat, width=16)
    np.testing.assert_allclose(out["logits"], head["logits"], atol=1e-5)


@pytest.mark.parametrize("readout", simplicial.READOUTS)
def test_encoder_without_registers_reads_the_class_token(readout):
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder(registers=0, readout=readout, mlp="swiglu", pos_resize="plain")
    variables = drawn(model, images)
    out = apply(model, variables, images)
    assert out["registers"].shape == (3, 0, 16)
    params = {"params": variables["params"]["simplicial"]}
    head = apply(simplicial.Simplicial(L, V, readout=readout), params, out["cls"], width=16)
    np.testing.assert_allclose(out["logits"], head["logits"], atol=1e-5)
    np.testing.assert_allclose(
        out["vector"], apply(model, variables, head["vector"], method="normalize"), atol=1e-4
    )


def test_simplicial_reads_only_the_positions_it_is_told_to():
    head = simplicial.Simplicial(positions=4, values=3)
    tokens = jax.random.normal(jax.random.key(0), (2, 8))
    params = head.init(jax.random.key(1), tokens, width=5)
    whole, half = (head.apply(params, tokens, width=5, read=read) for read in (None, (2, 4)))
    np.testing.assert_array_equal(whole["simplices"], half["simplices"])
    kernel = params["params"]["out"]["kernel"]
    want = np.asarray(whole["simplices"])[:, 2:].reshape(2, -1) @ np.asarray(kernel)[6:]
    np.testing.assert_allclose(half["vector"], want, rtol=1e-5, atol=1e-6)
