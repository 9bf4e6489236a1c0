"""What scale_by_mfac and ihvp compute, against dense float64 Fisher matrices."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import ihvp, scale_by_mfac
from tests.dense_reference import inverse_of_newest, inverse_product, mean_by_age, relative_error
from tests.mfac.dense_streams import (
    BLOCKS,
    ONE_BLOCKING,
    as_flat,
    as_tree,
    by_rank,
    constant,
    decaying,
    dense_run,
    jitted_run,
    run,
    stream,
    worst_error,
)

EPS = float(np.finfo(np.float32).eps)
slow = pytest.mark.slow


@functools.partial(jax.jit, static_argnames=("num_grads", "blocks", "damping"))
def run_and_states(grads, window_momentum, *, num_grads, blocks, damping):
    """All updates, and the states after each gradient, stacked."""
    tx = scale_by_mfac(num_grads, damping, window_momentum=window_momentum, blocks=blocks)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)[1]


@functools.partial(jax.jit, static_argnames="relative")
def run_four(grads, damping, relative=False):
    """With a window of four; the damping may be any."""
    return run(scale_by_mfac(4, damping, relative_damping=relative), grads)


CASES = [(7, by_rank, constant), (32, None, decaying)]
MORE_CASES = [(n, blocks, d) for n in (1, 2, 7, 32) for blocks in BLOCKS for d in (constant, decaying)]


@pytest.mark.parametrize(
    ("num_grads", "blocks", "damping"),
    [*CASES, *(pytest.param(*case, marks=slow) for case in MORE_CASES if case not in CASES)],
)
def test_every_step_of_a_long_stream_is_the_closed_form(x64, num_grads, blocks, damping):
    """The window wraps; one of 32 has more rows than there are parameters."""
    grads = stream(3 * num_grads)
    options = {"num_grads": num_grads, "blocks": blocks, "damping": damping}
    for window_momentum in (0.0, 0.9):
        updates, _ = run_and_states(as_tree(grads), window_momentum, **options)
        expected = dense_run(grads, num_grads, damping, window_momentum, blocks)
        assert worst_error(as_flat(updates), expected) < 1e-9, window_momentum


@ONE_BLOCKING
def test_relative_damping_is_in_units_of_the_windows_mean_square(x64, blocks):
    grads, num_grads, rho = stream(12), 5, 0.2
    updates, state = jitted_run(
        scale_by_mfac(num_grads, rho, relative_damping=True, blocks=blocks), as_tree(grads)
    )
    expected = np.empty_like(grads)
    for step in range(len(grads)):
        window = grads[max(0, step + 1 - num_grads) : step + 1]
        for block in BLOCKS[blocks]:
            energy = np.mean(np.sum(window[:, block] ** 2, axis=1))
            inverse = inverse_product(window[:, block], grads[step, block], rho * energy, 1)
            expected[step, block] = (1 + rho) * energy * inverse
    assert worst_error(as_flat(updates), expected) < 1e-9
    norms = [np.sum(grads[-num_grads:, block] ** 2) / num_grads for block in BLOCKS[blocks]]
    np.testing.assert_allclose(state.shift, rho * np.array(norms), rtol=1e-12)


def test_relative_damping_keeps_a_lone_gradient_and_knows_no_units():
    grads = stream(6).astype(np.float32)
    updates, _ = run_four(as_tree(grads), 0.2, relative=True)
    np.testing.assert_allclose(as_flat(updates)[0], grads[0], rtol=8 * EPS)
    tiny, _ = run_four(as_tree(grads * np.float32(2.0**-60)), 0.2, relative=True)
    np.testing.assert_allclose(as_flat(tiny)[0], grads[0] * 2.0**-60, rtol=8 * EPS)
    for unit in (2.0**-40, 2.0**40):
        scaled, _ = run_four(as_tree(grads * np.float32(unit)), 0.2, relative=True)
        assert worst_error(as_flat(scaled), unit * as_flat(updates)) < 64 * EPS


@pytest.mark.parametrize(("rho", "entry"), [(100.0, 3e38), (1e30, 1e15), (1e-30, 1e-15)])
def test_relative_damping_does_not_overflow(rho, entry):
    updates, state = run_four(as_tree(np.full((6, 10), entry, np.float32)), rho, relative=True)
    chex.assert_tree_all_finite((updates, state.shift))


@slow
def test_nesterov_counts_the_newest_gradient_once_more(x64):
    """As `mfac` does: the formula of its step in `test_metric.py` has it too."""
    grads = stream(9)
    updates, _ = jitted_run(scale_by_mfac(4, 0.05, window_momentum=0.7, nesterov=True), as_tree(grads))
    for step in range(len(grads)):
        window = grads[max(0, step - 3) : step + 1]
        x = 0.7 * mean_by_age(window, 0.7) + 0.3 * window[-1]
        assert relative_error(as_flat(updates)[step], inverse_product(window, x, 0.05, 4)) < 1e-9


@slow
def test_a_rejected_gradient_advances_neither_the_damping_schedule_nor_the_step_factor(x64):
    grads = stream(6)
    interrupted = np.insert(grads, 3, np.nan, axis=0)
    tx = scale_by_mfac(8, decaying, step_adaptation=0.3)
    expected, expected_state = jitted_run(tx, as_tree(grads))
    updates, state = jitted_run(tx, as_tree(interrupted))
    np.testing.assert_array_equal(np.delete(as_flat(updates), 3, axis=0), as_flat(expected))
    np.testing.assert_array_equal(state.log_step, expected_state.log_step)
    np.testing.assert_array_equal(state.coefficients, expected_state.coefficients)


# Products with the Fisher inverse. They read the states of one stream, compiled above.

product = jax.jit(functools.partial(ihvp, damping=0.05))


def updates_and_states(blocks) -> tuple[np.ndarray, np.ndarray, Any]:
    """The gradients, the updates, and a function from a step to the state after it."""
    grads = stream(21)
    options = {"num_grads": 7, "blocks": blocks, "damping": constant}
    updates, states = run_and_states(as_tree(grads), 0.0, **options)
    return grads, as_flat(updates), lambda step: jax.tree.map(lambda x: x[step], states)


@ONE_BLOCKING
@pytest.mark.parametrize("length", [3, 20], ids=["filling", "wrapped"])
def test_ihvp_of_any_vector_is_the_closed_form(x64, length, blocks):
    grads, _, state_after = updates_and_states(blocks)
    window = grads[:length][-7:]
    for x in (stream(1, seed=1)[0], window[0]):
        answer = product(state_after(length - 1), as_tree(x))
        expected = inverse_product(window, x, 0.05, 7, BLOCKS[blocks])
        assert relative_error(as_flat(answer), expected) < 1e-9


@ONE_BLOCKING
def test_ihvp_of_the_newest_gradient_is_the_update(x64, blocks):
    grads, updates, state_after = updates_and_states(blocks)
    answer = product(state_after(10), as_tree(grads[10]))
    np.testing.assert_allclose(as_flat(answer), updates[10], rtol=1e-12)


@ONE_BLOCKING
def test_ihvp_with_an_empty_window_divides_by_the_damping(x64, blocks):
    x = as_tree(stream(1)[0])
    answer = product(scale_by_mfac(7, blocks=blocks).init(x), x)
    np.testing.assert_allclose(as_flat(answer), as_flat(x) / 0.05, rtol=1e-15)


def permuted(state, order):
    """The state with its rows in another order; `next_row` keeps pointing at the same row."""
    return state._replace(
        next_row=jnp.argmax(order == state.next_row).astype(jnp.int32),
        window=jax.tree.map(lambda rows: rows[order], state.window),
        gram=state.gram[:, order][:, :, order],
        coefficients=state.coefficients[:, order],
    )


def test_ihvp_does_not_depend_on_the_order_of_the_rows(x64):
    _, _, state_after = updates_and_states(by_rank)
    state, x = state_after(14), as_tree(stream(1, seed=2)[0])
    other = permuted(state, np.random.default_rng(3).permutation(7))
    np.testing.assert_allclose(as_flat(product(other, x)), as_flat(product(state, x)), rtol=1e-12)


@slow
def test_the_update_does_not_depend_on_the_order_of_the_rows(x64):
    _, _, state_after = updates_and_states(by_rank)
    state, last = state_after(14), as_tree(stream(1, seed=2)[0])
    other = permuted(state, np.random.default_rng(3).permutation(7))
    update: Any = jax.jit(scale_by_mfac(7, 0.05, blocks=by_rank).update)
    found, expected = (as_flat(update(last, s)[0]) for s in (other, state))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# Limits.


def test_the_first_step_is_the_gradient_over_the_damped_squared_norm():
    grads = stream(6).astype(np.float32)
    updates, _ = run_four(as_tree(grads), 0.05)
    exact = grads[0].astype(np.float64)
    np.testing.assert_allclose(as_flat(updates)[0], 4 * exact / (4 * 0.05 + exact @ exact), rtol=8 * EPS)


def test_large_damping_leaves_the_gradient_over_it():
    grads = stream(6).astype(np.float32)
    updates, _ = run_four(as_tree(grads), 1e12)
    assert worst_error(as_flat(updates), grads * 1e-12) < 16 * EPS


def test_a_damping_of_nan_does_not_poison_the_state():
    updates, state = run_four(as_tree(stream(6).astype(np.float32)), jnp.nan)
    chex.assert_tree_all_finite((updates, state))


def test_weights_of_the_window_add_up_to_one_while_it_fills(x64):
    """Equal gradients have themselves as every weighted mean."""
    grads = as_tree(np.repeat(stream(1), 21, axis=0))
    options: Any = {"num_grads": 7, "blocks": by_rank, "damping": constant}
    plain, averaged = (run_and_states(grads, beta, **options)[0] for beta in (0.0, 0.9))
    np.testing.assert_allclose(as_flat(averaged), as_flat(plain), rtol=1e-12)


def test_the_exact_small_system_agrees_with_the_dense_matrix():
    grads = stream(5, width=40)
    expected = inverse_product(grads, grads[-1], 0.05, 8)
    assert relative_error(inverse_of_newest(grads, 0.05, 8), expected) < 1e-12


@pytest.mark.parametrize("size", [272_474, pytest.param(10_000_000, marks=slow)])  # 1.3e-6 and 7e-7
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
