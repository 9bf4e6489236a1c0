"""The storages of the package: what users pass as `storage`, and what a name in a state stands for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax._src.base import checks, numerics
from mfac_jax._src.rows import contractions, low_rank, scaled
from mfac_jax._src.rows.storages import Storage

_PLAIN = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@functools.cache  # one object for each dtype: compiled functions take storages as static arguments
def floats(dtype: Any = None) -> Storage:
    """Rows as plain arrays of the dtype; None: that of each leaf."""
    return Storage(
        name="None" if dtype is None else jnp.dtype(dtype).name,
        row=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype),
        encode=lambda x, rows: numerics.narrow(x, rows.dtype),
        decode=lambda row: row,
        dots=contractions.dots,
        combine=contractions.combine,
        gram=contractions.gram,
        map=lambda function, rows: function(rows),
    )


def as_storage(storage: Any) -> Storage:
    """A storage from what users pass: None, a dtype, or a storage."""
    if isinstance(storage, Storage):
        if storage is not by_name(storage.name):
            checks.check_own_name("storage", storage.name, tuple(_by_names()))
        return storage
    # It has a dtype too. optax.inject_hyperparams calls jnp.bfloat16 as if it were a schedule.
    is_array = isinstance(storage, (jax.Array, np.ndarray))
    try:
        found = None if storage is None else jnp.dtype(storage)
    except TypeError:
        found = storage
    if is_array or (found is not None and found not in (*_PLAIN, *scaled.DTYPES)):
        raise ValueError(
            "storage must be None, jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2 "
            f"or a mfac_jax.components.Storage, got {storage!r}. Pass jnp.int8 for a quarter of the size."
            f"{checks.static_hint('storage', storage)}"
        )
    return scaled.scaled(found) if found in scaled.DTYPES else floats(found)


def by_name(name: str) -> Storage | None:
    """The storage that a state of this name was made with; None where it is a user's own."""
    return _by_names().get(name) or low_rank.by_name(name)


def _by_names() -> dict[str, Storage]:
    known = (*map(floats, (None, *_PLAIN)), *map(scaled.scaled, scaled.DTYPES))
    return {storage.name: storage for storage in known}
