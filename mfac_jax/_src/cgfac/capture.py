"""Inputs and output gradients of the layers of any model, found in the program of its gradient.

JAX traces the gradient of the loss to a list of operations. There the gradient of a kernel is a sum of
products of rows, one for each use of the kernel. `interpreter.py` runs that list once, and keeps the
factors of these products. So all uses are found, or it is seen that one is of another kind. No model is
changed.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.assembly import Found, assembled
from mfac_jax._src.cgfac.interpreter import run
from mfac_jax._src.cgfac.known import Known
from mfac_jax._src.cgfac.layers import LayerFactors


class WithFactors:
    """What `value_and_grad_with_factors` returns: a function, and what it finds."""

    def __init__(self, loss: Callable[..., Any], has_aux: bool = False):
        functools.update_wrapper(self, loss)
        self._loss, self._has_aux, self._has_warned = loss, has_aux, False

    def __call__(
        self, params: optax.Params, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, dict[str, LayerFactors]]:
        """The value, the gradient and the factors."""
        value, aux, grads, found = self._evaluate(params, args, kwargs)
        if found.missed and not self._has_warned:
            warnings.warn(_warning(found), stacklevel=2)
        self._has_warned = True
        return (value, aux) if self._has_aux else value, grads, found.factors

    def explain(self, params: optax.Params, *args: Any, **kwargs: Any) -> dict[str, str]:
        """What each parameter is to CG-FAC, by its path; nothing is computed."""
        report: dict[str, str] = {}

        def evaluate(params):
            report.update(self._evaluate(params, args, kwargs)[-1].report)

        jax.eval_shape(evaluate, params)
        return report

    def _evaluate(self, params: optax.Params, args: Any, kwargs: Any) -> tuple[Any, Any, Any, Found]:
        trees.check_params(params)
        leaves, structure = jax.tree.flatten(params)
        rest: dict[str, Any] = {}  # what of the loss's other outputs is no array

        def gradient(leaves, one):
            def of_leaves(leaves):
                outputs = self._loss(jax.tree.unflatten(structure, leaves), *args, **kwargs)
                value, aux = outputs if self._has_aux else (outputs, None)
                aux, rest["structure"] = jax.tree.flatten(aux)
                rest["leaves"] = [_Array() if isinstance(x, jax.Array) else x for x in aux]
                return _checked(value), [x for x in aux if isinstance(x, jax.Array)]

            value, pull_back, aux = jax.vjp(of_leaves, leaves, has_aux=True)
            (grads,) = pull_back(lax.full_like(value, 1) * one.astype(value.dtype))
            return [value, *grads, *aux]

        program = jax.make_jaxpr(gradient)(leaves, jnp.ones(()))
        inputs = [Known(leaf, root=-1 - number) for number, leaf in enumerate(leaves)]
        inputs.append(Known(jnp.ones(()), has_grad=True, root=-1 - len(leaves)))
        wanted = [0 < number <= len(leaves) for number in range(len(program.jaxpr.outvars))]
        value, *outputs = run(program, inputs, wanted)
        grads, arrays = outputs[: len(leaves)], iter(outputs[len(leaves) :])
        aux = [next(arrays).value if isinstance(x, _Array) else x for x in rest["leaves"]]
        found = assembled(trees.paths_and_leaves(params), [grad.tracked for grad in grads])
        grads = jax.tree.unflatten(structure, [grad.value for grad in grads])
        return value.value, jax.tree.unflatten(rest["structure"], aux), grads, found


class _Array:
    """Stands for an array among the loss's other outputs."""


def _checked(value: Any) -> jax.Array:
    """The loss's value; raise if it is no real scalar."""
    dtype = jnp.result_type(value) if isinstance(value, jax.Array | float) else type(value)
    if jnp.shape(value) != () or not jnp.issubdtype(dtype, jnp.floating):
        shape = f" of shape {jnp.shape(value)}" if jnp.shape(value) else ""
        raise TypeError(
            f"loss must return a real scalar, got {dtype}{shape}. Return the mean over the examples; with "
            "has_aux=True, a pair of that and anything else."
        )
    return jnp.asarray(value)


def _warning(found: Found) -> str:
    missed = "; ".join(
        f"{path!r}: {found.report[path].removeprefix('left out: ')}" for path in found.missed
    )
    return (
        f"value_and_grad_with_factors has no factors for {len(found.missed)} of the kernels. {missed}. "
        "The function's explain() says this of every parameter."
    )


def value_and_grad_with_factors(loss: Callable[..., Any], has_aux: bool = False) -> WithFactors:
    """Compute a loss, its gradient and K-FAC's factors of each layer in one backward pass.

    A layer is a parameter that is multiplied, or convolved, with something that has a batch axis: Flax's
    `Dense`, `DenseGeneral`, `Conv`, `Linear`, or `x @ w`. Its bias is the parameter that is added to the
    output. The model is not changed: layers are found in the program that JAX traces the loss to. The first
    axis of a layer's inputs must be that of the examples, and the loss a mean over them.

    Not found are layers inside of loops (`jax.lax.scan`, `map`), of `jax.lax.cond`, and of functions with
    their own derivative rules; `jax.vmap` over kernels; grouped convolutions; kernels that are transposed
    or computed first; and parameters without such a product (embeddings, scales of normalisations). The
    keys of the factors show what was found. What `jax.checkpoint` would recompute is kept in memory.

    The output gradients are those of the loss, which makes F the empirical Fisher matrix. For the Fisher
    matrix itself, call the function again, on a loss whose labels are drawn from the model's own
    distribution, and use the factors of that call.

    Args:
      loss: from parameters and any other arguments to the mean loss; with `has_aux`, to a pair of that and
        anything else.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      A function with the arguments of `loss`, for use under `jax.jit`. It returns the value (with the rest
      if `has_aux`), the gradient by the first argument, and a dict from the path of each kernel, as in
      'Dense_0/kernel', to its `LayerFactors`. A kernel that is used in several places has the rows of all.

    Raises:
      TypeError: a parameter is not a real floating-point array; the loss is not a real scalar.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> params = {'dense': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}}
      >>> loss = lambda p, x: jnp.mean((x @ p['dense']['kernel'] + p['dense']['bias']) ** 2)
      >>> value, grads, factors = mfac_jax.value_and_grad_with_factors(loss)(params, jnp.ones((4, 3)))
      >>> layer = factors['dense/kernel']
      >>> layer.inputs.shape, layer.output_grads.shape, layer.bias
      ((4, 3), (4, 2), 'dense/bias')

    References:
      James Martens, Roger Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, ICML 2015.

      Roger Grosse, James Martens, `A Kronecker-factored approximate Fisher matrix for convolution layers
      <https://arxiv.org/abs/1602.01407>`_, ICML 2016.
    """
    return WithFactors(loss, has_aux)
