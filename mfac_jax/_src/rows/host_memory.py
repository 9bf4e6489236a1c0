"""In which memory does the window lie: the device's, or pinned memory of the host?

The memory of an array stands in its type, so compiled steps keep it, and nobody else has to be told.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.sharding import Sharding

HOST = "pinned_host"


def is_on_host(x) -> bool:
    """Whether an array, traced or not, is in memory of the host."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def may_be_on_host(shape: Sequence[int]) -> bool:
    """Whether a window whose rows have this shape on each device can be kept on the host.

    TPUs lay arrays out in tiles of two axes, chosen so that little is padded, and write into memory of the
    host only whole tiles. An axis of a multiple of 128 and another of a multiple of 8 are chosen before the
    axis of the window's rows.
    """
    return any(n and n % 128 == 0 for n in shape) and sum(n and n % 8 == 0 for n in shape) > 1


def to_device(x: jax.Array) -> jax.Array:
    """`x` in memory of the device."""
    return jax.device_put(x, jax.memory.Space.Device)


def to_memory_of(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where `rows` are."""
    return jax.device_put(x, jax.typeof(rows).memory_space)


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
