"""What scale_by_mfac and ihvp compute, against dense float64 Fisher matrices."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import ihvp, scale_by_mfac
from tests.dense_reference import inverse_of_newest, inverse_power, mean_by_age, relative_error

SIZES = {"bias": (3,), "kernel": (2, 3), "scale": ()}  # in the order of the leaves: 10 parameters
WIDTH = 10
EPS = float(np.finfo(np.float32).eps)


def by_rank(path) -> bool:
    return path[0].key == "kernel"


# The slices of the flattened parameters that make up each block; `by_rank` splits off the kernel alone.
BLOCKS = {
    None: (slice(None),),
    "leaf": (slice(0, 3), slice(3, 9), slice(9, 10)),
    by_rank: (np.array([0, 1, 2, 9]), slice(3, 9)),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def as_tree(flat):
    """Flat gradients `(*batch, 10)` as the tree of SIZES."""
    leaves = jnp.split(jnp.asarray(flat), [3, 9], axis=-1)
    shapes = zip(SIZES.items(), leaves, strict=True)
    return {name: leaf.reshape(*flat.shape[:-1], *shape) for (name, shape), leaf in shapes}


def as_flat(tree) -> np.ndarray:
    """The inverse of `as_tree`."""
    batch = tree["scale"].shape
    return np.concatenate([np.reshape(tree[name], (*batch, -1)) for name in SIZES], axis=-1)


def stream(length: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Correlated float64 gradients of different norms."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((length, width)) + rng.standard_normal(width)
    return grads * rng.uniform(0.3, 3, (length, 1))


def run(tx: optax.GradientTransformationExtraArgs, grads) -> tuple[Any, Any]:
    """All updates over a stream of gradients, stacked, and the last state."""
    state = tx.init(jax.tree.map(lambda g: g[0], grads))

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(step, state, grads)
    return updates, state


@functools.partial(jax.jit, static_argnames=("num_grads", "normalize_by", "blocks", "damping"))
def jitted_run(grads, power, window_momentum, *, num_grads, normalize_by, blocks, damping):
    tx = scale_by_mfac(
        num_grads,
        damping,
        normalize_by=normalize_by,
        power=power,
        window_momentum=window_momentum,
        blocks=blocks,
    )
    return run(tx, grads)


def dense_run(grads, num_grads, damping, normalize_by, power, window_momentum, blocks) -> np.ndarray:
    """What `scale_by_mfac` should answer at every step; `damping` is a schedule."""
    answers = []
    for step in range(len(grads)):
        window = grads[max(0, step + 1 - num_grads) : step + 1]
        count = num_grads if normalize_by == "window" else len(window)
        x = mean_by_age(window, window_momentum)
        answers.append(inverse_power(window, x, damping(step), count, power, BLOCKS[blocks]))
    return np.stack(answers)


def constant(step):
    return 0.05


def decaying(step):
    return 0.5 * 0.9**step


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return max(map(relative_error, actual, expected))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("normalize_by", ["window", "count"])
@pytest.mark.parametrize("num_grads", [1, 2, 7, 32])
def test_every_step_of_a_long_stream_is_the_closed_form(x64, num_grads, normalize_by, blocks):
    grads = stream(3 * num_grads)
    for power in (1.0, 0.5, 0.25):
        for window_momentum in (0.0, 0.9):
            updates, _ = jitted_run(
                as_tree(grads),
                power,
                window_momentum,
                num_grads=num_grads,
                normalize_by=normalize_by,
                blocks=blocks,
                damping=constant,
            )
            expected = dense_run(grads, num_grads, constant, normalize_by, power, window_momentum, blocks)
            assert worst_error(as_flat(updates), expected) < 1e-9, (power, window_momentum)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_relative_damping_is_in_units_of_the_windows_mean_square(x64, power, blocks):
    grads, num_grads, rho = stream(12), 5, 0.2
    tx = scale_by_mfac(num_grads, rho, relative_damping=True, power=power, blocks=blocks)
    updates, state = jax.jit(functools.partial(run, tx))(as_tree(grads))
    expected = np.empty_like(grads)
    for step in range(len(grads)):
        window = grads[max(0, step + 1 - num_grads) : step + 1]
        for block in BLOCKS[blocks]:
            energy = np.mean(np.sum(window[:, block] ** 2, axis=1))
            inverse = inverse_power(window[:, block], grads[step, block], rho * energy, 1, power)
            expected[step, block] = ((1 + rho) * energy) ** power * inverse
    assert worst_error(as_flat(updates), expected) < 1e-9
    norms = [np.sum(grads[-num_grads:, block] ** 2) / num_grads for block in BLOCKS[blocks]]
    np.testing.assert_allclose(state.shift, rho * np.array(norms), rtol=1e-12)


def test_relative_damping_keeps_a_lone_gradient_and_knows_no_units():
    grads = stream(6).astype(np.float32)
    tx = scale_by_mfac(4, 0.2, relative_damping=True)
    updates, _ = run(tx, as_tree(grads))
    np.testing.assert_allclose(as_flat(updates)[0], grads[0], rtol=8 * EPS)
    for unit in (2.0**-40, 2.0**40):
        scaled, _ = run(tx, as_tree(grads * np.float32(unit)))
        assert worst_error(as_flat(scaled), unit * as_flat(updates)) < 64 * EPS


@pytest.mark.parametrize(("rho", "entry"), [(100.0, 3e38), (1e30, 1e15), (1e-30, 1e-15)])
def test_relative_damping_does_not_overflow(rho, entry):
    tx = scale_by_mfac(3, rho, relative_damping=True)
    updates, state = run(tx, jnp.full((5, 10), entry, jnp.float32))
    assert np.isfinite(updates).all()
    assert np.isfinite(state.shift).all()


def test_nesterov_counts_the_newest_gradient_once_more(x64):
    grads = stream(9)
    tx = scale_by_mfac(4, 0.05, window_momentum=0.7, nesterov=True)
    updates, _ = run(tx, as_tree(grads))
    for step in range(len(grads)):
        window = grads[max(0, step - 3) : step + 1]
        x = 0.7 * mean_by_age(window, 0.7) + 0.3 * window[-1]
        assert relative_error(as_flat(updates)[step], inverse_power(window, x, 0.05, 4)) < 1e-9


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def adapted_log_steps(grads: np.ndarray, directions: np.ndarray, rate: float) -> np.ndarray:
    """What `log_step` should be after each gradient, as long as the window wraps never."""
    log_steps, mean = [0.0], 0.0
    for step in range(1, len(grads)):
        newest = cosine(grads[step], directions[step - 1])
        share = max(0.05, 1 / step)
        mean += share * (newest - mean)
        pairs = [cosine(grads[i], grads[j]) for i in range(step + 1) for j in range(i)]
        noise = np.sqrt(np.mean(np.square(pairs)) * share / (2 - share))
        significant = np.sign(mean) * max(abs(mean) - 2 * noise, 0)
        newer, older = np.array_split(np.log(np.sum(grads[step::-1] ** 2, axis=1)), 2)
        difference = older.mean() - newer.mean()
        standard_error = np.sqrt(sum(x.var(ddof=1) / len(x) if len(x) > 1 else 0 for x in (newer, older)))
        shrinkage = np.sign(difference) * (1 - np.exp(-max(abs(difference) - standard_error, 0)))
        beyond = significant + 0.06 * shrinkage - 0.005
        move = newest + 0.06 if log_steps[-1] < np.log(5) else beyond
        log_steps.append(np.clip(log_steps[-1] + rate * move, -np.log(30), np.log(30)))
    return np.array(log_steps)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_step_factor_follows_the_cosine_of_gradient_and_last_update(x64, blocks):
    signs = np.where(np.arange(40) < 8, 1, (-1) ** np.arange(40))  # along the updates, then against them
    grads = stream(40) / 3 + signs[:, None] * stream(1, seed=1)
    plain, _ = run(scale_by_mfac(40, 0.5, window_momentum=0.3, blocks=blocks), as_tree(grads))
    tx = scale_by_mfac(40, 0.5, window_momentum=0.3, blocks=blocks, step_adaptation=1.0)
    updates, state = run(tx, as_tree(grads))
    log_steps = adapted_log_steps(grads, as_flat(plain), 1.0)
    assert log_steps.max() > np.log(5)
    assert log_steps[-1] < log_steps.max()
    np.testing.assert_allclose(state.log_step, log_steps[-1], rtol=1e-9)
    assert worst_error(as_flat(updates), np.exp(log_steps)[:, None] * as_flat(plain)) < 1e-9


@pytest.mark.parametrize(("sign", "factor"), [(1, 30), (-1, 1 / 30)])
def test_the_step_factor_stays_in_its_band(sign, factor):
    """Equal gradients point along every update; alternating ones against every other."""
    g = stream(1)[0].astype(np.float32)
    grads = np.stack([g * sign**step for step in range(200)])
    _, state = run(scale_by_mfac(1, 0.05, step_adaptation=1.0), as_tree(grads))
    # In a window of one row the last update's gradient is gone when the next one comes.
    assert state.log_step == 0
    _, state = run(scale_by_mfac(2, 0.05, step_adaptation=1.0), as_tree(grads))
    np.testing.assert_allclose(np.exp(state.log_step), factor, rtol=1e-5)


def noise(norms: str, dimensions: int) -> np.ndarray:
    """Unrelated gradients; a bound on the step's length is all they can teach."""
    rng = np.random.default_rng(0)
    lengths = {
        "equal": np.ones(2000),
        "spread": np.exp(rng.standard_normal(2000)),
        "outliers": np.where(rng.random(2000) < 0.02, 30, 1),
        "waves": np.where(np.arange(2000) % 100 < 50, 3, 1),
    }[norms]
    return (lengths[:, None] * rng.standard_normal((2000, dimensions))).astype(np.float32)


@pytest.mark.parametrize("dimensions", [2, 64])
@pytest.mark.parametrize("num_grads", [4, 64])
@pytest.mark.parametrize("norms", ["equal", "spread", "outliers", "waves"])
def test_the_step_factor_does_not_grow_on_noise(norms, num_grads, dimensions):
    tx = scale_by_mfac(num_grads, 0.2, relative_damping=True, window_momentum=0.9, step_adaptation=0.3)

    def step(state, gradient):
        state = tx.update(gradient, state)[1]
        return state, optax.tree.get(state, "log_step")

    grads = noise(norms, dimensions)
    _, log_steps = jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads))(grads)
    assert np.log(4) < np.median(log_steps[1000:]) < np.log(8)
    assert log_steps.max() < np.log(20)


def test_the_step_factor_grows_while_gradients_shrink():
    shrinking = noise("spread", 64) * np.exp(-np.arange(2000) / 50, dtype=np.float32)[:, None]
    tx = scale_by_mfac(64, 0.2, relative_damping=True, window_momentum=0.9, step_adaptation=0.3)
    _, state = run(tx, shrinking[:1000])
    np.testing.assert_allclose(np.exp(state.log_step), 30, rtol=1e-5)


def test_a_schedule_of_nan_does_not_poison_the_state():
    tx = scale_by_mfac(4, lambda count: jnp.nan, step_adaptation=lambda count: jnp.nan)
    updates, state = run(tx, as_tree(stream(6)))
    chex.assert_tree_all_finite((updates, state))
    assert state.log_step == 0


def test_a_rejected_gradient_leaves_the_step_factor():
    grads = stream(6)
    interrupted = np.insert(grads, 3, np.inf, axis=0).astype(np.float32)
    tx = scale_by_mfac(8, 0.05, step_adaptation=0.3)
    _, expected = run(tx, as_tree(grads.astype(np.float32)))
    _, state = run(tx, as_tree(interrupted))
    np.testing.assert_array_equal(state.log_step, expected.log_step)
    np.testing.assert_array_equal(state.coefficients, expected.coefficients)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_damping_follows_a_schedule_over_the_gradients(x64, power):
    grads = stream(12)
    tx = scale_by_mfac(4, decaying, power=power)
    updates, _ = jax.jit(functools.partial(run, tx))(as_tree(grads))
    expected = dense_run(grads, 4, decaying, "window", power, 0.0, None)
    assert worst_error(as_flat(updates), expected) < 1e-9


def test_a_rejected_gradient_does_not_advance_the_damping_schedule(x64):
    grads = stream(6)
    interrupted = np.insert(grads, 3, np.nan, axis=0)
    run_decaying = jax.jit(functools.partial(run, scale_by_mfac(4, decaying)))
    expected, _ = run_decaying(as_tree(grads))
    updates, _ = run_decaying(as_tree(interrupted))
    np.testing.assert_array_equal(np.delete(as_flat(updates), 3, axis=0), as_flat(expected))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_traced_power_gives_what_a_static_one_gives(x64, power):
    grads = as_tree(stream(8))
    static, _ = jax.jit(functools.partial(run, scale_by_mfac(4, 0.05, power=power)))(grads)
    traced, _ = jitted_run(
        grads, power, 0.0, num_grads=4, normalize_by="window", blocks=None, damping=constant
    )
    np.testing.assert_allclose(as_flat(traced), as_flat(static), rtol=1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("length", [3, 32])
def test_ihvp_of_any_vector_is_the_closed_form(x64, length, power, blocks):
    grads, damping = stream(length), 0.05
    options: Any = {"num_grads": 7, "normalize_by": "window", "blocks": blocks, "damping": constant}
    _, state = jitted_run(as_tree(grads), 1.0, 0.0, **options)
    window = grads[-7:]
    counts: Any = {"window": 7, "count": len(window)}
    for normalize_by, count in counts.items():
        product = jax.jit(
            functools.partial(ihvp, damping=damping, normalize_by=normalize_by, power=power, blocks=blocks)
        )
        for x in (stream(1, seed=1)[0], window[0]):
            answer = product(state, as_tree(x))
            expected = inverse_power(window, x, damping, count, power, BLOCKS[blocks])
            assert relative_error(as_flat(answer), expected) < 1e-9


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_ihvp_of_the_newest_gradient_is_the_update(x64, power):
    grads = stream(10)
    updates, state = run(scale_by_mfac(4, 0.05, power=power), as_tree(grads))
    answer = ihvp(state, as_tree(grads[-1]), 0.05, power=power)
    np.testing.assert_allclose(as_flat(answer), as_flat(updates)[-1], rtol=1e-12)


def test_ihvp_with_an_empty_window_divides_by_the_damping():
    x = as_tree(stream(1)[0].astype(np.float32))
    state: Any = scale_by_mfac(4).init(x)
    for normalize_by in ("window", "count"):
        answer = ihvp(state, x, 0.25, normalize_by=normalize_by)
        np.testing.assert_array_equal(as_flat(answer), 4 * as_flat(x))


@pytest.mark.parametrize(("normalize_by", "count"), [("window", 7), ("count", 1)])
def test_the_first_step_is_the_gradient_over_the_damped_squared_norm(normalize_by, count):
    g = stream(1)[0].astype(np.float32)
    tx = scale_by_mfac(7, 0.05, normalize_by=normalize_by)
    updates, _ = tx.update(as_tree(g), tx.init(as_tree(g)))
    exact = g.astype(np.float64)
    expected = count * exact / (count * 0.05 + exact @ exact)
    np.testing.assert_allclose(as_flat(updates), expected, rtol=8 * EPS)


def permuted(state, order):
    """The state with its rows in another order; `next_row` keeps pointing at the same row."""
    return state._replace(
        next_row=jnp.argmax(order == state.next_row).astype(jnp.int32),
        window=jax.tree.map(lambda rows: rows[order], state.window),
        gram=state.gram[:, order][:, :, order],
        coefficients=state.coefficients[:, order],
    )


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_answer_does_not_depend_on_the_order_of_the_rows(x64, power):
    grads, last = stream(15), as_tree(stream(1, seed=2)[0])
    tx = scale_by_mfac(7, 0.05, power=power)
    _, state = run(tx, as_tree(grads))
    order = np.random.default_rng(3).permutation(7)
    expected, _ = tx.update(last, state)
    updates, _ = tx.update(last, permuted(state, order))
    np.testing.assert_allclose(as_flat(updates), as_flat(expected), rtol=1e-12)
    answer = ihvp(permuted(state, order), last, 0.05, power=power)
    np.testing.assert_allclose(as_flat(answer), as_flat(ihvp(state, last, 0.05, power=power)), rtol=1e-12)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_large_damping_leaves_the_gradient_over_a_power_of_it(power):
    grads = stream(9).astype(np.float32)
    updates, _ = run(scale_by_mfac(4, 1e12, power=power), as_tree(grads))
    assert worst_error(as_flat(updates), grads * 1e12**-power) < 16 * EPS


def test_more_gradients_than_parameters_are_used(x64):
    grads = stream(40, width=3)
    updates, _ = run(scale_by_mfac(20, 0.05), jnp.asarray(grads))
    expected = inverse_power(grads[-20:], grads[-1], 0.05, 20)
    assert relative_error(updates[-1], expected) < 1e-9


def test_one_gradient_is_scaled_by_its_own_norm_alone(x64):
    grads = stream(5)
    updates, _ = run(scale_by_mfac(1, 0.05), as_tree(grads))
    expected = grads / (0.05 + np.sum(grads**2, axis=1, keepdims=True))
    np.testing.assert_allclose(as_flat(updates), expected, rtol=1e-12)


def test_the_exact_small_system_agrees_with_the_dense_matrix():
    grads = stream(5, width=40)
    expected = inverse_power(grads, grads[-1], 0.05, 8)
    assert relative_error(inverse_of_newest(grads, 0.05, 8), expected) < 1e-12


def test_weights_of_the_window_add_up_to_one_while_it_fills(x64):
    """Equal gradients have themselves as every weighted mean."""
    grads = np.repeat(stream(1), 5, axis=0)
    plain, _ = run(scale_by_mfac(8, 0.05), as_tree(grads))
    averaged, _ = run(scale_by_mfac(8, 0.05, window_momentum=0.9), as_tree(grads))
    np.testing.assert_allclose(as_flat(averaged), as_flat(plain), rtol=1e-12)


@pytest.mark.parametrize("size", [272_474, 10_000_000])  # measured on CPU: 1.3e-6 and 7e-7
def test_gram_entries_stay_accurate_over_millions_of_parameters(size):
    grads = np.random.default_rng(0).uniform(0.5, 1.5, (3, size)).astype(np.float32)
    tx = scale_by_mfac(2)
    state: Any = tx.init(jnp.zeros(size))
    update = jax.jit(tx.update, donate_argnums=1)
    for g in grads:
        _, state = update(jnp.asarray(g), state)
    window = np.asarray(state.window, np.float64)
    expected = window @ window.T
    assert np.max(np.abs(np.asarray(state.gram[0]) - expected) / expected) < 1e-5
