"""Small problems that are trained with and without the learned step factor, for windows of any length.

`python -m tests.mfac.closed_loops` prints the losses at the end, and the largest factors, as a table.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax import mfac

STEPS = 400
LAST = STEPS // 10  # whose mean loss counts
# The peak, and whether it decays to zero.
RATES = {"3e-3": (3e-3, 0), "1e-2": (1e-2, 0), "3e-2": (3e-2, 0), "3e-2, decaying": (3e-2, 1)}
STARTS = 3
WINDOWS = (1, 2, 3, 4, 8, 16, 64, 256)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def start(key):
    """Parameters of the network, and of the least squares in `x`."""
    a, c = jax.random.normal(key, (2, 4, 8))
    return {"a": a / 2, "b": jnp.zeros(8), "c": c[:2].T / 3, "d": jnp.zeros(2), "x": jnp.zeros(10)}


def _network(params, places):
    """Mean square error of a small network on some of 16 samples."""
    hidden = jnp.tanh(_normal(2, 16, 4)[places] @ params["a"] + params["b"])
    return jnp.mean((hidden @ params["c"] + params["d"] - _normal(3, 16, 2)[places]) ** 2)


def _squares(params, places):
    """Mean square error of some of 40 equations, which have a solution; condition number 100."""
    matrix = _normal(4, 40, 10) * jnp.logspace(0, -1, 10)
    return jnp.mean((matrix[places] @ (params["x"] - _normal(5, 10))) ** 2)


def _noise(params, key):
    return jnp.vdot(params["x"], jax.random.normal(key, (10,)))


# Losses of a step, from parameters, number of the step and key; and what counts at the end.
PROBLEMS = {
    "full batches": (lambda p, t, key: _squares(p, slice(None)), lambda p: _squares(p, slice(None))),
    "full batches, network": (
        lambda p, t, key: _network(p, slice(None)),
        lambda p: _network(p, slice(None)),
    ),
    "batches of 4": (
        lambda p, t, key: _squares(p, jax.random.randint(key, (4,), 0, 40)),
        lambda p: _squares(p, slice(None)),
    ),
    "batches of 4, network": (
        lambda p, t, key: _network(p, jax.random.randint(key, (4,), 0, 16)),
        lambda p: _network(p, slice(None)),
    ),
    "growing": (
        lambda p, t, key: jnp.exp(t / 40) * _squares(p, slice(None)),
        lambda p: _squares(p, slice(None)),
    ),
    "shrinking": (
        lambda p, t, key: jnp.exp(-t / 40) * _squares(p, slice(None)),
        lambda p: _squares(p, slice(None)),
    ),
    "noise": (lambda p, t, key: _noise(p, key), lambda p: 0.0),
    "growing noise": (lambda p, t, key: jnp.exp(t / 30) * _noise(p, key), lambda p: 0.0),
    "constant": (lambda p, t, key: jnp.sum(p["x"]), lambda p: 0.0),
    "alternating": (lambda p, t, key: (1 - 2 * (t % 2)) * jnp.sum(p["x"]), lambda p: 0.0),
}
CLOSED = tuple(PROBLEMS)[:6]  # those with a loss


class Result(NamedTuple):
    """Of each problem, rate and start.

    Attributes:
      adapted: the mean of the last losses.
      fixed: the same, without the factor.
      factors: after each step.
    """

    adapted: np.ndarray
    fixed: np.ndarray
    factors: np.ndarray

    def ratios(self) -> np.ndarray:
        """Loss with the factor by loss without, a mean over the starts; losses below 1e-6 are equal."""
        with_factor, without = (np.log(losses + 1e-6) for losses in (self.adapted, self.fixed))
        return np.exp(np.mean(with_factor - without, axis=-1))


@functools.cache
def results(num_grads: int) -> Result:
    """Train all problems at all rates, from all starts, with a window of this length."""

    def train(problem, rate, number, speed):
        def schedule(count):
            peak, decays = jnp.asarray(list(RATES.values()))[rate]
            return peak * (1 - decays * (1 - jnp.cos(jnp.pi * count / STEPS)) / 2)

        run = jax.random.key(number)
        tx, params = mfac(schedule, num_grads, step_adaptation=speed, storage=None), start(run)
        steps, ends = zip(*PROBLEMS.values(), strict=True)

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(run, number)
            t = number.astype(jnp.float32)
            gradients = jax.grad(lambda p: jax.lax.switch(problem, steps, p, t, key))(params)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            loss = jax.lax.switch(problem, [lambda p, end=end: jnp.float32(end(p)) for end in ends], params)
            return (params, state), (loss, optax.tree.get(state, "log_step"))

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[1]

    # One after the other: a batch of conditionals would take all their branches.
    axes = (*map(jnp.arange, (len(PROBLEMS), len(RATES), STARTS)), jnp.asarray([0.3, 0.0]))
    cases = jnp.meshgrid(*axes, indexing="ij")
    runs = jax.jit(lambda cases: jax.lax.map(lambda case: train(*case), cases))
    losses, log_steps = runs([case.ravel() for case in cases])
    losses, log_steps = (np.reshape(x, (*cases[0].shape, STEPS)) for x in (losses, log_steps))
    ends = np.mean(losses[..., -LAST:], axis=-1)
    return Result(ends[..., 0], ends[..., 1], np.exp(log_steps[..., 0, :]))


def main() -> None:
    """Print the table."""
    rates = " | ".join(f"rate {rate}: loss with / without" for rate in RATES)
    print(f"| problem | m | {rates} | largest factor |")
    print("|---" * (3 + len(RATES)) + "|")
    for num_grads in WINDOWS:
        result = results(num_grads)
        for problem, ratios, factors in zip(PROBLEMS, result.ratios(), result.factors, strict=True):
            cells = (f"{ratio:.2g}" for ratio in ratios) if problem in CLOSED else ("-" for _ in RATES)
            print(
                f"| {problem} | {num_grads} | " + " | ".join(cells) + f" | {factors.max():.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
