"""A factorisation of each matrix of a batch, one at a time where more would never end."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def of_each(function: Callable[..., Any], *batches: jax.Array) -> Any:
    """What the function makes of the matrices at each place of the leading axis.

    On CPU one after the other. There a call of LAPACK for a batch hands its parts to the threads that it
    runs on, and waits for them: where as many run at a time as there are threads, all wait for ever
    (jaxlib 0.10: 20 batches of Cholesky decompositions in a program, on two cores).
    """
    if batches[0].shape[0] == 1:  # half the time of a batch of one
        found = function(*(x[0] for x in batches))
        return jax.tree.map(lambda y: y[None], found)
    return lax.platform_dependent(
        *batches,
        cpu=lambda *batches: lax.map(lambda each: function(*each), batches),
        default=jax.vmap(function),
    )
