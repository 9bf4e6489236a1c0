"""The window as a whole: what a step does with it, whatever its storage, blocks and place.

A `Plan` is made once a step, before a number is touched. Its products read the whole window; `write_row`
puts the new row into it, in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import numerics, trees
from mfac_jax._src.rows import host_memory, manual_axes, mesh, storages
from mfac_jax._src.rows.manual_axes import Layout, ManualAxes
from mfac_jax._src.rows.storages import Rows, Storage, main_array


class Plan(NamedTuple):
    """How the leaves of a tree meet the window.

    Attributes:
      storage: of the rows.
      structure: of the tree.
      blocks: the number of each leaf's block.
      layouts: where each leaf of the window lies on manual axes.
      host_chunk: rows of a window on the host that come to the device at a time.
    """

    storage: Storage
    structure: Any
    blocks: tuple[int, ...]
    layouts: tuple[Layout, ...]
    host_chunk: int | None = None

    def own_parts(self, tree: optax.Updates, window: Any) -> optax.Updates:
        """The parts of the tree that this device's part of the window belongs to."""
        if self.storage.shape is not None:  # never on manual axes
            return jax.tree.map(mesh.as_row, tree)
        arrays = map(main_array, storages.split(self.storage, window))
        return self._map_leaves(manual_axes.own_part, tree, arrays)

    def whole(self, parts: optax.Updates, like: optax.Updates) -> optax.Updates:
        """The tree from all devices' parts."""
        return self._map_leaves(manual_axes.whole, parts, jax.tree.leaves(like))

    def _map_leaves(self, function: Callable[..., jax.Array], tree, others) -> optax.Updates:
        splits = [layout.split for layout in self.layouts]
        return self.structure.unflatten(map(function, jax.tree.leaves(tree), others, splits))

    def encode(self, tree: optax.Updates, window: Any) -> Any:
        """The row of the window that stores the tree."""
        leaves = (jax.tree.leaves(tree), storages.split(self.storage, window), self.layouts)
        return storages.join(self.storage, self.structure, list(map(self._encode_leaf, *leaves)))

    def _encode_leaf(self, x: jax.Array, rows: Rows, layout: Layout) -> Any:
        if self.storage.encode_part is None or layout.along is None or not layout.summed:
            return self.storage.encode(x, rows)
        return manual_axes.varying_as(self.storage.encode_part(x, rows, layout.along), rows)

    def decode(self, row: Any) -> optax.Updates:
        """The tree that a row of the window stands for."""
        return self.structure.unflatten(map(self.storage.decode, storages.split(self.storage, row)))

    def dots(self, window: Any, tree: optax.Updates, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """G x for each block, `(blocks, m)` as `like`, and |x|^2 `(blocks,)`.

        One sum over the mesh for all leaves that are spread over the same axes.
        """
        leaves = zip(storages.split(self.storage, window), jax.tree.leaves(tree), strict=True)
        products = [
            jnp.append(self._dots_of_leaf(rows, x, like.dtype), numerics.square(x, like.dtype))
            for rows, x in leaves
        ]
        return self._summed(products, like)

    def dots_of_row(self, window: Any, row: Any, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `dots`, of the tree that a row stands for."""
        dots = self.storage.dots_of_row
        if dots is None or host_memory.is_on_host(window):
            return self.dots(window, self.decode(row), like)

        leaves = zip(*(storages.split(self.storage, tree) for tree in (window, row)), strict=True)
        products = [
            jnp.append(dots(rows, own, like.dtype), numerics.square(self.storage.decode(own), like.dtype))
            for rows, own in leaves
        ]
        return self._summed(products, like)

    def _summed(self, products: Sequence[jax.Array], like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sums over the leaves of a block, of G x and |x|^2 for each leaf."""
        # By the mesh axes that their sums are partial over, then by block.
        partial: dict[tuple[str, ...], dict[int, list[jax.Array]]] = {}
        for block, layout, product in zip(self.blocks, self.layouts, products, strict=True):
            group = partial.setdefault(layout.summed, {})
            group.setdefault(block, []).append(product)
        total = jnp.zeros_like(like, shape=(like.shape[0], like.shape[1] + 1))
        for axes, group in partial.items():
            stacked = jnp.stack(list(map(_sum, group.values())))
            total = total.at[jnp.asarray(list(group))].add(lax.psum(stacked, axes) if axes else stacked)
        return total[:, :-1], total[:, -1]

    def _dots_of_leaf(self, rows: Rows, x: jax.Array, dtype: Any) -> jax.Array:
        if host_memory.is_on_host(rows):
            return host_memory.dots(self.storage, rows, x, dtype, self.host_chunk)
        return self.storage.dots(rows, x, dtype)

    def combine(self, coefficients: jax.Array, window: Any) -> optax.Updates:
        """G^T c, each leaf with the coefficients of its block, on each device for its part of the window.

        The barrier makes the leaves wait for each other. Without it XLA for TPU would merge the
        coefficients' broadcasts over leaves that are sharded in different ways, and exchange whole leaves.
        """
        combined = []
        for block, rows in zip(self.blocks, storages.split(self.storage, window), strict=True):
            y = self._combine_leaf(coefficients[block], rows)
            if not manual_axes.varying(y):
                y, coefficients = lax.optimization_barrier((y, coefficients))
            combined.append(y)
        return self.structure.unflatten(combined)

    def add(self, tree: optax.Updates, weights: jax.Array, other: optax.Updates) -> optax.Updates:
        """The tree plus the other one, each leaf times the weight of its block."""
        leaves = zip(jax.tree.leaves(tree), self.blocks, jax.tree.leaves(other), strict=True)
        return self.structure.unflatten([x + weights[block] * y for x, block, y in leaves])

    def _combine_leaf(self, coefficients: jax.Array, rows: Rows) -> jax.Array:
        if host_memory.is_on_host(rows):
            return host_memory.combine(self.storage, coefficients, rows, self.host_chunk)
        return self.storage.combine(coefficients, rows)


def make_plan(
    name: str,
    tree: optax.Updates,
    window: Any,
    storage: Storage,
    blocks: Sequence[int],
    axes: ManualAxes,
    host_chunk: int | None = None,
) -> Plan:
    """The plan of a tree that fits the window; `name` is what errors call the tree."""
    shapes = [storages.shape_of_leaf(storage, rows) for rows in storages.split(storage, window)]
    structure = jax.tree.structure(tree)
    trees.check_tree(name, tree, storages.first_tree(storage, window))
    if axes.names is None:
        trees.check_shapes(name, tree, shapes)
    manual_axes.check_bound(axes.names)
    layouts = manual_axes.layouts(name, tree, shapes, axes)
    if storage.encode_part is not None:
        manual_axes.check_along(name, tree, [layout.along for layout in layouts], storage.name)
    return Plan(storage, structure, tuple(blocks), tuple(layouts), host_chunk)


def _sum(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of vectors of one length, as one operation.

    XLA would repeat separate additions for every entry of the Gram matrix: with 1,000 leaves and m = 1024 a
    step took 3.4 s in place of 0.1. It turns the sum of a stack into additions too, hence the reshape.
    """
    return jnp.sum(jnp.concatenate(leaves).reshape(len(leaves), -1), axis=0)


def gram(window: Any, storage: Storage, blocks: Sequence[int] | jax.Array, like: jax.Array) -> jax.Array:
    """The Gram matrices of the whole window, `(blocks, m, m)` as `like`."""
    total = jnp.zeros_like(like)
    for number, rows in enumerate(storages.split(storage, window)):
        total = total.at[blocks[number]].add(storages.gram(storage, rows, like.dtype))
    return total


@jax.jit  # a user's step may run outside of jit: there a bare lax.cond is compiled at every call
def write_row(window: Any, row: Any, index: jax.Array, accept: jax.Array) -> Any:
    """The window with `row` at `index`, or unchanged where `accept` is false.

    This is what keeps a donated step in place. `accept` has to come from the inner products with the window
    as it was read for them: so the write waits for that reading, and XLA needs no copy. Which of two ways
    does without one is up to the platform.
    """
    arguments = (window, row, index, accept)
    if host_memory.is_on_host(window):  # XLA for TPU could carry a host buffer through the conditional
        return _write_either(*arguments)
    return lax.platform_dependent(
        *arguments, cuda=_write_either, rocm=_write_either, default=_write_or_leave
    )


def _write_either(window: Any, row: Any, index: jax.Array, accept: jax.Array) -> Any:
    """Write the new row or, again, the old one: XLA for GPU copies what a conditional carries."""

    def put(rows, x):
        old = host_memory.to_device(lax.dynamic_index_in_dim(rows, index, 0))
        new = host_memory.to_memory_of(rows, jnp.where(accept, x[None], old))
        return lax.dynamic_update_slice_in_dim(rows, new, index, 0)

    return jax.tree.map(put, window, row)


def _write_or_leave(window: Any, row: Any, index: jax.Array, accept: jax.Array) -> Any:
    """Write the row in a conditional: XLA for CPU copies all rows otherwise."""

    def write(window, row):
        return jax.tree.map(lambda rows, x: _put(rows, x, index), window, row)

    return lax.cond(accept, write, lambda window, row: window, window, row)


def _put(rows: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """The rows with `x` at `index`."""

    def update(rows, x, index):
        return lax.dynamic_update_index_in_dim(rows, x, index, 0)

    if rows.dtype == jnp.bfloat16:
        return lax.platform_dependent(rows, x, index, cpu=_put_bfloat16, default=update)
    return update(rows, x, index)


@jax.custom_jvp
def _put_bfloat16(rows: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """As `_put` on CPU, where XLA of jax 0.10 would turn all rows into float32 and back.

    As a choice between integers it is an operation on each entry, in place, that changes one row only.
    """
    is_row = lax.broadcasted_iota(index.dtype, rows.shape, 0) == index
    new, old = (lax.bitcast_convert_type(y, jnp.uint16) for y in (x[None], rows))
    return lax.bitcast_convert_type(jnp.where(is_row, new, old), rows.dtype)


@_put_bfloat16.defjvp
def _put_bfloat16_jvp(primals, tangents):
    # Integers have no derivative, and bits no transpose.
    rows, x, index = primals
    return _put_bfloat16(rows, x, index), lax.dynamic_update_index_in_dim(*tangents[:2], index, 0)
