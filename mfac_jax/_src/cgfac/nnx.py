"""The factors of layers for a module of Flax's nnx."""

import functools
from collections.abc import Callable
from typing import Any

from mfac_jax._src.cgfac.capture import value_and_grad_with_factors
from mfac_jax._src.cgfac.layers import LayerFactors


def nnx_value_and_grad_with_factors(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, LayerFactors]]]:
    """Compute the loss of an nnx module, its gradient and K-FAC's factors in one backward pass.

    Changes that the loss makes to the model's other variables (batch statistics, counts of random numbers)
    stay in the model. The loss must not change its other arguments: keep random numbers in the model.

    Args:
      loss: from a module and any other arguments to the mean loss; with `has_aux`, to a pair of that and
        anything else.
      has_aux: as in `flax.nnx.value_and_grad`.

    Returns:
      A function with the arguments of `loss`, for use under `nnx.jit`. It returns the value (with the rest
      if `has_aux`), the gradient by the variables of type `nnx.Param`, and the factors. Hand them on as
      `optimizer.update(model, grads, curvature=factors)`. See `value_and_grad_with_factors`.

    Raises:
      ImportError: Flax is not installed.
      TypeError: as `value_and_grad_with_factors`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, mfac_jax.cgfac(0.1), wrt=nnx.Param)
      >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
      >>> step = mfac_jax.nnx_value_and_grad_with_factors(loss)
      >>> value, grads, factors = step(model, jnp.ones((4, 3)))
      >>> _ = optimizer.update(model, grads, curvature=factors)
      >>> list(factors)
      ['kernel']
    """

    @functools.wraps(loss)
    def wrapped(model, *args, **kwargs):
        from flax import nnx  # not needed by the package; whoever has a module of nnx has it

        graph, params, others = nnx.split(model, nnx.Param, ...)

        def pure(params):
            model = nnx.merge(graph, params, others, copy=True)
            outputs = loss(model, *args, **kwargs)
            value, aux = outputs if has_aux else (outputs, None)
            return value, (aux, nnx.state(model, nnx.Not(nnx.Param)))

        evaluate = value_and_grad_with_factors(pure, has_aux=True)
        (value, (aux, others)), grads, factors = evaluate(params)
        nnx.update(model, others)
        return (value, aux) if has_aux else value, grads, factors

    return wrapped
