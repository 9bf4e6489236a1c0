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
from mfac_jax._src.base.stacks import check_stacked
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
      rows: the stacked gradients G, of pruned weights too.
      masks: what is kept before the step; None where a leaf takes no part.
      damping: in the dtype of the sums.
      root: A `(m, m)` with A^T A = (G G^T + m damping I)^-1, G being zero where a weight is pruned.
    """

    weights: Sequence[jax.Array]
    rows: Sequence[jax.Array]
    masks: Sequence[jax.Array | None]
    damping: jax.Array
    root: jax.Array


def quadratic_model(
    params: optax.Params, grads: optax.Params, damping: float | jax.Array, masks: Any
) -> Model:
    """The model from stacked gradients of the parameters; raises for anything else."""
    cure = "Stack them with jnp.stack, or use collect_gradients."
    check_tree("grads", grads, params, "the parameters", cure)
    check_stacked(grads)
    rows, weights = jax.tree.leaves(grads), jax.tree.leaves(params)
    for (path, w), g in zip(jax.tree_util.tree_leaves_with_path(params), rows, strict=True):
        if g.shape[1:] != w.shape:
            raise ValueError(
                "grads must have the shapes of the parameters after one leading axis, but "
                f"{leaf_name(path)} is {g.shape} for {w.shape}. {cure}"
            )
    rows, kept = [jnp.asarray(g) for g in rows], at_leaves(masks, params)
    damping = jnp.asarray(damping, numerics.accumulation_dtype([*rows, *weights]))
    return Model(weights, rows, kept, damping, _root(rows, kept, damping))


def at_leaves(masks: Any, params: optax.Params) -> list[jax.Array | None]:
    """The masks in the order of the leaves of the parameters, without nodes that stand for no leaf."""
    pairs = (jax.tree.leaves(tree, is_leaf=is_absent) for tree in (masks, params))
    return [mask for mask, w in zip(*pairs, strict=True) if not is_absent(w)]


def _root(rows: Sequence[jax.Array], masks: Sequence[jax.Array | None], damping: jax.Array) -> jax.Array:
    """The root of `Model`, for these masks."""
    gram = functools.reduce(
        jnp.add, (_gram_of_kept(g, mask, damping) for g, mask in zip(rows, masks, strict=True))
    )
    return _inverse_root(gram, len(rows[0]) * damping)


# Compiled for one leaf: in one program for all, XLA would hold all masked leaves at once, as large as G.
@jax.jit
def _gram_of_kept(g: jax.Array, mask: jax.Array | None, damping: jax.Array) -> jax.Array:
    return contractions.gram(zero_pruned(mask, g), damping.dtype)


@jax.jit
def _inverse_root(gram: jax.Array, shift: jax.Array) -> jax.Array:
    return inverse_root(gram[None], shift)[0]


def costs(model: Model, size: int, choices: jax.Array | np.ndarray) -> list[jax.Array]:
    """The costs of pruning each choice of each group: `(groups, choices)` for each leaf that takes part."""
    return [
        _costs_of_leaf(w, g, mask, model.root, model.damping, size, choices)
        for w, g, mask in zip(model.weights, model.rows, model.masks, strict=True)
        if mask is not None
    ]


@functools.partial(jax.jit, static_argnames="size")
def _costs_of_leaf(
    w: jax.Array,
    g: jax.Array,
    mask: jax.Array,
    root: jax.Array,
    damping: jax.Array,
    size: int,
    choices: jax.Array | np.ndarray,
) -> jax.Array:
    w = groups(w.astype(damping.dtype), size)
    if size == 1:
        diagonal = _diagonal(g, mask, root) / damping
        return jnp.square(w) / (2 * groups(diagonal, 1))
    inverse = _diagonal_blocks(g, mask, root, size) / damping
    return _costs_of_choices(w, inverse, jnp.asarray(choices))


@jax.jit
def _diagonal(g: jax.Array, mask: jax.Array, root: jax.Array) -> jax.Array:
    """The diagonal of damping F^-1 `(*shape)`.

    It is 1 - |column of W|^2. Where this difference is rounding noise, the size of that noise takes its
    place.
    """
    inside = contractions.column_squares(contractions.mix(root, zero_pruned(mask, g)))
    return jnp.maximum(1 - inside, jnp.finfo(root.dtype).eps)


def _diagonal_blocks(g: jax.Array, mask: jax.Array, root: jax.Array, size: int) -> jax.Array:
    """The blocks of damping F^-1 that belong to groups `(groups, size, size)`, kept positive definite."""
    mixed = contractions.mix(root, zero_pruned(mask, g))
    columns = jax.vmap(lambda row: groups(row, size))(mixed)
    inside = jnp.einsum("kgi,kgj->gij", columns, columns, precision=jax.lax.Precision.HIGHEST)
    # More than rounding can take from an eigenvalue of I - W^T W: the Cholesky factors of the costs exist.
    noise = size * len(root) ** 0.5 * jnp.finfo(root.dtype).eps
    return (1 + noise) * jnp.eye(size, dtype=root.dtype)[None] - inside


def _costs_of_choices(w: jax.Array, inverse: jax.Array, choices: jax.Array) -> jax.Array:
    """w_Q^T ([F^-1]_QQ)^-1 w_Q / 2 for each choice Q, from weights `(groups, size)` and blocks of F^-1."""

    def cost(choice):
        # The unit matrix outside of Q leaves the product as it is, and all choices have one shape.
        inside = choice[:, None] & choice[None]
        part = jnp.where(inside, inverse, jnp.eye(len(choice), dtype=w.dtype))
        removed = jnp.where(choice, w, 0)
        root = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(part), removed[..., None], lower=True)
        return jnp.sum(jnp.square(root), axis=(-2, -1)) / 2

    return jax.lax.map(cost, choices).T


def follow(
    model: Model, new: Sequence[jax.Array | None], update: Update, gradient_term, step_limit
) -> list[jax.Array]:
    """The weights after the step: zero where they are pruned, and the survivors moved.

    On the survivors F^-1 G^T c = G^T (G G^T + m damping I)^-1 m c. So their move is a combination of their
    gradients.
    """
    weights, rows, old, damping, root = model
    removed = [_removed(*x) for x in zip(weights, old, new, strict=True)]
    if update == "joint":
        root, alone = _root(rows, new, damping), removed
    else:
        alone = [
            w if mask is None else w / _diagonal(g, mask, root)
            for w, g, mask in zip(removed, rows, old, strict=True)
        ]
    inner = functools.reduce(
        jnp.add, (contractions.dots(g, w, damping.dtype) for g, w in zip(rows, alone, strict=True))
    )
    coefficients = _coefficients(root, inner - gradient_term)
    moves = [_move(coefficients, g, mask) for g, mask in zip(rows, new, strict=True)]
    share = _share(removed, moves, step_limit)
    return [_after(w, move, mask, share) for w, move, mask in zip(weights, moves, new, strict=True)]


def _removed(w: jax.Array, old: jax.Array | None, new: jax.Array | None) -> jax.Array:
    """The weights that this step prunes, zeros elsewhere."""
    # Not compiled: under explicit mesh axes jit refuses zeros like an argument that it does not read.
    return jnp.zeros_like(w) if old is None or new is None else zero_pruned(old & ~new, w)


@jax.jit
def _coefficients(root: jax.Array, inner: jax.Array) -> jax.Array:
    half = jnp.matmul(root, inner, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(root.T, half, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _move(coefficients: jax.Array, g: jax.Array, mask: jax.Array | None) -> jax.Array:
    return zero_pruned(mask, contractions.combine(coefficients, g))


@jax.jit
def _share(removed: Sequence[jax.Array], moves: Sequence[jax.Array], step_limit) -> jax.Array:
    """The share of the moves that the step limit allows, at most 1."""
    length, limit = optax.tree.norm(moves), step_limit * optax.tree.norm(removed)
    return jnp.where(length > limit, limit / length, 1)  # no limit if it is Inf times 0


@jax.jit
def _after(w: jax.Array, move: jax.Array, mask: jax.Array | None, share: jax.Array) -> jax.Array:
    moved = w.astype(move.dtype) + share * move
    return numerics.narrow(zero_pruned(mask, moved), w.dtype)
