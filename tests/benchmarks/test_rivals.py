"""The rivals written here, beside their equations in NumPy, and what is evaluated of those that average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import optimizers, rivals
from benchmarks.normuon import scale_by_neurons
from benchmarks.soap import Decays, scale_by_soap

DECAYS, EPS, FREQUENCY, MAX_SIDE = Decays(0.9, 0.8, 0.7), 1e-8, 3, 7
SHAPES = {"wide": (4, 6), "one side": (8, 3), "vector": (5,), "kernel": (2, 3, 5)}


def gradients(steps: int):
    rng = np.random.default_rng(0)
    return [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def soap_in_numpy(stream: list[np.ndarray], first_bases) -> np.ndarray:
    """The steps on the gradients of a matrix; the momentum stays in the bases, as in the authors' code."""
    sides = range(2) if stream[0].ndim == 2 else ()
    bases = [
        np.asarray(b) if b is not None else np.eye(stream[0].shape[i]) for i, b in enumerate(first_bases)
    ]
    turned = [b is not None for b in first_bases]
    covariances = [0.3 * (g @ g.T) for g in ((stream[0], stream[0].T) if sides else ())]

    def into(x):
        return bases[0].T @ x @ bases[1] if sides else x

    def out_of(x):
        return bases[0] @ x @ bases[1].T if sides else x

    first, second, steps = np.zeros_like(stream[0]), np.zeros_like(stream[0]), [np.zeros_like(stream[0])]
    for t, g in enumerate(stream[1:], 1):
        first, second = 0.9 * first + 0.1 * into(g), 0.8 * second + 0.2 * into(g) ** 2
        mean, variance = first / (1 - 0.9**t), second / (1 - 0.8**t)
        steps.append(out_of(mean / (np.sqrt(variance) + EPS / np.sqrt(1 - 0.8**t))))
        plain = out_of(first)
        for i in sides:
            covariances[i] = 0.7 * covariances[i] + 0.3 * (g @ g.T, g.T @ g)[i]
            if t % FREQUENCY == 0 and turned[i]:
                order = np.argsort(-np.diag(bases[i].T @ covariances[i] @ bases[i]))
                second = np.take(second, order, axis=i)
                bases[i] = np.linalg.qr(covariances[i] @ bases[i][:, order])[0]
        first = into(plain)
    return np.array(steps)


def test_soap_follows_its_equations(x64):
    stream = gradients(10)
    tx = scale_by_soap(DECAYS, EPS, FREQUENCY, MAX_SIDE)
    update: Any = jax.jit(tx.update)
    states: list[Any] = [tx.init(jax.tree.map(jnp.asarray, stream[0]))]
    steps = []
    for grads in stream:
        step, state = update(grads, states[-1])
        states.append(state)
        steps.append(step)
    for name, shape in SHAPES.items():
        matrices = [g[name].reshape(-1, shape[-1]) if len(shape) > 2 else g[name] for g in stream]
        expected = soap_in_numpy(matrices, states[1].leaves[name].bases)
        found = np.array([step[name] for step in steps]).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_first_bases_are_eigenvectors_and_a_long_side_has_none(x64):
    grads = gradients(1)[0]
    tx = scale_by_soap(DECAYS, EPS, FREQUENCY, MAX_SIDE)
    step: Any
    state: Any
    step, state = tx.update(grads, tx.init(jax.tree.map(jnp.asarray, grads)))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(step))
    assert state.leaves["one side"].bases[0] is None
    assert state.leaves["vector"].bases == ()
    for side, basis in enumerate(state.leaves["wide"].bases):
        gradient = grads["wide"] if side == 0 else grads["wide"].T
        turned = basis.T @ (0.3 * gradient @ gradient.T) @ basis
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-14)
        assert np.diff(np.diag(turned)).max() < 1e-14


def test_normuon_evens_out_the_neurons_and_keeps_the_norm(x64):
    rng = np.random.default_rng(0)
    tx, second = scale_by_neurons(0.9), np.zeros((1, 5))
    found: Any
    state = tx.init({"w": jnp.zeros((3, 5))})
    for _ in range(3):
        step = rng.normal(size=(3, 5)) * np.arange(1, 6)
        found, state = tx.update({"w": jnp.asarray(step)}, state)
        second = 0.9 * second + 0.1 * np.mean(step**2, axis=0)
        scaled = step / np.sqrt(second)
        expected = np.sqrt(5 / 3) * scaled * np.linalg.norm(step) / np.linalg.norm(scaled)
        np.testing.assert_allclose(found["w"], expected, rtol=1e-8)


def test_the_average_weighs_later_parameters_more(x64):
    tx = rivals.averaged(optax.sgd(1.0))
    params: Any = jnp.array([2.0])
    state, mean = tx.init(params), 0.0
    for step in range(1, 5):
        updates, state = tx.update(jnp.array([0.5]), state, params)
        params = optax.apply_updates(params, updates)
        share = 9 / (step + 8)
        mean = (1 - share) * mean + share * float(params[0])
    average: Any = rivals.EVALUATED["dog"](state, params)
    assert average[0] == pytest.approx(mean)


PARAMETER_FREE = [
    pytest.param(name, marks=() if name == "schedule-free-adamw" else pytest.mark.slow)
    for name in ("prodigy", "dadapt-adamw", "schedule-free-adamw", "dog", "soap", "normuon")
]


@pytest.mark.parametrize("name", PARAMETER_FREE)
def test_every_rival_trains_from_a_rate_in_the_state(name):
    tx = optimizers.make_transform(name, 100, False)
    target = jnp.arange(6.0).reshape(2, 3)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    rate = optimizers.RATES[name]["all"][-1]
    state = optax.tree.set(tx.init(params), peak_rate=jnp.float32(rate))

    def loss(p):
        return jnp.mean((p["w"] - target) ** 2) + jnp.mean(p["b"] ** 2)

    @jax.jit
    def step(p, s):
        updates, s = optax.with_extra_args_support(tx).update(jax.grad(loss)(p), s, p, value=loss(p))
        return optax.apply_updates(p, updates), s

    start = loss(params)
    for _ in range(100):
        params, state = step(params, state)
    chosen = rivals.EVALUATED.get(name, lambda opt_state, newest: newest)(state, params)
    assert float(loss(chosen)) < float(start)
