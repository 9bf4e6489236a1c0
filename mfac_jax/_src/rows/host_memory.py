"""In which memory does the window lie: the device's, or pinned memory of the host?

The memory of an array stands in its type. So compiled steps keep it, and no other code asks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Sharding

from mfac_jax._src.rows import chunks
from mfac_jax._src.rows.storages import Rows, Storage, main_array, shape_of_leaf

HOST = "pinned_host"


def is_on_host(tree: Any) -> bool:
    """Whether an array of the tree, traced or not, is in memory of the host."""
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(tree))


def may_be_on_host(shape: Sequence[int]) -> bool:
    """Whether a window whose rows have this shape on each device can be kept on the host.

    TPUs lay arrays out in tiles of two axes, chosen so that little is padded, and write into memory of the
    host only whole tiles. An axis of a multiple of 128 and another of a multiple of 8 are chosen before the
    axis of the window's rows.
    """
    return any(n and n % 128 == 0 for n in shape) and sum(n and n % 8 == 0 for n in shape) > 1


def to_device(x: jax.Array) -> jax.Array:
    """`x` in memory of the device."""
    return _to_memory(jax.memory.Space.Device, x)


def to_memory_of(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where `rows` are."""
    return _to_memory(jax.typeof(rows).memory_space, x)


def _to_memory(space: Any, x: jax.Array) -> jax.Array:
    """`x` in that memory; without need no `device_put`, which commits the results of the jit around it."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def zero_rows(
    make: Callable[..., jax.Array], row: tuple, num_rows: int, sharding: Sharding | None
) -> jax.Array:
    """`num_rows` times `make(*row)` on the host; where a sharding is given, as it says but for the memory.

    One row at a time: XLA for TPU makes zeros on the device, and copies them.
    """
    sharding = sharding and sharding.with_memory_kind(HOST)
    return jax.jit(_repeated, static_argnums=(0, 1, 2), out_shardings=sharding)(make, row, num_rows)


def _repeated(make, row, num_rows):
    def one(carry, _):
        return carry, jax.device_put(make(*row), jax.memory.Space.Host)

    return lax.scan(one, None, None, length=num_rows)[1]


@functools.partial(jax.jit, static_argnames=("storage", "dtype", "length"))
def dots(storage: Storage, rows: Rows, x: jax.Array, dtype: Any, length: int | None) -> jax.Array:
    """`storage.dots`, of rows that come to the device `length` at a time; None: 2^21 entries."""

    def of_chunk(chunk):
        return storage.dots(jax.tree.map(to_device, chunk), x, dtype)

    return chunks.dots_in_chunks(of_chunk, rows, length or chunks.chunk_length(rows))


@functools.partial(jax.jit, static_argnames=("storage", "length"))
def combine(storage: Storage, coefficients: jax.Array, rows: Rows, length: int | None) -> jax.Array:
    """`storage.combine`, of rows that come to the device `length` at a time; None: 2^21 entries."""
    shape = shape_of_leaf(storage, rows)
    total = jnp.zeros_like(to_device(main_array(rows)[0]), coefficients.dtype, shape=shape)

    def of_chunk(own, chunk):
        return storage.combine(own, jax.tree.map(to_device, chunk))

    length = length or chunks.chunk_length(rows)
    return chunks.combine_in_chunks(of_chunk, total, coefficients, rows, length)


def check_memory(window: optax.Params, host_chunk: int | None) -> None:
    """Raise for a window that is not in the memory that the transform keeps it in."""
    expected = host_chunk is not None
    can_be = any(may_be_on_host(rows.shape[1:]) for rows in jax.tree.leaves(window))
    if is_on_host(window) != expected and can_be:
        memory = "pinned memory of the host" if expected else "memory of the device"
        raise ValueError(
            f"state must hold the window in {memory} with host_chunk={host_chunk!r}. Put it there: "
            "jax.device_put(state, jax.tree.map(lambda x: x.sharding, tx.init(params))), or restore a "
            "checkpoint with the shardings of mfac_jax.state_shardings; jax.pmap has no memory of the host."
        )
