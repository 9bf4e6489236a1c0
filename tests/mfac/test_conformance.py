"""M-FAC as a citizen of the optax world: wrappers, trees, dtypes, transformations, checkpoints, Flax."""

import functools
from typing import Any

import chex
import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from mfac_jax import ScaleByMFACState, mfac, mfac_published, scale_by_mfac

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3)), "scale": jnp.ones(())}
PLAIN = scale_by_mfac(3, 0.5)
LEAF = scale_by_mfac(3, 0.5, blocks="leaf")
MFAC = mfac(0.1, 3)
ALL_TRUE = dict.fromkeys(PARAMS, True)
STEPS = 5  # the window of three wraps
EPS = float(jnp.finfo(jnp.float32).eps)
slow = pytest.mark.slow
plain_update: Any = jax.jit(PLAIN.update)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[pytest.param("eager", marks=slow), "jit"])
def maybe_jit(request):
    return {"eager": lambda f: f, "jit": jax.jit}[request.param]


def gradients_for(params, steps: int = STEPS, seed: int = 0):
    """Random gradients, with an axis of steps in front of every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((steps, *p.shape)), p.dtype), params)


GRADIENTS = gradients_for(PARAMS)


def at(step: int, gradients=GRADIENTS):
    return jax.tree.map(lambda g: g[step], gradients)


def traceable_run(tx: optax.GradientTransformation, gradients, params=None) -> tuple[Any, Any]:
    """All updates, with an axis of steps in front, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(at(0, gradients)), gradients)
    return updates, state


run = jax.jit(traceable_run, static_argnames="tx")


def assert_close(actual, expected, eps: float = EPS):
    chex.assert_trees_all_close(actual, expected, rtol=100 * eps, atol=100 * eps)


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


@pytest.mark.parametrize("options", [{}, pytest.param({"blocks": is_kernel}, marks=slow)])
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
    expected, _ = scale_by_mfac(3, 3.0).update(at(0), state.inner_state)
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
    "dtype", [jnp.bfloat16, jnp.float64, *(pytest.param(d, marks=slow) for d in (jnp.float16, jnp.float32))]
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


# The state.


def types(state):
    """Shape, dtype, weak type and sharding of every array."""
    return jax.tree.map(jax.typeof, state)


def traced_types(function, *args):
    """As `types`, of what a function returns, without compiling it."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


@pytest.mark.parametrize(
    "tx",
    [mfac(0.1, 3, weight_decay=0.1, blocks="leaf"), mfac_published(num_grads=3, solver="inverse")],
    ids=["mfac", "mfac_published"],
)
def test_the_state_keeps_its_types_from_init_on(tx):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(params)
    updates, new_state = traced_types(tx.update, params, state, params)
    assert types(state) == new_state == traced_types(tx.init, params)
    assert types(params) == updates
    assert not any(aval.weak_type for aval in jax.tree.leaves(new_state))


def test_init_takes_shapes_in_the_place_of_arrays():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    chex.assert_trees_all_equal(PLAIN.init(shapes), PLAIN.init(PARAMS))
    assert jax.eval_shape(PLAIN.init, shapes) == jax.eval_shape(lambda: PLAIN.init(PARAMS))


traced_once: Any = jax.jit(chex.assert_max_traces(MFAC.update, n=1), donate_argnums=1)


@pytest.mark.parametrize("init", [MFAC.init, jax.jit(MFAC.init)], ids=["eager", "jit"])
def test_no_step_is_traced_twice_and_all_of_the_state_can_be_donated(init):
    """An array in two fields would be donated twice, which is an error."""
    state = init(PARAMS)
    for number in range(3):
        donated = jax.tree.leaves(state)
        _, state = traced_once(at(number), state)
        assert all(leaf.is_deleted() for leaf in donated)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)


def test_the_state_is_an_immutable_named_tuple():
    state: Any = PLAIN.init(PARAMS)
    assert state._fields == (
        *("grads_seen", "grads_rejected", "next_row", "window", "metric", "gram", "solver"),
        *("coefficients", "shift", "step_length", "log_step", "block_of_leaf", "made_with"),
    )
    with pytest.raises(AttributeError):
        state.gram = state.gram
    before = jax.tree.map(np.array, state)
    plain_update(at(0), state)
    chex.assert_trees_all_equal(state, before)


def test_the_state_says_what_it_was_made_with():
    state: Any = scale_by_mfac(3, metric="diagonal", storage=jnp.bfloat16, blocks=is_kernel).init(PARAMS)
    kinds = {"metric=diagonal", "solver=cholesky", "storage=bfloat16", "step_adaptation=none"}
    assert state.made_with.keys() == kinds
    np.testing.assert_array_equal(state.block_of_leaf, [0, 1, 0])
    assert not jax.tree.leaves((state.made_with, state.solver, state.step_length))


def test_tree_get_and_set_find_the_fields_in_a_chain():
    tx = optax.chain(optax.clip_by_global_norm(1.0), MFAC)
    state = tx.init(PARAMS)
    assert isinstance(optax.tree.get(state, "ScaleByMFACState"), ScaleByMFACState)
    assert optax.tree.get(state, "window").keys() == PARAMS.keys()
    changed = optax.tree.set(state, grads_seen=jnp.int32(7))
    assert optax.tree.get(changed, "ScaleByMFACState").grads_seen == 7


def test_map_params_reaches_window_and_second_moment_and_nothing_else_of_the_state():
    tx = optax.chain(optax.clip_by_global_norm(1.0), MFAC)
    names = {name: name for name in PARAMS}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(PARAMS), names, transform_non_params=lambda _: "no parameter"
    )
    assert optax.tree.get(mapped, "window") == names
    assert optax.tree.get(mapped, "second_moment") == names
    state = optax.tree.get(mapped, "ScaleByMFACState")
    others = jax.tree.leaves(state._replace(window=None, metric=None))
    # The window, the metric, the solver and `made_with` have none; the step length has the mean cosine.
    assert others == ["no parameter"] * (len(state._fields) - 4)


def with_flax(state, directory):
    del directory
    return flax.serialization.from_bytes(MFAC.init(PARAMS), flax.serialization.to_bytes(state))


def with_orbax(state, directory):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "state", jax.eval_shape(MFAC.init, PARAMS))


@pytest.mark.parametrize("save_and_restore", [with_flax, with_orbax])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(save_and_restore, tmp_path):
    _, state = run(MFAC, GRADIENTS)
    restored = save_and_restore(state, tmp_path)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    restored = jax.tree.map(jnp.array, restored)  # what is donated has to be JAX's own
    chex.assert_trees_all_equal(traced_once(at(0), restored), traced_once(at(0), state))


@pytest.mark.parametrize("save_and_restore", [with_flax, with_orbax])
def test_a_checkpoint_of_another_setting_is_not_restored(save_and_restore, tmp_path):
    """Libraries compare structures: where all arrays fit, the setting stands in what they say."""
    state = mfac(0.1, 3, storage=jnp.float32).init(PARAMS)
    with pytest.raises(ValueError, match="storage=None"):
        save_and_restore(state, tmp_path)


# Flax.


INPUTS = jax.random.normal(jax.random.key(0), (64, 3))
TARGETS = jnp.sin(INPUTS @ jnp.array([1.0, -2.0, 0.5]))[:, None]


def squared_error(predictions):
    return jnp.mean((predictions - TARGETS) ** 2)


@slow
def test_a_linen_train_state_trains():
    model = flax.linen.Sequential([flax.linen.Dense(16), jnp.tanh, flax.linen.Dense(1)])
    params = model.init(jax.random.key(1), INPUTS)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=mfac(0.1, 8, 0.1))

    @jax.jit
    def step(state):
        loss, gradients = jax.value_and_grad(lambda p: squared_error(state.apply_fn(p, INPUTS)))(
            state.params
        )
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < losses[0] / 2


@slow
def test_an_nnx_optimizer_trains():
    rngs = nnx.Rngs(1)
    model = nnx.Sequential(nnx.Linear(3, 16, rngs=rngs), jnp.tanh, nnx.Linear(16, 1, rngs=rngs))
    optimizer = nnx.Optimizer(model, mfac(0.1, 8, 0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: squared_error(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


# Gradients that are not finite.


def spoiled(value: float):
    """The gradients with a bad one before the first, the third and after the last: 0, 3 and 7 of 8."""
    order = jnp.array([0, 0, 1, 2, 2, 3, 4, 4])
    gradients = jax.tree.map(lambda g: g[order], GRADIENTS)
    bad = jnp.array([0, 3, 7])
    return {**gradients, "kernel": gradients["kernel"].at[bad, 1, 2].set(value)}, bad.tolist()


def loop(tx, gradients) -> tuple[list[Any], Any]:
    """As `run`, but each step is one call of one compiled program."""
    step, state, all_updates = jax.jit(tx.update), tx.init(PARAMS), []
    for number in range(len(gradients["scale"])):
        updates, state = step(at(number, gradients), state, PARAMS)
        all_updates.append(updates)
    return all_updates, state


def apart(updates, bad: list[int]):
    return [u for i, u in enumerate(updates) if i not in bad], [updates[i] for i in bad]


DECAYED = mfac(0.1, 3, optax.exponential_decay(0.5, 3, 0.3), weight_decay=0.1)
WITH_BAD_GRADIENTS = {
    "published": mfac_published(0.1, 3, 0.5),
    "mfac": DECAYED,
    "no momentum": mfac(0.1, 3, 0.5, None),
    "other options": mfac(0.1, 3, 0.5, blocks="leaf", solver="inverse", storage=jnp.bfloat16),
    "as in the paper, without momentum": mfac_published(0.1, 3, 0.5, None, blocks="leaf"),
}


@pytest.mark.parametrize("value", [jnp.nan, pytest.param(-jnp.inf, marks=slow)])
@pytest.mark.parametrize(
    "name", ["published", "mfac", *(pytest.param(n, marks=slow) for n in [*WITH_BAD_GRADIENTS][2:])]
)
def test_after_a_bad_gradient_all_is_as_if_it_had_not_come(value, name):
    """The schedule of the damping has not moved, nor have metric, momentum or step factor."""
    tx = WITH_BAD_GRADIENTS[name]
    gradients, bad = spoiled(value)
    updates, state = loop(tx, gradients)
    good_updates, bad_updates = apart(updates, bad)
    expected, expected_state = loop(tx, GRADIENTS)
    chex.assert_trees_all_equal(good_updates, expected)
    assert not any(jnp.isfinite(u["kernel"][1, 2]) for u in bad_updates)
    assert optax.tree.get(state, "grads_rejected") == len(bad)
    chex.assert_trees_all_equal(optax.tree.set(state, grads_rejected=jnp.int32(0)), expected_state)


def test_apply_if_finite_sees_a_bad_gradient_and_skips_it():
    tx = optax.apply_if_finite(DECAYED, 3)
    gradients, bad = spoiled(jnp.nan)
    updates, state = loop(tx, gradients)
    good_updates, bad_updates = apart(updates, bad)
    expected, expected_state = loop(tx, GRADIENTS)
    chex.assert_trees_all_equal(good_updates, expected)
    chex.assert_trees_all_equal(bad_updates, [jax.tree.map(jnp.zeros_like, PARAMS)] * len(bad))
    assert optax.tree.get(state, "total_notfinite") == len(bad)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)


@slow
def test_a_users_own_check_sees_a_bad_gradient_and_trains_on():
    tx = DECAYED

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        new_params = optax.apply_updates(params, updates)
        finite = jnp.isfinite(optax.tree.norm(updates))
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_params, params), state

    def train(gradients):
        params, state = PARAMS, tx.init(PARAMS)
        for number in range(len(gradients["scale"])):
            params, state = step(params, state, at(number, gradients))
        return params

    chex.assert_trees_all_equal(train(spoiled(jnp.nan)[0]), train(GRADIENTS))
