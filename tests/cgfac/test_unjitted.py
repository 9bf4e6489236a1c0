"""Steps of CG-FAC outside of jit: after the second one nothing is compiled, whatever is made anew."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import cgfac, empirical_fisher, gauss_newton, scale_by_cgfac
from tests.cgfac.network import PARAMS, X, apply, cross_entropy, flat, gradient_and_factors

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of what was compiled, also if it came from the folder of programs."""
    names = []

    def note(event: str, duration_secs: float, **details: Any) -> None:
        del duration_secs
        if event == COMPILED:
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def with_loop(params, x):
    """A model with a loop, jitted once."""
    return jax.lax.fori_loop(
        0, 2, lambda _, y: jnp.tanh(y) + jnp.asarray(apply(params, x)), jnp.zeros((12, 3))
    )


WITH_LOOP = jax.jit(with_loop)


def curvature_at(i: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Extra arguments of the i-th step. All functions are made anew, over other numbers."""
    gradient, factors = gradient_and_factors()
    x = X * (1 + i)
    stacked = jax.tree.map(lambda g: g[None] * (1 + i), gradient)

    def only(function):
        return lambda: {"curvature": function()}

    return {
        "factors": only(lambda: scaled(factors, 1.0 + i)),
        "a function": only(lambda: lambda v: scaled(v, 2.0 + i)),
        "a function of jit": only(lambda: SCALED),
        "a preconditioner": lambda: {
            "curvature": lambda v: scaled(v, 2.0 + i),
            "preconditioner": lambda v: scaled(v, 1 / (2.01 + i)),
        },
        "a Partial": only(lambda: jax.tree_util.Partial(scaled, factor=jnp.float32(1 + i))),
        "empirical Fisher": only(lambda: empirical_fisher(stacked)),
        "Gauss-Newton": only(lambda: gauss_newton(lambda p: apply(p, x), cross_entropy, PARAMS)),
        "Gauss-Newton of a loop": only(
            lambda: gauss_newton(lambda p: WITH_LOOP(p, x), cross_entropy, PARAMS)
        ),
    }


SCALED = jax.jit(lambda v: scaled(v, 2.0))
TRANSFORMS = {
    "cgfac": lambda: cgfac(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        cgfac, static_args=("max_iterations", "num_batches")
    )(0.1),
    "a window": lambda: scale_by_cgfac(num_batches=2, factors=gradient_and_factors()[1]),
}
SLOW = (
    "a preconditioner",
    "Gauss-Newton",
    "a function of jit",
    "a function",
    "a Partial",
    "Gauss-Newton of a loop",
    "empirical Fisher",
)
NAMES = ("factors", *SLOW)
CASES = [
    *(pytest.param("cgfac", name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES),
    pytest.param("inject_hyperparams", "a function", marks=pytest.mark.slow),
    pytest.param("a window", "factors", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("transform", "curvature"), CASES)
def test_nothing_is_compiled_after_the_second_step(compiled, transform, curvature):
    gradient, _ = gradient_and_factors()
    tx: Any = TRANSFORMS[transform]()
    state = tx.init(PARAMS)
    for i in range(5):
        if i == 2:
            compiled.clear()
        extra = curvature_at(i)[curvature]()
        updates, state = tx.update(scaled(gradient, 1.0 + i), state, PARAMS, **extra)
        assert np.all(np.isfinite(flat(updates)))
    assert compiled == []
