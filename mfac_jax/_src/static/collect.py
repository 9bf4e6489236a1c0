"""Gradients of a loss on batches, stacked: what the static algorithm starts from."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

from mfac_jax._src.base import checks
from mfac_jax._src.base.trees import check_params, leaf_name

_NUMBERS = (np.ndarray, np.generic, bool, int, float, complex)


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
      TypeError: `num_grads` is not an int; a parameter is not a real floating-point array; a leaf of a
        batch is no array of numbers; the loss is no real scalar.
      ValueError: `num_grads` is below 1; the batches end too soon; a batch has no examples; with
        `per_example`, its leaves have different numbers of them.

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
    checks.check_bool("per_example", per_example)
    check_params(params)
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function from parameters and a batch to a loss, got {loss_fn!r}. Pass a "
            "function, or a module's apply in one."
        )
    if isinstance(batches, (str, Mapping)) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}. Pass a list, e.g. "
            "[batch]."
        )
    # A Partial is a pytree: the function is part of the compiled program, and arrays it holds are
    # arguments.
    loss_fn = loss_fn if isinstance(loss_fn, Partial) else Partial(loss_fn)
    stack = jax.tree.map(lambda p: jnp.zeros((num_grads, *p.shape), jnp.result_type(p)), params)
    count = 0
    for number, batch in enumerate(batches):
        examples = _examples(number, batch, per_example)
        size = None if examples is None else min(examples, num_grads - count)
        stack = _put(stack, params, batch, count, loss_fn, size)
        count += 1 if size is None else size
        if count == num_grads:
            return stack
    cure = f"Pass more batches, or num_grads={count}." if count else "Pass batches with examples."
    raise ValueError(
        f"batches must give num_grads={num_grads} gradients, but ended after {count}. {cure} An iterator "
        "that was read before is empty: make a new one."
    )


def _examples(number: int, batch: Any, per_example: bool) -> int | None:
    """How many examples the batch has, None if it gives one gradient; raises if it cannot be used."""
    shapes = {}
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        is_text = isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "OSUMm"
        if is_text or not isinstance(x, (*_NUMBERS, jax.Array)):
            raise TypeError(
                f"batches must be trees of arrays of numbers, but {leaf_name(path)} of batch {number} is "
                f"{type(x).__name__}. Leave it out, or convert it with np.asarray."
            )
        shapes[leaf_name(path)] = np.shape(x)
    lengths = {shape[:1] for shape in shapes.values()}
    found = ", ".join(f"{name}: {shape}" for name, shape in shapes.items()) or "no leaf"
    if per_example and (len(lengths) != 1 or () in lengths):
        raise ValueError(
            "batches must have one leading axis of examples of the same length on all leaves with "
            f"per_example=True, but batch {number} has {found}. Leave out what is not per example, or "
            "repeat it."
        )
    if lengths - {()} == {(0,)} and not per_example:
        raise ValueError(
            f"batches must have an example each, but batch {number} has {found}. Leave it out."
        )
    return lengths.pop()[0] if per_example else None


# Donated: the stack is written in place, so that memory holds it once.
@functools.partial(jax.jit, static_argnames="size", donate_argnames="stack")
def _put(stack, params, batch, start, loss_fn: Partial, size: int | None):
    """The stack with the gradient of the batch, or those of its first `size` examples, from `start` on."""
    if size is None:
        grads = jax.tree.map(lambda g: g[None], jax.grad(_checked_loss(loss_fn))(params, batch))
    else:
        examples = jax.tree.map(lambda x: jnp.expand_dims(x[:size], 1), batch)
        grads = jax.vmap(jax.grad(_checked_loss(loss_fn)), in_axes=(None, 0))(params, examples)
    return jax.tree.map(lambda rows, g: lax.dynamic_update_slice_in_dim(rows, g, start, 0), stack, grads)


def _checked_loss(loss_fn: Partial) -> Callable[[optax.Params, Any], Any]:
    """The loss; raises for anything but a real scalar."""

    def checked(params, batch):
        loss = loss_fn(params, batch)
        is_number = isinstance(loss, (*_NUMBERS, jax.Array)) and jnp.ndim(loss) == 0
        if not is_number or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            found = jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array) else x, loss)
            raise TypeError(
                f"loss_fn must return a real floating-point scalar, got {found}. Return the mean loss "
                "alone."
            )
        return loss

    return checked
