"""Where the window lies on a mesh: the policy, shardings for whole optimizer states, and manual axes.

A leaf of the window follows its parameter, and may be split further over mesh axes that the parameter does
not use. The same rule decides for `state_shardings`, which looks at meshes from outside, and inside of
shard_map and pmap, where only the local shapes can be seen: there a leaf's `Layout` is found again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax import _memory

AxisName = str | Sequence[str] | None


# For each axis of a parameter the mesh axes that its window is split over, beyond those of the parameter.
Split = tuple[tuple[str, ...], ...]


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
        """Of a leaf that is whole."""
        return Layout(((),) * ndim, ())


def split(shape: Sequence[int], axes: Mapping[str, int]) -> Split:
    """The policy: which of the free mesh axes, name to size, go where on a leaf of the local shape.

    All to the longest axis of the parameter that they divide together, the last axis only where there is no
    other, because TPUs pad it to 128; else one after the other, the largest first, in the same way; an axis
    that divides none is not used. (Rows are never split: under automatic mesh axes the compiler would split
    the m x m algebra too.)
    """
    names = sorted((name for name in axes if axes[name] > 1), key=lambda name: (-axes[name], name))
    local = list(shape)
    chosen: list[tuple[str, ...]] = [() for _ in shape]

    def place(names: Sequence[str]) -> bool:
        size = math.prod(axes[name] for name in names)
        fitting = [i for i, length in enumerate(local) if length and length % size == 0]
        if fitting:
            longest = max(fitting, key=lambda i: (i < len(local) - 1, local[i]))
            chosen[longest] += tuple(names)
            local[longest] //= size
        return bool(fitting)

    if not place(names):
        for name in names:
            place([name])
    return tuple(chosen)


def _names(split: Split) -> tuple[str, ...]:
    """All mesh axes in it."""
    return tuple(name for names in split for name in names)


# ----------------------------------------------------------------------------- shardings from outside


def _axes_of(entry) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def row_sharding(shape: Sequence[int], sharding: NamedSharding) -> NamedSharding:
    """The sharding of a row of a parameter's window: the parameter's own, and split further."""
    mesh = sharding.mesh
    entries = [_axes_of(entry) for entry in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    used = {name for entry in entries for name in entry}
    local = [
        length // math.prod(mesh.shape[name] for name in entry)
        for length, entry in zip(shape, entries, strict=True)
    ]
    free = {name: size for name, size in mesh.shape.items() if name not in used}
    spec = (own + more for own, more in zip(entries, split(local, free), strict=True))
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in spec)))


def window_sharding(row: NamedSharding) -> NamedSharding:
    """The sharding of the window whose rows are sharded so."""
    return NamedSharding(row.mesh, PartitionSpec(None, *row.spec))


def state_shardings(tx: optax.GradientTransformation, params: optax.Params, param_shardings: Any) -> Any:
    """Shardings for the state of any optax chain, M-FAC's window split over all axes it can use.

    What has the shape of a parameter is sharded as the parameter. An array with one more axis in front (a
    window, the memory of L-BFGS) is sharded as the parameter, and further over mesh axes that the parameter
    does not use: all to the longest axis of the parameter that they divide together, the last axis only
    where there is no other (TPUs pad it to 128); else one after the other; what divides none is not used.
    With replicated parameters the window so takes 1 / devices of its memory on each. The second moment of
    the diagonal metric goes with the window. All else is replicated.

    For `jax.jit(tx.init, out_shardings=...)`, which makes the window in place and never holds it on one
    device, for `out_shardings` of the training step, for `in_specs` and `out_specs` of `jax.shard_map` (the
    `.spec` of each), and for the restore of a checkpoint.

    Args:
      tx: any transform.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.
      param_shardings: a `NamedSharding` for every parameter, or a `PartitionSpec` on the mesh of
        `jax.set_mesh`, in a tree like `params`, or one for all. Flax gives such trees: linen by
        `nn.get_sharding` and `nn.logical_to_mesh_sharding`, nnx by `nnx.get_named_sharding`. Parameters may
        be in linen's boxes.

    Returns:
      A tree of `NamedSharding` with the structure of `tx.init(params)`.

    Raises:
      TypeError: a sharding is neither.
      ValueError: no mesh is set for a `PartitionSpec`; the trees differ; a spec has more entries than its
        parameter has axes; the mesh axes of an entry do not divide the parameter's; shardings are on
        different meshes.

    Example:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
      >>> params = {'w': jnp.zeros((64, 64))}
      >>> tx = mfac_jax.mfac(1e-3, num_grads=8)
      >>> shardings = mfac_jax.state_shardings(tx, params, {'w': NamedSharding(mesh, P())})
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    param_shardings = _checked(params, param_shardings)
    meshes = {sharding.mesh for sharding in jax.tree.leaves(param_shardings)}
    if len(meshes) != 1:
        raise ValueError(f"param_shardings must have one mesh, got {len(meshes)}: {meshes}.")
    mesh = meshes.pop()

    def like_param(leaf, param, sharding):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.shape == param.shape:
            return sharding
        if leaf.shape[1:] == param.shape:
            found = window_sharding(row_sharding(param.shape, sharding))
            on_host = leaf.memory_space == jax.memory.Space.Host
            on_host &= _memory.may_be_on_host(found.shard_shape(leaf.shape)[1:])
            return found.with_memory_kind(_memory.HOST) if on_host else found
        return _replicated(mesh, leaf.ndim)

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    state = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)  # the types know the memory
    shardings = optax.tree.map_params(
        tx,
        like_param,
        state,
        params,
        param_shardings,
        transform_non_params=lambda leaf: _replicated(mesh, leaf.ndim),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return jax.tree.map(_with_metric, shardings, is_leaf=_holds_window)


def _holds_window(node) -> bool:
    return hasattr(node, "second_moment") and hasattr(node, "window")


def _with_metric(node):
    """The shardings of M-FAC's state, the second moment's those of the window without its rows."""
    if not _holds_window(node) or isinstance(node.second_moment, optax.EmptyState):
        return node
    return node._replace(second_moment=jax.tree.map(without_rows, node.window))


def without_rows(sharding: NamedSharding) -> NamedSharding:
    """The sharding of a row of a window with this sharding, not of its rows."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _checked(params: optax.Params, param_shardings: Any) -> Any:
    """A NamedSharding that fits for every parameter, from a tree or a prefix of one."""
    is_sharding = lambda x: isinstance(x, (jax.sharding.Sharding, PartitionSpec))  # noqa: E731
    try:
        shardings = jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda _: sharding, part),
            param_shardings,
            params,
            is_leaf=is_sharding,
        )
    except ValueError as error:
        raise ValueError(
            f"param_shardings must have the tree of params, or be a prefix of it: {error}"
        ) from None

    def named(path, leaf, sharding):
        return _as_named(f"leaf {jax.tree_util.keystr(path) or '()'}", leaf.shape, sharding)

    return jax.tree_util.tree_map_with_path(named, params, shardings, is_leaf=is_sharding)


def _as_named(name: str, shape: Sequence[int], sharding: Any) -> NamedSharding:
    """The NamedSharding for an array of the shape; what is none, or does not fit, is refused."""
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"param_shardings has the PartitionSpec {sharding} for {name}, but no mesh is set. Call "
                "jax.set_mesh(mesh) before, or pass NamedSharding(mesh, spec)."
            )
        sharding = NamedSharding(mesh, sharding)
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"param_shardings must be NamedShardings or PartitionSpecs, but that of {name} is "
            f"{sharding!r}. Pass NamedSharding(mesh, spec)."
        )
    spec = sharding.spec
    if len(spec) > len(shape):
        raise ValueError(
            f"param_shardings must fit the parameters, but {spec} has {len(spec)} entries and {name} has "
            f"the shape {tuple(shape)}. Leave out an entry."
        )
    for axis, (length, entry) in enumerate(zip(shape, spec, strict=False)):
        size = math.prod(sharding.mesh.shape[name] for name in _axes_of(entry))
        if length % size:
            raise ValueError(
                f"param_shardings must divide the parameters, but axis {axis} of {name}, {length} long, is "
                f"split over {entry!r} of {size} devices. Pad the parameter, or leave the entry None."
            )
    return sharding


# -------------------------------------------------------------------------------------------- manual axes


def bound_axes(axis_name: AxisName) -> dict[str, int]:
    """The names with their sizes, where they are manual axes of a shard_map or pmap; empty outside."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    bound = {name: lax.axis_size(name) for name in names if name in manual}
    if bound and len(bound) < len(names):
        missing = ", ".join(repr(name) for name in names if name not in bound)
        raise ValueError(f"axis_name must hold axes of the shard_map or pmap around it, got {missing}.")
    return bound


def check_bound(axis_name: AxisName) -> None:
    """Refuse an update outside of the axes."""
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


def local_shape(split: Split, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row of the window on one device."""
    parts = [lax.axis_size(names) if names else 1 for names in split]
    return tuple(length // part for length, part in zip(shape, parts, strict=True))


def empty_rows(
    params: optax.Params,
    dtype: Any,
    axis_name: AxisName,
    num_rows: int | None = None,
    on_host: bool = False,
) -> Any:
    """Zeros like rows of the window, `num_rows` in front or one without an axis of rows.

    They are of the dtype, or of the leaf's where that is None; sharded by the policy; local on manual axes.
    """
    axes = bound_axes(axis_name)
    leading = () if num_rows is None else (num_rows,)

    def zeros(leaf):
        sharding = named_sharding(leaf)
        row = None if sharding is None else row_sharding(leaf.shape, sharding)
        sharding = window_sharding(row) if row is not None and num_rows is not None else row
        sharded = tuple(name for name in axes if name in varying(leaf))
        beyond = split(leaf.shape, {name: size for name, size in axes.items() if name not in sharded})
        shape, varying_over = local_shape(beyond, leaf.shape), (*_names(beyond), *sharded)
        on_device = shape if row is None else row.shard_shape(shape)
        if num_rows and on_host and _memory.may_be_on_host(on_device):
            like_row = (shape, dtype or leaf.dtype, row, varying_over)
            outside = None if isinstance(leaf, Tracer) else sharding or getattr(leaf, "sharding", None)
            return _memory.zero_rows(_varying_zeros, like_row, num_rows, outside)
        return _varying_zeros((*leading, *shape), dtype or leaf.dtype, sharding, varying_over)

    return jax.tree.map(zeros, params)


def _varying_zeros(shape, dtype, sharding: NamedSharding | None, axes: tuple[str, ...]) -> jax.Array:
    """Zeros that vary along manual axes as what will take their place, where types tell."""
    zeros = jnp.zeros(shape, dtype, device=sharding)
    axes = tuple(name for name in axes if name in varying(lax.axis_index(name)))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def zeros_like_params(params: optax.Params) -> Callable[..., jax.Array]:
    """`jnp.zeros`, on all devices of the parameters' mesh where they are on one."""
    for leaf in jax.tree.leaves(params):
        sharding = named_sharding(leaf)
        if sharding is not None:
            return lambda shape, dtype: jnp.zeros(
                shape, dtype, device=_replicated(sharding.mesh, len(shape))
            )
    return jnp.zeros


def _replicated(mesh, ndim: int) -> NamedSharding:
    """With an entry for each axis, as compiled steps return it: another spelling would compile anew."""
    return NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def named_sharding(leaf) -> NamedSharding | None:
    """The mesh sharding that an array, a ShapeDtypeStruct or, under explicit axes, a tracer has."""
    if isinstance(leaf, Tracer):
        return explicit_sharding(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def layouts(updates: optax.Updates, window: optax.Params, axis_name: AxisName) -> list[Layout]:
    """The layout of every leaf of the window, found from the local shapes.

    Where values carry no axes (check_vma=False, pmap), a leaf whose window is split is replicated, and one
    whose window is whole is a shard if it could have been split.
    """
    axes = bound_axes(axis_name)
    knows = _knows_varying(axes)
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for (path, x), rows in zip(leaves, jax.tree.leaves(window), strict=True):
        sharded = tuple(name for name in axes if name in varying(x))
        free = {name: size for name, size in axes.items() if name not in sharded}
        planned = split(x.shape, free)
        if _names(planned) and rows.shape[1:] == local_shape(planned, x.shape):
            used = (*_names(planned), *sharded)
            found.append(Layout(planned, tuple(name for name in axes if name in used)))
        elif rows.shape[1:] == x.shape:
            is_shard = not knows and _names(planned)
            found.append(Layout.local(x.ndim)._replace(summed=tuple(axes) if is_shard else sharded))
        else:
            raise ValueError(
                f"state must hold rows of {x.shape} for leaf {jax.tree_util.keystr(path) or '()'} on each "
                f"device, or of {local_shape(planned, x.shape)} split over {tuple(free)}, got "
                f"{rows.shape[1:]}. Take the specs of the state from mfac_jax.state_shardings, and name in "
                "axis_name all mesh axes that they use."
            )
    if not knows:
        _check_told_apart(updates, found)
    return found


def _check_told_apart(updates: optax.Updates, found: Sequence[Layout]) -> None:
    """Refuse a leaf that may be a shard or replicated, next to leaves that are shards."""
    whole = [not _names(layout.split) for layout in found]
    unknown = [i for i, layout in enumerate(found) if whole[i] and not layout.summed]
    unknown = [i for i in unknown if jax.tree.leaves(updates)[i].size]
    if unknown and (all(whole) or any(layout.summed for i, layout in enumerate(found) if whole[i])):
        path = jax.tree_util.tree_leaves_with_path(updates)[unknown[0]][0]
        raise ValueError(
            f"leaf {jax.tree_util.keystr(path) or '()'} may be a shard or replicated, and without "
            "check_vma that cannot be told. Use jax.shard_map with check_vma=True, its default."
        )


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
            to = "invarying" if varying(y) else "varying"
            y = lax.all_gather(y, names, axis=axis, tiled=True, to=to)
    return y


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding in the type of a value, where mesh axes are explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if not sharding.mesh.empty and sharding.mesh.explicit_axes else None
