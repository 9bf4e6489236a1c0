"""Weight decay: a number, or a schedule over the steps."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from mfac_jax import cgfac, mfac, mfac_published, state_shardings
from mfac_jax.pruning import keep_pruned, set_masks
from tests.mfac.on_mesh import P, make_mesh
from tests.mfac.small_runs import EPS, GRADIENTS, PARAMS, STEPS, assert_close, at, run

RATE = 0.1
SCHEDULE = optax.linear_schedule(0.5, 0.1, STEPS)
DECAYS = 0.5 - 0.4 * np.arange(STEPS) / STEPS  # SCHEDULE by hand
MASK = {"bias": False, "kernel": True, "scale": True}
PLAIN: Any = {"metric": "identity", "storage": None, "step_adaptation": 0.0}  # quick to compile
MAKERS = {
    "mfac": lambda decay, **options: mfac(RATE, 3, weight_decay=decay, **PLAIN, **options),
    "mfac_published": lambda decay, **options: mfac_published(RATE, 3, weight_decay=decay, **options),
    "cgfac": lambda decay, **options: with_identity(cgfac(RATE, weight_decay=decay, **options)),
}
MASKS = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0, PARAMS)
PARAMS_AT = jax.tree.map(lambda p: 2.0 * p, PARAMS)


def with_identity(tx):
    """`cgfac` where the Fisher matrix is the identity."""

    def update(updates, state, params=None):
        return tx.update(updates, state, params, curvature=lambda v: v)

    return optax.GradientTransformation(tx.init, update)


def decayed(params, decays):
    """What weight decay adds, with an axis of steps in front."""
    return jax.tree.map(lambda p: jnp.asarray(np.multiply.outer(decays, p), p.dtype), params)


def by_hand(name: str, params, decays):
    """The updates of SCHEDULE, from the optimizer without weight decay."""
    added = decayed(params, decays)
    if name == "mfac_published":
        return run(MAKERS[name](None), jax.tree.map(jnp.add, GRADIENTS, added))[0]
    return jax.tree.map(lambda u, x: u - RATE * x, run(MAKERS[name](None), GRADIENTS)[0], added)


@pytest.mark.parametrize("name", MAKERS)
def test_a_schedule_gives_each_step_its_weight_decay(name):
    updates, _ = run(MAKERS[name](SCHEDULE), GRADIENTS, PARAMS_AT)
    assert_close(updates, by_hand(name, PARAMS_AT, DECAYS))


def test_a_mask_says_where_a_schedule_acts():
    updates, _ = run(MAKERS["mfac"](SCHEDULE, mask=MASK), GRADIENTS, PARAMS_AT)
    acts = {name: PARAMS_AT[name] * MASK[name] for name in PARAMS}
    assert_close(updates, by_hand("mfac", acts, DECAYS))


def test_a_schedule_counts_refused_gradients_as_that_of_the_learning_rate_does():
    tx: Any = mfac(optax.linear_schedule(0.5, 0.1, STEPS), 3, weight_decay=SCHEDULE, **PLAIN)
    _, state = tx.update(jax.tree.map(lambda g: g * jnp.nan, at(0)), tx.init(PARAMS), PARAMS)
    assert optax.tree.get(state, "grads_seen") == 0
    assert [int(part.count) for part in state[1:]] == [1, 1]


@pytest.mark.parametrize("static_args", ["num_grads", ("num_grads", "weight_decay")], ids=str)
def test_a_schedule_acts_under_inject_hyperparams_too(static_args):
    make = optax.inject_hyperparams(mfac, static_args)
    updates, state = run(make(RATE, 3, weight_decay=SCHEDULE, **PLAIN), GRADIENTS, PARAMS_AT)
    assert_close(updates, by_hand("mfac", PARAMS_AT, DECAYS))
    is_injected = static_args == "num_grads"
    assert state.hyperparams.get("weight_decay") == (
        pytest.approx(DECAYS[-1], rel=2 * EPS) if is_injected else None
    )


@pytest.mark.parametrize("decay", [0.1, np.float64(0.1), jnp.float32(0.1)])
def test_a_number_keeps_nothing_in_the_state(decay):
    """So checkpoints do not change."""
    states: list[Any] = [mfac(RATE, 3, weight_decay=x).init(PARAMS) for x in (None, decay)]
    assert states[1][1] == optax.EmptyState()
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(state)] for state in states]
    assert paths[0] == paths[1]


def test_a_state_goes_on_and_that_of_a_number_is_refused():
    tx: Any = MAKERS["mfac"](SCHEDULE)
    step = jax.jit(tx.update)
    _, state = step(at(0), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(step(at(1), jax.device_get(state), PARAMS), step(at(1), state, PARAMS))
    number = jax.eval_shape(MAKERS["mfac"](0.1).init, PARAMS)
    with pytest.raises(ValueError, match=r"state\[1\]\.count must be int32 .* got nothing there"):
        jax.eval_shape(tx.update, at(0), number, PARAMS)


def test_the_count_is_replicated_on_a_mesh():
    mesh = make_mesh(AxisType.Auto)
    tx: Any = MAKERS["mfac"](SCHEDULE)
    places: Any = state_shardings(tx, PARAMS, NamedSharding(mesh, P()))
    assert places[1].count == NamedSharding(mesh, P())


def test_new_masks_leave_the_count():
    tx: Any = keep_pruned(MAKERS["mfac"](SCHEDULE), MASKS)
    state = tx.update(at(0), tx.init(PARAMS), PARAMS)[1]
    after: Any = set_masks(tx, state, jax.tree.map(jnp.ones_like, MASKS))
    assert after.inner_state[1].count == state.inner_state[1].count == 1


@pytest.mark.parametrize("make", [mfac, mfac_published])
@pytest.mark.parametrize(
    "decay",
    [0.1, np.float32(0.1), jnp.float32(0.1), SCHEDULE],
    ids=["of Python", "of NumPy", "of JAX", "schedule"],
)
def test_updates_keep_the_dtypes_of_the_parameters(make, decay):
    params = {**PARAMS, "kernel": PARAMS["kernel"].astype(jnp.bfloat16)}
    for factory in (make, optax.inject_hyperparams(make, static_args="num_grads")):
        tx = factory(RATE, 3, weight_decay=decay)
        updates = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p)[0], params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
