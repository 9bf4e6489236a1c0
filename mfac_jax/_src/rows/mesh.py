"""Where the window lies on a mesh: the policy.

A leaf of the window follows its parameter, and may be split further over mesh axes that the parameter does
not use. The same rule decides in `manual_axes.py`, inside of shard_map and pmap.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

Result = TypeVar("Result", bound=Any)
# For each axis of a parameter the mesh axes that its window is split over, beyond those of the parameter.
Split = tuple[tuple[str, ...], ...]
# For each axis of one of the arrays that a row is made of, the leaf's axis that it goes along, or None.
AxesOfLeaf = tuple[int | None, ...]


def split(shape: Sequence[int], axes: Mapping[str, int]) -> Split:
    """Choose the axes of a leaf, of the local shape, that free mesh axes (name to size) split: the policy.

    All go to the longest axis of the leaf that they divide together. Where there is none, they go one after
    the other, the largest first, each to the longest axis that it divides. The last axis of the leaf is
    taken only where there is no other, because TPUs pad it to 128. An axis that divides none is not used.

    Rows are never split: under automatic mesh axes the compiler would split the m x m algebra too.
    """
    names = sorted((name for name in axes if axes[name] > 1), key=lambda name: (-axes[name], name))
    local = list(shape)
    chosen: list[tuple[str, ...]] = [() for _ in shape]

    def place(names: Sequence[str]) -> bool:
        size = math.prod(axes[name] for name in names)
        fitting = [i for i, length in enumerate(local) if 0 not in shape and length % size == 0]
        if fitting:
            longest = max(fitting, key=lambda i: (i < len(local) - 1, local[i]))
            chosen[longest] += tuple(names)
            local[longest] //= size
        return bool(fitting)

    if not place(names):
        for name in names:
            place([name])
    return tuple(chosen)


def names_in(split: Split) -> tuple[str, ...]:
    """All mesh axes in it."""
    return tuple(name for names in split for name in names)


def axes_of(entry) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def row_sharding(shape: Sequence[int], sharding: NamedSharding) -> NamedSharding:
    """The sharding of a row of a parameter's window: the parameter's own, and split further."""
    mesh = sharding.mesh
    entries = [axes_of(entry) for entry in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    used = {name for entry in entries for name in entry}
    local = [
        length // math.prod(mesh.shape[name] for name in entry)
        for length, entry in zip(shape, entries, strict=True)
    ]
    # Only explicit axes take part in types. On a mesh with both kinds a type can name no other.
    nameable = mesh.explicit_axes or mesh.axis_names
    free = {name: mesh.shape[name] for name in nameable if name not in used}
    spec = (own + more for own, more in zip(entries, split(local, free), strict=True))
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in spec)))


def window_sharding(row: NamedSharding) -> NamedSharding:
    """The sharding of the window whose rows are sharded so."""
    return NamedSharding(row.mesh, PartitionSpec(None, *row.spec))


def sharding_of_array(shape: Sequence[int], axes: AxesOfLeaf, row: NamedSharding) -> NamedSharding:
    """The sharding of one of the arrays that a row of the window is made of.

    Each axis is split as that of the row, as `row` has it, where the devices divide it, else whole.
    """
    of_row = dict(enumerate(map(axes_of, row.spec)))
    names = [() if axis is None else of_row.get(axis, ()) for axis in axes]
    entries = (
        own if length % math.prod(row.mesh.shape[name] for name in own) == 0 else ()
        for length, own in zip(shape, names, strict=True)
    )
    return NamedSharding(row.mesh, PartitionSpec(*(entry or None for entry in entries)))


def as_row(x: jax.Array) -> jax.Array:
    """A gradient, sharded as the rows that take it, where types tell how it is sharded."""
    sharding = explicit_sharding(x)
    return x if sharding is None else jax.reshard(x, row_sharding(x.shape, sharding))


def without_rows(sharding: NamedSharding) -> NamedSharding:
    """The sharding of a row of a window with this sharding, not of its rows."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def zeros_like_params(params: optax.Params) -> Callable[..., jax.Array]:
    """`jnp.zeros`, on all devices of the parameters' mesh where they are on one."""
    for leaf in jax.tree.leaves(params):
        sharding = named_sharding(leaf)
        if sharding is not None:
            return lambda shape, dtype: jnp.zeros(
                shape, dtype, device=replicated(sharding.mesh, len(shape))
            )
    return jnp.zeros


def replicated(mesh, ndim: int) -> NamedSharding:
    """With an entry for each axis, as explicit axes spell it: another spelling would compile anew."""
    return NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def named_sharding(leaf) -> NamedSharding | None:
    """The mesh sharding that an array, a ShapeDtypeStruct or, under explicit axes, a tracer has."""
    if isinstance(leaf, Tracer):
        return explicit_sharding(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def with_automatic_axes(
    function: Callable[..., Result], like: Any, axes: slice = slice(None)
) -> Callable[..., Result]:
    """The function with XLA choosing the shardings inside of it; its results are sharded as `like`.

    That is for products of matrices: where mesh axes are explicit, types would have to tell all of them.
    Of `like` the `axes` count.
    """

    def spec_of(x) -> PartitionSpec:
        sharding = explicit_sharding(x)
        return PartitionSpec() if sharding is None else PartitionSpec(*sharding.spec[axes])

    is_manual = bool(jax.sharding.get_abstract_mesh().manual_axes)
    if is_manual or all(explicit_sharding(x) is None for x in jax.tree.leaves(like)):
        return function
    specs: Any = jax.tree.map(spec_of, like)
    automatic: Any = jax.sharding.auto_axes(function, out_sharding=specs)
    return automatic


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding in the type of a value, where mesh axes are explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if not sharding.mesh.empty and sharding.mesh.explicit_axes else None
