"""A causal transformer in Flax nnx for two mesh axes: parameters are sharded over `fsdp` and `tensor`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from examples import text

AXES = ("fsdp", "tensor")
# Of matrices whose outputs are added up over `tensor`. Their last axis stays whole: TPUs pad it to 128.
ROWS = (("tensor", "fsdp"), None)


class Size(NamedTuple):
    """The size of a model. All fields but `layers` and `heads` are numbers of entries."""

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return self.layers * (12 * self.width**2 + 2 * self.width) + self.width * (2 * self.vocabulary + 1)


class Block(text.Block):
    """The block of text.py with sharded matrices and norms without a mean."""

    def __init__(self, size: Size, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = size.width

        def linear(fan_in: int, fan_out: int, axes: tuple, scale: float = 1.0) -> nnx.Linear:
            init = nnx.with_partitioning(nnx.initializers.normal(scale / math.sqrt(fan_in)), axes)
            options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
            return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_init=init, rngs=rngs, **options)

        shrink = 1 / math.sqrt(2 * size.layers)  # the sum of all layers' outputs then starts near one
        self.heads = size.heads
        self.norm_attention = nnx.RMSNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.norm_mlp = nnx.RMSNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.query_key_value = linear(width, 3 * width, AXES)
        self.attention_out = linear(width, width, ROWS, shrink)
        self.up = linear(width, 4 * width, AXES)
        self.down = linear(4 * width, width, ROWS, shrink)


class Transformer(nnx.Module):
    """Logits of the next token, `(batch, context, vocabulary)`; the layers' parameters are stacked."""

    def __init__(self, size: Size, dtype: jnp.dtype, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=size.layers)
        @nnx.vmap(axis_size=size.layers, transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs):
            return Block(size, dtype, rngs)

        def table(axes: tuple):
            return nnx.with_partitioning(nnx.initializers.normal(0.02), axes)

        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embedding = nnx.Embed(size.vocabulary, size.width, embedding_init=table(ROWS), **options)
        self.blocks = stacked(rngs)
        self.norm = nnx.RMSNorm(size.width, **options)
        self.out = nnx.Linear(
            size.width, size.vocabulary, use_bias=False, kernel_init=table(AXES), **options
        )

    def __call__(self, ids, activations: NamedSharding | None = None):
        """Compute the logits; `activations` is the sharding of `(batch, context, width)` between layers."""
        graph, layers = nnx.split(self.blocks)

        def placed(x):
            return x if activations is None else jax.lax.with_sharding_constraint(x, activations)

        @jax.checkpoint  # the backward pass computes a layer anew instead of keeping its inside
        def layer(x, params):
            return placed(nnx.merge(graph, params)(x)), None

        x = jax.lax.scan(layer, placed(self.embedding(ids)), layers)[0]
        return self.out(self.norm(x))


def split(size: Size, dtype: jnp.dtype, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """Split the model into its graph and its parameters; it has no other state."""
    with nnx.use_eager_sharding(False):  # shardings are given to jit instead
        graph, params = nnx.split(Transformer(size, dtype, nnx.Rngs(seed)), nnx.Param)
    return graph, params


def abstract(size: Size, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """As `split`, with shapes in place of arrays."""
    graph = []

    def params():
        found, params = split(size, dtype)
        graph.append(found)
        return params

    shapes = jax.eval_shape(params)
    return graph[0], shapes


def loss(
    graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, activations: NamedSharding | None = None
) -> jax.Array:
    """Mean cross-entropy of the next token; `tokens` is `(batch, context + 1)`.

    With automatic mesh axes pass `activations=batch_sharding(mesh)`. Otherwise XLA may gather the
    activations of all sequences rather than the parameters of a layer.
    """
    logits = nnx.merge(graph, params)(tokens[:, :-1], activations).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of the tokens: each device along `fsdp` has sequences of its own."""
    return NamedSharding(mesh, PartitionSpec("fsdp"))
