"""A factorisation of each matrix of a batch, one at a time where more would never end."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def of_each(function: Callable[..., Any], *batches: jax.Array, axes: int = 1) -> Any:
    """What the function makes of the matrices at each place of the leading axes.

    On CPU one after the other. There a call of LAPACK for a batch hands its parts to the threads that it
    runs on, and waits for them: where as many run at a time as there are threads, all wait for ever
    (jaxlib 0.10: 20 batches of Cholesky decompositions in a program, on two cores).
    """
    ahead = batches[0].shape[:axes]
    if math.prod(ahead) == 1:  # half the time of a batch of one
        found = function(*(x.reshape(x.shape[axes:]) for x in batches))
        return jax.tree.map(lambda y: y.reshape(*ahead, *y.shape), found)

    def in_turn(*batches):
        one_axis = (x.reshape(-1, *x.shape[axes:]) for x in batches)
        found = lax.map(lambda each: function(*each), tuple(one_axis))
        return jax.tree.map(lambda y: y.reshape(*ahead, *y.shape[1:]), found)

    at_once = function
    for _ in range(axes):  # axes stay apart: together, split ones would have to be gathered
        at_once = jax.vmap(at_once)
    return lax.platform_dependent(*batches, cpu=in_turn, default=at_once)
