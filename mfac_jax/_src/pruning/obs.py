"""The Optimal Brain Surgeon's model of the loss: what removing weights costs, and how the others follow.

F = damping I + G^T G / m takes the place of the Hessian matrix. The rows of G `(m, d)` are the gradients of
the survivors. All products with F^-1 go through the m x m matrix G G^T. Arrays as large as G are made for
one leaf at a time.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.base.numerics import Parts
from mfac_jax._src.base.stacks import check_stacked, products_fit
from mfac_jax._src.base.trees import check_tree, leaf_name
from mfac_jax._src.linalg.solve import inverse_root
from mfac_jax._src.pruning.masks import is_absent, zero_pruned
from mfac_jax._src.pruning.patterns import groups
from mfac_jax._src.rows import contractions

Update = Literal["joint", "independent"]


class Model(NamedTuple):
    """The quadratic model of the loss; the sequences are in the order of the leaves.

    Attributes:
      weights: the parameters.
      grads: the stacked gradients G, of pruned weights too.
      masks: what is kept before the step; None where a leaf takes no part.
      damping: in the dtype of the sums.
      fits: whether products of gradients are sure to fit the dtype of the sums.
      system: that of the gradients of what is kept.
    """

    weights: Sequence[jax.Array]
    grads: Sequence[jax.Array]
    masks: Sequence[jax.Array | None]
    damping: Parts
    fits: bool
    system: "System"


class System(NamedTuple):
    """The damped m x m system of masked gradients, D^-1 (G G^T + m damping I) D^-1 = K' + m damping D^-2.

    Attributes:
      rows: D^-1 G.
      exponents: those of D, a diagonal of powers of two, `(m,)`. They bring gradients of any size near one.
      root: A `(m, m)` with A^T A = (K' + m damping D^-2)^-1, G being zero where a weight is pruned.
    """

    rows: Sequence[jax.Array]
    exponents: jax.Array
    root: jax.Array


def quadratic_model(
    params: optax.Params, grads: optax.Params, damping: float | jax.Array, masks: Any
) -> Model:
    """The model from stacked gradients of the parameters; raises for anything else."""
    cure = "Stack them with jnp.stack, or use collect_gradients."
    check_tree("grads", grads, params, "the parameters", cure)
    largest = check_stacked(grads)
    rows, weights = jax.tree.leaves(grads), jax.tree.leaves(params)
    for (path, w), g in zip(jax.tree_util.tree_leaves_with_path(params), rows, strict=True):
        if g.shape[1:] != w.shape:
            raise ValueError(
                "grads must have the shapes of the parameters after one leading axis, but "
                f"{leaf_name(path)} is {g.shape} for {w.shape}. {cure}"
            )
    rows, kept = [jnp.asarray(g) for g in rows], at_leaves(masks, params)
    fits = products_fit(largest, damping)
    parts = numerics.parts(damping, numerics.accumulation_dtype([*rows, *weights]))
    return Model(weights, rows, kept, parts, fits, _system(rows, kept, parts, fits))


def at_leaves(masks: Any, params: optax.Params) -> list[jax.Array | None]:
    """The masks in the order of the leaves of the parameters, without nodes that stand for no leaf."""
    pairs = (jax.tree.leaves(tree, is_leaf=is_absent) for tree in (masks, params))
    return [mask for mask, w in zip(*pairs, strict=True) if not is_absent(w)]


def _system(
    grads: Sequence[jax.Array], masks: Sequence[jax.Array | None], damping: Parts, fits: bool
) -> System:
    """The system for these masks. Where products fit as they are, this saves a copy of the gradients."""
    m, dtype = len(grads[0]), damping.mantissa.dtype
    shift = damping._replace(mantissa=m * damping.mantissa)
    rows, exponents = grads, jnp.zeros((m,), jnp.int32)
    if not fits:
        largest = [_largest_kept(g, mask, shift) for g, mask in zip(grads, masks, strict=True)]
        exponents = numerics.exponents_near_one(functools.reduce(jnp.maximum, largest), shift)
        rows = [_scaled(g, mask, exponents, dtype) for g, mask in zip(grads, masks, strict=True)]
    gram = functools.reduce(
        jnp.add, (_gram_of_kept(g, mask, dtype) for g, mask in zip(rows, masks, strict=True))
    )
    return System(rows, exponents, _inverse_root(gram, shift, exponents))


@jax.jit
def _largest_kept(g: jax.Array, mask: jax.Array | None, like: Parts) -> jax.Array:
    kept = jnp.abs(zero_pruned(mask, g)).astype(like.mantissa.dtype)
    return jnp.max(kept, axis=tuple(range(1, g.ndim)), initial=0)


@functools.partial(jax.jit, static_argnames="dtype")
def _scaled(g: jax.Array, mask: jax.Array | None, exponents: jax.Array, dtype: jnp.dtype) -> jax.Array:
    kept = zero_pruned(mask, g).astype(dtype)
    return numerics.times_power(kept, -exponents.reshape(-1, *[1] * (g.ndim - 1)))


# Compiled for one leaf: in one program for all, XLA would hold all masked leaves at once, as large as G.
@functools.partial(jax.jit, static_argnames="dtype")
def _gram_of_kept(g: jax.Array, mask: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    return contractions.gram(zero_pruned(mask, g), dtype)


@jax.jit
def _inverse_root(gram: jax.Array, shift: Parts, exponents: jax.Array) -> jax.Array:
    shifts = numerics.times_power(shift.mantissa, shift.exponent - 2 * exponents)
    return inverse_root(gram[None], shifts[None])[0]


def scores(model: Model) -> list[jax.Array]:
    """The costs of pruning each entry alone, like the leaves that take part."""
    return [_scores_of_leaf(*leaf, model.system.root, model.damping) for leaf in _taking_part(model)]


def _taking_part(model: Model) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The weights, rows and masks of leaves with a mask."""
    leaves = zip(model.weights, model.system.rows, model.masks, strict=True)
    return [(w, g, mask) for w, g, mask in leaves if mask is not None]


@jax.jit
def _scores_of_leaf(
    w: jax.Array, g: jax.Array, mask: jax.Array, root: jax.Array, damping: Parts
) -> jax.Array:
    w = w.astype(root.dtype)
    exponent = numerics.exponent_of(w)
    square = damping.mantissa * jnp.square(numerics.times_power(w, -exponent))
    return numerics.within_range(square / (2 * _diagonal(g, mask, root)), 2 * exponent + damping.exponent)


def costs(
    model: Model, size: int, choices: np.ndarray, inputs: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """What pruning each choice of each group costs: `(groups, choices)` for each leaf that takes part.

    These are the roots of 2 cost / damping in one unit, which neither overflow nor vanish where weights are
    large or small.
    """
    leaves = _taking_part(model)
    exponent = _unit([w for w, _, _ in leaves], model.damping.mantissa.dtype)
    return [
        _costs_of_leaf(*leaf, model.system.root, exponent, size, choices, axes)
        for leaf, axes in zip(leaves, inputs, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="dtype")
def _unit(weights: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The exponent that leaves weights room for division by a small diagonal; 0 if they have it."""
    largest = numerics.largest_exponent([w.astype(dtype) for w in weights])
    return jnp.maximum(largest - (jnp.finfo(dtype).maxexp - 28), 0)


@functools.partial(jax.jit, static_argnames=("size", "inputs"))
def _costs_of_leaf(
    w: jax.Array,
    g: jax.Array,
    mask: jax.Array,
    root: jax.Array,
    exponent: jax.Array,
    size: int,
    choices: jax.Array | np.ndarray,
    inputs: tuple[int, ...],
) -> jax.Array:
    w = groups(numerics.times_power(w.astype(root.dtype), -exponent), size, inputs)
    if size == 1:
        return jnp.abs(w) / jnp.sqrt(groups(_diagonal(g, mask, root), 1, inputs))
    return _costs_of_choices(w, _diagonal_blocks(g, mask, root, size, inputs), jnp.asarray(choices))


@jax.jit
def _diagonal(g: jax.Array, mask: jax.Array, root: jax.Array) -> jax.Array:
    """The diagonal of damping F^-1 `(*shape)`.

    It is 1 - |column of W|^2. Where this difference is rounding noise, the size of that noise takes its
    place.
    """
    inside = contractions.column_squares(contractions.mix(root, zero_pruned(mask, g)))
    return jnp.maximum(1 - inside, jnp.finfo(root.dtype).eps)


def _diagonal_blocks(
    g: jax.Array, mask: jax.Array, root: jax.Array, size: int, inputs: tuple[int, ...]
) -> jax.Array:
    """The blocks of damping F^-1 that belong to groups `(groups, size, size)`, kept positive definite."""
    mixed = contractions.mix(root, zero_pruned(mask, g))
    columns = jax.vmap(lambda row: groups(row, size, inputs))(mixed)
    inside = jnp.einsum("kgi,kgj->gij", columns, columns, precision=jax.lax.Precision.HIGHEST)
    # More than rounding can take from an eigenvalue of I - W^T W: the Cholesky factors of the costs exist.
    noise = size * len(root) ** 0.5 * jnp.finfo(root.dtype).eps
    return (1 + noise) * jnp.eye(size, dtype=root.dtype)[None] - inside


def _costs_of_choices(w: jax.Array, inverse: jax.Array, choices: jax.Array) -> jax.Array:
    """The root of w_Q^T ([P]_QQ)^-1 w_Q for each choice Q, from weights and blocks of P of each group."""

    def cost(choice):
        # The unit matrix outside of Q leaves the product as it is, and all choices have one shape.
        inside = choice[:, None] & choice[None]
        part = jnp.where(inside[None], inverse, jnp.eye(len(choice), dtype=w.dtype)[None])
        removed = jnp.where(choice[None], w, 0)
        root = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(part), removed[..., None], lower=True)
        largest = jnp.max(jnp.abs(root), axis=(-2, -1), keepdims=True)
        unit = root / jnp.where(largest > 0, largest, 1)  # its squares do not vanish
        return largest[:, 0, 0] * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1)))

    return jax.lax.map(cost, choices).T


def follow(
    model: Model, new: Sequence[jax.Array | None], update: Update, gradient_term, step_limit
) -> list[jax.Array]:
    """The weights after the step: zero where they are pruned, and the survivors moved.

    On the survivors F^-1 G^T c = G^T (G G^T + m damping I)^-1 m c. So their move is a combination of their
    gradients.
    """
    weights, grads, old, damping, fits, before = model
    dtype = damping.mantissa.dtype
    removed = [_removed(*x) for x in zip(weights, old, new, strict=True)]
    removed, exponent = _near_one([w.astype(dtype) for w in removed])
    if update == "joint":
        after, alone = _system(grads, new, damping, fits), removed
    else:
        after = before
        alone = [
            w if mask is None else w / _diagonal(g, mask, before.root)
            for w, g, mask in zip(removed, before.rows, old, strict=True)
        ]
    inner = functools.reduce(
        jnp.add, (contractions.dots(g, w, dtype) for g, w in zip(before.rows, alone, strict=True))
    )
    inner, unit = _in_one_unit(inner, before.exponents + exponent, gradient_term, after.exponents)
    coefficients = _coefficients(after.root, inner)
    moves = [_move(coefficients, g, mask) for g, mask in zip(after.rows, new, strict=True)]
    share = _share(removed, moves, step_limit, exponent - unit)
    return [_after(w, move, mask, share, unit) for w, move, mask in zip(weights, moves, new, strict=True)]


def _removed(w: jax.Array, old: jax.Array | None, new: jax.Array | None) -> jax.Array:
    """The weights that this step prunes, zeros elsewhere."""
    # Not compiled: under explicit mesh axes jit refuses zeros like an argument that it does not read.
    return jnp.zeros_like(w) if old is None or new is None else zero_pruned(old & ~new, w)


@jax.jit
def _near_one(leaves: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The leaves over a power of two that brings the largest entry near one, and its exponent."""
    exponent = numerics.largest_exponent(leaves)
    return [numerics.times_power(x, -exponent) for x in leaves], exponent


@jax.jit
def _in_one_unit(
    inner: jax.Array, exponents: jax.Array, gradient_term: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """D^-1 (2^exponents inner - gradient_term), D = 2^scale, in a unit near it; and the unit's exponent."""
    pull = jnp.full_like(inner, gradient_term)
    nothing = jnp.iinfo(jnp.int32).min // 2

    def size(x, exponent):
        return jnp.max(jnp.where(x == 0, nothing, numerics.exponent_of(x) + exponent))

    unit = jnp.maximum(size(inner, exponents - scale), size(pull, -scale))
    unit = jnp.where(unit == nothing, 0, unit)
    inner = numerics.times_power(inner, exponents - scale - unit)
    return inner - numerics.times_power(pull, -scale - unit), unit


@jax.jit
def _coefficients(root: jax.Array, inner: jax.Array) -> jax.Array:
    half = jnp.matmul(root, inner, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(root.T, half, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _move(coefficients: jax.Array, g: jax.Array, mask: jax.Array | None) -> jax.Array:
    return zero_pruned(mask, contractions.combine(coefficients, g))


@jax.jit
def _share(
    removed: Sequence[jax.Array], moves: Sequence[jax.Array], step_limit: jax.Array, exponent: jax.Array
) -> jax.Array:
    """The share of the moves that the step limit allows, at most 1; weights are in units of 2^exponent."""
    moves, own = _near_one(moves)
    length, norm = optax.tree.norm(moves), optax.tree.norm(removed)
    step_limit = jnp.asarray(step_limit, length.dtype)
    is_limited = jnp.isfinite(step_limit)
    limit = numerics.times_power(jnp.where(is_limited, step_limit, 0) * norm, exponent - own)
    is_long = is_limited & (length > limit)
    return jnp.where(is_long, limit / jnp.where(is_long, length, 1), 1)


@jax.jit
def _after(w: jax.Array, move: jax.Array, mask: jax.Array | None, share: jax.Array, unit) -> jax.Array:
    moved = w.astype(move.dtype) + numerics.times_power(share * move, unit)
    return numerics.narrow(zero_pruned(mask, moved), w.dtype)
