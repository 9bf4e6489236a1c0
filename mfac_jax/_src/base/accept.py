"""Accept or refuse a gradient: states and updates chosen by one flag, under jit."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

State = TypeVar("State", bound=Any)


def select(accept: jax.Array, new: State, old: State) -> State:
    """The first tree where `accept` is true, else the second, in the dtypes of the second."""
    return jax.tree.map(lambda x, y: jnp.where(accept, jnp.asarray(x, jnp.result_type(y)), y), new, old)


def accept_or_refuse(accept: jax.Array, before: State, after: State) -> State:
    """The state after a gradient; where it is refused as before, but for `grads_rejected`."""
    refused = before._replace(grads_rejected=optax.safe_increment(before.grads_rejected))
    return select(accept, after, refused)
