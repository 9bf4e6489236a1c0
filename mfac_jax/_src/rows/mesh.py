"""Where the window lies on a mesh: the policy, and shardings for whole optimizer states.

A leaf of the window follows its parameter, and may be split further over mesh axes that the parameter does
not use. The same rule decides in `manual_axes.py`, inside of shard_map and pmap.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.rows import host_memory

# For each axis of a parameter the mesh axes that its window is split over, beyond those of the parameter.
Split = tuple[tuple[str, ...], ...]


def split(shape: Sequence[int], axes: Mapping[str, int]) -> Split:
    """The policy: which of the free mesh axes, name to size, go where on a leaf of the local shape.

    All to the longest axis of the parameter that they divide together, the last axis only where there is no
    other, because TPUs pad it to 128; else one after the other, the largest first, in the same way; an axis
    that divides none is not used, and a leaf without entries is not split. (Rows are never split: under
    automatic mesh axes the compiler would split the m x m algebra too.)
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
    # Explicit axes take part in types, the others do not: of a mesh with both, a type can name the former.
    nameable = mesh.explicit_axes or mesh.axis_names
    free = {name: mesh.shape[name] for name in nameable if name not in used}
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
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    param_shardings, mesh = _checked(params, param_shardings)

    def like_param(leaf, param, sharding):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.shape == param.shape:
            return sharding
        if leaf.shape[1:] == param.shape:
            found = window_sharding(row_sharding(param.shape, sharding))
            on_host = leaf.memory_space == jax.memory.Space.Host
            on_host &= host_memory.may_be_on_host(found.shard_shape(leaf.shape)[1:])
            return found.with_memory_kind(host_memory.HOST) if on_host else found
        return replicated(mesh, leaf.ndim)

    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
    state = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)  # the types know the memory
    shardings = optax.tree.map_params(
        tx,
        like_param,
        state,
        params,
        param_shardings,
        transform_non_params=lambda leaf: replicated(mesh, leaf.ndim),
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


def _checked(params: optax.Params, param_shardings: Any) -> tuple[Any, Any]:
    """A NamedSharding that fits for every parameter, from a tree or a prefix of one, and their mesh."""
    is_sharding = lambda x: isinstance(x, (jax.sharding.Sharding, PartitionSpec))  # noqa: E731
    given = jax.tree_util.tree_map_with_path(_as_named, param_shardings, is_leaf=is_sharding)
    try:
        shardings = jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda _: sharding, part),
            given,
            params,
            is_leaf=is_sharding,
        )
    except ValueError as error:
        raise ValueError(
            "param_shardings must have the tree of params, or be a prefix of it, with "
            f"NamedSharding(mesh, PartitionSpec()) for what is replicated: {error}"
        ) from None
    meshes = {sharding.mesh for sharding in jax.tree.leaves(given)}
    if len(meshes) != 1:
        raise ValueError(f"param_shardings must have one mesh, got {len(meshes)}: {meshes}.")
    jax.tree_util.tree_map_with_path(_check_fits, params, shardings)
    return shardings, meshes.pop()


def _as_named(path, sharding: Any) -> NamedSharding:
    """The NamedSharding that is meant; what is none is refused."""
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_mesh()
        mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
        if mesh.empty:
            raise ValueError(
                f"param_shardings has the PartitionSpec {sharding} for {leaf_name(path)}, but no mesh is "
                "set. Call jax.set_mesh(mesh) before, or pass NamedSharding(mesh, spec)."
            )
        sharding = NamedSharding(mesh, sharding)
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"param_shardings must be NamedShardings or PartitionSpecs, but that of {leaf_name(path)} is "
            f"{sharding!r}. Pass NamedSharding(mesh, spec)."
        )
    return sharding


def _check_fits(path, leaf, sharding: NamedSharding) -> None:
    """Refuse a sharding that is not one of the parameter."""
    shape, spec = leaf.shape, sharding.spec
    if len(spec) > len(shape):
        raise ValueError(
            f"param_shardings must fit the parameters, but {spec} has {len(spec)} entries and "
            f"{leaf_name(path)} has the shape {shape}. Leave out an entry."
        )
    for axis, (length, entry) in enumerate(zip(shape, spec, strict=False)):
        size = math.prod(sharding.mesh.shape[name] for name in _axes_of(entry))
        if length % size:
            raise ValueError(
                f"param_shardings must divide the parameters, but axis {axis} of {leaf_name(path)}, "
                f"{length} long, is split over {entry!r} of {size} devices. Pad the parameter, or leave "
                "the entry None."
            )


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
    """With an entry for each axis, as compiled steps return it: another spelling would compile anew."""
    return NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def named_sharding(leaf) -> NamedSharding | None:
    """The mesh sharding that an array, a ShapeDtypeStruct or, under explicit axes, a tracer has."""
    if isinstance(leaf, Tracer):
        return explicit_sharding(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding in the type of a value, where mesh axes are explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if not sharding.mesh.empty and sharding.mesh.explicit_axes else None
