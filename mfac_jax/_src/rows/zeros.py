"""Zeros like the parameters, for `init`: sharded by the policy of `mesh.py`, local on manual axes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from mfac_jax._src.rows import host_memory, manual_axes, storages
from mfac_jax._src.rows.manual_axes import ManualAxes, local_shape, varying
from mfac_jax._src.rows.mesh import (
    named_sharding,
    names_in,
    row_sharding,
    sharding_of_groups,
    window_sharding,
)
from mfac_jax._src.rows.storages import Storage


class Part(NamedTuple):
    """The part of a leaf that a row of the window has here.

    Attributes:
      shape: on manual axes that of one device, else that of the whole leaf.
      sharding: of a row; None where the leaf lies on no mesh.
      varies_over: the manual axes along which devices have different parts.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None
    varies_over: tuple[str, ...]


def parts_of(params: optax.Params, axes: ManualAxes) -> list[Part]:
    """Those of all leaves; raises where a leaf may be a shard or equal on all devices."""
    manual_axes.check_declared("params", params, axes)
    bound = manual_axes.bound_axes(axes.names)
    return [
        _part_of(leaf, bound, sharded)
        for leaf, sharded in zip(
            jax.tree.leaves(params), manual_axes.shards("params", params, axes), strict=True
        )
    ]


def _part_of(leaf: Any, axes: Mapping[str, int], sharded: tuple[str, ...]) -> Part:
    """Inside of shard_map the leaf is this device's shard; the other axes split it further."""
    sharding = named_sharding(leaf)
    row = None if sharding is None else row_sharding(leaf.shape, sharding)
    beyond = manual_axes.beyond(leaf.shape, axes, sharded)
    return Part(local_shape(beyond, leaf.shape), row, (*names_in(beyond), *sharded))


def empty_row(params: optax.Params, dtype: Any, axes: ManualAxes) -> optax.Params:
    """Zeros like a row of the window before it is encoded: what metrics keep for each entry."""
    zeros = [
        _varying_zeros(part.shape, dtype, part.sharding, part.varies_over)
        for part in parts_of(params, axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), zeros)


def empty_window(
    params: optax.Params, storage: Storage, num_grads: int, axes: ManualAxes, on_host: bool
) -> Any:
    """A window of rows of zeros; on the host where it may be."""

    def rows_of(leaf, part):
        row = storage.row(jax.ShapeDtypeStruct(part.shape, jnp.result_type(leaf)))
        return jax.tree.map(lambda array: _empty_rows(array, leaf, part, num_grads, on_host), row)

    leaves, structure = jax.tree.flatten(params)
    return storages.join(storage, structure, list(map(rows_of, leaves, parts_of(params, axes))))


def placed(row: jax.ShapeDtypeStruct, part: Part) -> tuple[NamedSharding | None, tuple[int, ...]]:
    """The sharding of one array that a row is made of, and its shape on each device."""
    own = part.sharding
    if own is None:
        return None, row.shape
    if row.shape != part.shape:
        own = sharding_of_groups(part.shape, own, row.shape)
    return own, own.shard_shape(row.shape)


def _empty_rows(
    row: jax.ShapeDtypeStruct, leaf: Any, part: Part, num_grads: int, on_host: bool
) -> jax.Array:
    """Of one array that a row of the leaf is made of."""
    own, on_device = placed(row, part)
    sharding = None if own is None else window_sharding(own)
    if on_host and host_memory.may_be_on_host(on_device):
        like_row = (row.shape, row.dtype, own, part.varies_over)
        outside = None if isinstance(leaf, Tracer) else sharding or getattr(leaf, "sharding", None)
        return host_memory.zero_rows(_varying_zeros, like_row, num_grads, outside)
    return _varying_zeros((num_grads, *row.shape), row.dtype, sharding, part.varies_over)


def _varying_zeros(shape, dtype, sharding: NamedSharding | None, axes: tuple[str, ...]) -> jax.Array:
    """Zeros that vary along manual axes as what will take their place, where types tell."""
    zeros = jnp.zeros(shape, dtype, device=sharding)
    axes = tuple(name for name in axes if name in varying(lax.axis_index(name)))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros
