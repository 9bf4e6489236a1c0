"""How the rows of the window are stored: the seam.

A storage sees one leaf of the parameters at a time. It says what a row of the leaf is made of, brings
gradients into that form and back, and contracts many rows. Where the rows lie (on one device, on a mesh, in
memory of the host) and when they are written is the window's business: `window.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.rows.mesh import AxesOfLeaf, Split

Rows = Any  # what `row` returns, each array with a leading axis of m rows


class Storage(NamedTuple):
    """Stores the window's rows in a form of your choice: pass it as `storage` to `scale_by_mfac`.

    A row is an array or a NamedTuple of arrays, the same for all leaves. Its first array has the leaf's
    shape, if `shape` does not say otherwise. Arrays with as many axes as the leaf, as long or shorter, are
    sharded as it, if `axes` does not say otherwise. All functions are pure, and see one leaf.

    Attributes:
      name: recorded in the state. A state is refused by a storage of another name.
      row: from a `jax.ShapeDtypeStruct` of the leaf to those of a row.
      encode: from a gradient (float32, or float64) and the leaf's rows to a row. A NaN has to stay one.
      decode: from a row to the gradient that it stands for.
      dots: `(rows, x, dtype)` to the inner products `(m,)` of the rows and x, summed up in `dtype`.
      combine: `(coefficients, rows)` to the sum of coefficients `(m,)` times rows, in their dtype.
      gram: `(rows, dtype)` to the inner products `(m, m)`. None: from `dots`, a row at a time.
      map: `(function, rows)` to the rows of `function(gradient)`. None: by `encode` and `decode`, a row at
        a time.
      shape: from a row, of arrays or of shapes, to the shape of the leaf. None: that of the first array.
      keeps_remainder: keep a running mean of what rows leave out, gradient minus decoded row, in float32,
        and precondition it with them: for rows that are far from the gradients.
      encode_part: `(gradient, rows, along)` to a row, of the part of a leaf that a device has with
        `axis_name`; `along` has, for each axis of the leaf, the mesh axes that parts of it are spread over.
        None: `encode`, for rows of one array. Others are refused with `axis_name`, and so are those with a
        `shape`.
      axes: from a row, of shapes, to a list with a tuple for each of its arrays: for each axis of the array
        the axis of the leaf that it goes along, or None. `state_shardings` asks it of the package's own
        storages alone, and takes other arrays with fewer axes as replicated.
      dots_of_row: `(rows, row, dtype)` to `dots(rows, decode(row), dtype)`. None: that.

    Example:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> half = mfac_jax.components.Storage(
      ...   name='float16',
      ...   row=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16),
      ...   encode=lambda x, rows: x.astype(jnp.float16),
      ...   decode=lambda row: row.astype(jnp.float32),
      ...   dots=lambda rows, x, dtype: jnp.einsum('mi,i->m', rows.astype(dtype), x),
      ...   combine=lambda c, rows: jnp.einsum('m,mi->i', c, rows.astype(c.dtype)),
      ... )
      >>> state = mfac_jax.scale_by_mfac(num_grads=4, storage=half).init(jnp.zeros(3))
      >>> state.window.dtype
      dtype('float16')
    """

    name: str
    row: Callable[[jax.ShapeDtypeStruct], Any]
    encode: Callable[[jax.Array, Rows], Any]
    decode: Callable[[Any], jax.Array]
    dots: Callable[[Rows, jax.Array, Any], jax.Array]
    combine: Callable[[jax.Array, Rows], jax.Array]
    gram: Callable[[Rows, Any], jax.Array] | None = None
    map: Callable[[Callable[[jax.Array], jax.Array], Rows], Rows] | None = None
    shape: Callable[[Any], tuple[int, ...]] | None = None
    keeps_remainder: bool = False
    encode_part: Callable[[jax.Array, Rows, Split], Any] | None = None
    axes: Callable[[Any], list[AxesOfLeaf]] | None = None
    dots_of_row: Callable[[Rows, Any, Any], jax.Array] | None = None


def gram(storage: Storage, rows: Rows, dtype: Any) -> jax.Array:
    """The inner products `(m, m)` of the rows."""
    if storage.gram is not None:
        return storage.gram(rows, dtype)

    def dots_of_row(row):
        return storage.dots(rows, storage.decode(row).astype(dtype), dtype)

    return lax.map(dots_of_row, rows)


def map_rows(storage: Storage, function: Callable[[jax.Array], jax.Array], rows: Rows) -> Rows:
    """The rows of what the function makes of each gradient."""
    if storage.map is not None:
        return storage.map(function, rows)

    def one(row):
        return storage.encode(function(storage.decode(row)), rows)

    return lax.map(one, rows)


def main_array(rows: Rows) -> jax.Array:
    """The first array of the rows: of most storages, that with the axes of the leaf."""
    return jax.tree.leaves(rows)[0]


def shape_of_leaf(storage: Storage, rows: Rows) -> tuple[int, ...]:
    """The shape of the leaf, from the rows of it."""
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.float32), rows)
    return main_array(row).shape if storage.shape is None else storage.shape(row)


def axes_of_leaf(storage: Storage, row: Any, ndim: int) -> list[AxesOfLeaf]:
    """For each array of a row, of shapes, the axes of the leaf that its axes go along."""
    if storage.axes is not None:
        return storage.axes(row)
    shapes = [array.shape for array in jax.tree.leaves(row)]
    return [tuple(range(ndim)) if len(shape) == ndim else (None,) * len(shape) for shape in shapes]


def takes_parts(storage: Storage) -> bool:
    """Whether it works where a device has a part of a leaf alone."""
    is_one_array = _structure(storage).num_leaves == 1
    return storage.shape is None and (is_one_array or storage.encode_part is not None)


def split(storage: Storage, window: Any) -> list[Rows]:
    """The rows of each leaf.

    The window is the storage's structure with a tree like the parameters at each of its arrays: so
    `optax.tree.map_params` finds trees like the parameters in it.
    """
    outer = _structure(storage)
    arrays = (jax.tree.leaves(tree) for tree in outer.flatten_up_to(window))
    return [outer.unflatten(leaf) for leaf in zip(*arrays, strict=True)]


def first_tree(storage: Storage, window: Any) -> Any:
    """A tree like the parameters out of the window."""
    return _structure(storage).flatten_up_to(window)[0]


def map_arrays(
    storage: Storage, function: Callable[[int, Any], Any], window: Any, is_leaf: Callable[[Any], bool]
) -> Any:
    """The window with `function(number, leaf)` of the leaves of the tree for each array of a row."""
    outer = _structure(storage)
    trees = enumerate(outer.flatten_up_to(window))
    return outer.unflatten(
        jax.tree.map(functools.partial(function, number), tree, is_leaf=is_leaf) for number, tree in trees
    )


def join(storage: Storage, structure: Any, rows: Sequence[Rows]) -> Any:
    """The window, or a row of it, from those of each leaf; `structure` is that of the parameters."""
    outer = _structure(storage)
    arrays = [outer.flatten_up_to(leaf) for leaf in rows]
    return outer.unflatten(
        structure.unflatten([leaf[number] for leaf in arrays]) for number in range(outer.num_leaves)
    )


def _structure(storage: Storage) -> Any:
    """The structure of a row, from a made-up leaf: the tree may have none."""
    return jax.tree.structure(storage.row(jax.ShapeDtypeStruct((8, 8), jnp.float32)))
