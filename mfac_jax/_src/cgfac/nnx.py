"""The factors of layers for a module of Flax's nnx."""

import functools
from collections.abc import Callable
from typing import Any

from mfac_jax._src.cgfac.capture import WithFactors
from mfac_jax._src.cgfac.layers import LayerFactors


class NNXWithFactors:
    """What `nnx_value_and_grad_with_factors` returns: a function, and what it finds."""

    def __init__(self, loss: Callable[..., Any], has_aux: bool):
        functools.update_wrapper(self, loss)
        self._loss, self._has_aux = loss, has_aux
        self._with_factors = WithFactors(_of_params, has_aux=True, depth=3)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, LayerFactors]]:
        """The value, the gradient and the factors."""
        from flax import nnx

        params, rest = self._split(model)
        (value, (aux, others)), grads, factors = self._with_factors(params, *rest, args, kwargs)
        nnx.update(model, others)
        return (value, aux) if self._has_aux else value, grads, factors

    def explain(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        """What each parameter is to CG-FAC, by its path, as `value_and_grad_with_factors` says it."""
        params, rest = self._split(model)
        return self._with_factors.explain(params, *rest, args, kwargs)

    def _split(self, model: Any) -> tuple[Any, tuple[Any, ...]]:
        """The model's parameters, and the other arguments of `_of_params`."""
        from flax import nnx  # not needed by the package; whoever has a module of nnx has it

        graph, params, others = nnx.split(model, nnx.Param, ...)
        return params, (self._loss, self._has_aux, graph, others)


def _of_params(params, loss, has_aux, graph, others, args, kwargs):
    """The loss as a function of the parameters, and the other variables after it."""
    from flax import nnx

    model = nnx.merge(graph, params, others, copy=True)
    outputs = loss(model, *args, **kwargs)
    value, aux = outputs if has_aux else (outputs, None)
    return value, (aux, nnx.state(model, nnx.Not(nnx.Param)))


def nnx_value_and_grad_with_factors(loss: Callable[..., Any], has_aux: bool = False) -> NNXWithFactors:
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
      `optimizer.update(model, grads, curvature=factors)`. Its method `explain` says what each parameter
      is. See `value_and_grad_with_factors`.

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
    return NNXWithFactors(loss, has_aux)
