"""The factors of layers, found in the programs of losses: that they give the gradient; what is a layer."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mfac_jax import cgfac, scale_by_cgfac, value_and_grad_with_factors
from mfac_jax._src.base.trees import paths_and_leaves

IMAGES = jax.random.normal(jax.random.key(0), (6, 8, 8, 2))
TEXT = jax.random.randint(jax.random.key(1), (6, 5), 0, 11)


class Convolutions(nn.Module):
    """Strides, dilation, padding, a batch normalisation; a Dense that is recomputed."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.Conv(5, (2, 3), padding="VALID", kernel_dilation=(1, 1), use_bias=False)(x)
        x = nn.Conv(3, (3, 3), padding="CIRCULAR", kernel_dilation=2)(nn.tanh(x))
        return nn.remat(nn.Dense)(10)(x.reshape(len(x), -1))


class Line(nn.Module):
    """A convolution over one axis, another over none."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3,))(x.reshape(len(x), 16, -1)))
        return nn.Dense(10)(nn.tanh(nn.Conv(4, (1,))(x)).reshape(len(x), -1))


class Transformer(nn.Module):
    """Attention, kernels with several axes, a lookup."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11, use_bias=False)(x).mean(axis=1)


class Shared(nn.Module):
    """One layer used twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8)
        return nn.Dense(10)(layer(nn.tanh(layer(x[:, 0, :, 0]))))


MODELS: dict[str, tuple[nn.Module, jax.Array, set[str]]] = {
    "convolutions": (
        Convolutions(),
        IMAGES,
        {"Conv_0/kernel", "Conv_1/kernel", "Conv_2/kernel", "CheckpointDense_0/kernel"},
    ),
    "line": (Line(), IMAGES, {"Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"}),
    "transformer": (
        Transformer(),
        TEXT,
        {
            *(f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")),
            "Dense_0/kernel",
            "Dense_1/kernel",
            "Dense_2/kernel",
        },
    ),
    "shared": (Shared(), IMAGES, {"Dense_0/kernel", "Dense_1/kernel"}),
}


def loss_of(model, x, labels=None):
    labels = jnp.arange(6) % 10 if labels is None else labels

    def loss(variables, rest=None):
        out, changed = model.apply(variables | (rest or {}), x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean(), (out, changed)

    return loss


@pytest.mark.parametrize(
    "name",
    ["convolutions", "shared", *(pytest.param(x, marks=pytest.mark.slow) for x in ("line", "transformer"))],
)
def test_inputs_and_output_gradients_multiply_to_the_gradient(name):
    """a^T b / N is the gradient of a kernel, the mean of b that of a bias: to rounding, for every layer."""
    model, x, expected = MODELS[name]
    variables = dict(jax.jit(model.init)(jax.random.key(2), x))
    params = {"params": variables.pop("params")}
    loss = loss_of(model, x)
    run, plainly = value_and_grad_with_factors(loss, has_aux=True), jax.value_and_grad(loss, has_aux=True)
    with_factors, plain = jax.jit(lambda *args: (run(*args), plainly(*args)))(params, variables)
    (value, (out, changed)), grads, factors = with_factors
    chex.assert_trees_all_close(((value, (out, changed)), grads), plain, rtol=1e-4, atol=1e-6)
    assert set(factors) == {f"params/{path}" for path in expected}
    leaves = paths_and_leaves(grads)
    for kernel, layer in factors.items():
        a = layer.inputs.reshape(-1, layer.inputs.shape[-1])
        b = layer.output_grads.reshape(-1, layer.output_grads.shape[-1])
        g = leaves[kernel]
        np.testing.assert_allclose((a.T @ b / 6).reshape(g.shape), g, rtol=1e-4, atol=2e-6)
        has_bias = kernel.replace("kernel", "bias") in leaves
        assert layer.bias == (kernel.replace("kernel", "bias") if has_bias else None)
        if layer.bias is not None:
            g = leaves[layer.bias]
            np.testing.assert_allclose((b.sum(0) / 6).reshape(g.shape), g, rtol=1e-4, atol=2e-6)


def found_in(function, params: Any, *args) -> dict[str, str | None]:
    """The kernels and their biases."""
    _, _, factors = value_and_grad_with_factors(function)(params, *args)
    return {kernel: layer.bias for kernel, layer in factors.items()}


W, B, X = jnp.ones((4, 3)), jnp.zeros(3), jnp.ones((6, 4))


def add_to(y, bias):
    """Twice what comes out, once with a bias."""
    return (y + bias) ** 2 + y**3


PROGRAMS: dict[str, tuple[Any, Any, Any]] = {
    "product and bias": (lambda p: (X @ p["w"] + p["b"]).sum(), {"w": W, "b": B}, {"w": "b"}),
    "bias first": (lambda p: (p["b"] + X @ p["w"]).sum(), {"w": W, "b": B}, {"w": "b"}),
    "kernel on the left": (lambda p: jnp.einsum("io,ni->on", p["w"], X).sum(), {"w": W}, {"w": None}),
    "half precision": (
        lambda p: (X.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).sum().astype(jnp.float32),
        {"w": W},
        {"w": None},
    ),
    "under jit": (
        lambda p: jax.jit(lambda w: jax.jit(jnp.matmul)(X, w).sum())(p["w"]),
        {"w": W},
        {"w": None},
    ),
    "a scale that is no bias": (lambda p: (X @ p["w"] * p["s"]).sum(), {"w": W, "s": B + 1}, {"w": None}),
    "a scalar is no bias": (
        lambda p: (X @ p["w"] + p["s"]).sum(),
        {"w": W, "s": jnp.ones(())},
        {"w": None},
    ),
    "a multiple": (lambda p: (X @ (2 * p["w"])).sum(), {"w": W}, {"w": None}),
    "a bias along another axis": (
        lambda p: jnp.sum((X.reshape(2, 3, 4) @ p["w"] + p["b"][:, None]) ** 2),
        {"w": W, "b": B},
        {"w": None},
    ),
    "a bias that not all of the output gets": (
        lambda p: jnp.sum(add_to(X @ p["w"], p["b"])),
        {"w": W, "b": B},
        {"w": None},
    ),
    "a bias of two kernels": (
        lambda p: jnp.sum((X @ p["w"] + p["b"]) ** 2) + jnp.sum((X @ p["u"] + p["b"]) ** 3),
        {"w": W, "u": W, "b": B},
        {"w": None, "u": None},
    ),
    "a kernel that is its own bias": (
        lambda p: jnp.sum(jnp.tanh(X[:, :1] @ p["w"] + p["w"])),
        {"w": W[:1]},
        {"w": None},
    ),
    "as whole numbers": (
        lambda p: jnp.sum(X @ p["w"]) + jnp.sum((jnp.ones((6, 4), int) @ p["w"].astype(int)).astype(float)),
        {"w": W},
        {"w": None},
    ),
    "no examples": (lambda p: jnp.sum(X[:0] @ p["w"]), {"w": W}, {"w": None}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_a_layer(name):
    function, params, expected = PROGRAMS[name]
    assert found_in(function, params) == expected
    chex.assert_trees_all_close(
        value_and_grad_with_factors(function)(params)[:2], jax.value_and_grad(function)(params), rtol=1e-5
    )


def test_a_kernel_that_is_used_twice_has_the_rows_of_both():
    model: Any = MODELS["shared"][0]
    x = IMAGES
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    run = value_and_grad_with_factors(lambda p: model.apply(p, x).sum())
    factors = jax.eval_shape(run, params)[2]
    assert factors["params/Dense_0/kernel"].inputs.shape == (6, 2, 8)


def test_custom_rules_and_random_numbers_stay():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def loss(p, key):
        kept = jax.random.bernoulli(key, 0.5, (6, 3))
        return jnp.sum(clipped(jax.nn.relu(X @ p["w"] + 0.1)) * kept)

    found = value_and_grad_with_factors(loss)({"w": W}, jax.random.key(3))
    chex.assert_trees_all_close(found[:2], jax.value_and_grad(loss)({"w": W}, jax.random.key(3)))
    np.testing.assert_allclose(X.T @ found[2]["w"].output_grads / 6, found[1]["w"], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.slow), False])
def test_in_shard_map_the_factors_are_those_of_the_shard(check_vma):
    x = jax.random.normal(jax.random.key(0), (16, 4))

    def loss(p, x):
        return jnp.mean(jnp.tanh(x @ p["w"] + p["b"]) ** 2)

    def local(p, x):
        layer = value_and_grad_with_factors(loss)(p, x)[2]["w"]
        return layer.inputs, layer.output_grads

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs: Any = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": check_vma}
    found = jax.shard_map(local, mesh=mesh, **specs)({"w": W, "b": B}, x)
    chex.assert_trees_all_close(found, local({"w": W, "b": B}, x), rtol=1e-5, atol=1e-6)


def test_what_is_no_array_may_be_an_argument():
    def loss(p, x, kind, *, scale):
        return scale * (x @ p["w"]).sum() if kind == "sum" else 0.0

    value, _, factors = value_and_grad_with_factors(loss)({"w": W}, X, "sum", scale=2.0)
    assert float(value) == 2 * 72
    assert list(factors) == ["w"]


def test_a_kernel_that_is_left_out_is_named_once_with_the_line_that_is_to_blame():
    def loss(p):
        return jnp.mean(X @ p["w"]) + jnp.sum(p["w"] ** 2)

    function = value_and_grad_with_factors(loss)
    with pytest.warns(UserWarning, match=r"'w': .*add_decayed_weights\) \(test_capture\.py:\d+\)") as said:
        assert function({"w": W})[2] == {}
    assert said[0].filename == __file__
    function({"w": W})  # warnings are errors: there is no second one


def test_tables_that_are_only_looked_up_in_are_left_out_without_a_warning():
    function = value_and_grad_with_factors(lambda p: jnp.mean(p["table"][TEXT] @ p["w"]))
    params = {"table": jnp.ones((11, 4)), "w": W}
    assert list(function(params)[2]) == ["w"]
    assert "lookup" in function.explain(params)["table"]


def test_other_outputs_may_be_anything():
    def loss(p):
        return jnp.mean(X @ p["w"]), {"name": "of a run", "n": 3, "out": X @ p["w"], "none": None}

    (value, aux), _, _ = value_and_grad_with_factors(loss, has_aux=True)({"w": W})
    (expected, expected_aux), _ = jax.value_and_grad(loss, has_aux=True)({"w": W})
    assert (float(value), aux.pop("name"), aux["n"]) == (float(expected), expected_aux.pop("name"), 3)
    chex.assert_trees_all_close(aux, expected_aux)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (X, r"float32 of shape \(6, 4\)"),
        (jnp.ones((), int), "int32"),
        (1j * W.sum(), "complex64"),
        ("text", "str"),
        ((W.sum(), 1), "tuple"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_loss_that_is_no_real_scalar_is_refused(value, got):
    with pytest.raises(TypeError, match=f"loss must return a real scalar, got {got}. Return the mean"):
        value_and_grad_with_factors(lambda p: value)({"w": W})


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
def test_half_precision_holds_the_number_of_examples(dtype):
    """float16 ends at 65,504, and bfloat16 has no 257: the rows are scaled in float32."""
    n = 70_001 if dtype == jnp.float16 else 257
    x = jnp.ones((n, 1), dtype)

    def loss(p):
        return jnp.mean(x @ p["w"], dtype=jnp.float32)

    b = value_and_grad_with_factors(loss)({"w": jnp.ones((1, 1), dtype)})[2]["w"].output_grads
    np.testing.assert_allclose(b.astype(jnp.float32), 1, rtol=2 * float(jnp.finfo(dtype).eps))


def test_no_tracer_outlives_a_call():
    def loss(p):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), X, p["layers"])[0]
        return jnp.mean(jax.lax.cond(h.sum() > 0, lambda h: h @ p["w"].T, jnp.sin, h) ** 2)

    with jax.checking_leaks():
        jax.jit(value_and_grad_with_factors(loss))({"layers": jnp.ones((2, 4, 4)), "w": jnp.ones((4, 4))})


def test_parameters_that_are_no_floats_are_refused():
    with pytest.raises(TypeError, match="is int32"):
        value_and_grad_with_factors(lambda p: p["w"].sum())({"w": jnp.ones(3, jnp.int32)})


def update(loss, params, damping=0.1, max_iterations=200):
    """What CG-FAC makes of the gradient, with all its systems solved."""
    _, grads, factors = value_and_grad_with_factors(loss)(params)
    tx = scale_by_cgfac(damping, max_iterations=max_iterations, tolerance=1e-6)
    return tx.update(grads, tx.init(grads), curvature=factors)[0]


def test_layers_stacked_for_a_scan_are_updated_as_layers_of_their_own():
    w, b = jax.random.normal(jax.random.key(0), (2, 4, 4)), jnp.ones((2, 4))

    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"])

    def of_list(p):
        return jnp.mean(layer(layer(IMAGES[:, 0, 0] @ jnp.ones((2, 4)), p[0]), p[1]) ** 2)

    def of_stack(p):
        return jnp.mean(
            jax.lax.scan(lambda h, p: (layer(h, p), None), IMAGES[:, 0, 0] @ jnp.ones((2, 4)), p)[0] ** 2
        )

    one_by_one = jax.jit(lambda p: update(of_list, p))([{"w": w[i], "b": b[i]} for i in range(2)])
    stacked = jax.jit(lambda p: update(of_stack, p))({"w": w, "b": b})
    chex.assert_trees_all_close(
        stacked, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), rtol=1e-3, atol=1e-5
    )


def test_a_tied_autoencoder_trains():
    """With the rows of the encoder alone the update had the norm 3,060, and the loss grew without bound."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 8)) @ rng.standard_normal((8, 256)) / np.sqrt(8)
    k = rng.standard_normal((256, 128)) / 16
    x, params = jnp.asarray(x, jnp.float32), {"k": jnp.asarray(k, jnp.float32)}

    def loss(p):
        return jnp.mean(jnp.sum((jnp.tanh(x @ p["k"]) @ p["k"].T - x) ** 2, 1)) / 2

    first = jax.jit(lambda p: update(loss, p, 1e-2))(params)
    np.testing.assert_allclose(jnp.linalg.norm(first["k"]), 21.5, rtol=0.01)
    tx = cgfac(0.1)

    def step(carry, _):
        params, state = carry
        value, grads, factors = value_and_grad_with_factors(loss)(params)
        updates, state = tx.update(grads, state, params, curvature=factors)
        return (optax.apply_updates(params, updates), state), value

    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60))(params)
    assert losses[-1] < 0.7 * losses[0]
    assert bool(jnp.all(jnp.diff(losses) < 0))
