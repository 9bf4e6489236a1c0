"""Some rows of a window at a time, where all of them at once would take too much memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK_ENTRIES = 2**21  # 8 MiB of float32


def chunk_length(rows: Any) -> int:
    """How many of these rows have about 2^21 entries, at least one."""
    entries = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(rows))
    return max(1, _CHUNK_ENTRIES // max(1, entries))


def dots_in_chunks(dot: Callable[[Any], jax.Array], rows: Any, length: int) -> jax.Array:
    """`dot(rows)` `(m,)`, from `dot` of `length` rows at a time."""

    def step(_, chunk, *__):
        return None, dot(chunk)

    _, products = _over_chunks(step, None, rows, length)
    # The last chunk may begin within the one before: what it has in common with that one is left out.
    rest = products.size - _number_of(rows)
    return jnp.concatenate([products[:-1].ravel(), products[-1, rest:]])


def combine_in_chunks(
    contract: Callable[[jax.Array, Any], jax.Array],
    total: jax.Array,
    coefficients: jax.Array,
    rows: Any,
    length: int,
) -> jax.Array:
    """`total` plus the sum of `contract(coefficients, rows)` over chunks of `length` rows."""

    def step(total, chunk, start, unseen):
        number = _number_of(chunk)
        own = lax.dynamic_slice_in_dim(coefficients, start, number)
        own = jnp.where(start + jnp.arange(number) < unseen, 0, own)
        return total + contract(own, chunk), None

    return _over_chunks(step, total, rows, length)[0]


def _number_of(rows: Any) -> int:
    return len(jax.tree.leaves(rows)[0])


def _over_chunks(
    step: Callable[..., tuple[Any, Any]], carry: Any, rows: Any, length: int
) -> tuple[Any, Any]:
    """Scan `step(carry, chunk, start, unseen)` over chunks of the rows, `length` at a time.

    Chunks are of one length, so the last one may `start` before `unseen`, within the chunk before.
    """
    m = _number_of(rows)
    length = min(length, m)

    def body(carry, i):
        start = jnp.minimum(i * length, m - length)
        chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), rows)
        return step(carry, chunk, start, i * length)

    return lax.scan(body, carry, jnp.arange(-(-m // length)))
