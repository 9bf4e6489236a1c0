"""Gradients of a loss on batches, stacked: what the static algorithm starts from."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from mfac_jax._src.base.checks import check_count
from mfac_jax._src.base.trees import check_params


def collect_gradients(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    batches: Iterable[Any],
    num_grads: int,
    *,
    per_example: bool = False,
) -> optax.Params:
    """Collect gradients of a loss at fixed parameters: one for each batch, or one for each example.

    Args:
      loss_fn: a pure function from parameters and a batch to the loss, a scalar. Pass the same function
        object again, and it is not compiled anew. Arrays that it holds and that change, such as batch
        statistics, belong into `jax.tree_util.Partial(loss, stats)`, which is called as
        `loss(stats, params, batch)`.
      params: real floating-point arrays.
      batches: pytrees of arrays with a leading axis of examples; read until there are enough gradients.
        Each shape of batch is compiled once. For a progress bar, wrap them in `tqdm.tqdm`.
      num_grads: number of gradients, exactly, an int >= 1. The result is that many times as large as
        `params`.
      per_example: False: gradients of the losses of batches. True: gradients of the losses of examples,
        which `loss_fn` gets as batches of one.

    Returns:
      A tree like `params`, leaves `(num_grads, *shape)` of their dtypes.

    Raises:
      TypeError: `num_grads` is not an int; a parameter is not a real floating-point array.
      ValueError: `num_grads` is below 1; the batches end too soon.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
      >>> batches = jnp.arange(24.0).reshape(4, 3, 2)  # four batches of three
      >>> mfac_jax.collect_gradients(loss_fn, jnp.ones(2), batches, 4).shape
      (4, 2)
      >>> mfac_jax.collect_gradients(loss_fn, jnp.ones(2), batches, 10, per_example=True).shape
      (10, 2)
    """
    num_grads = check_count("num_grads", num_grads, "64")
    check_params(params)
    # A Partial is a pytree: the function is part of the compiled program, and arrays it holds are
    # arguments.
    loss_fn = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
    stack = jax.tree.map(lambda p: jnp.zeros((num_grads, *p.shape), jnp.result_type(p)), params)
    count = 0
    for batch in batches:
        size = min(len(jax.tree.leaves(batch)[0]), num_grads - count) if per_example else None
        stack = _put(stack, params, batch, count, loss_fn, size)
        count += 1 if size is None else size
        if count == num_grads:
            return stack
    raise ValueError(
        f"batches must give num_grads={num_grads} gradients, but ended after {count}. Pass more "
        f"batches, or num_grads={count}."
    )


# Donated: the stack is written in place, so that memory holds it once.
@functools.partial(jax.jit, static_argnames="size", donate_argnames="stack")
def _put(stack, params, batch, start, loss_fn: Partial, size: int | None):
    """The stack with the gradient of the batch, or those of its first `size` examples, from `start` on."""
    if size is None:
        grads = jax.tree.map(lambda g: g[None], jax.grad(loss_fn)(params, batch))
    else:
        examples = jax.tree.map(lambda x: jnp.expand_dims(x[:size], 1), batch)
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, examples)
    return jax.tree.map(lambda rows, g: lax.dynamic_update_slice_in_dim(rows, g, start, 0), stack, grads)
