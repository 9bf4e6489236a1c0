"""Contractions between the window and a tree of parameters, leaf by leaf.

The window mirrors the parameter tree; each of its leaves has a leading axis of `num_grads` rows.
This is the only file that knows dtypes, precision and sharding. Contractions ask for full precision:
the TF32 and bfloat16 products that are the default on GPU and TPU would cost the Gram matrix its digits.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

# On CPU a matrix-vector product adds each row up in one running sum a lane, so its relative error
# grows with the columns (same signs, float32): 1e-6 at 2^16, 5e-6 at 272k, 1e-5 at 2^19, 7e-4 at
# 10 M. Multiply-and-sum adds in partial sums (1e-6 at 10 M) and takes 1.1 to 1.5 times as long.
_MAX_DOT_COLUMNS = 2**19

# Squared norms must not overflow: this leaves float32 a factor of 16.
_MAX_NORM = 2.0**62


def accumulation_dtype(tree: optax.Params) -> jnp.dtype:
    """float64 where a leaf is float64, else float32: the dtype of every sum over parameters."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(tree)))


def empty_window(num_grads: int, params: optax.Params) -> optax.Params:
    """Zeros `(num_grads, *leaf.shape)` of each leaf's dtype, sharded like the leaf, rows unsharded."""

    def rows(leaf):
        shape, sharding = (num_grads, *leaf.shape), _named_sharding(leaf)
        if sharding is None:
            return jnp.zeros(shape, leaf.dtype)
        spec = PartitionSpec(None, *sharding.spec)
        return jnp.zeros(shape, leaf.dtype, device=NamedSharding(sharding.mesh, spec))

    return jax.tree.map(rows, params)


def _named_sharding(leaf) -> NamedSharding | None:
    """The mesh sharding that an array, a ShapeDtypeStruct or, under explicit axes, a tracer has."""
    sharding = jax.typeof(leaf).sharding if _is_traced(leaf) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _is_traced(leaf) -> bool:
    return isinstance(leaf, Tracer)


def bounded(tree: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    """The tree, scaled down where its squared norm could overflow, and whether all of it is finite.

    Only entries above 2^62 / sqrt(d) are affected (1.4e15 for ten million parameters in float32).
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    dtype = accumulation_dtype(leaves)
    peaks = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in leaves]
    peak = jnp.max(jnp.stack([jnp.zeros((), dtype), *peaks]))
    limit = _MAX_NORM / math.sqrt(max(1, sum(leaf.size for leaf in leaves)))
    scale = limit / jnp.maximum(peak, limit)
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree), jnp.isfinite(peak)


@jax.jit  # a user's step may run outside of jit: there a bare lax.cond is compiled at every call
def write_row(
    window: optax.Params, row: optax.Updates, index: jax.Array, accept: jax.Array
) -> optax.Params:
    """The window with `row` at `index`, or unchanged where `accept` is false.

    `lax.cond` does more than choose: XLA would otherwise write the row twice, into two copies of
    the window, where a leaf is reshaped for the contraction that follows.
    """

    def write(window, row):
        def put(rows, x):
            return lax.dynamic_update_index_in_dim(rows, x, index, 0)

        return jax.tree.map(put, window, row)

    return lax.cond(accept, write, lambda window, row: window, window, row)


def dots(rows: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`(m,)` inner products of the rows `(m, *shape)` of a window leaf with `x` `(*shape)`."""
    rows, x = _collapsed(rows, 1), _collapsed(x, 0)
    rows, x = rows.astype(dtype), x.astype(dtype)
    if rows.ndim == 2 and x.size <= _MAX_DOT_COLUMNS:
        return jnp.matmul(rows, x, precision=lax.Precision.HIGHEST)
    return jnp.sum(rows * x, axis=tuple(range(1, rows.ndim)))


def combine(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    """`coefficients` `(m,)` times the rows `(m, *shape)` of a window leaf, summed: `(*shape)`."""
    flat = _collapsed(rows, 1).astype(coefficients.dtype)
    total = jnp.tensordot(coefficients, flat, axes=1, precision=lax.Precision.HIGHEST)
    return total.reshape(rows.shape[1:])


def _collapsed(x: jax.Array, leading: int) -> jax.Array:
    """`x` with all but its `leading` axes made one, which is free; as it is where it is sharded."""
    sharding = _named_sharding(x)
    if sharding is not None and any(axis is not None for axis in sharding.spec):
        return x
    return x.reshape(*x.shape[:leading], math.prod(x.shape[leading:]))


def narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as `dtype`, clipped to what it can hold: float16 ends at 65,504."""
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)
