"""Diagnostics against dense float64 formulas on the gradients themselves, at extremes, and their log."""

import functools
import json
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mfac_jax import Diagnostics, DiagnosticsLog, diagnostics, scale_by_mfac

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
EPS = float(np.finfo(np.float32).eps)
slow = pytest.mark.slow


def zeros(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def as_tree(flat, dtype=jnp.float32):
    a, b, c = np.split(np.asarray(flat), [12, 17])
    return {
        name: jnp.asarray(x.reshape(SHAPES[name]), dtype) for name, x in zip("abc", (a, b, c), strict=True)
    }


def stack(grads):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[as_tree(g) for g in grads])


def as_matrix(tree, blocks) -> list[np.ndarray]:
    """The rows of each block, float64."""
    leaves = [np.asarray(x, np.float64).reshape(*x.shape[:1], -1) for x in jax.tree.leaves(tree)]
    return leaves if blocks == "leaf" else [np.concatenate(leaves, axis=-1)]


@functools.partial(jax.jit, static_argnames=("relative", "blocks"))
def step(updates, state, damping, relative, blocks):
    return transform(damping, relative, blocks).update(updates, state)


def transform(damping=0.2, relative=False, blocks: Any = None):
    options: Any = {"relative_damping": relative, "blocks": blocks}
    return scale_by_mfac(4, damping, window_momentum=0.5, step_adaptation=0.3, **options)


def walk(grads, damping=0.2, *, relative=False, blocks=None, dtype=jnp.float32) -> tuple[Any, Any]:
    """The last update and the state after all gradients `(steps, 18)`, with a window of four."""
    state, updates = transform(damping, relative, blocks).init(zeros(dtype)), None
    for g in grads:
        updates, state = step(as_tree(g, dtype), state, damping, relative, blocks)
    return updates, state


def random_grads(steps, seed=0, mean=0.5):
    rng = np.random.default_rng(seed)
    return (
        mean * rng.standard_normal(18)
        + rng.standard_normal((steps, 18)) * np.geomspace(1, 5, steps)[:, None]
    )


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def mean(values):
    return np.mean(values) if len(values) else 0.0


def dense(rows: np.ndarray, update: np.ndarray, shift: float, num_grads: int) -> dict[str, Any]:
    """The formulas for one block; `rows` oldest first, as the docstring of `diagnostics` has them."""
    n = len(rows)
    s = np.linalg.eigvalsh(rows.T @ rows / n)[::-1]
    s = np.concatenate([np.maximum(s, 0), np.zeros(num_grads)])[:num_grads]
    damping, in_use = shift / n, s[:n]
    pairs = [cosine(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
    return {
        "spectrum": s,
        "damping": damping,
        "effective_rank": s.sum() ** 2 / (s**2).sum(),
        "condition_number": (in_use[0] + damping) / (in_use[-1] + damping),
        "damping_share": np.mean(damping / (in_use + damping)),
        "similarity": mean(pairs),
        "newest_similarity": mean([cosine(rows[-1], row) for row in rows[:-1]]),
        "alignment": cosine(rows[-1], update),
        "gradient_norm": np.linalg.norm(rows[-1]),
        "step_norm": np.linalg.norm(update),
        "fisher_norm": np.sqrt(np.mean((rows @ update) ** 2)),
    }


@pytest.mark.parametrize(
    ("relative", "blocks"),
    [
        (False, None),
        (True, "leaf"),
        pytest.param(False, "leaf", marks=slow),
        pytest.param(True, None, marks=slow),
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 4, 7], ids=["one", "filling", "full", "wrapped"])
def test_every_field_is_its_dense_formula(steps, relative, blocks):
    grads = random_grads(steps)
    updates, state = walk(grads, relative=relative, blocks=blocks)
    result = diagnostics(state)
    rows = as_matrix(stack(grads[-4:]), blocks)
    update = [x[0] for x in as_matrix(jax.tree.map(lambda x: x[None], updates), blocks)]
    for block, (g, u) in enumerate(zip(rows, update, strict=True)):
        expected = dense(g, u, float(state.shift[block]), 4)
        # s_n + damping has the rounding of s_1, and sums of gradients that cancel that of their terms.
        terms = np.abs(state.coefficients[block]) @ np.sqrt(np.diag(state.gram[block]))
        cancelling = (terms * float(result.step_factor) / expected["step_norm"]) ** 2
        rounding = {"condition_number": expected["condition_number"], "step_norm": cancelling}
        rounding |= {"alignment": cancelling, "fisher_norm": cancelling}
        for name, value in expected.items():
            actual = np.asarray(getattr(result, name))[block]
            scale = np.maximum(np.max(np.abs(value)), 0.1)
            atol = 100 * EPS * rounding.get(name, 1)
            np.testing.assert_allclose(actual / scale, value / scale, rtol=0, atol=atol, err_msg=name)
    assert (int(result.grads_seen), int(result.rows_used)) == (steps, min(steps, 4))
    np.testing.assert_allclose(result.step_factor, np.exp(state.log_step), rtol=4 * EPS)  # two exps
    np.testing.assert_array_equal(result.mean_cosine, state.step_length.mean_cosine)


def test_damping_is_in_the_units_of_the_spectrum():
    grads = random_grads(7)
    np.testing.assert_allclose(diagnostics(walk(grads)[1]).damping, [0.2], rtol=4 * EPS)
    _, filling = walk(grads[:2])  # the paper's n is num_grads from the start
    np.testing.assert_allclose(diagnostics(filling).damping, [0.4], rtol=4 * EPS)
    result = diagnostics(walk(grads, relative=True, blocks="leaf")[1])
    np.testing.assert_allclose(result.damping, 0.2 * result.spectrum.mean(-1), rtol=20 * EPS)


def test_the_order_of_the_rows_makes_no_difference():
    _, state = walk(random_grads(7))
    order = np.array([3, 0, 2, 1])
    newest = (int(state.next_row) - 1) % 4
    permuted = state._replace(
        gram=state.gram[:, order][:, :, order],
        coefficients=state.coefficients[:, order],
        next_row=jnp.asarray((int(np.flatnonzero(order == newest)[0]) + 1) % 4, jnp.int32),
    )
    for name, x, y in zip(Diagnostics._fields, diagnostics(state), diagnostics(permuted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_state_before_the_first_step_has_zeros():
    result = diagnostics(transform().init(zeros()))
    for name, actual in zip(Diagnostics._fields, result, strict=True):
        np.testing.assert_array_equal(actual, name in ("condition_number", "step_factor"), err_msg=name)


def test_zero_gradients_are_left_out_of_the_similarities():
    grads = random_grads(3)
    with_zero = diagnostics(walk(np.insert(grads, 1, 0, axis=0))[1])
    np.testing.assert_allclose(with_zero.similarity, diagnostics(walk(grads)[1]).similarity, rtol=1e-5)
    result = diagnostics(walk([*grads, np.zeros(18)])[1])
    np.testing.assert_array_equal([result.newest_similarity, result.gradient_norm, result.alignment], 0)


def test_parallel_and_orthogonal_gradients_have_known_diagnostics():
    parallel = diagnostics(walk(np.ones((4, 18)) * [[1], [2], [3], [4]])[1])
    np.testing.assert_allclose(parallel.similarity, 1, rtol=1e-5)
    np.testing.assert_allclose(parallel.effective_rank, 1, rtol=1e-5)
    orthogonal = diagnostics(walk(2 * np.eye(18)[:4], damping=1.0)[1])
    np.testing.assert_allclose(orthogonal.similarity, 0, atol=1e-6)
    np.testing.assert_allclose(orthogonal.effective_rank, 4, rtol=1e-5)
    np.testing.assert_allclose(orthogonal.damping_share, 0.5, rtol=1e-5)  # eigenvalues 4 / 4, damping 1
    np.testing.assert_allclose(orthogonal.condition_number, 1, rtol=1e-5)


def test_rejected_gradients_change_only_their_count():
    grads = random_grads(3)
    before, after = diagnostics(walk(grads)[1]), diagnostics(walk([*grads, np.full(18, np.nan)])[1])
    assert int(after.grads_rejected) == 1
    for x, y in zip(before, after._replace(grads_rejected=before.grads_rejected), strict=True):
        np.testing.assert_array_equal(x, y)


STREAMS = {
    "tiny": random_grads(7) * 1e-30,
    "denormal": random_grads(7) * 1e-40,
    "norms near the root of the smallest float": random_grads(7) * 1e-19,
    "huge": random_grads(7) * 1e30,
    "mixed": random_grads(7) * np.array([1e30, 1e-30, 1, 1e15, 0, 1e-15, 1e10])[:, None],
    "largest": np.full((7, 18), 3e38),
    "repeated": np.tile(random_grads(1), (7, 1)),
    "nearly parallel": 1e3 + 1e-4 * random_grads(7),
    "zeros": np.zeros((7, 18)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    "dtype", [jnp.float32, *(pytest.param(d, marks=slow) for d in (jnp.bfloat16, jnp.float16))]
)
@pytest.mark.parametrize(
    ("damping", "relative"),
    [
        (1e-38, True),
        (10.0, True),
        *(pytest.param(d, False, marks=slow) for d in (1e-38, 1e-7, 1e30)),
    ],
)
def test_all_is_finite_at_extremes(name, dtype, damping, relative):
    largest = float(jnp.finfo(dtype).max)
    grads = np.clip(STREAMS[name], -largest, largest)
    _, state = walk(grads, damping, relative=relative, blocks="leaf", dtype=dtype)
    result = jax.device_get(diagnostics(state))
    for field, x in zip(Diagnostics._fields, result, strict=True):
        assert np.isfinite(x).all(), field
    for field in ("similarity", "newest_similarity", "alignment", "mean_cosine"):
        assert np.all(np.abs(getattr(result, field)) <= 1), field
    assert np.all((result.damping_share >= 0) & (result.damping_share <= 1 + 4 * EPS))
    assert np.all((result.effective_rank >= 0) & (result.effective_rank <= 4 * (1 + 10 * EPS)))
    assert np.all(result.condition_number <= 1 / (16 * EPS))  # what the rounding noise leaves of it
    assert np.all(np.diff(result.spectrum) <= 0)
    assert np.all(result.spectrum >= 0)


@slow
@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_ratios_do_not_depend_on_the_scale_of_the_gradients(scale):
    expected, actual = (diagnostics(walk(c * random_grads(7), relative=True)[1]) for c in (1, scale))
    for name in ("effective_rank", "condition_number", "damping_share", "similarity", "alignment"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(actual.step_norm / scale, expected.step_norm, rtol=1e-4)


def test_jit_and_vmap_agree_with_plain_calls():
    states = [walk(random_grads(5, seed), relative=True, blocks="leaf")[1] for seed in range(3)]
    batched = jax.vmap(diagnostics)(jax.tree.map(lambda *x: jnp.stack(x), *states))
    jitted = jax.jit(diagnostics)
    for i, state in enumerate(states):
        for x, y, z in zip(diagnostics(state), batched, jitted(state), strict=True):
            np.testing.assert_allclose(y[i], x, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(z, x, rtol=1e-4, atol=1e-6)


@slow
def test_float64_parameters_have_float64_diagnostics():
    with jax.enable_x64(True):
        result = diagnostics(walk(random_grads(6), dtype=jnp.float64)[1])
        assert {x.dtype for x in result[:13]} == {jnp.dtype(jnp.float64)}
        rows = random_grads(6)[-4:]
        s = np.linalg.eigvalsh(rows @ rows.T / 4)[::-1]
        np.testing.assert_allclose(result.spectrum[0], s, rtol=1e-12)


def test_the_state_is_found_in_the_states_of_chains_wrappers_and_nnx():
    _, state = walk(random_grads(3))
    expected = diagnostics(state)
    holder: Any = optax.inject_hyperparams(optax.sgd)(0.1).init(zeros())
    for chained in (
        (optax.EmptyState(), state),
        {"first": (holder, [state])},
        holder._replace(inner_state=state),
    ):
        for x, y in zip(diagnostics(chained), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    optimizer = nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), transform(), wrt=nnx.Param)
    assert diagnostics(optimizer.opt_state).spectrum.shape == (1, 4)


def test_the_window_is_never_read():
    _, state = walk(random_grads(3))
    without = diagnostics(state._replace(window=None))
    np.testing.assert_array_equal(without.spectrum, diagnostics(state).spectrum)


def test_other_states_are_refused_with_the_cure():
    with pytest.raises(
        TypeError, match=r"holds one, got a tuple without\. Pass what init or update of mfac"
    ):
        diagnostics(optax.adam(1e-3).init(zeros()))
    with pytest.raises(TypeError, match="got a NoneType without"):
        diagnostics(None)  # pyright: ignore[reportArgumentType]
    two = optax.chain(scale_by_mfac(2), scale_by_mfac(3)).init(zeros())
    with pytest.raises(ValueError, match=r"got 2, at .*get_all_with_path"):
        diagnostics(two)
    ensemble = jax.vmap(scale_by_mfac(2).init)({"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"\(3, 1, 2, 2\)\. After jax\.vmap\(tx\.init\) call jax\.vmap"):
        diagnostics(ensemble)


def fill(log, steps=25, blocks=None):
    state: Any = transform(blocks=blocks).init(zeros())
    for number, g in enumerate(random_grads(steps)):
        _, state = step(as_tree(g), state, 0.2, False, blocks)
        log(number, state)
    return state


def test_the_log_keeps_every_so_many_steps_as_json():
    log = DiagnosticsLog(every=10)
    fill(log, steps=25)
    assert [record["step"] for record in log.records] == [0, 10, 20]
    assert set(log.records[0]) == {"step", *Diagnostics._fields}
    assert json.loads(json.dumps(log.records, allow_nan=False)) == log.records


def test_every_may_be_any_integer():
    log = DiagnosticsLog(every=np.int64(10))  # pyright: ignore[reportArgumentType]
    fill(log, steps=11)
    assert [record["step"] for record in log.records] == [0, 10]


@slow
def test_the_mean_cosine_tells_short_steps_from_long_ones():
    means, tx = [], scale_by_mfac(4, 100.0, relative_damping=True, step_adaptation=1e-6)
    for rate in (0.01, 10.0):  # gradient descent on |x|^2 / 2, whose right rate is near one
        x = jnp.asarray(random_grads(1)[0], jnp.float32)
        state, update = tx.init(x), jax.jit(tx.update)
        for _ in range(8):
            updates, state = update(x, state)
            x = optax.apply_updates(x, optax.tree.scale(-rate, updates))
        means.append(float(diagnostics(state).mean_cosine))
    assert means[0] > 0.9
    assert means[1] < -0.9


@slow
def test_the_update_is_the_one_with_the_momentum_in_the_window():
    grads = random_grads(6)
    updates, state = walk(grads)  # with window_momentum=0.5
    newest_alone = scale_by_mfac(4, 0.2)
    without, other = zeros(), newest_alone.init(zeros())
    update = jax.jit(newest_alone.update)
    for g in grads:
        without, other = update(as_tree(g), other)
    for result, tree in ((diagnostics(state), updates), (diagnostics(other), without)):
        np.testing.assert_allclose(result.step_norm, [optax.tree.norm(tree)], rtol=1e-4)
    assert abs(float(diagnostics(state).alignment[0]) - float(diagnostics(other).alignment[0])) > 1e-3


def test_a_log_goes_on_from_its_records():
    whole = DiagnosticsLog(every=5)
    state = fill(whole)
    resumed = DiagnosticsLog(every=5, records=json.loads(json.dumps(whole.records)))
    resumed(jnp.asarray(20), state)  # the run was resumed at step 15, whose record and the next are there
    assert [record["step"] for record in resumed.records] == [0, 5, 10, 15, 20]
    resumed(10, state)
    assert [record["step"] for record in resumed.records] == [0, 5, 10]
    assert len(whole.records) == 5


@pytest.mark.parametrize(
    ("blocks", "pattern"),
    [(None, r"rank [\d.]+ of 4,"), pytest.param("leaf", r"\([\d.]+ to [\d.]+\)", marks=slow)],
)
def test_a_record_is_logged_as_one_line(caplog, blocks, pattern):
    with caplog.at_level(logging.INFO, "mfac_jax"):
        fill(DiagnosticsLog(every=24), blocks=blocks)
    lines = [record.getMessage() for record in caplog.records if record.name == "mfac_jax"]
    assert len(lines) == 2
    assert lines[1].startswith("step 24: effective rank")
    assert "\n" not in lines[1]
    assert re.search(pattern, lines[1])
    assert re.search(r"mean cosine -?[\d.e-]+, step factor [\d.e-]+, rejected 0$", lines[1])


def test_the_log_refuses_bad_input_with_the_cure():
    message = r"every must be an int >= 1, got .*Pass e\.g\. 10"
    for every in (0, -1, True):
        with pytest.raises(ValueError, match=message):
            DiagnosticsLog(every=every)
    for every in (2.5, math.nan, "10", None):
        with pytest.raises(TypeError, match=message):
            DiagnosticsLog(every=every)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="Pass what init or update"):
        DiagnosticsLog()(0, optax.sgd(0.1).init(zeros()))
