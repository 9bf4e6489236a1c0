"""Streams that no sound loss gives: finite gradients have finite updates, the others stay out."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfac_jax import ihvp, scale_by_mfac

LENGTH = 12
SIZES = {"empty": 0, "matrix": 6, "scalar": 1, "vector": 2}  # in the order of the leaves
WIDTH = sum(SIZES.values())
BLOCK_SLICES = {None: [slice(0, 9)], "leaf": [slice(0, 6), slice(6, 7), slice(7, 9)]}
EPS = float(np.finfo(np.float32).eps)
slow = pytest.mark.slow


class Config(NamedTuple):
    """What has to be known before tracing."""

    num_grads: int
    dtype: Any
    blocks: Any
    solver: Any = "cholesky"


CONFIGS = [
    Config(5, jnp.float32, "leaf"),
    Config(4, jnp.float16, None, "inverse"),
    Config(4, jnp.float16, None),
    Config(5, jnp.float32, "leaf", "inverse"),
    Config(8, jnp.float32, None, "inverse"),
    Config(1, jnp.float32, None),
    Config(2, jnp.float32, "leaf"),
    Config(3, jnp.bfloat16, None),
    Config(6, jnp.float16, "leaf"),
    Config(7, jnp.bfloat16, "leaf"),
    Config(8, jnp.float32, None),
]


class Stream(NamedTuple):
    grads: np.ndarray  # (LENGTH, WIDTH), float64
    damping: float
    window_momentum: float


KINDS = ["new", "zero", "repeat", "parallel", "one entry", "nan", "inf"]
EXPONENTS = [-45, -30, -15, -3, 0, 0, 0, 3, 15, 30, 40]  # 10^40 becomes the largest float of the dtype


def make_grads(kinds: list[str], exponents: list[int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise, grads = rng.standard_normal((LENGTH, WIDTH)), np.zeros((LENGTH, WIDTH))
    for step, (kind, exponent) in enumerate(zip(kinds, exponents, strict=True)):
        scale, before = 10.0**exponent, grads[step - 1]
        entry = np.arange(WIDTH) == rng.integers(WIDTH)
        grads[step] = {
            "new": scale * noise[step],
            "zero": np.zeros(WIDTH),
            "repeat": before,
            "parallel": scale * (noise[0] + 1e-4 * noise[step]),
            "one entry": scale * entry,
            "nan": np.where(entry, np.nan, noise[step]),
            "inf": np.where(entry, np.copysign(np.inf, noise[step]), noise[step]),
        }[kind]
    return grads


def steps(values):
    return st.lists(st.sampled_from(values), min_size=LENGTH, max_size=LENGTH)


streams = st.builds(
    Stream,
    st.builds(make_grads, steps(KINDS), steps(EXPONENTS), st.integers(0, 2**32 - 1)),
    damping=st.floats(-8, 3).map(lambda exponent: 10.0**exponent),
    window_momentum=st.sampled_from([0.0, 0.9]),
)


def in_dtype(grads: np.ndarray, dtype) -> np.ndarray:
    """Rounded to `dtype`; finite numbers stay finite."""
    largest = float(jnp.finfo(dtype).max)
    return np.where(np.isinf(grads), grads, np.clip(grads, -largest, largest)).astype(dtype)


def flat(tree, batch: tuple[int, ...]) -> jax.Array:
    return jnp.concatenate([leaf.reshape(*batch, -1) for leaf in jax.tree.leaves(tree)], axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def run(grads, damping, window_momentum, config: Config):
    """The updates, and the state before the first step and after each, the window flattened."""
    tx = scale_by_mfac(
        config.num_grads,
        damping,
        window_momentum=window_momentum,
        blocks=config.blocks,
        solver=config.solver,
    )

    def tree(g):
        empty, matrix, scalar, vector = jnp.split(g, np.cumsum(list(SIZES.values()))[:-1])
        return {"empty": empty, "matrix": matrix.reshape(2, 3), "scalar": scalar[0], "vector": vector}

    def flattened(state):
        return state._replace(window=flat(state.window, (config.num_grads,)))

    def step(state, g):
        updates, state = tx.update(tree(g), state)
        return state, (flat(updates, ()), flattened(state))

    initial = tx.init(tree(grads[0]))
    _, (updates, states) = jax.lax.scan(step, initial, grads)
    states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), flattened(initial), states)
    return updates, states


def check_rejection(grads, updates, states) -> None:
    """A gradient that is not finite is returned, counted, and leaves the rest of the state alone."""
    bad = ~np.isfinite(grads).all(axis=1)
    np.testing.assert_array_equal(states.grads_rejected, np.cumsum([0, *bad]))
    np.testing.assert_array_equal(states.grads_seen, np.cumsum([0, *~bad]))
    np.testing.assert_array_equal(updates[bad].astype(np.float32), grads[bad].astype(np.float32))
    for values in jax.tree.leaves((states.window, states.gram, states.next_row, states.solver)):
        np.testing.assert_array_equal(values[1:][bad], values[:-1][bad])


def rounding(gram: np.ndarray, shift: float) -> float:
    """What float32 can add to F^-1 g, in units of n over the norm of g: the system with a unit diagonal
    has an inverse of at most 1 / smallest, or 1 / jitter.
    """
    m = len(gram)
    scale = 1 / np.sqrt(np.diag(gram) + shift)
    smallest = np.linalg.eigvalsh(scale[:, None] * (gram + shift * np.eye(m)) * scale)[0]
    return m * EPS / max(smallest, 8 * EPS)


def check_natural_gradients(stream: Stream, config: Config, updates, states) -> None:
    """F^-1 is positive and F^-1 G^T w no longer than n / (2 sqrt(n damping))."""
    precision = float(jnp.finfo(config.dtype).eps)
    smallest = float(jnp.finfo(config.dtype).smallest_normal)
    for step in np.flatnonzero(np.diff(states.grads_seen)):
        u, n = updates[step].astype(np.float64), config.num_grads
        window = states.window[step + 1].astype(np.float64)
        for block in BLOCK_SLICES[config.blocks]:
            rows, part = window[:, block], u[block]
            slack = rounding(rows @ rows.T, n * stream.damping)
            norm = np.linalg.norm(part)
            assert norm <= (0.5 + slack) * np.sqrt(n / stream.damping) * (1 + precision) + 3 * smallest
            g = rows[states.next_row[step]]
            if stream.window_momentum == 0:
                lost = precision * np.linalg.norm(g) * norm + 3 * smallest * np.linalg.norm(g)
                assert g @ part >= -n * slack - lost


def check(stream: Stream, config: Config) -> None:
    grads = in_dtype(stream.grads, config.dtype)
    options = stream[1:]
    updates, states = jax.device_get(run(grads, *options, config=config))
    finite = np.isfinite(grads).all(axis=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))
    assert np.isfinite(updates[finite]).all()
    check_rejection(grads, updates, states)
    check_natural_gradients(stream, config, updates, states)

    only_finite = np.zeros_like(grads)
    only_finite[: finite.sum()] = grads[finite]
    expected, _ = jax.device_get(run(only_finite, *options, config=config))
    np.testing.assert_array_equal(updates[finite], expected[: finite.sum()])


def check_streams(config: Config, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(streams)
    def property_holds(stream):
        check(stream, config)

    property_holds()


def identifier(config: Config) -> str:
    dtype = jnp.dtype(config.dtype).name
    return "-".join(map(str, config._replace(dtype=dtype)))


configs = pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=[slow] if c in CONFIGS[1:] else [], id=identifier(c)) for c in CONFIGS],
)


@configs
def test_generated_streams_stay_finite_and_reject_what_is_not(config):
    check_streams(config, 100)


@pytest.mark.parametrize("config", [CONFIGS[0], pytest.param(CONFIGS[3], marks=slow)], ids=identifier)
def test_norms_of_many_magnitudes_stay_finite(config):
    exponents = [-45, -45, -30, -45, 15, -45, 0, -3, -45, -45, -45, -45]
    check(Stream(make_grads(["new"] * LENGTH, exponents, 0), 1.0, 0.0), config)


@slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradients_wider_than_the_parameters_stay_finite(dtype):
    tx = scale_by_mfac(3)
    update: Any = jax.jit(tx.update)
    for magnitude in (1e6, 1e30, 3e38):
        state = tx.init(jnp.zeros(5, dtype))
        for scale in (magnitude, 1.0):
            updates, state = update(jnp.full(5, scale, jnp.float32), state)
            assert np.isfinite(np.asarray(updates)).all()
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@jax.jit
def step_and_product(gradient, damping):
    """A first update, and the product of ones with the Fisher inverse."""
    tx = scale_by_mfac(3, damping)
    state: Any = tx.init(gradient)
    updates, state = tx.update(gradient, state)
    return updates, ihvp(state, jnp.ones_like(gradient), damping)


@pytest.mark.parametrize("damping", [1e-30, 1e-38])  # the second is below the normal float32 numbers
def test_zero_gradients_have_zero_updates_at_any_damping(damping):
    updates, _ = step_and_product(jnp.zeros(5), damping)
    np.testing.assert_array_equal(updates, jnp.zeros(5))


@pytest.mark.parametrize("damping", [1e37, 3e38])
def test_the_largest_damping_stays_finite(damping):
    assert all(jnp.all(jnp.isfinite(x)) for x in step_and_product(jnp.ones(5), damping))


@functools.partial(jax.jit, static_argnums=0)
def steps_along_a_repeated_gradient(num_grads, damping, gradient):
    """The products of the updates with the gradient, until the window has been filled twice."""
    tx = scale_by_mfac(num_grads, damping)

    def step(state, _):
        updates, state = tx.update(gradient, state)
        return state, optax.tree.vdot(updates, gradient)

    return jax.lax.scan(step, tx.init(gradient), length=2 * num_grads)[1]


@pytest.mark.parametrize("num_grads", [64, pytest.param(8, marks=slow), pytest.param(256, marks=slow)])
@pytest.mark.parametrize("damping", [1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("norm", [1.0, 1e3])
def test_repeated_gradients_are_descended_by_the_right_length(num_grads, damping, norm):
    along = steps_along_a_repeated_gradient(num_grads, damping * norm**2, jnp.full(100, norm / 10))
    rows = np.minimum(np.arange(1, 2 * num_grads + 1), num_grads)
    ratio = np.asarray(along, np.float64) * (num_grads * damping + rows) / num_grads
    assert ratio.min() > 0
    assert ratio.max() < 2


@pytest.mark.exhaustive
@configs
@slow
def test_ten_thousand_generated_streams_stay_finite_and_reject_what_is_not(config):
    check_streams(config, 10_000 // len(CONFIGS))


@pytest.mark.parametrize("blocks", [None, "leaf"])
def test_products_with_vectors_and_dampings_of_any_size_keep_their_digits(blocks):
    """Powers of two pass through `ihvp`; a damping of 1e-40 divides, traced or not."""
    random = np.random.default_rng(0)
    params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((4, 3)), "none": None}
    draw = lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32)  # noqa: E731
    tx = scale_by_mfac(num_grads=3, blocks=blocks)
    state: Any = tx.init(params)
    for _ in range(4):
        _, state = tx.update(jax.tree.map(draw, params), state)
    x = jax.tree.map(draw, params)
    expected = ihvp(state, x, 0.3)
    for exponent in (-110, 110):
        found = ihvp(state, jax.tree.map(lambda v, e=exponent: jnp.ldexp(v, e), x), 0.3)
        jax.tree.map(
            lambda a, b, e=exponent: np.testing.assert_array_equal(a, np.ldexp(b, e)), found, expected
        )
    nothing: Any = tx.init(params)  # F is the damping alone
    small = jax.tree.map(lambda v: v * 1e-10, x)
    for product in (ihvp, jax.jit(ihvp)):
        found = product(nothing, small, jnp.float32(1e-40))
        right = jax.tree.map(lambda v: np.asarray(v, np.float64) / 1e-40, small)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, right)


@pytest.mark.parametrize("magnitude", [1e30, 1e39, 1e300])
def test_float64_updates_of_float32_parameters_are_clipped_and_not_refused(x64, magnitude):
    tx = scale_by_mfac(3, 1.0)
    state: Any = tx.init(jnp.zeros(3, jnp.float32))
    after: Any
    updates, after = tx.update(jnp.array([magnitude, 1.0, -magnitude], jnp.float64), state)
    clipped, expected = tx.update(jnp.array([2.0**46, 1.0, -(2.0**46)], jnp.float64), state)
    jax.tree.map(np.testing.assert_array_equal, (updates, after), (clipped, expected))
    assert (after.grads_rejected, after.grads_seen) == (0, 1)
