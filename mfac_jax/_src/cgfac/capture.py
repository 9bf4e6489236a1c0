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
import numpy as np
import optax
from jax import lax

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.assembly import Found, assembled
from mfac_jax._src.cgfac.interpreter import run
from mfac_jax._src.cgfac.known import Known
from mfac_jax._src.cgfac.layers import LayerFactors


class WithFactors:
    """What `value_and_grad_with_factors` returns: a function, and what it finds."""

    def __init__(self, loss: Callable[..., Any], has_aux: bool, depth: int = 2):
        functools.update_wrapper(self, loss)
        self._loss, self._has_aux = loss, has_aux
        self._depth, self._has_warned = (
            depth,
            False,
        )  # how many calls lie between a warning and the user's line

    def __call__(
        self, params: optax.Params, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, dict[str, LayerFactors]]:
        """The value, the gradient and the factors."""
        value, aux, grads, found = self._evaluate(params, args, kwargs)
        if found.missed and not self._has_warned:
            warnings.warn(_warning(found), stacklevel=self._depth)
        self._has_warned = True
        return (value, aux) if self._has_aux else value, grads, found.factors

    def explain(self, params: optax.Params, *args: Any, **kwargs: Any) -> dict[str, str]:
        """What each parameter is to CG-FAC, by its path. It traces the loss, and computes nothing.

        The text is 'kernel', or 'bias of ' and the path of a kernel, or 'left out: ' and the reason.
        """
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
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    dtype = value.dtype if is_array else type(value)
    shape = value.shape if is_array else ()
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = f"{getattr(dtype, '__name__', dtype)}{f' of shape {shape}' if shape else ''}"
        raise TypeError(
            f"loss must return a real scalar, got {got}. Return the mean over the examples; with "
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

    A kernel is a parameter that is multiplied, or convolved, with something that has a batch axis: in
    Flax's `Dense`, `Conv`, `Linear`, attention and recurrent cells, in `x @ w`. All its uses count:
    transposed, scaled, in pieces, under `jax.vmap`, `jax.checkpoint`, `jax.lax.scan`, `cond` and `map`, and
    in functions with derivative rules of their own. Layers stacked by `nn.scan` or `nnx.scan`, experts, and
    the groups of a convolution are a stack of independent layers. The bias of a kernel is the parameter
    that is added to all its outputs, and to nothing else. The model is not changed.

    If any use is of another kind, the whole parameter is left out. Other kinds are a lookup in a table, a
    penalty in the loss, a mask on the kernel, a weight normalisation, a product with parameters alone, and
    a `shard_map` inside of the loss. The first call warns of every kernel that it leaves out, with the
    reason. The method `explain` says it of every parameter. There is no warning for parameters without a
    product: tables that are only looked up in, scales, what is added.

    The first axis of a layer's inputs must be that of the examples, and the loss a mean over them. The
    iterations of a loop are places; they are the examples if the body has a single one. In a loop over
    parts of a batch, N is the size of a part. Inside of a `shard_map`, rows are those of the shard.

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
      'Dense_0/kernel', to its `LayerFactors`. A kernel with several uses has the rows of all, as places.
      Its method `explain` takes the same arguments, and returns a dict from the path of each parameter to
      'kernel', to 'bias of Dense_0/kernel', or to 'left out: ' and the reason.

    Raises:
      TypeError: a parameter is not a real floating-point array; the loss is not a real scalar.

    Warns:
      UserWarning: at the first call, if a kernel with two or more axes is left out.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> params = {'dense': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}}
      >>> loss = lambda p, x: jnp.mean((x @ p['dense']['kernel'] + p['dense']['bias']) ** 2)
      >>> function = mfac_jax.value_and_grad_with_factors(loss)
      >>> value, grads, factors = function(params, jnp.ones((4, 3)))
      >>> layer = factors['dense/kernel']
      >>> layer.inputs.shape, layer.output_grads.shape, layer.bias
      ((4, 3), (4, 2), 'dense/bias')
      >>> function.explain(params, jnp.ones((4, 3)))
      {'dense/bias': 'bias of dense/kernel', 'dense/kernel': 'kernel'}

    References:
      James Martens, Roger Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, ICML 2015.

      Roger Grosse, James Martens, `A Kronecker-factored approximate Fisher matrix for convolution layers
      <https://arxiv.org/abs/1602.01407>`_, ICML 2016.
    """
    return WithFactors(loss, has_aux)
