"""Gradients as rows of a storage, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax._src.rows.storage_kinds import as_storage
from mfac_jax._src.rows.storages import main_array


def rows_of(storage: Any, gradients: np.ndarray) -> Any:
    """The gradients `(m, *shape)` as rows."""
    storage = as_storage(storage)
    row = storage.row(jax.ShapeDtypeStruct(gradients.shape[1:], gradients.dtype))
    empty = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), row)
    encoded = [storage.encode(jnp.asarray(x), empty) for x in gradients]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *encoded)


def decoded(storage: Any, rows: Any) -> np.ndarray:
    """What the rows stand for, in float64."""
    of_each = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(len(main_array(rows)))]
    return np.stack([np.asarray(as_storage(storage).decode(row), np.float64) for row in of_each])
