"""The rotated metric: the running mean of squares in the eigenbases of each matrix's two covariances.

With g (n1 x n2) the gradient of a matrix, Q_L and Q_R the eigenbases of the running means of g g^T and
g^T g, and v that of (Q_L^T g Q_R)^2, both maps are

    P g = Q_L (v^-1/4 * (Q_L^T g Q_R)) Q_R^T.

P is symmetric and works in the coordinates of the parameters, so bases may turn while rows of older ones
stand in the window. This is the second moment of SOAP (Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener,
Janson, Kakade, arXiv 2409.11321, 2024). Leaves of other shapes are cut into matrices (`tiles.py`); vectors
have the diagonal metric.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import numerics
from mfac_jax._src.base.accept import select
from mfac_jax._src.linalg.batches import of_each
from mfac_jax._src.mfac.diagonal_metric import running_mean, scale_of
from mfac_jax._src.mfac.metric import Coordinates, Metric
from mfac_jax._src.mfac.tiles import Tiles, sharding_of_sides, tiles_of
from mfac_jax._src.rows import mesh

_DECAY = 0.95  # of all means; 0.99 ends 2 % higher on text
# Of a tile's root mean square: what is smaller may be rounding. Exact zeros do not survive a rotation.
_FLOOR = 1e-3
# Bases turn at so many steps, and at each of the first ones: every step is no better on text.
_EVERY = 10
# Of the largest entry of a covariance: less says nothing of a direction, which keeps its place then.
# Rounding would turn it otherwise, and updates would differ by percents from one machine to the next.
_UNSEEN = 1e-4


Multiply = Callable[[jax.Array, jax.Array], jax.Array]


class RotatedMetricState(NamedTuple):
    """State of the rotated metric. Of a side that is not rotated, covariance and basis are a zero.

    Attributes:
      second_moment: running mean of the squared gradients in the bases, without its bias correction.
      row_covariance: the same of g g^T, for each tile.
      column_covariance: the same of g^T g.
      row_basis: Q_L, orthogonal.
      column_basis: Q_R.
    """

    second_moment: optax.Params  # leaves like the parameters', float32, float64 with a float64 leaf
    row_covariance: optax.Params  # (down, across, rows, rows)
    column_covariance: optax.Params  # (down, across, columns, columns)
    row_basis: optax.Params
    column_basis: optax.Params


class _Leaf(NamedTuple):
    """What the state has for one leaf; in the order of `RotatedMetricState`."""

    second_moment: jax.Array
    row_covariance: jax.Array
    column_covariance: jax.Array
    row_basis: jax.Array
    column_basis: jax.Array


def _init(new: Callable[[], optax.Params]) -> RotatedMetricState:
    def of_side(is_row: bool, is_basis: bool) -> optax.Params:
        return jax.tree.map(lambda x: _first_of_side(x, is_row, is_basis), new())

    sides = (of_side(is_row, is_basis) for is_basis in (False, True) for is_row in (True, False))
    return RotatedMetricState(new(), *sides)


def _first_of_side(leaf: jax.Array, is_row: bool, is_basis: bool) -> jax.Array:
    """The first covariance, zero, or the first basis, the identity."""
    tiles, row = tiles_of(leaf.shape), mesh.named_sharding(leaf)
    if tiles is None or not (tiles.turns_rows if is_row else tiles.turns_columns):
        return jnp.zeros((), leaf.dtype, device=None if row is None else mesh.replicated(row.mesh, 0))
    side = tiles.rows if is_row else tiles.columns
    sharding = None if row is None else sharding_of_sides(leaf.shape, row, side)
    zeros = jnp.zeros(tiles.squares(side), leaf.dtype, device=sharding)
    return zeros + jnp.eye(side, dtype=leaf.dtype)[None, None] if is_basis else zeros


def _update(
    state: RotatedMetricState, gradients: optax.Updates, count: jax.Array
) -> tuple[RotatedMetricState, Coordinates]:
    leaves, structure = jax.tree.flatten(gradients)
    before = list(map(_Leaf, *map(structure.flatten_up_to, state)))
    after = mesh.with_automatic_axes(_next, before)(leaves, before, count)
    scales = mesh.with_automatic_axes(_scales, leaves)(after, count)

    def mapped(multiply: Multiply):
        def apply(tree):
            xs = structure.flatten_up_to(tree)
            of_all = functools.partial(_mapped, multiply)
            return structure.unflatten(mesh.with_automatic_axes(of_all, xs)(xs, after, scales))

        return apply

    fields = ([getattr(leaf, name) for leaf in after] for name in RotatedMetricState._fields)
    state = RotatedMetricState(*map(structure.unflatten, fields))
    return state, Coordinates(mapped(jnp.multiply), mapped(numerics.scaled))


@jax.jit  # outside of a user's jit, the loop would be compiled at every call
def _next(gradients: list[jax.Array], leaves: list[_Leaf], count: jax.Array) -> list[_Leaf]:
    """The means and bases with one more gradient."""
    leaves = list(map(_with_covariances, gradients, leaves))
    leaves = _turned_if((count <= _EVERY) | (count % _EVERY == 0), leaves)
    return list(map(_with_second_moment, gradients, leaves))


def _with_covariances(gradient: jax.Array, leaf: _Leaf) -> _Leaf:
    tiles = tiles_of(gradient.shape)
    if tiles is None:
        return leaf
    g = tiles.split(gradient)
    if tiles.turns_rows:
        leaf = leaf._replace(row_covariance=running_mean(leaf.row_covariance, _product(g, g.mT), _DECAY))
    if tiles.turns_columns:
        covariance = running_mean(leaf.column_covariance, _product(g.mT, g), _DECAY)
        leaf = leaf._replace(column_covariance=covariance)
    return leaf


def _with_second_moment(gradient: jax.Array, leaf: _Leaf) -> _Leaf:
    tiles = tiles_of(gradient.shape)
    if tiles is not None:
        gradient = tiles.join(_into_bases(tiles.split(gradient), leaf, tiles))
    return leaf._replace(second_moment=running_mean(leaf.second_moment, jnp.square(gradient), _DECAY))


@jax.jit
def _scales(leaves: list[_Leaf], count: jax.Array) -> list[jax.Array]:
    """v^-1/4 of each, bounded where v is rounding."""

    def scale(v):
        tiles = tiles_of(v.shape)
        if tiles is None:
            return scale_of(v, count, _DECAY)
        v = tiles.split(v)
        floor = _FLOOR * numerics.root(jnp.mean(v, axis=(-2, -1), keepdims=True))
        return tiles.join(scale_of(jnp.square(numerics.root(v) + floor), count, _DECAY))

    return [scale(leaf.second_moment) for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def _mapped(
    multiply: Multiply, xs: list[jax.Array], leaves: list[_Leaf], scales: list[jax.Array]
) -> list[jax.Array]:
    """P x."""
    return [_mapped_leaf(multiply, *each) for each in zip(xs, leaves, scales, strict=True)]


def _mapped_leaf(multiply: Multiply, x: jax.Array, leaf: _Leaf, scale: jax.Array) -> jax.Array:
    tiles = tiles_of(x.shape)
    if tiles is None:
        return multiply(x, scale)
    turned = multiply(_into_bases(tiles.split(x), leaf, tiles), tiles.split(scale))
    if tiles.turns_rows:
        turned = _product(leaf.row_basis, turned)
    if tiles.turns_columns:
        turned = _product(turned, leaf.column_basis.mT)
    return tiles.join(turned)


def _into_bases(x: jax.Array, leaf: _Leaf, tiles: Tiles) -> jax.Array:
    """Q_L^T x Q_R."""
    if tiles.turns_rows:
        x = _product(leaf.row_basis.mT, x)
    return _product(x, leaf.column_basis) if tiles.turns_columns else x


@jax.custom_jvp
def _turned_if(turns: jax.Array, leaves: list[_Leaf]) -> list[_Leaf]:
    """The leaves, with their bases turned if `turns`.

    One loop for all leaves, of one turn or none: a conditional would copy what it carries, and at each a
    GPU waits for the host.
    """
    return lax.while_loop(
        lambda carry: carry[-1], lambda carry: (_turned(carry[0]), jnp.array(False)), (leaves, turns)
    )[0]


@_turned_if.defjvp
def _derivative_of_turned_if(primals, tangents):
    """Turned in any case: reverse mode goes through no such loop."""
    (turns, leaves), (_, moves) = primals, tangents
    return select(turns, jax.jvp(_turned, (leaves,), (moves,)), (leaves, moves))


def _turned(leaves: list[_Leaf]) -> list[_Leaf]:
    """The leaves with their bases a step of the orthogonal iteration further."""

    def turn(basis, covariance):
        return basis if basis.ndim == 0 else _nearer(basis, covariance)

    return [
        leaf._replace(
            row_basis=turn(leaf.row_basis, leaf.row_covariance),
            column_basis=turn(leaf.column_basis, leaf.column_covariance),
        )
        for leaf in leaves
    ]


def _nearer(basis: jax.Array, covariance: jax.Array) -> jax.Array:
    """A basis nearer to the eigenvectors: orthonormal columns of the covariance times the basis.

    The first columns get the largest eigenvalues.
    """
    largest = jnp.max(jnp.abs(covariance), axis=(-2, -1), keepdims=True)
    product = _product(covariance / jnp.where(largest > 0, largest, 1), basis) + _UNSEEN * basis
    one_axis = product.reshape(-1, *product.shape[2:])
    return of_each(lambda x: jnp.linalg.qr(x)[0], one_axis).reshape(product.shape)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


ROTATED = Metric("rotated", _init, _update)
