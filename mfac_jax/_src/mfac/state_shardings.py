"""Shardings for whole optimizer states.

A leaf of the window follows its parameter, and may be split further: `rows/mesh.py` has the rule.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.mfac.state import ScaleByMFACState
from mfac_jax._src.mfac.state_checks import kind_of
from mfac_jax._src.mfac.tiles import sharding_of_squares
from mfac_jax._src.rows import host_memory, storage_kinds, storages
from mfac_jax._src.rows.mesh import (
    axes_of,
    replicated,
    row_sharding,
    sharding_of_array,
    window_sharding,
)


def state_shardings(tx: optax.GradientTransformation, params: optax.Params, param_shardings: Any) -> Any:
    """Tell `jax.jit` where the state of any optax chain lies on a mesh.

    Use the result for `jax.jit(tx.init, out_shardings=...)`, which never holds the window on one device,
    for `out_shardings` of the training step, for the specs of `jax.shard_map` (the `.spec` of each), and to
    restore a checkpoint.

    - An array shaped like a parameter is sharded as the parameter.
    - An array with one more axis in front (a window, the memory of L-BFGS) is sharded as the parameter, and
      further over mesh axes that the parameter does not use: M-FAC's window is split as far as it can be.
      Rows are never split. Scales of such a window go with their parts of it.
    - The state of M-FAC's metric goes with the window. All else is replicated.

    The further mesh axes all go to the longest axis of the parameter that they divide together, to the last
    only where there is no other. Where there is none, they go one after the other, the largest first.

    Args:
      tx: any transform.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.
      param_shardings: a `NamedSharding` for every parameter, or a `PartitionSpec` on the mesh of
        `jax.set_mesh`; a tree like `params`, a prefix of one, or one for all. Flax gives such trees:
        linen by `nn.get_sharding`, nnx by `nnx.get_named_sharding`.

    Returns:
      A tree of `NamedSharding` with the structure of `tx.init(params)`.

    Raises:
      TypeError: a sharding is neither; `tx` is no transform.
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
    if not callable(getattr(tx, "init", None)):
        raise TypeError(
            f"tx must be an optax.GradientTransformation, got {tx!r}. Pass e.g. mfac_jax.mfac(1e-3)."
        )
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    param_shardings, mesh = _checked(params, param_shardings)
    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
    state = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)  # the types know the memory

    def shardings_with(like_param):
        return optax.tree.map_params(
            tx,
            like_param,
            state,
            params,
            param_shardings,
            transform_non_params=lambda leaf: replicated(mesh, leaf.ndim),
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )

    def with_own(node, as_rows, as_arrays):
        """A metric sees the gradient as the window does: its arrays are sharded as rows.

        So is the remainder. The window is sharded as its storage says.
        """
        if not _is_mfac(node):
            return node
        window = _placed(node, as_arrays.window)
        return node._replace(window=window, metric=as_rows.metric, remainder=as_rows.remainder)

    shardings, as_rows, as_arrays = map(shardings_with, (_like_param, _like_row, _array_of))
    return jax.tree.map(with_own, shardings, as_rows, as_arrays, is_leaf=_is_mfac)


def _is_mfac(node) -> bool:
    return isinstance(node, ScaleByMFACState)


class _Array(NamedTuple):
    """An array of the window, beside the parameter that it belongs to and the sharding of that."""

    array: Any
    param: Any
    sharding: NamedSharding


def _array_of(leaf, param, sharding: NamedSharding):
    return leaf if isinstance(leaf, optax.MaskedNode) else _Array(leaf, param, sharding)


def _placed(shardings: ScaleByMFACState, window: Any) -> Any:
    """The shardings of the window, or others if its storage says along which axes its arrays go."""
    storage = storage_kinds.by_name(kind_of(shardings, "storage"))
    if storage is None or storage.axes is None:
        return shardings.window

    def place(number: int, leaf: _Array) -> NamedSharding:
        axes = storages.axes_of_leaf(storage, storage.row(leaf.param), leaf.param.ndim)[number]
        row = row_sharding(leaf.param.shape, leaf.sharding)
        own = sharding_of_array(leaf.array.shape[1:], axes, row)
        return _in_memory_of(leaf.array, window_sharding(own))

    return storages.map_arrays(storage, place, window, lambda node: isinstance(node, _Array))


def _like_param(leaf, param, sharding: NamedSharding):
    """The sharding of an array that belongs to a parameter."""
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    if leaf.shape == param.shape:
        return sharding
    if leaf.shape[1:] == param.shape:
        return _in_memory_of(leaf, window_sharding(row_sharding(param.shape, sharding)))
    if leaf.ndim == len(param.shape) + 1 and _are_groups(param.shape, leaf.shape[1:]):
        row = row_sharding(param.shape, sharding)
        own = sharding_of_array(leaf.shape[1:], tuple(range(len(param.shape))), row)
        return _in_memory_of(leaf, window_sharding(own))
    return replicated(sharding.mesh, leaf.ndim)


def _in_memory_of(leaf, sharding: NamedSharding) -> NamedSharding:
    """The sharding in memory of the host, where the traced leaf is there and its parts may be."""
    on_host = leaf.memory_space == jax.memory.Space.Host
    on_host &= host_memory.may_be_on_host(sharding.shard_shape(leaf.shape)[1:])
    return sharding.with_memory_kind(host_memory.HOST) if on_host else sharding


def _are_groups(shape: Sequence[int], groups: Sequence[int]) -> bool:
    """Whether its axes can be the parameter's, as long or shorter: scales of a window, or factors."""
    return all(
        (number > 0 or length == 0) and number <= length
        for length, number in zip(shape, groups, strict=True)
    )


def _like_row(leaf, param, sharding: NamedSharding):
    """As `_like_param`, but an array like the parameter, or one for its tiles, is sharded as a row."""
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    row = row_sharding(param.shape, sharding)
    if leaf.shape == param.shape:
        return row
    return sharding_of_squares(param.shape, row, leaf.shape) or _like_param(leaf, param, sharding)


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
    """The sharding as a NamedSharding; raise for anything else."""
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
    """Raise for a sharding that does not fit its parameter."""
    shape, spec = leaf.shape, sharding.spec
    if len(spec) > len(shape):
        raise ValueError(
            f"param_shardings must fit the parameters, but {spec} has {len(spec)} entries and "
            f"{leaf_name(path)} has the shape {shape}. Leave out an entry."
        )
    for axis, (length, entry) in enumerate(zip(shape, spec, strict=False)):
        size = math.prod(sharding.mesh.shape[name] for name in axes_of(entry))
        if length % size:
            raise ValueError(
                f"param_shardings must divide the parameters, but axis {axis} of {leaf_name(path)}, "
                f"{length} long, is split over {entry!r} of {size} devices. Pad the parameter, or leave "
                "the entry None."
            )
