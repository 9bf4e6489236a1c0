"""The storages that are compared, by name."""

from typing import Any

import jax.numpy as jnp

import mfac_jax

STORAGES: dict[str, Any] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": jnp.int8,
    "low rank": mfac_jax.components.low_rank(),
}
