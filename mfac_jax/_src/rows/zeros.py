"""Zeros like the parameters, for `init`: sharded by the policy of `mesh.py`, local on manual axes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from mfac_jax._src.rows import host_memory, manual_axes, storages
from mfac_jax._src.rows.manual_axes import ManualAxes, local_shape
from mfac_jax._src.rows.mesh import (
    AxesOfLeaf,
    Split,
    named_sharding,
    names_in,
    row_sharding,
    sharding_of_array,
    window_sharding,
)
from mfac_jax._src.rows.storages import Storage


class Part(NamedTuple):
    """The part of a leaf that a row of the window has here.

    Attributes:
      shape: on manual axes that of one device, else that of the whole leaf.
      sharding: of a row; None where the leaf lies on no mesh.
      varies_over: the manual axes along which devices have different parts.
      along: the same for each axis of the leaf; None where that is not known.
    """

    shape: tuple[int, ...]
    sharding: NamedSharding | None
    varies_over: tuple[str, ...]
    along: Split | None


class Array(NamedTuple):
    """One of the arrays that a row of the window is made of.

    Attributes:
      shape: on manual axes that on one device, else that of the whole array.
      dtype: of the entries.
      sharding: None where the leaf lies on no mesh.
      varies_over: as of a `Part`.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding | None
    varies_over: tuple[str, ...]

    def on_device(self) -> tuple[int, ...]:
        """The shape of what each device has."""
        return self.shape if self.sharding is None else self.sharding.shard_shape(self.shape)


def parts_of(params: optax.Params, axes: ManualAxes) -> list[Part]:
    """Those of all leaves; raises where a leaf may be a shard or equal on all devices."""
    manual_axes.check_declared("params", params, axes)
    bound = manual_axes.bound_axes(axes.names)
    spread = manual_axes.spread("params", params, axes)
    return [
        _part_of(leaf, bound, *shard) for leaf, shard in zip(jax.tree.leaves(params), spread, strict=True)
    ]


def _part_of(leaf: Any, axes: Mapping[str, int], sharded: tuple[str, ...], along: Split | None) -> Part:
    """Inside of shard_map the leaf is this device's shard; the other axes split it further."""
    sharding = named_sharding(leaf)
    row = None if sharding is None else row_sharding(leaf.shape, sharding)
    beyond = manual_axes.beyond(leaf.shape, axes, sharded)
    varies_over = (*names_in(beyond), *sharded)
    return Part(local_shape(beyond, leaf.shape), row, varies_over, manual_axes.joined(along, beyond))


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
    leaves, structure = jax.tree.flatten(params)

    def rows_of(leaf, row):
        is_array = lambda node: isinstance(node, Array)  # noqa: E731
        return jax.tree.map(
            lambda array: _empty_rows(array, leaf, num_grads, on_host), row, is_leaf=is_array
        )

    rows = list(map(rows_of, leaves, rows_like(params, storage, axes)))
    return storages.join(storage, structure, rows)


def rows_like(params: optax.Params, storage: Storage, axes: ManualAxes) -> list[Any]:
    """What a row of each leaf is made of here: the storage's structure, with an `Array` for each."""
    parts = parts_of(params, axes)
    if storage.encode_part is not None:
        manual_axes.check_along("params", params, [part.along for part in parts], storage.name)

    def row_of(leaf, part):
        along = part.along or ((),) * len(part.shape)
        whole = manual_axes.whole_shape(along, part.shape)
        row = storage.row(jax.ShapeDtypeStruct(whole, jnp.result_type(leaf)))
        arrays, structure = jax.tree.flatten(row)
        axes = storages.axes_of_leaf(storage, row, len(whole))
        return structure.unflatten(
            _array_of(array, own, whole, along, part) for array, own in zip(arrays, axes, strict=True)
        )

    return list(map(row_of, jax.tree.leaves(params), parts))


def _array_of(
    array: jax.ShapeDtypeStruct, axes: AxesOfLeaf, whole: tuple[int, ...], along: Split, part: Part
) -> Array:
    """Of what the whole leaf has in a row, the part that belongs to this part of the leaf."""
    if array.shape == whole:
        return Array(part.shape, array.dtype, part.sharding, part.varies_over)
    own = part.sharding
    sharding = None if own is None else sharding_of_array(array.shape, axes, own)
    split = tuple(
        along[axis] if axis is not None and length == whole[axis] else ()
        for length, axis in zip(array.shape, axes, strict=True)
    )
    return Array(local_shape(split, array.shape), array.dtype, sharding, names_in(split))


def _empty_rows(row: Array, leaf: Any, num_grads: int, on_host: bool) -> jax.Array:
    """Of one array that a row of the leaf is made of."""
    sharding = None if row.sharding is None else window_sharding(row.sharding)
    if on_host and host_memory.may_be_on_host(row.on_device()):
        outside = None if isinstance(leaf, Tracer) else sharding or getattr(leaf, "sharding", None)
        return host_memory.zero_rows(_varying_zeros, row, num_grads, outside)
    return _varying_zeros((num_grads, *row.shape), row.dtype, sharding, row.varies_over)


def _varying_zeros(shape, dtype, sharding: NamedSharding | None, axes: tuple[str, ...]) -> jax.Array:
    """Zeros that vary along manual axes as what will take their place, where types tell."""
    zeros = jnp.zeros(shape, dtype, device=sharding)
    return manual_axes.vary(zeros, axes)
