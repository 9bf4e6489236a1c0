"""Derivatives through whole runs: forward mode beside finite differences in float64, and reverse mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mfac_jax

SHAPES = {"bias": (4,), "kernel": (3, 2)}
STEPS, NUM_GRADS = 7, 4
slow = pytest.mark.slow


def random_trees(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One gradient for each step."""
    return {name: rng.standard_normal((STEPS, *shape)) for name, shape in SHAPES.items()}


# Where gradients are zero: at the first step and later, and what the perturbation makes of them.
KINDS = ("new", "repeats", "zeros", "zeros that move", "a zero entry")


def stream(kind: str) -> tuple[Any, Any, Any]:
    """Gradients, their derivatives, and weights that make a number of all updates."""
    rng = np.random.default_rng(0)
    grads, moves, weights = random_trees(rng), random_trees(rng), random_trees(rng)
    for g, v in zip(grads.values(), moves.values(), strict=True):
        g += 1  # a direction in common
        if kind == "repeats":
            g[[3, 6]], v[[3, 6]] = g[[2, 5]], v[[2, 5]]
        if kind.startswith("zeros"):
            g[[0, 3]] = 0
        if kind == "zeros":
            v[[0, 3]] = 0
    if kind == "a zero entry":
        grads["bias"][:, 0] = moves["bias"][:, 0] = 0
    return grads, moves, weights


def weighted_updates(tx: optax.GradientTransformation, of_state: Callable, inputs, t) -> jax.Array:
    """A sum over all updates of a run with the gradients g + t v, and a number from its last state."""
    grads, moves, weights = inputs

    def step(carry, g_and_weights):
        params, state = carry
        g, w = g_and_weights
        updates, state = tx.update(g, state, params)
        total = optax.tree.vdot(w, updates)
        return (optax.apply_updates(params, updates), state), total

    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    moved = jax.tree.map(lambda g, v: g + t * v, grads, moves)
    (_, state), totals = jax.lax.scan(step, (params, tx.init(params)), (moved, weights))
    return jnp.sum(totals) + of_state(state)


@functools.partial(jax.jit, static_argnames=("tx", "of_state"))
def derivatives(tx, of_state, inputs, step):
    """By central differences, in forward mode and in reverse mode."""
    f = functools.partial(weighted_updates, tx, of_state, inputs)
    zero = jnp.zeros(())
    above, below = jax.lax.map(f, jnp.stack([step, -step]))
    difference = (above - below) / (2 * step)
    return difference, jax.jvp(f, (zero,), (zero + 1,))[1], jax.grad(f)(zero)


def nothing(state) -> Any:
    return 0.0


def all_diagnostics(state) -> Any:
    found = mfac_jax.diagnostics(state)
    return sum(jnp.sum(x) for x in found if jnp.issubdtype(x.dtype, jnp.floating))


def a_product(state) -> Any:
    state = optax.tree.get(state, "ScaleByMFACState")
    return optax.tree.sum(mfac_jax.ihvp(state, {n: jnp.ones(s) for n, s in SHAPES.items()}, 0.3))


def scale(**options) -> optax.GradientTransformation:
    return mfac_jax.scale_by_mfac(NUM_GRADS, options.pop("damping", 0.5), **options)


WARM = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
CONFIGS = {
    "absolute": scale(),
    "relative": scale(relative_damping=True),
    "relative, kept inverse": scale(relative_damping=True, solver="inverse"),
    "relative, one block per leaf": scale(relative_damping=True, blocks="leaf", solver="inverse"),
    "damping of a schedule": scale(damping=lambda t: 0.5 * 0.9**t, solver="inverse"),
    "momentum": scale(window_momentum=0.9, nesterov=True),
    "step adaptation": scale(step_adaptation=0.3),
    "diagonal metric": scale(metric="diagonal", relative_damping=True),
    "rotated metric": scale(metric="rotated", relative_damping=True),
    "on the host": scale(host_chunk=2),
    "mfac": mfac_jax.mfac(0.1, NUM_GRADS, storage=None),
    "mfac, kept inverse": mfac_jax.mfac(WARM, NUM_GRADS, solver="inverse", weight_decay=0.1, storage=None),
    "mfac_published": mfac_jax.mfac_published(0.1, NUM_GRADS, damping=0.5),
    "inject_hyperparams": optax.inject_hyperparams(mfac_jax.mfac, static_args=("num_grads", "solver"))(
        learning_rate=0.1, num_grads=NUM_GRADS, solver="inverse", storage=None
    ),
    "masked": optax.masked(mfac_jax.mfac(0.1, NUM_GRADS, storage=None), {"bias": False, "kernel": True}),
}
QUICK = "relative"
# The cosine with a gradient that passes zero jumps, and so do bases that turn to it: there is no
# derivative.
JUMPING = (
    "step adaptation",
    "rotated metric",
    "mfac",
    "mfac, kept inverse",
    "inject_hyperparams",
    "masked",
)


def check(name: str, kind: str, of_state: Callable = nothing) -> None:
    tx, bends = CONFIGS[name], kind == "zeros that move" and name == "diagonal metric"
    step, tolerance = (1e-12, 1e-3) if bends else (1e-5, 1e-6)  # next to zero it bends within 1e-8
    difference, forward, reverse = derivatives(tx, of_state, stream(kind), jnp.asarray(step))
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(forward, difference, rtol=tolerance)
    # Rounding alone, through the bases of the rotated metric 1.6e-9 on some CPUs.
    np.testing.assert_allclose(reverse, forward, rtol=1e-8 if name == "rotated metric" else 1e-9)


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=slow) for n in CONFIGS])
def test_both_modes_equal_finite_differences(x64, name):
    for kind in KINDS:
        if not (kind == "zeros that move" and name in JUMPING):
            check(name, kind)


@slow
@pytest.mark.parametrize("of_state", [all_diagnostics, a_product])
@pytest.mark.parametrize("name", ["relative, kept inverse", "mfac"])
def test_figures_of_a_state_have_derivatives_too(x64, name, of_state):
    for kind in ("new", "repeats", "zeros", "a zero entry"):
        check(name, kind, of_state)


def of_fisher_inverse(grads, damping, blocks) -> Any:
    """A number from all methods."""
    inverse = mfac_jax.FisherInverse.from_gradients(grads, damping, blocks=blocks)
    ones = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    found = (inverse.ihvp(ones), inverse.diagonal(), inverse.submatrix([0, 3, 9])[0], inverse.entry(1, 2))
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found))


@pytest.mark.exhaustive
@slow
@pytest.mark.parametrize("blocks", [None, "leaf", 3])
def test_the_static_inverse_has_derivatives_too(x64, blocks):
    for kind in ("new", "repeats", "zeros", "a zero entry"):
        grads, moves, _ = stream(kind)

        @jax.jit
        def f(t, grads=grads, moves=moves):
            moved = jax.tree.map(lambda g, v: jnp.asarray(g) + t * v, grads, moves)
            return of_fisher_inverse(moved, 0.5 + 0.1 * t, blocks)

        zero, step = jnp.zeros(()), 1e-5
        forward = jax.jvp(f, (zero,), (zero + 1,))[1]
        np.testing.assert_allclose(forward, (f(step) - f(-step)) / (2 * step), rtol=1e-6)
        np.testing.assert_allclose(jax.grad(f)(zero), forward, rtol=1e-9)


def test_rows_of_bfloat16_have_derivatives_in_both_modes():
    tx = mfac_jax.scale_by_mfac(4, 0.1, storage=jnp.bfloat16)

    def loss(x):
        return sum(map(jnp.vdot, jax.tree.leaves(tx.update(x, tx.init(x))[0]), [x]))

    x = jnp.arange(1.0, 4.0)
    np.testing.assert_allclose(jax.grad(loss)(x), jax.jacfwd(loss)(x), rtol=0.1)  # bfloat16 both ways
