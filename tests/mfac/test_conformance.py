"""M-FAC as a citizen of the optax world: wrappers, trees, dtypes, transformations of JAX."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import mfac, mfac_published, scale_by_mfac
from tests.mfac.small_runs import (
    EPS,
    GRADIENTS,
    MFAC,
    PARAMS,
    PLAIN,
    STEPS,
    assert_close,
    at,
    gradients_for,
    plain_update,
    run,
    traceable_run,
)

LEAF = scale_by_mfac(3, 0.5, blocks="leaf")
ALL_TRUE = dict.fromkeys(PARAMS, True)
slow = pytest.mark.slow


@pytest.fixture(params=[pytest.param("eager", marks=slow), "jit"])
def maybe_jit(request):
    return {"eager": lambda f: f, "jit": jax.jit}[request.param]


def without(name: str, tree) -> dict:
    return {key: leaf for key, leaf in tree.items() if key != name}


def is_kernel(path) -> bool:
    return path[0].key == "kernel"


def inject(factory, **kwargs) -> optax.GradientTransformationExtraArgs:
    return optax.inject_hyperparams(factory, static_args="num_grads")(num_grads=3, **kwargs)


# Wrappers. By default those run that change what the transform sees: masks, traced numbers, skipped steps.


@slow
@pytest.mark.parametrize(
    "wrapped",
    {
        "chain": optax.chain(optax.identity(), PLAIN, optax.identity()),
        "named_chain": optax.named_chain(("mfac", PLAIN), ("rest", optax.identity())),
        "masked": optax.masked(PLAIN, ALL_TRUE),
        "partition": optax.partition({"all": PLAIN}, "all"),
        "inject_hyperparams": inject(scale_by_mfac, damping=0.5),
        "apply_if_finite": optax.apply_if_finite(PLAIN, 3),
        "flatten": optax.flatten(PLAIN),
        "MultiSteps": optax.MultiSteps(PLAIN, 1).gradient_transformation(),
        "selective_transform": optax.selective_transform(PLAIN, freeze_mask=dict.fromkeys(PARAMS, False)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_wrapper_around_all_parameters_changes_nothing(wrapped):
    assert_close(run(wrapped[1], GRADIENTS, PARAMS)[0], run(PLAIN, GRADIENTS)[0])


@slow
def test_chain_applies_what_comes_after():
    doubled = optax.chain(PLAIN, optax.scale(-2.0))
    expected = jax.tree.map(lambda u: -2 * u, run(PLAIN, GRADIENTS)[0])
    assert_close(run(doubled, GRADIENTS)[0], expected)


@slow
@pytest.mark.parametrize("options", [{}, {"blocks": is_kernel}])
def test_masked_leaves_stay_out_of_the_fisher_matrix(options):
    tx = scale_by_mfac(3, 0.5, **options)
    updates, state = run(optax.masked(tx, {**ALL_TRUE, "bias": False}), GRADIENTS)
    expected, _ = run(tx, without("bias", GRADIENTS))
    assert_close(updates, {**expected, "bias": GRADIENTS["bias"]})
    assert len(jax.tree.leaves(state.inner_state.window)) == 2


@slow
def test_partition_gives_each_group_its_own_fisher_matrix():
    first, second = scale_by_mfac(3, 0.5), scale_by_mfac(2, 2.0)
    labels = {"bias": "first", "kernel": "second", "scale": "first"}
    updates, _ = run(optax.partition({"first": first, "second": second}, labels), GRADIENTS)
    of_first, _ = run(first, without("kernel", GRADIENTS))
    of_second, _ = run(second, {"kernel": GRADIENTS["kernel"]})
    assert_close(updates, {**of_first, **of_second})


@slow
def test_freeze_stops_a_leaf_and_keeps_its_gradients_in_the_fisher_matrix():
    frozen = optax.chain(PLAIN, optax.freeze({"bias": True, "kernel": False, "scale": False}))
    expected, _ = run(PLAIN, GRADIENTS)
    assert_close(run(frozen, GRADIENTS)[0], {**expected, "bias": jnp.zeros_like(expected["bias"])})


@slow
def test_multi_steps_makes_one_update_of_the_averaged_gradient():
    tx = optax.MultiSteps(PLAIN, 2).gradient_transformation()
    gradients = gradients_for(PARAMS, steps=8)
    updates, state = run(tx, gradients, PARAMS)
    averaged = jax.tree.map(lambda g: (g[0::2] + g[1::2]) / 2, gradients)
    expected, expected_state = run(PLAIN, averaged)
    assert_close(jax.tree.map(lambda u: u[1::2], updates), expected)
    assert_close(state.inner_opt_state, expected_state)
    assert all(not jnp.any(u[0::2]) for u in jax.tree.leaves(updates))


@slow
def test_a_changed_hyperparameter_acts_on_the_next_step():
    _, state = run(inject(scale_by_mfac, damping=0.5), GRADIENTS, PARAMS)
    state.hyperparams.update(damping=jnp.float32(3.0))
    updates, _ = inject(scale_by_mfac, damping=0.5).update(at(0), state, PARAMS)
    # What is injected may change, so its state has room for a step factor that is learned.
    expected, _ = scale_by_mfac(3, 3.0, step_adaptation=lambda _: 0.0).update(at(0), state.inner_state)
    assert_close(updates, expected)


@slow
@pytest.mark.parametrize("factory", [mfac, mfac_published])
def test_injected_schedules_act_as_schedules_of_the_optimizer(factory):
    rate, damping = optax.linear_schedule(1.0, 0.1, STEPS), optax.linear_schedule(2.0, 0.5, STEPS)
    options = {"weight_decay": None}
    updates, _ = run(inject(factory, learning_rate=rate, damping=damping, **options), GRADIENTS, PARAMS)
    assert_close(updates, run(factory(rate, 3, damping, **options), GRADIENTS)[0])


def test_injected_numbers_act_as_static_ones():
    options: dict[str, Any] = {"damping": 0.5, "window_momentum": 0.7, "step_adaptation": 0.3}
    updates, state = run(inject(scale_by_mfac, **options), GRADIENTS, PARAMS)
    assert state.hyperparams.keys() == options.keys()
    assert_close(updates, run(scale_by_mfac(3, **options), GRADIENTS)[0])


# Trees.


EMPTY: dict[str, Any] = {
    "None": None,
    "MaskedNode": optax.MaskedNode(),
    "zero size": jnp.ones((0, 3)),
    "empty dict": {},
    "empty tuple": (),
}


@pytest.mark.parametrize(
    ("tx", "more"),
    [(PLAIN, EMPTY), *(pytest.param(LEAF, {name: x}, marks=slow) for name, x in EMPTY.items())],
)
def test_what_holds_no_numbers_changes_nothing(tx, more):
    gradients = gradients_for({**PARAMS, **more})
    updates, _ = run(tx, gradients)
    chex.assert_trees_all_equal_structs(updates, gradients)
    assert_close({name: updates[name] for name in PARAMS}, run(tx, GRADIENTS)[0])


@slow
@pytest.mark.parametrize("empty", [{"x": jnp.ones((0, 3))}, {}, None, ()], ids=str)
def test_a_tree_without_numbers_is_updated_to_itself(maybe_jit, empty):
    updates, state = maybe_jit(MFAC.update)(empty, maybe_jit(MFAC.init)(empty))
    chex.assert_trees_all_equal(updates, empty)
    assert optax.tree.get(state, "grads_seen") == 1


@slow
def test_the_shape_of_a_leaf_does_not_matter():
    flat = {"all": jnp.concatenate([g.reshape(STEPS, -1) for g in jax.tree.leaves(GRADIENTS)], axis=1)}
    updates, _ = run(PLAIN, GRADIENTS)
    joined = jnp.concatenate([u.reshape(STEPS, -1) for u in jax.tree.leaves(updates)], axis=1)
    assert_close({"all": joined}, run(PLAIN, flat)[0])


@slow
def test_outside_of_jit_a_step_of_numpy_arrays_with_extra_arguments_is_the_compiled_one():
    """`params` and extra arguments are not needed and not used."""
    as_numpy = functools.partial(jax.tree.map, np.asarray)
    state = PLAIN.init(as_numpy(PARAMS))
    updates, _ = PLAIN.update(as_numpy(at(0)), state, as_numpy(PARAMS), value=1.0, history=jnp.zeros(3))
    assert_close(updates, plain_update(at(0), state)[0])


# Dtypes.


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(d, marks=slow) for d in (jnp.float16, jnp.float32, jnp.float64))],
)
def test_the_leaves_keep_their_dtype_and_the_algebra_has_single_precision(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        gradients = gradients_for(jax.tree.map(lambda p: p.astype(dtype), PARAMS))
        updates, state = run(PLAIN, gradients)
    chex.assert_trees_all_equal_dtypes(updates, state.window, gradients)
    assert state.gram.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    expected, _ = run(PLAIN, jax.tree.map(lambda g: jnp.asarray(np.asarray(g), jnp.float32), gradients))
    in_float32 = jax.tree.map(lambda u: np.asarray(u).astype(np.float32), updates)
    assert_close(in_float32, expected, max(EPS, float(jnp.finfo(dtype).eps) / 100))


# Transformations of JAX.


def test_scan_takes_the_plain_steps():
    updates, state = run(PLAIN, GRADIENTS)
    plain_state = PLAIN.init(PARAMS)
    for step in range(STEPS):
        plain, plain_state = plain_update(at(step), plain_state)
        assert_close(at(step, updates), plain)
    assert_close(state, plain_state)


def test_cond_takes_the_plain_step_or_none():
    _, state = run(PLAIN, GRADIENTS)

    @jax.jit
    def maybe_update(accept):
        return jax.lax.cond(accept, lambda: PLAIN.update(at(0), state), lambda: (at(0), state))

    assert_close(maybe_update(True), plain_update(at(0), state))
    chex.assert_trees_all_equal(maybe_update(False), (at(0), state))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"window_momentum": 0.5, "blocks": "leaf", "solver": "inverse"}, marks=slow)],
)
def test_vmap_over_problems_takes_the_plain_steps_of_each(options):
    """The second problem meets a NaN, which none of the others see."""
    tx = scale_by_mfac(3, 0.5, **options) if options else PLAIN
    problems = [gradients_for(PARAMS, seed=seed) for seed in range(3)]
    problems[1]["bias"] = problems[1]["bias"].at[2, 0].set(jnp.nan)
    together = jax.vmap(functools.partial(run, tx))(jax.tree.map(lambda *g: jnp.stack(g), *problems))
    for number, gradients in enumerate(problems):
        assert_close(at(number, together), run(tx, gradients))
    np.testing.assert_array_equal(together[1].grads_rejected, [0, 1, 0])


@slow
def test_vmap_over_dampings_takes_the_plain_steps_of_each():
    dampings = jnp.array([0.1, 1.0, 10.0])

    together, _ = jax.vmap(lambda d: traceable_run(scale_by_mfac(3, d), GRADIENTS))(dampings)
    for number, damping in enumerate(dampings):
        assert_close(at(number, together), run(scale_by_mfac(3, float(damping)), GRADIENTS)[0])
