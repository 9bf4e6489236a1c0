"""Groups of a pattern lie along the inputs of a kernel, or it is refused."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mfac_jax._src.pruning.inputs import input_axes
from mfac_jax.pruning import kernel_masks, prune

X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32)


def shapes_of(module: nn.Module, *inputs) -> dict:
    init = lambda key, *xs: module.init(key, *xs)["params"]  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), *inputs)


class Scanned(nn.Module):
    use_bias: bool

    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(8, use_bias=self.use_bias)(carry), None


def scanned(use_bias: bool):
    kind: Any = nn.scan(Scanned, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return shapes_of(kind(use_bias), X, None)


def nnx_shapes(make) -> Any:
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def attention(use_bias: bool) -> nn.Module:
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, use_bias=use_bias)


def of_leaf(params, *names) -> Any:
    """The input axes of one kernel, read with the others around it."""
    masks = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.ones(x.shape, bool)
            if [jax.tree_util.keystr((key,), simple=True) for key in path][: len(names)] == [*names]
            and "kernel" in jax.tree_util.keystr(path)
            else None
        ),
        params,
    )
    (axes,) = input_axes(params, masks, None)
    return axes


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_has_its_inputs_in_front_and_its_outputs_behind(use_bias):
    own = shapes_of(attention(use_bias), X, X)
    other = nnx_shapes(
        lambda rngs: nnx.MultiHeadAttention(2, 8, 16, decode=False, use_bias=use_bias, rngs=rngs)
    )
    for params in (own, other, {"block": own}):
        module = ["block"] if "block" in params else []
        for name in ("query", "key", "value"):
            assert of_leaf(params, *module, name) == (0,)  # (in, heads, d)
        assert of_leaf(params, *module, "out") == (0, 1)  # (heads, d, out)


REFUSED = None


@pytest.mark.parametrize(
    ("params", "expected"),
    {
        "dense": (shapes_of(nn.Dense(4), X), (0,)),
        "dense, no bias": (shapes_of(nn.Dense(4, use_bias=False), X), (0,)),
        "heads": (shapes_of(nn.DenseGeneral((2, 4)), X), (0,)),
        "heads, no bias": (shapes_of(nn.DenseGeneral((2, 4), use_bias=False), X), REFUSED),
        "two inputs": (shapes_of(nn.DenseGeneral(6, axis=(-2, -1)), X), (1,)),
        "two to two": (shapes_of(nn.DenseGeneral((2, 3), axis=(-2, -1)), X), (0, 1)),
        "batched": (shapes_of(nn.DenseGeneral(6, batch_dims=(0,)), X), (1,)),
        "conv": (shapes_of(nn.Conv(4, (3, 3)), IMAGE), (2,)),
        "conv, no bias": ({"Conv_0": shapes_of(nn.Conv(4, (3, 3), use_bias=False), IMAGE)}, (2,)),
        "no name, no bias": (shapes_of(nn.Conv(4, (3, 3), use_bias=False), IMAGE), REFUSED),
        "local": (shapes_of(nn.ConvLocal(4, (3,)), X), (1,)),
        "transposed": (shapes_of(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), IMAGE), REFUSED),
        "scanned": (scanned(True), (1,)),
        "scanned, no bias": (scanned(False), REFUSED),
        "nnx linear": (nnx_shapes(lambda rngs: nnx.Linear(4, 8, rngs=rngs)), (0,)),
        "nnx heads": (nnx_shapes(lambda rngs: nnx.LinearGeneral(8, (2, 4), rngs=rngs)), (0,)),
        "nnx conv": (nnx_shapes(lambda rngs: nnx.Conv(4, 8, (3, 3), rngs=rngs)), (2,)),
        # Layers in front, or two axes of outputs: both fit.
        "two readings": ({"kernel": np.ones((3, 3, 4)), "bias": np.ones((3, 4))}, REFUSED),
        "(out, in)": ({"kernel": np.ones((8, 4)), "bias": np.ones(8)}, REFUSED),
    }.values(),
)
def test_inputs_are_read_from_the_bias_and_the_name(params, expected):
    names = [] if "kernel" in params else [*params]
    if expected is REFUSED:
        with pytest.raises(
            ValueError, match=r"input_axes must say which axes of leaf .*kernel.*lambda path: -2"
        ):
            of_leaf(params, *names)
    else:
        assert of_leaf(params, *names) == expected


def test_two_of_four_inputs_of_each_head_stay():
    """Along axis -2 of (in, heads, d), as for (in, out), four heads would be a group."""
    shapes = jax.eval_shape(lambda: attention(True).init(jax.random.key(0), *[jnp.ones((2, 5, 8))] * 2))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), shapes["params"])
    grads = jax.tree.map(lambda x: random.standard_normal((3, *x.shape)).astype(np.float32), params)
    found: Any = prune(params, grads, 0.5, pattern="2:4")[0]
    for name in ("query", "key", "value"):
        kernel = np.asarray(found[name]["kernel"]).reshape(2, 4, 2, 8)
        assert np.all(np.sum(kernel != 0, axis=1) == 2)
    out = np.asarray(found["out"]["kernel"]).reshape(4, 4, 8)
    assert np.all(np.sum(out != 0, axis=1) == 2)


def test_the_user_can_say_which_axes_are_inputs():
    random = np.random.default_rng(0)
    w = random.standard_normal((2, 6, 4)).astype(np.float32)  # (out, in), (in)
    grads = random.standard_normal((3, *w.shape)).astype(np.float32)
    with pytest.raises(ValueError, match="input_axes must say"):
        prune(w, grads, 0.5, pattern="2:4")
    for axes, groups in ((-1, w.reshape(2, 6, 1, 4)), ((1, 2), w.reshape(2, 1, 6, 4))):
        found, _ = prune(w, grads, 0.5, pattern="2:4", input_axes=lambda path, axes=axes: axes)
        assert np.all(np.sum(np.asarray(found).reshape(groups.shape) != 0, axis=-1) == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_axes": lambda path: 3, "pattern": "2:4"}, r"different axes of leaf \(\), \(4, 2\), got 3"),
        ({"input_axes": lambda path: (0, 0), "pattern": "2:4"}, r"got \(0, 0\)"),
        ({"input_axes": lambda path: "in", "pattern": "2:4"}, "got 'in'"),
        ({"input_axes": 0, "pattern": "2:4"}, "a function from a key path to axes, got 0"),
        ({"input_axes": lambda path: 0}, "with a pattern a function.*groups of 1"),
    ],
)
def test_axes_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune(np.ones((4, 2)), np.ones((3, 4, 2)), 0.5, masks=kernel_masks(np.ones((4, 2))), **options)
