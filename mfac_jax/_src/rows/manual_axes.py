"""How the window lies inside of shard_map and pmap, where a device sees its own part alone.

`mesh.split` has the policy. Here a leaf's `Layout` is found again, from the shapes of its parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.rows.mesh import (
    Split,
    explicit_sharding,
    names_in,
    split,
    without_rows,
)

AxisName = str | Sequence[str] | None


class Layout(NamedTuple):
    """A window leaf inside of shard_map or pmap.

    Attributes:
      split: of the axes of its rows.
      summed: the mesh axes over which inner products with the leaf are partial.
    """

    split: Split
    summed: tuple[str, ...]

    @staticmethod
    def local(ndim: int) -> "Layout":
        """The layout of a leaf that is not split."""
        return Layout(((),) * ndim, ())


def bound_axes(axis_name: AxisName) -> dict[str, int]:
    """The names with their sizes, where they are manual axes of a shard_map or pmap; empty outside."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    bound = {name: lax.axis_size(name) for name in names if name in manual}
    if bound and len(bound) < len(names):
        missing = ", ".join(repr(name) for name in names if name not in bound)
        raise ValueError(
            f"axis_name must hold axes of the shard_map or pmap around it, {manual}, got {missing}. Leave "
            "it out, or run inside of a shard_map over it."
        )
    return bound


def check_bound(axis_name: AxisName) -> None:
    """Raise for an update outside of the shard_map or pmap whose axes are named."""
    if axis_name is not None and not bound_axes(axis_name):
        raise ValueError(
            f"axis_name={axis_name!r} is not bound: call update inside of jax.shard_map or jax.pmap with "
            "this axis, or leave axis_name out under jit alone."
        )


def varying(x) -> frozenset[str]:
    """The manual axes along which a value is known to differ; none with check_vma=False and in pmap."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _knows_varying(axes: Mapping[str, int]) -> bool:
    """Whether values carry the axes that they vary along: shard_map's check_vma."""
    return any(name in varying(lax.axis_index(name)) for name in axes)


def layouts(updates: optax.Updates, rows: Sequence[tuple[int, ...]], axis_name: AxisName) -> list[Layout]:
    """The layout of every leaf of the window, whose rows have these shapes on a device."""
    axes = bound_axes(axis_name)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    found = [_layout_of(path, x, row, axes) for (path, x), row in zip(leaves, rows, strict=True)]
    if not _knows_varying(axes):
        _check_replicated(leaves, found, axes)
    return found


def _layout_of(path, x: jax.Array, row: tuple[int, ...], axes: Mapping[str, int]) -> Layout:
    """The layout of a leaf whose window has rows of this shape on a device."""
    # The parameter's own shards are given; only axes that it does not use can split its window further.
    sharded = tuple(name for name in axes if name in varying(x))
    planned = split(x.shape, {name: size for name, size in axes.items() if name not in sharded})
    if names_in(planned) and row == local_shape(planned, x.shape):
        used = (*names_in(planned), *sharded)
        return Layout(planned, tuple(name for name in axes if name in used))
    if row == x.shape:
        return Layout.local(x.ndim)._replace(summed=sharded)
    if sharded and row == local_shape(split(x.shape, axes), x.shape):
        raise ValueError(
            f"updates must be equal along the mesh axes that their window is split over, but "
            f"{leaf_name(path)} differs along {sharded}. Average it before: jax.lax.pmean(updates, "
            f"{sharded})."
        )
    raise ValueError(
        f"state must hold rows of {x.shape} for {leaf_name(path)} on each device, or of "
        f"{local_shape(planned, x.shape)} where they are split, got {row}. Take the specs of the state "
        "from mfac_jax.state_shardings, and name in axis_name all mesh axes that they use."
    )


def _check_replicated(
    leaves: Sequence[tuple[Any, jax.Array]], found: Sequence[Layout], axes: Mapping[str, int]
) -> None:
    """Raise for what may be a shard, where types do not tell shards from replicated leaves.

    A window that is split over all axes belongs to a replicated leaf. A leaf that the policy cannot split
    like that passes beside one that it could.
    """
    everywhere = {name for name, size in axes.items() if size > 1}
    is_split = [set(names_in(layout.split)) == everywhere for layout in found]
    for (path, x), done in zip(leaves, is_split, strict=True):
        could_be = set(names_in(split(x.shape, axes))) == everywhere
        if x.size and not done and (could_be or not any(is_split)):
            raise ValueError(
                f"{leaf_name(path)} may be a shard or replicated, which in jax.pmap, and with "
                "check_vma=False, cannot be told. For replicated parameters run init inside, with the same "
                "axis_name, or leave axis_name out (every device then holds all of the window); for shards "
                "use jax.shard_map with check_vma=True, its default."
            )


def check_named(updates: optax.Updates, gram: jax.Array, axis_name: AxisName) -> None:
    """Raise for a leaf that varies along a mesh axis that is not named, unless the state varies too."""
    known = varying(gram) | set(bound_axes(axis_name))
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
        unnamed = tuple(sorted(varying(x) - known))
        if unnamed:
            raise ValueError(
                f"axis_name must name the mesh axes that updates are spread over, but {leaf_name(path)} "
                f"varies along {unnamed} and axis_name is {axis_name!r}. Pass them to axis_name, or "
                "average the updates over them."
            )


def local_shape(split: Split, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row of the window on one device."""
    parts = [lax.axis_size(names) if names else 1 for names in split]
    return tuple(length // part for length, part in zip(shape, parts, strict=True))


def own_part(x: jax.Array, rows: jax.Array, split: Split) -> jax.Array:
    """The part of a parameter's array that this device's part of the window leaf belongs to."""
    explicit = explicit_sharding(rows)
    if explicit is not None:
        return jax.reshard(x, without_rows(explicit))
    for axis, names in enumerate(split):
        if names:
            length = x.shape[axis] // lax.axis_size(names)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * length, length, axis)
    return x


def whole(y: jax.Array, like: jax.Array, split: Split) -> jax.Array:
    """An array like the parameter's from all devices' parts."""
    explicit = explicit_sharding(like)
    if explicit is not None:
        return jax.reshard(y, explicit)
    for axis, names in enumerate(split):
        if names:
            # Where types tell, a gathered leaf is equal on all devices again.
            to = "invarying" if varying(y) else "varying"
            y = lax.all_gather(y, names, axis=axis, tiled=True, to=to)
    return y
