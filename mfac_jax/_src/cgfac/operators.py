"""Fisher matrices as functions from a vector to a product, for `scale_by_cgfac`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics, stacks, trees
from mfac_jax._src.rows import contractions

Operator = Callable[[optax.Params], optax.Params]


def empirical_fisher(grads: optax.Params) -> Operator:
    """Multiply by the Fisher matrix of given gradients, as `curvature` of `scale_by_cgfac`.

    With G the m gradients as rows, it takes v to G^T G v / m.

    Args:
      grads: m gradients, stacked on a first axis of each leaf, as `collect_gradients` returns them with
        `per_example=True`.

    Returns:
      A function from a tree like the parameters to another one.

    Raises:
      TypeError: a leaf is not a real floating-point array.
      ValueError: the leading axes differ or are empty; a gradient is not finite; there is no leaf.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> fisher = mfac_jax.empirical_fisher(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
      >>> print(fisher(jnp.array([1.0, 1.0])))
      [0.5 4.5]
    """
    stacks.check_stacked(grads)
    dtype = numerics.accumulation_dtype(grads)
    m = len(jax.tree.leaves(grads)[0])

    def product(v: optax.Params) -> optax.Params:
        dots = jax.tree.map(lambda rows, x: contractions.dots(rows, x, dtype), grads, v)
        inner = sum(jax.tree.leaves(dots)) / m
        return jax.tree.map(lambda rows: contractions.combine(inner, rows), grads)

    return product


def gauss_newton(
    model: Callable[[optax.Params], Any], loss: Callable[[Any], jax.Array], params: optax.Params
) -> Operator:
    """Multiply by the generalised Gauss-Newton matrix of a batch, as `curvature` of `scale_by_cgfac`.

    It takes v to J^T H J v, with J the derivative of the model's outputs by the parameters, H the second
    derivative of the loss by the outputs. For softmax cross-entropy and squared error this is the Fisher
    matrix.

    The call makes one forward pass. Each product then takes one forward and one backward pass through the
    linearized model. Outside of jit, pass a plain function, or one that was jitted once: what is jitted
    anew at each step, and loops in a plain function, are compiled anew.

    Args:
      model: from parameters to the outputs for a batch, which it holds.
      loss: from the outputs to the mean loss. It must be convex for a positive semidefinite matrix.
      params: real floating-point arrays.

    Returns:
      A function from a tree like the parameters to another one.

    Raises:
      TypeError: a parameter is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
      >>> loss = lambda outputs: jnp.sum((outputs - y) ** 2) / 2
      >>> matrix = mfac_jax.gauss_newton(lambda w: x @ w, loss, jnp.ones(2))
      >>> print(matrix(jnp.array([1.0, 1.0])))
      [1. 4.]

    References:
      Nicol Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent
      <https://doi.org/10.1162/08997660260028683>`_, Neural Computation 2002.
    """
    trees.check_params(params)
    outputs, forward = jax.linearize(model, params)
    backward = jax.linear_transpose(forward, params)

    def product(v: optax.Params) -> optax.Params:
        v = jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), v, params)
        _, curved = jax.jvp(jax.grad(loss), (outputs,), (forward(v),))
        return backward(curved)[0]

    return product
