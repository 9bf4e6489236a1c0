"""Errors of the updates of each solver beside dense float64, over random streams of gradients.

A stream has outliers of up to 1e8 times the usual norm, repeats, zeros, near-parallel gradients, norms that
grow or shrink, and a damping that moves. Both solvers see the same rows, rounded to float32.

A step is sound where a float32 Gram matrix has the digits: its system, scaled to a diagonal of ones, has a
condition number below 1e4, and an exact solution after rounding the inner products once is right to 1e-6.
At the other steps no solver of that matrix is right; 'exact' has the error of that solution. 'behind' is
the largest error of the kept inverse at any step, in units of Cholesky's or 1e-6. 'made anew' is the share
of steps that fell back to Cholesky.

    python -m benchmarks.solver_accuracy
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from examples.common import reporting
from examples.common.command_line import Count, parse
from mfac_jax import scale_by_mfac

SIZES = (4, 16, 64)  # rows of the window
WIDTH = 100
RATIOS = (1.0, 1e1, 1e2, 1e4, 1e6, 1e8)
SCHEDULES = ("constant", "drift", "walk", "waves", "jumps")
SOUND = 1e4
SOLVERS = ("cholesky", "inverse")
KEYS = {"ratio": "outliers of", "schedule": "damping:", "damping": "damping:", "num_grads": "m ="}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    streams: Count = 1000
    """random streams"""


class Stream(NamedTuple):
    """Gradients, and what their systems are damped with.

    Attributes:
      num_grads: rows of the window; there are three times as many gradients.
      ratio: norm of an outlier, in units of the usual norm.
      schedule: how the damping moves.
      relative: whether the damping is in units of the window.
      gradients: rows of float32.
      damping: one number for each gradient.
    """

    num_grads: int
    ratio: float
    schedule: str
    relative: bool
    gradients: np.ndarray
    damping: np.ndarray


def stream(seed: int) -> Stream:
    """Draw a stream; all sizes, ratios and schedules come in turn."""
    rng = np.random.default_rng(seed)
    num_grads, ratio = SIZES[seed % len(SIZES)], RATIOS[seed // 3 % len(RATIOS)]
    schedule = SCHEDULES[seed // 18 % len(SCHEDULES)]
    length = 3 * num_grads
    common = rng.choice([0.0, 0.5, 1.0, 3.0]) * rng.standard_normal(WIDTH)
    rows = (rng.standard_normal((length, WIDTH)) + common) / np.sqrt(WIDTH)
    rows *= 10.0 ** (rng.choice([0.0, 0.0, -0.05, 0.05]) * np.minimum(np.arange(length), 60))[:, None]
    is_outlier = rng.uniform(size=length) < rng.choice([0.5, 1.0, 3.0]) / num_grads
    is_outlier[rng.integers(num_grads, length)] = True
    rows[is_outlier] *= ratio ** rng.uniform(0.5, 1, size=(np.sum(is_outlier), 1))
    for t in range(1, length):
        kind = rng.uniform()
        if kind < 0.05:
            rows[t] = rows[t - 1]
        elif kind < 0.08:
            rows[t] = 0
        elif kind < 0.12:
            rows[t] = rows[rng.integers(t)] + 1e-2 * rows[t]
    return Stream(
        num_grads=num_grads,
        ratio=ratio,
        schedule=schedule,
        relative=bool(rng.integers(2)),
        gradients=rows.astype(np.float32),
        damping=_dampings(schedule, length, rng),
    )


def _dampings(schedule: str, length: int, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(length)
    moved = {
        "constant": 0 * t,
        "drift": rng.uniform(-0.1, 0.1) * np.minimum(t, 30),
        "walk": np.cumsum(rng.uniform(-0.15, 0.15, length)),
        "waves": np.sin(t * rng.uniform(0.05, 2)),
        "jumps": rng.choice([0.0, 0.0, 0.0, -2.0, 2.0], length),
    }[schedule]
    return (10.0 ** np.clip(rng.uniform(-3, 1) + moved, -3, 3)).astype(np.float32)


class Run(NamedTuple):
    """A stream after all steps of one solver.

    Attributes:
      updates: of all steps.
      renewals: steps that made the kept inverse anew.
    """

    updates: np.ndarray
    renewals: int


@functools.partial(jax.jit, static_argnames=("solver", "num_grads", "relative"))
def _steps(gradients, damping, solver, num_grads, relative):
    tx = scale_by_mfac(num_grads, lambda t: damping[t], relative_damping=relative, solver=solver)

    def step(state: Any, g):
        after: Any
        updates, after = tx.update(g, state)
        is_anew = jnp.any(after.solver.shift != state.solver.shift) if solver == "inverse" else False
        return after, (updates, jnp.asarray(is_anew))

    return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]


def run(drawn: Stream, solver: str) -> Run:
    """Take all steps of a stream."""
    inputs = (jnp.asarray(drawn.gradients), jnp.asarray(drawn.damping))
    updates, anew = jax.device_get(
        _steps(*inputs, solver=solver, num_grads=drawn.num_grads, relative=drawn.relative)
    )
    return Run(updates, int(np.sum(anew)))


class Expected(NamedTuple):
    """What is right.

    Attributes:
      updates: in float64.
      from_gram: in float64 too, but from inner products that were rounded to float32.
      conditions: condition numbers of the systems, each scaled to a diagonal of ones.
    """

    updates: np.ndarray
    from_gram: np.ndarray
    conditions: np.ndarray

    @property
    def is_sound(self) -> np.ndarray:
        """Which steps a float32 Gram matrix has the digits for."""
        return (errors(self.from_gram, self.updates) < 1e-6) & (self.conditions < SOUND)


def expected(drawn: Stream) -> Expected:
    """Solve dense float64 systems of the same rows and dampings."""
    m, rows = drawn.num_grads, drawn.gradients.astype(np.float64)
    found = [
        _newest(rows[max(0, t + 1 - m) : t + 1], float(drawn.damping[t]), drawn) for t in range(len(rows))
    ]
    return Expected(*map(np.array, zip(*found, strict=True)))


def _newest(window: np.ndarray, damping: float, drawn: Stream) -> tuple[np.ndarray, np.ndarray, float]:
    """The fields of `Expected` for the last row."""
    squares, identity = np.sum(window**2, axis=1), np.eye(len(window))
    shift, gain = drawn.num_grads * damping, drawn.num_grads
    if drawn.relative:
        energy = np.mean(squares) if np.mean(squares) > 2.0**-100 else 1.0
        shift, gain = damping * energy, (1 + damping) * energy
    # The system is M M^T. A QR decomposition of M loses half as many digits as one of M M^T.
    scale = 1 / np.sqrt(squares + shift)[:, None]
    r: Any = np.linalg.qr((scale * np.hstack([window, np.sqrt(shift) * identity])).T, mode="r")
    solution = scale * np.linalg.solve(r, np.linalg.solve(r.T, identity[:, -1:] * scale))
    rounded = (window @ window.T).astype(np.float32).astype(np.float64) + shift * identity
    from_rounded = (
        scale * np.linalg.pinv(scale * rounded * scale.T, rcond=1e-15, hermitian=True)[:, -1:] * scale[-1]
    )
    updates = (gain * window.T @ c[:, 0] for c in (solution, from_rounded))
    return *updates, float(np.linalg.cond(r) ** 2)


def errors(updates: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative errors of the updates; of zero gradients, none."""
    norms = np.linalg.norm(expected, axis=1)
    return np.linalg.norm(updates - expected, axis=1) / np.where(norms > 0, norms, np.inf)


def measure(drawn: Stream) -> dict:
    """Measure the worst error of each solver, and how often the kept inverse was made anew."""
    runs = {solver: run(drawn, solver) for solver in SOLVERS}
    right = expected(drawn)
    found = {solver: errors(runs[solver].updates, right.updates) for solver in SOLVERS}
    found["limit"] = errors(right.from_gram, right.updates)
    sound = right.is_sound
    return {
        "num_grads": drawn.num_grads,
        "ratio": drawn.ratio,
        "schedule": drawn.schedule,
        "damping": "relative" if drawn.relative else "absolute",
        "sound": {solver: float(np.max(found[solver], where=sound, initial=0)) for solver in SOLVERS},
        "all": {solver: float(np.max(found[solver])) for solver in found},
        "sound_steps": float(np.mean(sound)),
        "behind": float(np.max(found["inverse"] / np.maximum(found["cholesky"], 1e-6))),
        "renewals": runs["inverse"].renewals / len(drawn.damping),
    }


def row(label: str, results: Sequence[dict]) -> list[str]:
    """Write the worst errors of some streams, and how often the inverse was made anew."""
    cells = [max(result["sound"][solver] for result in results) for solver in SOLVERS]
    cells += [max(result["all"][solver] for result in results) for solver in (*SOLVERS, "limit")]
    behind = max(result["behind"] for result in results)
    sound, renewals = (np.mean([result[key] for result in results]) for key in ("sound_steps", "renewals"))
    return [
        label,
        f"{len(results):,}",
        f"{sound:.0%}",
        *(f"{x:.0e}" for x in cells),
        f"{behind:.0f}",
        f"{renewals:.0%}",
    ]


def table(results: Sequence[dict]) -> list[list[str]]:
    """Give a line for each ratio, schedule, size and kind of damping, and one for all."""
    lines = []
    for key, name in KEYS.items():
        for value in sorted({result[key] for result in results}):
            chosen = [result for result in results if result[key] == value]
            lines.append(
                row(f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}", chosen)
            )
    return [*lines, row("all", results)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all streams and print the table; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    results = [measure(stream(seed)) for seed in tqdm(range(options.streams), unit="stream", leave=False)]
    header = ["streams", "number", "sound steps", *SOLVERS]
    header += [*(f"{solver}, all steps" for solver in SOLVERS), "exact, all steps", "behind", "made anew"]
    reporting.print_table("Worst relative error of an update beside float64", header, table(results))


if __name__ == "__main__":
    main()
