"""Time and memory of a step of CG-FAC beside explicit K-FAC, for one layer of growing width.

Explicit K-FAC makes both Kronecker factors, takes their Cholesky factors and solves with them, with the
damping split over the two (its square root on each). Its exact counterpart takes eigendecompositions in
their place. CG-FAC has the exact damping. `in the span` is the exact solution from two eigendecompositions
in the space of the examples, where CG-FAC iterates too. Everything is timed in turn in one process;
solutions are compared with each other first.

    python -m benchmarks.kronecker_cost --out benchmarks/results/kronecker.jsonl
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import mfac_jax
from benchmarks import timing
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, parse

DAMPING, LARGEST = 1e-2, 10.0  # so that the condition number is a thousand
TOLERANCE, MAX_ITERATIONS = 0.1, 100
CG, EXPLICIT, EXACT, SPAN = "CG-FAC", "K-FAC", "K-FAC, exact damping", "in the span"
LARGEST_EXACT = 1024  # an eigendecomposition of 4,096 takes a minute


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    rounds: Count = 7
    """timed, after one to warm up"""
    largest: Count = 4096
    """inputs or outputs of a layer; larger layers are left out"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


class Case(NamedTuple):
    """A layer and a batch.

    Attributes:
      name: of the layer.
      sizes: inputs and outputs.
      rows: examples, and places.
    """

    name: str
    sizes: tuple[int, int]
    rows: tuple[int, ...]


CASES = (
    *(Case(f"dense, {width}", (width, width), (128,)) for width in (256, 512, 1024, 2048, 4096)),
    Case("dense, 4096 to 10", (4096, 10), (128,)),
    Case("dense, 1024, 64 places", (1024, 1024), (16, 64)),
    Case("3 x 3 convolution, 16 channels, 32 x 32", (144, 16), (32, 1024)),
    Case("3 x 3 convolution, 64 channels, 8 x 8", (576, 64), (32, 64)),
    Case("3 x 3 convolution, 256 channels, 8 x 8", (2304, 256), (32, 64)),
)

Batch = tuple[jax.Array, jax.Array, jax.Array]  # gradient, inputs, output gradients


def batch_of(case: Case, seed: int) -> Batch:
    """Draw inputs with a falling spectrum, as after a ReLU, and output gradients of all sizes.

    The largest eigenvalue of the Fisher matrix is `LARGEST`.
    """
    rng = np.random.default_rng(seed)
    rows, (size_in, size_out) = int(np.prod(case.rows)), case.sizes
    rank = min(64, size_in, size_out)
    strength = (1 + np.arange(rank)) ** -0.5

    def correlated(size):
        common = (rng.standard_normal((rows, rank)) * strength) @ rng.standard_normal((rank, size))
        return (common + 0.3 * rng.standard_normal((rows, size))).astype(np.float32)

    a, b = np.maximum(correlated(size_in), 0), correlated(size_out) / np.sqrt(size_out)
    b *= np.exp(rng.standard_normal((rows, 1))).astype(np.float32)
    root = np.linalg.norm(a, 2) * np.linalg.norm(b, 2) / np.sqrt(case.rows[0] * rows)
    b *= np.float32(LARGEST**0.5 / root)
    a, b = (x.reshape(*case.rows, -1) for x in (a, b))
    gradient = a.reshape(rows, -1).T @ b.reshape(rows, -1) / case.rows[0]
    return jnp.asarray(gradient), jnp.asarray(a), jnp.asarray(b)


def cg(gradient, inputs, output_grads):
    """Solve by CG-FAC; return the update and its iterations."""
    tx = mfac_jax.scale_by_cgfac(DAMPING, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS)
    factors = {"0": mfac_jax.LayerFactors(inputs, output_grads)}
    updates, state = tx.update([gradient], tx.init([gradient]), curvature=factors)
    return jax.tree.leaves(updates)[0], optax.tree.get(state, "iterations")[0]


def _dot(x, y):
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def kronecker_factors(inputs, output_grads):
    """Make A and B."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (inputs, output_grads))
    return _dot(a.T, a) / len(inputs), _dot(b.T, b) / len(b)


def explicit(gradient, inputs, output_grads):
    """(A + sqrt(damping) I)^-1 V (B + sqrt(damping) I)^-1."""
    A, B = kronecker_factors(inputs, output_grads)
    roots = [jax.scipy.linalg.cho_factor(M + DAMPING**0.5 * jnp.eye(len(M))) for M in (A, B)]
    return jax.scipy.linalg.cho_solve(roots[1], jax.scipy.linalg.cho_solve(roots[0], gradient).T).T


def exact(gradient, inputs, output_grads):
    """(A (x) B + damping I)^-1 V."""
    return _in_eigenvectors(gradient, *kronecker_factors(inputs, output_grads))


def span(gradient, inputs, output_grads):
    """The same, from eigendecompositions in the space of the examples."""
    (a, Q_in), (b, Q_out) = (_spanned(x.reshape(-1, x.shape[-1])) for x in (inputs, output_grads))
    coordinates = _dot(_dot(Q_in.T, gradient), Q_out)
    solved = _in_eigenvectors(coordinates, _dot(a.T, a) / len(inputs), _dot(b.T, b) / len(b))
    outside = gradient - _dot(_dot(Q_in, coordinates), Q_out.T)  # F is zero there
    return _dot(_dot(Q_in, solved), Q_out.T) + outside / DAMPING


def _spanned(rows):
    """Coordinates of the rows in the space that they span, and an orthonormal basis of it."""
    if len(rows) >= rows.shape[1]:
        return rows, jnp.eye(rows.shape[1])
    Q, R = jnp.linalg.qr(rows.T)
    return R.T, Q


def _in_eigenvectors(V, A, B):
    (s, P), (t, Q) = map(jnp.linalg.eigh, (A, B))
    inside = _dot(_dot(P.T, V), Q) / (jnp.maximum(s[:, None] * t, 0) + DAMPING)
    return _dot(_dot(P, inside), Q.T)


def relative_error(actual, expected) -> float:
    """The error of `actual` as a share of `expected`, in float64."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def temporary_bytes(program: Any) -> int:
    """The bytes that a compiled program needs beside its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def measure(case: Case, rounds: int) -> dict:
    """Check and time all methods on one layer; return a line of results."""
    methods: dict[str, Callable] = {CG: cg, EXPLICIT: explicit, SPAN: span}
    if max(case.sizes) <= LARGEST_EXACT:
        methods[EXACT] = exact
    batch = batch_of(case, 0)
    compiled = {name: jax.jit(method).lower(*batch).compile() for name, method in methods.items()}
    solution, iterations = compiled[CG](*batch)
    reference = compiled[EXACT if EXACT in compiled else SPAN](*batch)
    error = relative_error(solution, reference)
    if not error < TOLERANCE:
        raise RuntimeError(f"{case.name}: the solution is off by {error}")
    programs = {name: lambda batch, f=program: f(*batch) for name, program in compiled.items()}
    numbers = tqdm(range(rounds + 1), case.name, unit="round", leave=False)
    seconds = timing.in_turn(programs, (batch_of(case, number) for number in numbers))
    return case._asdict() | {
        "iterations": int(iterations),
        "error": error,
        "milliseconds": {name: [round(1e3 * s, 4) for s in spent] for name, spent in seconds.items()},
        "temporary_megabytes": {
            name: 1e-6 * temporary_bytes(program) for name, program in compiled.items()
        },
    }


def table(lines: Sequence[dict]) -> str:
    """Write medians and megabytes as Markdown."""

    def cells(line, values, form):
        return [form(values[name]) if name in values else "" for name in (CG, EXPLICIT, EXACT, SPAN)]

    header = ["layer", "rows", "iterations", "error"]
    header += [f"{name}, ms" for name in (CG, EXPLICIT, EXACT, SPAN)]
    header += [f"temporaries of {name}, MB" for name in (CG, EXPLICIT)]
    body = []
    for line in lines:
        megabytes = [f"{line['temporary_megabytes'][name]:.3g}" for name in (CG, EXPLICIT)]
        times = cells(line, line["milliseconds"], lambda spent: f"{np.median(spent):.3g}")
        rows = " x ".join(map(str, line["rows"]))
        body.append(
            [line["name"], rows, str(line["iterations"]), f"{line['error']:.2g}", *times, *megabytes]
        )
    return markdown.table(header, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    lines = []
    for case in CASES:
        if max(case.sizes) <= options.largest:
            lines.append(measure(case, options.rounds))
            if options.out is not None:
                made_with = provenance.record(("mfac_jax", "jax", "jaxlib"))
                json_lines.append(options.out, lines[-1] | made_with)
    print(timing.conditions(options.rounds))
    print(table(lines))


if __name__ == "__main__":
    main()
