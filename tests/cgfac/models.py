"""Small models, each with the kernels that CG-FAC has to find in it, and those it has to leave out.

Here are products, several uses of a kernel, loops, conditionals and derivative rules. `layer_models.py`
adds einsums, convolutions, modules of Flax, and what is no layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N = 5  # examples


class Model(NamedTuple):
    """A loss of parameters alone.

    Attributes:
      loss: a mean over N examples.
      params: float32, unless the model is about another dtype.
      kernels: the paths of the kernels that are captured, with those of their biases.
      missed: the paths of the kernels that are not, with a word of the reason.
    """

    loss: Callable[[Any], jax.Array]
    params: Any
    kernels: dict[str, str | None]
    missed: dict[str, str]


MODELS: dict[str, Callable[[], Model]] = {}  # made when a test asks


def random(*shape: int, seed: int = 0) -> jax.Array:
    size = np.sqrt(shape[0] if shape else 1)
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape) / size, jnp.float32)


X, Y = random(N, 4, seed=1) * 2, random(N, 3, 4, seed=2) * 2  # vectors, and texts of three places
W, U, B = random(4, 4, seed=7), random(4, 4, seed=8), random(4, seed=9)


def mean_square(y: Any) -> jax.Array:
    """Something that has no linear part, summed over all but the examples."""
    return jnp.sum(jnp.sin(y) + y**2) / N


def model(name: str, params: Any, kernels: Any, missed: Any = None):
    """Adds a model: from the function of the parameters to the outputs."""

    def add(outputs):
        kernels_of = kernels if isinstance(kernels, dict) else dict.fromkeys(kernels)
        MODELS[name] = lambda: Model(lambda p: mean_square(outputs(p)), params, kernels_of, missed or {})
        return outputs

    return add


def add(
    name: str, params: Any, kernels: Any, outputs: Callable[[Any], jax.Array], missed: Any = None
) -> None:
    model(name, params, kernels, missed)(outputs)


# Products.
add("a bias", {"w": W, "b": B}, {"w": "b"}, lambda p: jnp.tanh(X @ p["w"] + p["b"]))
add("a text", {"w": W, "b": B}, {"w": "b"}, lambda p: Y @ p["w"] + p["b"])
add(
    "flattened",
    {"w": W, "b": B},
    {"w": "b"},
    lambda p: (Y.reshape(-1, 4) @ p["w"]).reshape(N, 3, 4) + p["b"],
)
add("a vector", {"w": B}, ["w"], lambda p: X @ p["w"])
add("one output", {"w": W[:, :1], "b": B[:1]}, {"w": "b"}, lambda p: X @ p["w"] + p["b"])
add("one input", {"w": W[:1], "b": B}, {"w": "b"}, lambda p: X[:, :1] @ p["w"] + p["b"])
add("outputs first", {"w": W, "b": B}, {"w": "b"}, lambda p: X @ p["w"].T + p["b"])
add("a bias in front", {"w": W, "b": B}, {"w": "b"}, lambda p: p["b"][:, None] + p["w"] @ X.T)
add("negative", {"w": W, "b": B}, ["w"], lambda p: p["b"] - 0.5 * (X @ p["w"]))
add("a multiple", {"w": W, "b": B, "s": B[0]}, {"w": "b"}, lambda p: X @ (p["s"] * p["w"] / 2) + p["b"])
add("scaled outputs", {"w": W, "s": B}, ["w"], lambda p: X @ (p["w"] * p["s"]))
add(
    "scaled inputs", {"w": W, "b": B, "s": B}, {"w": "b"}, lambda p: X @ (p["w"] * p["s"][:, None]) + p["b"]
)
add(
    "two layers",
    {"w": W, "b": B, "u": U},
    {"w": "b", "u": None},
    lambda p: jnp.tanh(X @ p["w"] + p["b"]) @ p["u"],
)
add("rounded", {"w": W, "b": B}, ["w"], lambda p: lax.reduce_precision(X @ p["w"], 5, 10) + p["b"])
add("reversed", {"w": W, "b": B}, {"w": "b"}, lambda p: X @ p["w"][::-1] + p["b"])
add("a part", {"w": random(6, 4)}, ["w"], lambda p: X @ p["w"][1:5])
add("every other", {"w": random(8, 4)}, ["w"], lambda p: X @ p["w"][::2])
add("padded", {"w": random(3, 4)}, ["w"], lambda p: X @ jnp.pad(p["w"], ((1, 0), (0, 0))))
add("another shape", {"w": random(2, 2, 4)}, ["w"], lambda p: X @ p["w"].reshape(4, 4))


@model("pieces", {"qkv": random(4, 12), "b": random(12)}, {"qkv": "b"})
def _(p):
    q, k, v = jnp.split(Y @ p["qkv"] + p["b"], 3, axis=-1)
    return jnp.einsum("nst,ntd->nsd", jax.nn.softmax(jnp.einsum("nsd,ntd->nst", q, k)), v)


@model("a kernel in pieces", {"w": random(4, 8), "b": random(8)}, {"w": "b"})
def _(p):
    return jnp.tanh(X @ p["w"][:, :4] + p["b"][:4]) @ (X @ p["w"][:, 4:] + p["b"][4:]).T / N


@model("put together", {"w": W, "u": U, "b": random(8)}, ["w", "u"])
def _(p):
    return X @ jnp.concatenate([p["w"], p["u"]], axis=1) + p["b"]


# One kernel, several uses.
add("tied", {"w": random(4, 3)}, ["w"], lambda p: jnp.tanh(X @ p["w"]) @ p["w"].T)
add("used twice", {"w": W, "b": B}, {"w": "b"}, lambda p: jnp.tanh(X @ p["w"] + p["b"]) @ p["w"] + p["b"])
add("a bias once", {"w": W, "b": B}, ["w"], lambda p: jnp.tanh(X @ p["w"] + p["b"]) @ p["w"])
add("a bias elsewhere", {"w": W, "b": B}, ["w"], lambda p: (X @ p["w"] + p["b"]) * jnp.cos(p["b"]))
add(
    "a shared bias",
    {"w": W, "u": U, "b": B},
    ["w", "u"],
    lambda p: (X @ p["w"] + p["b"]) * (X @ p["u"] + p["b"]),
)
add("its own bias", {"w": W[:1]}, ["w"], lambda p: jnp.tanh(X[:, :1] @ p["w"] + p["w"]))
add(
    "two kernels, one sum",
    {"w": W, "u": U, "b": B},
    {"u": "b", "w": None},
    lambda p: X @ p["w"] + p["b"] + jnp.cos(X) @ p["u"],
)
add("places and none", {"w": W}, ["w"], lambda p: jnp.tanh(Y @ p["w"]).sum(1) @ p["w"])

# Loops and conditionals.
ONE_STEP = {"w": W, "b": B}


def step(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


@model("scan", ONE_STEP, {"w": "b"})
def _(p):
    return lax.scan(lambda h, x: (step(p, h) + x, h), X, Y.swapaxes(0, 1))[1].swapaxes(0, 1)


@model("scan over layers", {"w": random(2, 4, 4), "b": random(2, 4)}, {"w": "b"})
def _(p):
    return lax.scan(lambda h, layer: (step(layer, h), None), X, p)[0]


@model("scan over layers, outputs first", {"w": random(2, 4, 4)}, ["w"])
def _(p):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), Y, p["w"])[0]


@model("scan backwards, unrolled", {"w": random(3, 4, 4), "b": random(3, 4)}, {"w": "b"})
def _(p):
    return lax.scan(lambda h, layer: (step(layer, h), None), Y, p, reverse=True, unroll=2)[0]


@model("nested scans in remat", {"w": random(2, 4, 4), "b": random(2, 4), "u": U}, {"w": "b", "u": None})
def _(p):
    @jax.checkpoint
    def block(h, layer):
        return lax.scan(lambda h, x: (step(layer, h) + x @ p["u"], None), h, Y.swapaxes(0, 1))

    return lax.scan(block, X, {"w": p["w"], "b": p["b"]})[0]


@model("scan of a pair of layers", {"w": random(2, 2, 4, 4)}, ["w"])
def _(p):
    return lax.scan(lambda h, w: (jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]), None), X, p["w"])[0]


add("fori_loop", ONE_STEP, {"w": "b"}, lambda p: lax.fori_loop(0, 3, lambda _, x: step(p, x), X))
add(
    "kernel in a carry",
    ONE_STEP,
    {"w": "b"},
    lambda p: lax.fori_loop(0, 3, lambda _, c: (c[0], step(*c)), (p, X))[1],
)
add("map over examples", ONE_STEP, {"w": "b"}, lambda p: lax.map(lambda x: step(p, x), X))
add(
    "inside and outside of a loop",
    ONE_STEP,
    ["w"],
    lambda p: lax.fori_loop(0, 2, lambda _, x: step(p, x), X) @ p["w"],
)
add(
    "a list of layers",
    {"w": random(3, 4, 4), "b": random(3, 4)},
    {"w": "b"},
    lambda p: functools.reduce(lambda x, i: jnp.tanh(x @ p["w"][i] + p["b"][i]), range(3), X),
)
add(
    "cond",
    ONE_STEP,
    {"w": "b"},
    lambda p: lax.cond(X.sum() > 0, lambda x: step(p, x), lambda x: step(p, 2 * x), X),
)
add(
    "cond, not taken",
    ONE_STEP,
    {"w": "b"},
    lambda p: lax.cond(X.sum() > 1e9, lambda x: step(p, x), jnp.cos, X),
)
add(
    "cond in scan",
    ONE_STEP,
    {"w": "b"},
    lambda p: lax.scan(
        lambda h, i: (lax.cond(i > 0, lambda h: step(p, h), jnp.cos, h), None), X, jnp.arange(3)
    )[0],
)
add(
    "switch",
    {"w": W, "u": U},
    ["w", "u"],
    lambda p: lax.switch(1, [lambda x: x @ p["w"], lambda x: jnp.cos(x @ p["u"]) @ p["w"].T, jnp.sin], X),
)
add(
    "switch by data",
    {"w": W, "b": B},
    {"w": "b"},
    lambda p: lax.switch(jnp.argmax(X[0]), [lambda x, i=i: step(p, i * x) for i in range(4)], X),
)


@model("while", {"w": W, "u": U}, ["w", "u"])
def _(p):
    def fixed_point(w):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.cos(c[1])), (0, X))[1] @ w

    return fixed_point(p["w"]) @ p["u"]


# Derivative rules of their own.
@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def swish(x, w):
    return x @ w


@swish.defjvp
def _(primals, tangents):
    (x, w), (x_dot, w_dot) = primals, tangents
    return x @ w, x_dot @ w + x @ w_dot


@jax.custom_vjp
def wrong_sign(w):
    return w


wrong_sign.defvjp(lambda w: (w, None), lambda _, g: (-2 * g,))
add("custom_vjp", ONE_STEP, {"w": "b"}, lambda p: jnp.tanh(product(X, p["w"]) + p["b"]))
add("custom_vjp and plain", {"w": W}, ["w"], lambda p: jnp.tanh(product(X, p["w"])) @ p["w"])
add("custom_vjp of the outputs", ONE_STEP, {"w": "b"}, lambda p: clipped(X @ p["w"] + p["b"]))
add("custom_vjp of the kernel", {"w": W}, ["w"], lambda p: X @ wrong_sign(p["w"]))
add(
    "custom_vjp in a scan",
    {"w": W},
    ["w"],
    lambda p: lax.fori_loop(0, 2, lambda _, x: jnp.cos(product(x, p["w"])), X),
)
add("custom_jvp", ONE_STEP, {"w": "b"}, lambda p: jax.nn.silu(swish(X, p["w"]) + p["b"]))
add("stop_gradient", {"w": W, "u": U}, ["w"], lambda p: X @ p["w"] @ lax.stop_gradient(p["u"]))
add("stop_gradient once", {"w": W}, ["w"], lambda p: jnp.cos(X @ p["w"]) @ lax.stop_gradient(p["w"]))
add(
    "jit in jit",
    ONE_STEP,
    {"w": "b"},
    lambda p: jax.jit(lambda w, b: jax.jit(jnp.matmul)(X, w) + b)(p["w"], p["b"]),
)
add("remat", ONE_STEP, {"w": "b"}, lambda p: jax.checkpoint(step)(p, X))
