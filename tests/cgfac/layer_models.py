"""Small models of layers: einsums, convolutions, modules of Flax; and what is no layer. See `models.py`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.cgfac.models import (
    MODELS,
    ONE_STEP,
    Model,
    N,
    U,
    W,
    X,
    Y,
    add,
    mean_square,
    model,
    random,
    step,
)

IMAGES, LINES, VOLUMES = random(N, 6, 6, 4, seed=3), random(N, 7, 4, seed=4), random(N, 4, 4, 3, 2, seed=5)
TOKENS = jnp.arange(3 * N).reshape(N, 3) ** 2 % 7

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
)


@model("shard_map", {"w": W, "u": U}, ["u"], {"w": "shard_map"})
def _(p):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    place = {"mesh": mesh, "in_specs": (P("data"), P()), "out_specs": P("data")}
    return jax.shard_map(jnp.matmul, **place)(X, p["w"]) @ p["u"]


MODELS["a penalty"] = lambda: Model(
    lambda p: mean_square(X @ p["w"] + p["b"]) + 0.1 * jnp.sum(p["w"] ** 2),
    ONE_STEP,
    {},
    {"w": "add_decayed_weights"},
)
MODELS["a penalty of the columns"] = lambda: Model(
    lambda p: mean_square(X @ p["w"]) + jnp.sum((p["w"].T @ p["w"] - jnp.eye(4)) ** 2),
    {"w": W},
    {},
    {"w": "not with data"},
)


# Flax.
def add_module(name: str, module: nn.Module, x: jax.Array, kernels: Any, missed: Any = None) -> None:
    def made():
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda like: random(*like.shape), shapes)
        kernels_of = kernels if isinstance(kernels, dict) else dict.fromkeys(kernels)
        return Model(
            lambda p: mean_square(module.apply({"params": p}, x)), params, kernels_of, missed or {}
        )

    MODELS[name] = made


def add_nnx(name: str, module: Callable[[nnx.Rngs], nnx.Module], x: jax.Array, kernels: Any) -> None:
    def made():
        graph, params, rest = nnx.split(module(nnx.Rngs(0)), nnx.Param, ...)

        def loss(p):
            return mean_square(nnx.merge(graph, p, rest, copy=True)(x))

        return Model(loss, params, kernels, {})

    MODELS[name] = made


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


def of_stack(name: str) -> dict[str, str | None]:
    attention = [f"MultiHeadDotProductAttention_0/{part}/kernel" for part in ATTENTION]
    kernels = with_bias("Dense_0", "Dense_1") | dict.fromkeys(attention)
    return {f"{name}/{path}": bias and f"{name}/{bias}" for path, bias in kernels.items()}


add_module("linen scan", Layers(), Y, of_stack("ScanBlock_0"))
add_module("linen scan in remat", Layers(remat=True), Y, of_stack("ScanCheckpointBlock_0"))
add_module("linen tied table", Tied(), TOKENS, with_bias("Dense_0"), {"Embed_0/embedding": "index"})


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm, self.linear = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(nnx.relu(self.attention(self.norm(x))))


class NNXLayers(nnx.Module):
    """Layers stacked by nnx.vmap, run by nnx.scan."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(NNXBlock, in_axes=(0,), out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


LAYERS = with_bias("linear", *(f"attention/{part}" for part in ATTENTION))
add_nnx("nnx attention", NNXBlock, Y, LAYERS)
add_nnx("nnx scan", NNXLayers, Y, {f"layers/{path}": f"layers/{bias}" for path, bias in LAYERS.items()})
add_nnx(
    "nnx Conv",
    lambda rngs: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=rngs),
    LINES,
    {"kernel": "bias"},
)
add_nnx(
    "nnx ConvTranspose", lambda rngs: nnx.ConvTranspose(4, 6, (3,), 2, rngs=rngs), LINES, {"kernel": "bias"}
)
add_nnx(
    "nnx Einsum", lambda rngs: nnx.Einsum("abc,cd->abd", (4, 3), (3,), rngs=rngs), Y, {"kernel": "bias"}
)
add_nnx(
    "nnx LoRALinear",
    lambda rngs: nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs),
    Y,
    {"kernel": "bias", "lora/lora_a": None, "lora/lora_b": None},
)
add_nnx(
    "nnx GRU",
    lambda rngs: nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs)),
    Y,
    with_bias("cell/dense_i") | {"cell/dense_h/kernel": None},
)
