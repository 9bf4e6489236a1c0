"""Inputs and output gradients of the layers of any model, found in the program of its loss.

JAX traces the loss to a list of operations. `interpreter.py` runs that list once more. At each layer it
keeps the inputs, and adds a zero to the output. The gradient by that zero is the output gradient, so the
one backward pass gives it too. No model has to be changed, in linen, nnx or neither.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.interpreter import Interpreter
from mfac_jax._src.cgfac.layers import LayerFactors
from mfac_jax._src.cgfac.uses import Origin


def value_and_grad_with_factors(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, LayerFactors]]]:
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

    @functools.wraps(loss)
    def wrapped(params, *args, **kwargs):
        trees.check_params(params)
        leaves, structure = jax.tree.flatten(params)
        closed, shape = jax.make_jaxpr(lambda p: loss(p, *args, **kwargs), return_shape=True)(params)
        origins = [Origin(parameter=number) for number in range(len(leaves))]

        def run(leaves, interpreter):
            outputs, _ = interpreter.run(closed.jaxpr, closed.consts, leaves, origins)
            outputs = jax.tree.unflatten(jax.tree.structure(shape), outputs)
            value, aux = outputs if has_aux else (outputs, None)
            return value, (aux, [use.inputs for use in interpreter.uses])

        found = Interpreter(None)  # a first walk finds the uses, and with them the shapes of the zeros
        jax.eval_shape(lambda leaves: run(leaves, found), leaves)
        zeros = [_zeros(use.output) for use in found.uses]
        evaluate = jax.value_and_grad(
            lambda leaves, zeros: run(leaves, Interpreter(zeros)), argnums=(0, 1), has_aux=True
        )
        (value, (aux, inputs)), (grads, output_grads) = evaluate(leaves, zeros)
        factors = _of_kernels(_rows(found, inputs, output_grads), params)
        return (value, aux) if has_aux else value, jax.tree.unflatten(structure, grads), factors

    return wrapped


def _zeros(like: Any) -> jax.Array:
    """Zeros of a type, which may be sharded over explicit axes, or vary along those of a shard_map."""
    explicit = not like.sharding.mesh.are_all_axes_auto
    zeros = jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding if explicit else None)
    varying = tuple(like.manual_axis_type.varying)
    return lax.pcast(zeros, varying, to="varying") if varying else zeros


class _Rows(NamedTuple):
    """The rows of one use of a kernel, and the bias that was added to its output."""

    kernel: int  # number of the parameter
    inputs: jax.Array  # (N, ..., in)
    output_grads: jax.Array  # (N, ..., out)
    bias: int | None  # number of the parameter


def _rows(
    found: Interpreter, inputs: Sequence[jax.Array], output_grads: Sequence[jax.Array]
) -> list[_Rows]:
    rows = []
    for number, (use, x, g) in enumerate(zip(found.uses, inputs, output_grads, strict=True)):
        bias = found.bias_of_use.get(number) if use.has_outputs_last else None
        # len(x): the loss is a mean, and an example's own loss has N times that gradient.
        rows.append(_Rows(use.kernel, x, len(x) * use.as_rows(g), bias))
    return rows


def _of_kernels(rows: Sequence[_Rows], params: optax.Params) -> dict[str, LayerFactors]:
    """The factors of each kernel, by its path."""
    paths, leaves = zip(*trees.paths_and_leaves(params).items(), strict=True)
    kernels = {
        kernel: [use for use in rows if use.kernel == kernel]
        for kernel in dict.fromkeys(use.kernel for use in rows)
    }
    biases = {kernel: {use.bias for use in uses} for kernel, uses in kernels.items()}
    taken = [bias for found in biases.values() for bias in found]
    factors = {}
    for kernel, uses in kernels.items():
        if len({len(use.inputs) for use in uses}) > 1:
            continue  # not the same examples
        inputs = _one_after_another([use.inputs for use in uses])
        output_grads = _one_after_another([use.output_grads for use in uses])
        (bias, *more) = biases[kernel]
        # The bias is a row of the layer only if all uses add it, and no other layer does.
        is_own = not more and bias not in kernels and taken.count(bias) == 1
        if bias is None or not is_own or leaves[bias].size != output_grads.shape[-1]:
            factors[paths[kernel]] = LayerFactors(inputs, output_grads)
        else:
            factors[paths[kernel]] = LayerFactors(inputs, output_grads, paths[bias])
    return factors


def _one_after_another(uses: Sequence[jax.Array]) -> jax.Array:
    """The rows of all uses, as those of places."""
    if len(uses) == 1:
        return uses[0]
    return jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in uses], axis=1)
