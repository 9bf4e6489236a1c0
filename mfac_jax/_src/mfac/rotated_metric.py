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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import checks, numerics
from mfac_jax._src.base.accept import select
from mfac_jax._src.linalg.batches import of_each
from mfac_jax._src.mfac.diagonal_metric import running_mean, scale_of
from mfac_jax._src.mfac.metric import Coordinates, Metric
from mfac_jax._src.mfac.tiles import (
    BLOCK_SIZE,
    BLOCK_SIZES,
    Side,
    Tiles,
    sharding_of_squares,
    tiles_of,
)
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
TilesOfAll = Callable[[Sequence[jax.Array]], tuple[Tiles | None, ...]]


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
    row_covariance: optax.Params  # (*grid, rows, rows)
    column_covariance: optax.Params  # (*grid, columns, columns)
    row_basis: optax.Params
    column_basis: optax.Params


class _Leaf(NamedTuple):
    """What the state has for one leaf; in the order of `RotatedMetricState`."""

    second_moment: jax.Array
    row_covariance: jax.Array
    column_covariance: jax.Array
    row_basis: jax.Array
    column_basis: jax.Array


def rotated_metric(block_size: int = BLOCK_SIZE) -> Metric:
    """Make the rotated metric with blocks of your size, which fit the parts that devices have of a leaf.

    It is a running second moment in the eigenbases of each matrix's two covariances: `metric='rotated'`
    with the default size. A smaller block costs less and sees less of a matrix. On a
    mesh, pass a size that divides each device's part of an axis: then no tile lies on two devices, and none
    of the metric's arithmetic waits for another device.

    Args:
      block_size: sides of a matrix are cut into parts of at most this length: a power of two from 8 to
        8192. A step takes about 24 times so many operations for each parameter.

    Returns:
      The metric.

    Raises:
      ValueError: `block_size` is no such power.

    Example:
      >>> import mfac_jax
      >>> metric = mfac_jax.components.rotated_metric(block_size=128)
      >>> tx = mfac_jax.mfac(1e-2, num_grads=8, metric=metric)

    References:
      Nikhil Vyas, Depen Morwani, Rosie Zhao, Mujin Kwun, Itai Shapira, David Brandfonbrener, Lucas Janson,
      Sham Kakade, `SOAP: Improving and Stabilizing Shampoo using Adam <https://arxiv.org/abs/2409.11321>`_,
      2024.
    """
    if checks.check_size("block_size", block_size, "128") not in BLOCK_SIZES:
        raise ValueError(
            f"block_size must be a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, got "
            f"{block_size!r}. Pass e.g. 128."
        )
    return _of_size(int(block_size))


@functools.cache  # one object for each size: a metric is told from a user's own by it
def _of_size(block_size: int) -> Metric:
    tiles = functools.partial(_tiles_of_all, block_size)
    return Metric(
        "rotated" if block_size == BLOCK_SIZE else f"rotated, blocks of {block_size}",
        functools.partial(_init, tiles),
        functools.partial(_update, tiles),
    )


def _tiles_of_all(block_size: int, leaves: Sequence[jax.Array]) -> tuple[Tiles | None, ...]:
    return tuple(tiles_of(leaf.shape, block_size) for leaf in leaves)


def _init(tiles_of_all: TilesOfAll, new: Callable[[], optax.Params]) -> RotatedMetricState:
    leaves, structure = jax.tree.flatten(new())
    firsts = list(map(_first, leaves, tiles_of_all(leaves)))
    return _state_of(structure, firsts)


def _first(leaf: jax.Array, tiles: Tiles | None) -> _Leaf:
    """What the state has for a leaf before the first gradient."""

    def squares(side: Side | None) -> jax.Array:
        row = mesh.named_sharding(leaf)
        if tiles is None or side is None or not side.turns:
            return jnp.zeros((), leaf.dtype, device=None if row is None else mesh.replicated(row.mesh, 0))
        shape = tiles.squares(side)
        sharding = None if row is None else sharding_of_squares(leaf.shape, row, shape)
        return jnp.zeros(shape, leaf.dtype, device=sharding)

    sides = (None, None) if tiles is None else (tiles.above, tiles.behind)
    bases = (_with_ones(squares(side)) for side in sides)
    return _Leaf(leaf, *map(squares, sides), *bases)


def _with_ones(zeros: jax.Array) -> jax.Array:
    """The identities of this shape; of no basis, the zero."""
    if not zeros.ndim:
        return zeros
    return zeros + jnp.broadcast_to(jnp.eye(zeros.shape[-1], dtype=zeros.dtype), zeros.shape)


def _state_of(structure: Any, leaves: Sequence[_Leaf]) -> RotatedMetricState:
    fields = ([getattr(leaf, name) for leaf in leaves] for name in RotatedMetricState._fields)
    return RotatedMetricState(*map(structure.unflatten, fields))


def _update(
    tiles_of_all: TilesOfAll, state: RotatedMetricState, gradients: optax.Updates, count: jax.Array
) -> tuple[RotatedMetricState, Coordinates]:
    leaves, structure = jax.tree.flatten(gradients)
    tiles = tiles_of_all(leaves)
    before = list(map(_Leaf, *map(structure.flatten_up_to, state)))
    after = mesh.with_automatic_axes(functools.partial(_next, tiles), before)(leaves, before, count)
    scales = mesh.with_automatic_axes(functools.partial(_scales, tiles), leaves)(after, count)

    def mapped(multiply: Multiply):
        def apply(tree):
            xs = structure.flatten_up_to(tree)
            of_all = functools.partial(_mapped, multiply, tiles)
            return structure.unflatten(mesh.with_automatic_axes(of_all, xs)(xs, after, scales))

        return apply

    return _state_of(structure, after), Coordinates(mapped(jnp.multiply), mapped(numerics.scaled))


@functools.partial(jax.jit, static_argnums=0)  # outside of a user's jit, the loop would be compiled anew
def _next(
    tiles: tuple[Tiles | None, ...], gradients: list[jax.Array], leaves: list[_Leaf], count: jax.Array
) -> list[_Leaf]:
    """The means and bases with one more gradient."""
    leaves = list(map(_with_covariances, tiles, gradients, leaves))
    leaves = _turned_if((count <= _EVERY) | (count % _EVERY == 0), leaves)
    return list(map(_with_second_moment, tiles, gradients, leaves))


def _with_covariances(tiles: Tiles | None, gradient: jax.Array, leaf: _Leaf) -> _Leaf:
    if tiles is None:
        return leaf
    g = tiles.split(gradient)
    if tiles.above.turns:
        leaf = leaf._replace(row_covariance=running_mean(leaf.row_covariance, _product(g, g.mT), _DECAY))
    if tiles.behind.turns:
        covariance = running_mean(leaf.column_covariance, _product(g.mT, g), _DECAY)
        leaf = leaf._replace(column_covariance=covariance)
    return leaf


def _with_second_moment(tiles: Tiles | None, gradient: jax.Array, leaf: _Leaf) -> _Leaf:
    if tiles is not None:
        gradient = tiles.join(_into_bases(tiles, tiles.split(gradient), leaf))
    return leaf._replace(second_moment=running_mean(leaf.second_moment, jnp.square(gradient), _DECAY))


@functools.partial(jax.jit, static_argnums=0)
def _scales(tiles: tuple[Tiles | None, ...], leaves: list[_Leaf], count: jax.Array) -> list[jax.Array]:
    """v^-1/4 of each, bounded where v is rounding."""

    def scale(tiles, v):
        if tiles is None:
            return scale_of(v, count, _DECAY)
        v = tiles.split(v)
        floor = _FLOOR * numerics.root(jnp.mean(v, axis=(-2, -1), keepdims=True))
        return tiles.join(scale_of(jnp.square(numerics.root(v) + floor), count, _DECAY))

    return [scale(cut, leaf.second_moment) for cut, leaf in zip(tiles, leaves, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mapped(
    multiply: Multiply,
    tiles: tuple[Tiles | None, ...],
    xs: list[jax.Array],
    leaves: list[_Leaf],
    scales: list[jax.Array],
) -> list[jax.Array]:
    """P x."""
    return [_mapped_leaf(multiply, *each) for each in zip(tiles, xs, leaves, scales, strict=True)]


def _mapped_leaf(
    multiply: Multiply, tiles: Tiles | None, x: jax.Array, leaf: _Leaf, scale: jax.Array
) -> jax.Array:
    if tiles is None:
        return multiply(x, scale)
    turned = multiply(_into_bases(tiles, tiles.split(x), leaf), tiles.split(scale))
    if tiles.above.turns:
        turned = _product(leaf.row_basis, turned)
    if tiles.behind.turns:
        turned = _product(turned, leaf.column_basis.mT)
    return tiles.join(turned)


def _into_bases(tiles: Tiles, x: jax.Array, leaf: _Leaf) -> jax.Array:
    """Q_L^T x Q_R."""
    if tiles.above.turns:
        x = _product(leaf.row_basis.mT, x)
    return _product(x, leaf.column_basis) if tiles.behind.turns else x


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
    return of_each(lambda x: jnp.linalg.qr(x)[0], product, axes=product.ndim - 2)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
