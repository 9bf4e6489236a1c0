"""The defaults of `mfac`, and how to pass them to `scale_by_mfac` in a chain of one's own."""

import inspect
import re
from typing import Any

import chex
import jax.numpy as jnp
import optax

from mfac_jax import memory_estimate, mfac, scale_by_mfac
from tests.mfac.small_runs import GRADIENTS, run


def recommended() -> dict[str, Any]:
    """What the docstring of `scale_by_mfac` says that `mfac` passes to it."""
    found = re.search(r"`mfac` passes `(.+?)`", scale_by_mfac.__doc__ or "", re.DOTALL)
    assert found
    return eval(f"dict({found[1]})", {"jnp": jnp})


def test_the_preconditioner_of_mfac_can_be_typed_from_the_docstring():
    own = optax.chain(scale_by_mfac(**recommended()), optax.scale_by_learning_rate(0.1))
    chex.assert_trees_all_equal(run(own, GRADIENTS), run(mfac(0.1), GRADIENTS))


def test_windows_have_as_many_rows_by_default_whatever_the_function():
    functions = (mfac, scale_by_mfac, memory_estimate)
    assert {inspect.signature(f).parameters["num_grads"].default for f in functions} == {32}
