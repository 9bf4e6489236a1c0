"""How the window lies inside of shard_map and pmap, where a device sees its own part alone.

`mesh.split` has the policy. Here a leaf's `Layout` is found again, from the shapes of its parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jax.sharding import PartitionSpec

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.rows.mesh import (
    Split,
    axes_of,
    explicit_sharding,
    names_in,
    split,
    without_rows,
)

AxisName = str | Sequence[str] | None


class ManualAxes(NamedTuple):
    """What the caller says about the shard_map or pmap around a step.

    Attributes:
      names: of the mesh axes that parameters or window are spread over.
      param_specs: how the parameters are spread, as PartitionSpecs; None where types tell.
    """

    names: AxisName = None
    param_specs: Any = None


class Layout(NamedTuple):
    """A window leaf inside of shard_map or pmap.

    Attributes:
      split: of the axes of its rows.
      summed: the mesh axes over which inner products with the leaf are partial.
      along: for each axis of its rows the mesh axes that parts of it are spread over; None where types
        tell that the leaf is a shard, and nothing declares how.
    """

    split: Split
    summed: tuple[str, ...]
    along: Split | None


def names_of(axis_name: AxisName) -> tuple[str, ...]:
    """The names, if any."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def bound_axes(axis_name: AxisName) -> dict[str, int]:
    """The names with their sizes, where they are manual axes of a shard_map or pmap; empty outside."""
    names = names_of(axis_name)
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


def varying_as(tree: Any, like: Any) -> Any:
    """The tree, whose arrays vary along what those of `like` do, also where that is one device."""
    return jax.tree.map(lambda x, y: vary(x, tuple(varying(y))), tree, like)


def vary(x: jax.Array, names: Sequence[str]) -> jax.Array:
    """The value as one that varies along the mesh axes, where types tell."""
    told = tuple(n for n in names if n in varying(lax.axis_index(n)) and n not in varying(x))
    return lax.pcast(x, told, to="varying") if told else x


def silent_axes() -> tuple[str, ...]:
    """The manual axes of two devices or more whose types do not tell what differs along them.

    So it is in pmap, and in shard_map with check_vma=False.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(n for n in manual if lax.axis_size(n) > 1 and n not in varying(lax.axis_index(n)))


def shards(name: str, tree: optax.Params, axes: ManualAxes) -> list[tuple[str, ...]]:
    """The named mesh axes along which each leaf is a shard, by its type, or by what the caller declared."""
    bound, silent = bound_axes(axes.names), silent_axes()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if axes.param_specs is None:
        return [tuple(axis for axis in bound if axis in varying(x)) for _, x in leaves]
    found = []
    for (path, x), spec in zip(leaves, _declared(name, leaves, axes.param_specs), strict=True):
        names = {axis for entry in spec for axis in axes_of(entry)}
        told = {axis: axis in varying(x) for axis in bound if axis not in silent and bound[axis] > 1}
        wrong = tuple(axis for axis in told if told[axis] != (axis in names))
        if wrong:
            differs = "varies" if told[wrong[0]] else "does not vary"
            raise ValueError(
                f"param_specs must be right about {name}, but the type of {leaf_name(path)} {differs} "
                f"along {wrong}. Average what should be equal (jax.lax.pmean), or leave param_specs out: "
                "with check_vma=True types tell."
            )
        # Types tell of axes with one device too.
        found.append(tuple(axis for axis in bound if axis in names or axis in varying(x)))
    return found


def _declared(name: str, leaves: Sequence[tuple[Any, Any]], specs: Any) -> list[PartitionSpec]:
    """The spec of each leaf; specs are a tree like the leaves', or a prefix of one."""
    given = dict(jax.tree_util.tree_leaves_with_path(specs))
    found = []
    for path, _ in leaves:
        own = [given[path[:depth]] for depth in range(len(path) + 1) if path[:depth] in given]
        if not own:
            raise ValueError(
                f"param_specs must be a tree like {name}, or a prefix of one, but there is none for "
                f"{leaf_name(path)}. Pass PartitionSpec() for what is equal on all devices."
            )
        found.append(own[0])
    return found


def spread(name: str, tree: optax.Params, axes: ManualAxes) -> list[tuple[tuple[str, ...], Split | None]]:
    """The mesh axes along which each leaf is a shard, and those of each of its axes if they are known."""
    leaves, sharded = jax.tree_util.tree_leaves_with_path(tree), shards(name, tree, axes)
    known: list[Split | None] = [
        None if names else ((),) * x.ndim for (_, x), names in zip(leaves, sharded, strict=True)
    ]
    if axes.param_specs is not None and bound_axes(axes.names):
        specs = _declared(name, leaves, axes.param_specs)
        known = [
            (*map(axes_of, spec), *[()] * x.ndim)[: x.ndim]
            for (_, x), spec in zip(leaves, specs, strict=True)
        ]
    return list(zip(sharded, known, strict=True))


def joined(along: Split | None, beyond: Split) -> Split | None:
    """The mesh axes that split a leaf, and then those that split its window further."""
    return None if along is None else tuple(a + b for a, b in zip(along, beyond, strict=True))


def check_along(name: str, tree: optax.Params, splits: Sequence[Split | None], storage: str) -> None:
    """Raise where nothing tells which axis of a leaf is split, for a storage that has to know."""
    for (path, _), known in zip(jax.tree_util.tree_leaves_with_path(tree), splits, strict=True):
        if known is None:
            raise ValueError(
                f"param_specs must say which axes of {name} are sharded with storage={storage!r}, which "
                f"takes entries of whole axes together: {leaf_name(path)} is a shard. Pass what in_specs "
                "of jax.shard_map has for the parameters, or storage=jnp.float32."
            )


def check_declared(
    name: str, tree: optax.Params, axes: ManualAxes, splits: Sequence[Split] | None = None
) -> None:
    """Raise where a leaf may be a shard or equal on all devices, and nothing tells which.

    A leaf whose window is split over all axes is equal on all devices: the window of a shard never is.
    """
    silent = silent_axes() if axes.param_specs is None else ()
    leaves = jax.tree_util.tree_leaves_with_path(tree) if silent else []
    for number, (path, x) in enumerate(leaves):
        if x.size and not (splits and set(silent) <= set(names_in(splits[number]))):
            raise ValueError(
                f"param_specs must say what {name} holds: {leaf_name(path)} may be a shard or "
                f"replicated along {silent}, which in jax.pmap, and with check_vma=False, types do not "
                "tell. Pass param_specs=PartitionSpec() where every device holds all of every parameter; "
                "for shards axis_name, and as param_specs what in_specs has for the parameters. Or use "
                "jax.shard_map with check_vma=True, its default."
            )


def check_param_specs(axes: ManualAxes) -> None:
    """Raise for anything but PartitionSpecs over named axes."""
    names = names_of(axes.names)
    for path, spec in jax.tree_util.tree_leaves_with_path(axes.param_specs):
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                "param_specs must be None, or PartitionSpecs in a tree like the parameters or a prefix of "
                f"one, got {spec!r} at {leaf_name(path)}. Pass what in_specs of jax.shard_map has for them."
            )
        unnamed = tuple(axis for entry in spec for axis in axes_of(entry) if axis not in names)
        if unnamed:
            raise ValueError(
                f"axis_name must name the mesh axes in param_specs, got {axes.names!r} and {spec} at "
                f"{leaf_name(path)}. Pass axis_name={tuple(dict.fromkeys((*names, *unnamed)))!r}."
            )


def layouts(
    name: str, tree: optax.Updates, rows: Sequence[tuple[int, ...]], axes: ManualAxes
) -> list[Layout]:
    """The layout of every leaf of the window, whose rows have these shapes on a device."""
    bound, leaves = bound_axes(axes.names), jax.tree_util.tree_leaves_with_path(tree)
    found = [
        _layout_of(path, x, row, bound, *shard)
        for (path, x), row, shard in zip(leaves, rows, spread(name, tree, axes), strict=True)
    ]
    check_declared(name, tree, axes, [layout.split for layout in found])
    return found


def beyond(shape: Sequence[int], axes: Mapping[str, int], sharded: Sequence[str]) -> Split:
    """How the window of a leaf is split further, which is a shard of this shape along some of the axes."""
    return split(shape, {name: size for name, size in axes.items() if name not in sharded})


def _layout_of(
    path,
    x: jax.Array,
    row: tuple[int, ...],
    axes: Mapping[str, int],
    sharded: tuple[str, ...],
    along: Split | None,
) -> Layout:
    """The layout of a leaf whose window has rows of this shape on a device."""
    planned = beyond(x.shape, axes, sharded)
    if names_in(planned) and row == local_shape(planned, x.shape):
        used = (*names_in(planned), *sharded)
        return Layout(planned, tuple(name for name in axes if name in used), joined(along, planned))
    if row == x.shape:
        return Layout(((),) * x.ndim, sharded, along)
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


def check_named(name: str, tree: optax.Updates, gram: jax.Array, axis_name: AxisName) -> None:
    """Raise for a leaf that varies along a mesh axis that is not named, unless the state varies too."""
    known = varying(gram) | set(bound_axes(axis_name))
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        unnamed = tuple(sorted(varying(x) - known))
        if unnamed:
            raise ValueError(
                f"axis_name must name the mesh axes of {name}, but {leaf_name(path)} varies along "
                f"{unnamed} and axis_name is {axis_name!r}. Pass them to axis_name, or average {name} over "
                "them."
            )


def local_shape(split: Split, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row of the window on one device."""
    return tuple(length // _parts(names) for names, length in zip(split, shape, strict=True))


def whole_shape(split: Split, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape on all devices of what has this one on one."""
    return tuple(length * _parts(names) for names, length in zip(split, shape, strict=True))


def _parts(names: Sequence[str]) -> int:
    return lax.axis_size(names) if names else 1


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
