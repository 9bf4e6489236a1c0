"""Gradients of a loss on batches, stacked: what the static algorithm starts from."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from mfac_jax._src.base import checks, trees


def collect_gradients(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    batches: Iterable[Any],
    num_grads: int,
    *,
    per_example: bool = False,
    progress: bool = False,
) -> optax.Params:
    """Collect gradients of a loss at fixed parameters, one a batch or one an example.

    Nothing but the gradient is kept of a batch: batch statistics, which `loss_fn` holds itself, stay as
    they are.

    Args:
      loss_fn: from parameters and a batch to the loss, a scalar; a pure function, compiled once for each
        shape of batch. Pass the same function object again, and it is not compiled anew. Arrays that it
        holds and that change, such as batch statistics, come in as `jax.tree_util.Partial(loss, stats)`,
        which is called as `loss(stats, params, batch)`.
      params: real floating-point arrays.
      batches: pytrees of arrays with a leading axis of examples; read until there are enough gradients.
      num_grads: gradients to collect, exactly, an int >= 1. The result takes that many copies of `params`.
      per_example: False: the gradient of the loss of a batch. True: those of the losses of its examples,
        where `loss_fn` gets batches of one.
      progress: whether tqdm, which has to be installed, shows a bar.

    Returns:
      A tree like `params`, leaves `(num_grads, *shape)` of their dtypes.

    Raises:
      TypeError: `num_grads` is not an int; a parameter is not a real floating-point array.
      ValueError: `num_grads` is below 1; the batches end too soon.
      ImportError: `progress` without tqdm.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
      >>> batches = jnp.arange(24.0).reshape(4, 3, 2)  # four batches of three
      >>> mfac_jax.collect_gradients(loss_fn, jnp.ones(2), batches, 4).shape
      (4, 2)
      >>> mfac_jax.collect_gradients(loss_fn, jnp.ones(2), batches, 10, per_example=True).shape
      (10, 2)
    """
    num_grads = checks.check_count("num_grads", num_grads, "64")
    trees.check_params(params)
    # A pytree: the function is compiled in, and the arrays that it may hold are arguments.
    loss_fn = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
    stack = jax.tree.map(lambda p: jnp.zeros((num_grads, *p.shape), p.dtype), params)
    count = 0
    with _bar(num_grads, progress) as bar:
        for batch in batches:
            size = min(len(jax.tree.leaves(batch)[0]), num_grads - count) if per_example else None
            stack = _put(stack, params, batch, count, loss_fn, size)
            added = 1 if size is None else size
            count += added
            bar.update(added)
            if count == num_grads:
                return stack
    raise ValueError(
        f"batches must give num_grads={num_grads} gradients, but ended after {count}. Pass more "
        f"batches, or num_grads={count}."
    )


@functools.partial(jax.jit, static_argnames="size", donate_argnames="stack")
def _put(stack, params, batch, start, loss_fn: Partial, size: int | None):
    """The stack with the gradient of the batch, or those of its first `size` examples, from `start` on."""
    if size is None:
        grads = jax.tree.map(lambda g: g[None], jax.grad(loss_fn)(params, batch))
    else:
        examples = jax.tree.map(lambda x: jnp.expand_dims(x[:size], 1), batch)
        grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, examples)
    return jax.tree.map(lambda rows, g: lax.dynamic_update_slice_in_dim(rows, g, start, 0), stack, grads)


class _NoBar:
    """What tqdm's bar is, but for the bar."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def update(self, number: int):
        """Nothing."""


def _bar(total: int, progress: bool):
    if not progress:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or pass progress=False.") from None
    return tqdm(total=total, unit="gradient")
