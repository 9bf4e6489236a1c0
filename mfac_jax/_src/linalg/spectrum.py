"""Eigenvalues of Gram matrices, and which of them are rounding noise."""

import math

import jax
import jax.numpy as jnp


def eigenvalues(gram: jax.Array) -> jax.Array:
    """Eigenvalues of the Gram matrices `(blocks, m)`, largest first; zero where they are rounding noise."""
    _, exponent = jnp.frexp(jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1, keepdims=True))
    # LAPACK returns NaN on some matrices of 1e30: a power of two brings the largest entry near one.
    exponent = jnp.maximum(exponent, jnp.finfo(gram.dtype).minexp)
    scale = jnp.ldexp(jnp.ones_like(gram[..., 0, :1]), -exponent)
    s = jnp.linalg.eigvalsh(gram * scale[..., None], symmetrize_input=False)
    s = s[..., ::-1]
    return jnp.where(s > noise(gram) * s[..., :1], s, 0) / scale


def noise(x: jax.Array) -> float:
    """What rounding may add to an eigenvalue, as a part of the largest; x is `(..., m)`."""
    return 8 * math.sqrt(x.shape[-1]) * float(jnp.finfo(x.dtype).eps)
