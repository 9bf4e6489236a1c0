"""The systems of one step: one per layer, several for stacked layers, or one for a whole operator."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax._src.base import numerics, trees
from mfac_jax._src.cgfac import curvature_checks
from mfac_jax._src.cgfac.layers import Factors, LayerFactors, LayerFisher
from mfac_jax._src.cgfac.operators import Operator
from mfac_jax._src.linalg import conjugate_gradients
from mfac_jax._src.linalg.conjugate_gradients import Limits
from mfac_jax._src.rows import mesh


class SolvedLeaf(NamedTuple):
    """A leaf of a solution, with what the state reports of its system."""

    x: jax.Array
    residual: jax.Array  # () of the dtype of x
    iterations: jax.Array  # () int32
    indefinite: jax.Array  # () bool


def solve_whole(
    operator: Operator, preconditioner: Operator | None, gradient: optax.Updates, limits: Limits
) -> list[SolvedLeaf]:
    """One system for all leaves."""
    if not jax.tree.leaves(gradient):
        return []

    def on_block(name: str, operator: Operator) -> conjugate_gradients.Product:
        def product(blocks):
            y = operator(blocks[0])
            curvature_checks.check_product(name, y, blocks[0])
            return [jax.tree.map(lambda y, x: y.astype(x.dtype), y, blocks[0])]

        return product

    multiply = on_block("curvature", operator)
    precondition = on_block("preconditioner", preconditioner) if preconditioner else lambda blocks: blocks
    found = conjugate_gradients.solve(multiply, [gradient], limits, precondition)
    return [_of_block(x, found, 0) for x in jax.tree.leaves(found.blocks[0])]


@functools.partial(jax.jit, static_argnames="num_batches")  # a bare loop compiles at each call
def solve_layers(
    factors: Factors, gradient: optax.Updates, mean_squares: jax.Array, limits: Limits, num_batches: int
) -> list[SolvedLeaf]:
    """A system for each layer; leaves without factors in closed form. In the order of the leaves."""
    solve = functools.partial(_solve_layers, num_batches=num_batches)
    # The factors have the batch's mesh axes and the gradient its own: no type holds for all products.
    scalar = jnp.zeros(())
    like = [SolvedLeaf(g, scalar, scalar, scalar) for g in jax.tree.leaves(gradient)]
    return mesh.with_automatic_axes(solve, like)(factors, gradient, mean_squares, limits)


def _solve_layers(
    factors: Factors, gradient: optax.Updates, mean_squares: jax.Array, limits: Limits, num_batches: int
) -> list[SolvedLeaf]:
    grads, damping = trees.paths_and_leaves(gradient), limits.damping
    layers = [
        LayerFisher.of(of_layer, grads[kernel].dtype, damping.dtype, num_batches)
        for kernel, of_layer in factors.items()
    ]
    matrices = [_matrices(grads, kernel, of_layer) for kernel, of_layer in factors.items()]
    coordinates = [layer.coordinates(V) for layer, V in zip(layers, matrices, strict=True)]

    def product(blocks):
        return [layer.product(V) for layer, V in zip(layers, blocks, strict=True)]

    stacked = tuple(of_layer.is_stacked for of_layer in factors.values())
    found = conjugate_gradients.solve(product, coordinates, limits, stacked=stacked)
    num_examples = max(of_layer.num_examples for of_layer in factors.values())
    solved = {  # all leaves, in the order of the tree; layers then replace theirs
        path: _closed_form(g, num_examples * mean_squares[number] + damping)
        for number, (path, g) in enumerate(grads.items())
    }
    for number, (kernel, layer) in enumerate(zip(factors, layers, strict=True)):
        outside = layer.outside(matrices[number], coordinates[number])
        V = layer.vectors(found.blocks[number]) + numerics.quotient(outside, damping)
        for path, x in _leaves(V, grads, kernel, factors[kernel]).items():
            solved[path] = _of_block(x, found, number)
    return list(solved.values())


def _matrices(leaves: Mapping[str, jax.Array], kernel: str, factors: LayerFactors) -> jax.Array:
    """The layer's part of the leaves, `(..., in, out)`, with its bias as last row, or as last column."""
    V = factors.matrices(leaves[kernel])
    if factors.bias is None:
        return V
    axis = -2 if factors.bias_side == "outputs" else -1
    bias = leaves[factors.bias].reshape(np.delete(V.shape, axis))
    return jnp.concatenate([V, jnp.expand_dims(bias, axis)], axis=axis)


def _leaves(
    V: jax.Array, like: Mapping[str, jax.Array], kernel: str, factors: LayerFactors
) -> dict[str, jax.Array]:
    """Kernel and bias from the layer's matrices."""
    if factors.bias is None:
        return {kernel: factors.kernel(V, like[kernel].shape)}
    is_row = factors.bias_side == "outputs"
    V, bias = (V[..., :-1, :], V[..., -1, :]) if is_row else (V[..., :-1], V[..., -1])
    shape = like[factors.bias].shape
    return {kernel: factors.kernel(V, like[kernel].shape), factors.bias: bias.reshape(shape)}


def _closed_form(g: jax.Array, eigenvalue: jax.Array) -> SolvedLeaf:
    """A leaf whose damped matrix is a multiple of the identity."""
    x = numerics.quotient(g, eigenvalue)
    return SolvedLeaf(x, jnp.zeros_like(eigenvalue), jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def _of_block(x: jax.Array, found: conjugate_gradients.Solution, number: int) -> SolvedLeaf:
    """A leaf of the block with this number; of a stack of layers the largest numbers are reported."""
    residual, iterations = (jnp.max(of[number], initial=0) for of in (found.residuals, found.iterations))
    return SolvedLeaf(x, residual, iterations, jnp.any(found.indefinite[number]))


def finite_or_zero(leaf: SolvedLeaf) -> SolvedLeaf:
    """The leaf; zeros, reported as indefinite, if an entry has overflowed."""
    finite = jnp.all(jnp.isfinite(leaf.x))
    residual = jnp.nan_to_num(leaf.residual)
    return SolvedLeaf(jnp.where(finite, leaf.x, 0), residual, leaf.iterations, leaf.indefinite | ~finite)


def reports(solved: list[SolvedLeaf], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """What the state reports of the systems, by its fields' names."""
    return {
        "residuals": jnp.asarray([leaf.residual for leaf in solved], dtype),
        "iterations": jnp.asarray([leaf.iterations for leaf in solved], jnp.int32),
        "indefinite": jnp.asarray([leaf.indefinite for leaf in solved], bool),
    }
