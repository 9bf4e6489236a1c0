"""The storages that are compared, by name; programs for accelerators are compiled with the first ones."""

from typing import Any

import jax.numpy as jnp

import mfac_jax

STORAGES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": jnp.int8,
    "low rank": mfac_jax.components.low_rank(),
}
ALL: dict[str, Any] = STORAGES | {
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}
