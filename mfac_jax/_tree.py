"""Contractions between the window and a tree of parameters, leaf by leaf.

The window mirrors the parameter tree; each of its leaves has a leading axis of `num_grads` rows.
This is the only file that knows precision, sharding and the dtypes of sums. Contractions ask for full
precision: the TF32 and bfloat16 products that are the default on GPU and TPU would cost the Gram matrix
its digits.
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
_MAX_DOT_COLUMNS = 300_000


def accumulation_dtype(tree: optax.Params) -> jnp.dtype:
    """float64 where a leaf is float64, else float32: the dtype of every sum over parameters."""
    is_double = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


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
    is_traced = isinstance(leaf, Tracer)
    sharding = jax.typeof(leaf).sharding if is_traced else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def all_finite(tree: optax.Updates) -> jax.Array:
    """Whether no entry of the tree is NaN or Inf."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def as_row(updates: optax.Updates, window: optax.Params) -> tuple[optax.Updates, jax.Array]:
    """The updates in the dtypes of the window, and whether all of them are finite.

    Where the squared norm could overflow, or a leaf does not fit its dtype, all are scaled down: in
    float32 that takes an entry above 2^62 / sqrt(d), 1.4e15 for ten million parameters.
    """
    dtype = accumulation_dtype(window)
    leaves = jax.tree.leaves(updates)
    max_norm = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 2)  # its square is a 16th of what overflows
    limit = max_norm / math.sqrt(max(1, sum(x.size for x in leaves)))
    excess = [jnp.ones((), dtype)]
    for x, rows in zip(leaves, jax.tree.leaves(window), strict=True):
        if x.size:
            fits = min(limit, float(jnp.finfo(rows.dtype).max))
            excess.append(jnp.max(jnp.abs(x)).astype(dtype) / fits)
    most = jnp.max(jnp.stack(excess))
    row = jax.tree.map(lambda x, rows: (x.astype(dtype) / most).astype(rows.dtype), updates, window)
    return row, jnp.isfinite(most)


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
    return jnp.sum(rows * x[None], axis=tuple(range(1, rows.ndim)))


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
