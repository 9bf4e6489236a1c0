"""Small models, each with the kernels that CG-FAC has to find in it, and the parameters it has to leave out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
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
    missed: dict[str, str] = {}


MODELS: dict[str, Model] = {}


def random(*shape: int, seed: int = 0) -> jax.Array:
    size = np.sqrt(shape[0] if shape else 1)
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape) / size, jnp.float32)


X, Y = random(N, 4, seed=1) * 2, random(N, 3, 4, seed=2) * 2  # vectors, and texts of three places
IMAGES, LINES, VOLUMES = random(N, 6, 6, 4, seed=3), random(N, 7, 4, seed=4), random(N, 4, 4, 3, 2, seed=5)
TOKENS = jnp.asarray(np.random.default_rng(6).integers(0, 7, (N, 3)))
W, U, B = random(4, 4, seed=7), random(4, 4, seed=8), random(4, seed=9)


def mean_square(y: jax.Array) -> jax.Array:
    """Something that has no linear part, summed over all but the examples."""
    return jnp.sum(jnp.sin(y) + y**2) / N


def model(name: str, params: Any, kernels: Any, missed: Any = None):
    """Adds a model: from the function of the parameters to the outputs."""

    def add(outputs):
        kernels_of = kernels if isinstance(kernels, dict) else dict.fromkeys(kernels)
        MODELS[name] = Model(lambda p: mean_square(outputs(p)), params, kernels_of, missed or {})
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

# vmap and einsum.
add("vmap over examples", ONE_STEP, {"w": "b"}, lambda p: jax.vmap(lambda x: step(p, x))(X))
add(
    "vmap over places and examples",
    ONE_STEP,
    {"w": "b"},
    lambda p: jax.vmap(jax.vmap(lambda x: p["w"] @ x + p["b"]))(Y),
)
add(
    "one copy for each example",
    {"w": W},
    ["w"],
    lambda p: jnp.einsum("ni,nio->no", X, jnp.broadcast_to(p["w"], (N, 4, 4))),
)
EXPERTS = {"w": random(3, 4, 2), "b": random(3, 2)}
add(
    "vmap over kernels",
    EXPERTS,
    {"w": "b"},
    lambda p: jax.vmap(lambda w, b: jnp.tanh(X @ w + b))(p["w"], p["b"]),
)
add("experts", EXPERTS, {"w": "b"}, lambda p: jnp.einsum("nei,eio->neo", Y, p["w"]) + p["b"])
add("experts, last axis", {"w": random(4, 2, 3)}, ["w"], lambda p: jnp.einsum("nei,ioe->neo", Y, p["w"]))
add("heads first", {"w": random(2, 4, 3)}, ["w"], lambda p: jnp.einsum("BTD,NDH->BTNH", Y, p["w"]))
add(
    "heads, three kernels",
    {"w": random(3, 2, 4, 3)},
    ["w"],
    lambda p: jnp.prod(jnp.einsum("BSD,KNDH->KBSNH", Y, p["w"]), axis=0),
)
add(
    "heads together",
    {"w": random(2, 2, 4)},
    ["w"],
    lambda p: jnp.einsum("BTNH,NHD->BTD", Y.reshape(N, 3, 2, 2), p["w"]),
)
add("low rank", {"a": random(4, 2), "b": random(2, 4)}, ["a", "b"], lambda p: X @ W + (X @ p["a"]) @ p["b"])


# Convolutions.
def convolved(x, w, *args, **kwargs):
    space = "DHW"[5 - x.ndim :]
    return lax.conv_general_dilated(
        x, w, *args, **kwargs, dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C")
    )


def add_convolution(name, x, shape, *args, bias: bool = False, **kwargs):
    params = {"w": random(*shape)} | ({"b": random(shape[-1])} if bias else {})
    add(
        name,
        params,
        {"w": "b" if bias else None},
        lambda p: convolved(x, p["w"], *args, **kwargs) + p.get("b", 0),
    )


add_convolution("convolution", IMAGES, (3, 3, 4, 3), (1, 1), "SAME", bias=True)
add_convolution("strides", IMAGES, (3, 2, 4, 3), (2, 3), "VALID", bias=True)
add_convolution("dilation", IMAGES, (2, 3, 4, 3), (1, 2), ((2, 1), (0, 3)), rhs_dilation=(2, 1))
add_convolution("negative padding", IMAGES, (2, 2, 4, 3), (1, 1), ((-1, 0), (0, -2)))
add_convolution("groups", IMAGES, (3, 3, 2, 6), (1, 1), "SAME", feature_group_count=2, bias=True)
add_convolution("depthwise", IMAGES, (3, 3, 1, 4), (2, 1), "SAME", feature_group_count=4, bias=True)
add_convolution("groups of the batch", IMAGES[:4], (2, 2, 4, 6), (1, 1), "VALID", batch_group_count=2)
add_convolution("one axis", LINES, (3, 4, 2), (2,), "SAME", bias=True)
add_convolution(
    "one axis in groups, dilated", LINES, (2, 2, 4), (1,), "SAME", rhs_dilation=(3,), feature_group_count=2
)
add_convolution("three axes", VOLUMES, (2, 3, 2, 2, 3), (1, 2, 1), "SAME", bias=True)
add_convolution(
    "transposed by hand", IMAGES, (3, 3, 4, 2), (1, 1), ((2, 1), (1, 2)), lhs_dilation=(2, 3), bias=True
)
add(
    "transposed",
    {"w": random(3, 3, 4, 2), "b": random(2)},
    {"w": "b"},
    lambda p: lax.conv_transpose(IMAGES, p["w"], (2, 2), "SAME") + p["b"],
)
add(
    "transposed, kernel of the forward one",
    {"w": random(3, 2, 2, 4)},
    ["w"],
    lambda p: lax.conv_transpose(IMAGES, p["w"], (2, 1), "VALID", transpose_kernel=True),
)
add(
    "channels first",
    {"w": random(3, 4, 2, 2), "b": random(3)},
    {"w": "b"},
    lambda p: (
        lax.conv_general_dilated(IMAGES.transpose(0, 3, 1, 2), p["w"], (1, 1), "SAME")
        + p["b"][:, None, None]
    ),
)
add(
    "vmap of a convolution",
    {"w": random(2, 3, 4, 2)},
    ["w"],
    lambda p: jax.vmap(lambda w: convolved(LINES, w, (1,), "SAME"))(p["w"]),
)
add(
    "vmap of a convolution over examples",
    {"w": random(3, 4, 2)},
    ["w"],
    lambda p: jax.vmap(lambda x: convolved(x[None], p["w"], (1,), "SAME")[0])(LINES),
)
add(
    "a convolution in a scan",
    {"w": random(2, 3, 4, 4), "b": random(2, 4)},
    {"w": "b"},
    lambda p: lax.scan(
        lambda h, layer: (jnp.tanh(convolved(h, layer["w"], (1,), "SAME") + layer["b"]), None), LINES, p
    )[0],
)

# What is no layer, or not all of one.
LOOKUP = {"table": random(7, 4), "w": W}
add("a lookup", LOOKUP, ["w"], lambda p: p["table"][TOKENS] @ p["w"])
add(
    "lookup and decoder",
    LOOKUP,
    ["w"],
    lambda p: jnp.tanh(p["table"][TOKENS] @ p["w"]) @ p["table"].T,
    {"table": "index"},
)
add(
    "an expert by index", {"w": random(3, 4, 4)}, [], lambda p: X @ p["w"][jnp.argmax(X[0])], {"w": "index"}
)
add("a masked kernel", {"w": W, "u": U}, ["u"], lambda p: X @ (p["w"] * (W > 0)) @ p["u"], {"w": "mask"})
add(
    "weight normalisation",
    {"w": W, "u": U},
    ["u"],
    lambda p: X @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)) @ p["u"],
    {"w": "normalisation"},
)
add(
    "a product of kernels",
    {"w": W, "u": U},
    [],
    lambda p: X @ (p["w"] @ p["u"]),
    {"w": "not with data", "u": "not with data"},
)
add("no batch", {"w": W}, [], lambda p: X[0] @ p["w"], {"w": "no batch"})
add(
    "other examples",
    {"w": W},
    [],
    lambda p: (X @ p["w"]).sum() + (X[:2] @ p["w"]) ** 2,
    {"w": "numbers of examples, 2 and 5"},
)
add(
    "split in two ways",
    {"w": random(2, 2, 4)},
    [],
    lambda p: (
        jnp.einsum("nij,ijk->nk", X.reshape(N, 2, 2), p["w"])
        * jnp.einsum("nijk,jki->ni", random(N, 2, 2, 4), p["w"].transpose(1, 2, 0)).sum(1, keepdims=True)
    ),
    {"w": "different ways"},
)
add(
    "scales and places",
    {"w": W, "s": random(3, 4), "place": random(3, 4)},
    ["w"],
    lambda p: (Y * p["s"] + p["place"]) @ p["w"],
)
add("unused", {"w": W, "u": U}, ["w"], lambda p: X @ p["w"])
add(
    "no entries",
    {"w": W, "u": jnp.zeros((4, 0))},
    ["w"],
    lambda p: X @ p["w"] + (X @ p["u"]).sum(),
    {"u": "no entries"},
)
MODELS["a penalty"] = Model(
    lambda p: mean_square(X @ p["w"] + p["b"]) + 0.1 * jnp.sum(p["w"] ** 2),
    ONE_STEP,
    {},
    {"w": "add_decayed_weights"},
)
MODELS["a penalty of the columns"] = Model(
    lambda p: mean_square(X @ p["w"]) + jnp.sum((p["w"].T @ p["w"] - jnp.eye(4)) ** 2),
    {"w": W},
    {},
    {"w": "not with data"},
)


# Flax.
def add_module(name: str, module: nn.Module, x: jax.Array, kernels: Any, missed: Any = None) -> None:
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda like: random(*like.shape), shapes)
    add(name, params, kernels, lambda p: module.apply({"params": p}, x), missed)


def with_bias(*layers: str) -> dict[str, str | None]:
    return {f"{layer}/kernel": f"{layer}/bias" for layer in layers}


ATTENTION = ("query", "key", "value", "out")
add_module("linen Dense", nn.Dense(3), Y, {"kernel": "bias"})
add_module("linen DenseGeneral", nn.DenseGeneral((2, 3), axis=(-2, -1)), Y, {"kernel": "bias"})
add_module(
    "linen DenseGeneral with a batch",
    nn.DenseGeneral(3, axis=-1, batch_dims=(0,)),
    Y[:, 0],
    [],
    {"kernel": "no batch"},
)
add_module("linen Conv", nn.Conv(6, (3, 3), strides=2, feature_group_count=2), IMAGES, {"kernel": "bias"})
add_module(
    "linen Conv, circular",
    nn.Conv(3, (3,), padding="CIRCULAR", kernel_dilation=2),
    LINES,
    {"kernel": "bias"},
)
add_module("linen ConvTranspose", nn.ConvTranspose(3, (3, 3), strides=(2, 2)), IMAGES, {"kernel": "bias"})
add_module("linen ConvLocal", nn.ConvLocal(2, (3,)), LINES, {"kernel": "bias"})
add_module("linen Einsum", nn.Einsum((4, 2, 3), "...d,dnh->...nh"), Y, {"kernel": "bias"})
add_module("linen attention", nn.MultiHeadDotProductAttention(2), Y, with_bias(*ATTENTION))
add_module("linen MLP in remat", nn.remat(nn.Dense)(3), Y, {"kernel": "bias"})
LSTM = {f"cell/h{gate}/kernel": f"cell/h{gate}/bias" for gate in "fgio"} | {
    f"cell/i{gate}/kernel": None for gate in "fgio"
}
add_module("linen LSTM", nn.RNN(nn.LSTMCell(3)), Y, LSTM)
add_module("linen optimized LSTM", nn.RNN(nn.OptimizedLSTMCell(3)), Y, LSTM)
add_module(
    "linen GRU",
    nn.RNN(nn.GRUCell(3)),
    Y,
    with_bias("cell/ir", "cell/iz", "cell/in", "cell/hn")
    | dict.fromkeys(("cell/hr/kernel", "cell/hz/kernel")),
)


class Layers(nn.Module):
    """Layers stacked by nn.scan, in remat or not."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Block) if self.remat else Block
        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(
            x, None
        )[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(x))), None


class Tied(nn.Module):
    """A table that is used at both ends."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(7, 4)
        return table.attend(nn.Dense(4)(table(tokens)))


STACKED = {
    f"ScanBlock_0/{path}": bias and f"ScanBlock_0/{bias}"
    for path, bias in {
        **with_bias("Dense_0", "Dense_1"),
        **{f"MultiHeadDotProductAttention_0/{name}/kernel": None for name in ATTENTION},
    }.items()
}
add_module("linen scan", Layers(), Y, STACKED)
add_module(
    "linen scan in remat",
    Layers(remat=True),
    Y,
    {
        path.replace("ScanBlock", "ScanCheckpointBlock"): bias
        and bias.replace("ScanBlock", "ScanCheckpointBlock")
        for path, bias in STACKED.items()
    },
)
add_module(
    "linen tied table", Tied(), TOKENS, {"Dense_0/kernel": "Dense_0/bias"}, {"Embed_0/embedding": "index"}
)
