"""Dtypes of sums, and numbers that neither overflow nor hide a NaN."""

import jax
import jax.numpy as jnp
import optax


def accumulation_dtype(tree: optax.Params) -> jnp.dtype:
    """float64 where a leaf is float64, else float32: the dtype of every sum over parameters."""
    # Of NumPy's float64 arrays JAX makes float32 ones, unless x64 is enabled.
    is_double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def all_finite(tree: optax.Updates) -> jax.Array:
    """Whether no entry of the tree is NaN or Inf."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def bounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as `dtype`, Inf as NaN, and finite entries clipped: 2^34 of their squares can be added up."""
    limit = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 18)
    # 0 times Inf is NaN. A constant would be one for jax_debug_nans where all is finite.
    return jnp.where(jnp.isfinite(x), jnp.clip(x.astype(dtype), -limit, limit), (x * 0).astype(dtype))


def scaled(u: jax.Array, scale: jax.Array) -> jax.Array:
    """`u` times the scale of the metric, clipped so that it cannot overflow."""
    limit = 2.0 ** (jnp.finfo(u.dtype).maxexp // 2)
    return jnp.clip(u, -limit, limit) * scale


def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative zero at zero. A NaN stays one."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def square(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The squared norm of `x`."""
    return jnp.sum(jnp.square(x.astype(dtype)))


def narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as `dtype`, clipped to what it can hold: float16 ends at 65,504."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # of NumPy's arrays it may be float64, without x64
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)
