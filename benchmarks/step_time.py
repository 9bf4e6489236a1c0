"""Time of a step of `scale_by_mfac` beside its floor: the time of reading the window twice.

Two readings are the least there is: all products of the rows with the new gradient have to be known
before the rows are combined. For each case, everything is timed in turn in one process, with a new
gradient at every round; the table has medians. The update is compared with float64 first.

    python benchmarks/step_time.py --original DIR --out benchmarks/results/steps.jsonl

DIR is a checkout of https://github.com/IST-DASLab/M-FAC; with PyTorch, its optimizer is timed in turn
with ours (`original.py` says what is replaced to run it on CPU). `--grid` times flat windows of many
sizes. On a GPU the same commands run there, the original too; products are in float32, without TF32.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import mfac_jax
from benchmarks import original, tpu_tables
from benchmarks.provenance import provenance
from mfac_jax._src.linalg import gram as _gram
from mfac_jax._src.linalg import kept_inverse
from mfac_jax._src.rows import manual_axes
from mfac_jax._src.rows import window as _window

DAMPING = 1e-3  # of gradients whose squared norm is about one
TOLERANCE = 1e-3  # relative, of F u = g in float64
COLUMNS = 2**16  # that are float64 at a time
COPIED = 2**28  # entries at most: of a larger window as many are copied as tell the bandwidth
OURS, PARTS = "mfac_jax", ("first_pass", "solve", "second_pass")
GRID = tuple(
    (m, d) for d in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000) for m in (32, 128, 512, 1024, 2048)
)


class Case(NamedTuple):
    """A window.

    Attributes:
      name: of the tree of parameters.
      num_grads: rows.
      shapes: of the leaves.
    """

    name: str
    num_grads: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def parameters(self) -> int:
        """d."""
        return sum(map(math.prod, self.shapes))


def resnet20_shapes() -> list[tuple[int, ...]]:
    """Convolutions, normalisation scales and biases, and the classifier: 59 leaves."""
    shapes, width_in = [(3, 3, 3, 16), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(3):
            for fan_in in (width_in, width):
                shapes += [(3, 3, fan_in, width), (width,), (width,)]
            width_in = width
    return [*shapes, (64, 10), (10,)]


def transformer_shapes(width: int = 176, layers: int = 12, heads: int = 8, tokens: int = 256) -> list:
    """A decoder as Flax has it: attention with biases, two dense layers four times as wide, two norms."""
    head = (heads, width // heads)
    attention = [(width, *head), head] * 3 + [(*head, width), (width,)]
    dense = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer = attention + dense + [(width,)] * 4
    return [(tokens, width), (tokens, width), *layer * layers, (width,), (width,)]


CASES = (
    Case("one leaf", 1024, ((272_474,),)),
    Case("ResNet-20", 1024, tuple(resnet20_shapes())),
    Case("1,000 leaves", 1024, ((272,),) * 1000),
    Case("one leaf", 1024, ((1_000_000,),)),
    Case("one leaf", 128, ((4_400_000,),)),
    Case("transformer", 128, tuple(transformer_shapes())),
)

Window = list[jax.Array]
Timed = Callable[[Window], Any]  # from the new gradient to whatever has to be waited for


def draw(case: Case) -> tuple[Callable[[jax.Array], Window], Callable[[jax.Array], Window]]:
    """Functions of a key that draw rows, and a gradient; half of each is common to all, as in training."""
    ends, scale = np.cumsum(list(map(math.prod, case.shapes)))[:-1], 1 / math.sqrt(2 * case.parameters)

    def leaves(key, *leading):
        common, noise = jax.random.key(0), jax.random.normal(key, (*leading, case.parameters))
        flat = scale * (jax.random.normal(common, noise.shape[-1:]) + noise)
        parts = zip(jnp.split(flat, ends, axis=-1), case.shapes, strict=True)
        return [part.reshape(*leading, *shape) for part, shape in parts]

    return jax.jit(lambda key: leaves(key, case.num_grads)), jax.jit(leaves)


class Step:
    """`scale_by_mfac` with a full window, its parts, and the reading of it; each call makes a step."""

    def __init__(self, case: Case, window: Window, solver: Any = "cholesky"):
        transform = mfac_jax.scale_by_mfac(case.num_grads, DAMPING, solver=solver)
        block_of_leaf = [0] * len(window)
        gram = jax.jit(lambda window, like: _window.gram(window, block_of_leaf, like))
        state: Any = transform.init([rows[0] for rows in window])
        seen = jnp.asarray(case.num_grads, jnp.int32)
        self.state = state._replace(window=window, gram=gram(window, state.gram), grads_seen=seen)
        layouts = [manual_axes.Layout.local(len(shape)) for shape in case.shapes]

        def first_pass(window, row, like, newest):
            return _window.products(window, row, block_of_leaf, layouts, like, newest)

        def solve(gram, inverse, newest):
            weights = jnp.zeros(gram.shape[:-1], gram.dtype).at[:, newest].set(1)
            shift = jnp.full((len(gram), 1), case.num_grads * DAMPING, gram.dtype)
            if solver == "cholesky":
                return _gram.solve(gram, shift, weights)
            same = gram[:, newest]  # once more
            inverse = kept_inverse.replace_row(inverse, same, newest, jnp.array(True))
            return kept_inverse.solve(inverse, gram, shift[:, 0], weights)

        gradient = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in case.shapes]
        start = time.perf_counter()
        compiled: Any = jax.jit(transform.update, donate_argnums=1).lower(gradient, self.state).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        self._update: Any = jax.jit(transform.update, donate_argnums=1)
        self._first_pass, self._solve = jax.jit(first_pass), jax.jit(solve)
        self._second_pass = jax.jit(lambda c, window: _window.combine(c, window, block_of_leaf))

    @property
    def compilations(self) -> int:
        """Of the step, since the start."""
        return self._update._cache_size()

    def step(self, gradient: Window) -> Window:
        """The update; the state is changed."""
        updates, self.state = self._update(gradient, self.state)
        return updates

    def first_pass(self, gradient: Window) -> jax.Array:
        """Products of the rows with the gradient."""
        return self._first_pass(self.state.window, gradient, self.state.coefficients, self.state.next_row)

    def solve(self, _: Window) -> jax.Array:
        """Coefficients of the rows."""
        return self._solve(self.state.gram, self.state.inverse, self.state.next_row)

    def second_pass(self, _: Window) -> Window:
        """The combination of the rows."""
        return self._second_pass(self.state.coefficients, self.state.window)


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.negative(x)


def relative_error(window: Window, newest: int, update: np.ndarray) -> float:
    """Of F u = g, in float64; u flat, and g the newest row."""
    m, square, residual = len(window[0]), 0.0, 0.0
    rows = [np.asarray(leaf).reshape(m, -1) for leaf in window]

    def chunks():
        first = 0
        for leaf in rows:
            for start in range(0, leaf.shape[1], COLUMNS):
                part = leaf[:, start : start + COLUMNS].astype(np.float64)
                yield part, update[first : first + part.shape[1]].astype(np.float64)
                first += part.shape[1]

    products = sum(part @ u for part, u in chunks()) / m
    for part, u in chunks():
        residual += np.sum((DAMPING * u + products @ part - part[newest]) ** 2)
        square += np.sum(part[newest] ** 2)
    return math.sqrt(residual / square)


def check(step: Step, originals: Mapping[str, Timed], gradient: Window) -> dict[str, float]:
    """Relative errors of the first step of each; refused where one is large."""
    newest = int(step.state.next_row)
    updates = {OURS: np.concatenate([np.ravel(u) for u in step.step(gradient)])}
    for name, function in originals.items():
        updates[name] = np.asarray(jnp.from_dlpack(function(gradient)))
    errors = {name: relative_error(step.state.window, newest, u) for name, u in updates.items()}
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise ValueError(f"{name} is no inverse: relative error {error:.1e} of F u = g.")
    return errors


def floors(case: Case, step: Step) -> dict[str, Timed]:
    """One reading of as many numbers as the window has, in one array, and a copy of some of them.

    No copy on CPU: it takes as long as it does for the new memory that it is given.
    """
    flat = None if len(case.shapes) == 1 else jnp.ones((case.num_grads, case.parameters))
    timed: dict[str, Timed] = {"read": lambda _: _sum(step.state.window[0] if flat is None else flat)}
    if jax.default_backend() != "cpu":
        copied = jnp.ones(min(COPIED, case.num_grads * case.parameters))
        timed["copy"] = lambda _: _copy(copied)
    return timed


def time_in_turn(timed: dict[str, Timed], gradients: Iterable[Window], rounds: int) -> dict[str, dict]:
    """Median and extremes of each, in seconds, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for gradient in tqdm(gradients, total=rounds + 1, unit="round", leave=False):
        for name, function in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(function(gradient))
            seconds[name].append(time.perf_counter() - start)
    values = {name: np.asarray(all_rounds[1:]) for name, all_rounds in seconds.items()}
    return {
        name: {"median": float(np.median(x)), "min": float(x.min()), "max": float(x.max())}
        for name, x in values.items()
    }


def measure(case: Case, solver: str, rounds: int, folder: Path | None) -> dict[str, Any]:
    """A line of results."""
    rows, gradient = draw(case)
    step = Step(case, rows(jax.random.key(8)), solver)
    originals = {} if folder is None else original.steps(folder, step.state.window, DAMPING)
    errors = check(step, originals, gradient(jax.random.key(9)))
    timed: dict[str, Timed] = {OURS: step.step} | floors(case, step)
    timed |= {part: getattr(step, part) for part in PARTS} | originals
    keys = jax.random.split(jax.random.key(10), rounds + 1)
    gradients = (jax.block_until_ready(gradient(key)) for key in keys)
    line = {"case": case.name, "num_grads": case.num_grads, "parameters": case.parameters}
    line |= {"leaves": len(case.shapes), "solver": solver, "relative_errors": errors}
    line |= {"compile_seconds": step.compile_seconds, "temporary_bytes": step.temporary_bytes}
    line |= {"seconds": time_in_turn(timed, gradients, rounds), "compilations": step.compilations}
    return line | {"device": jax.devices()[0].device_kind}


def of_copy(line: dict[str, Any]) -> str:
    """The rate of the two readings in a step over that of a copy, which reads and writes."""
    seconds, entries = line["seconds"], line["num_grads"] * line["parameters"]
    if "copy" not in seconds:
        return ""
    copying = seconds["copy"]["median"] * entries / min(COPIED, entries)
    return f"{copying / seconds[OURS]['median']:.0%}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Milliseconds, and ratios, in Markdown."""
    own = {OURS, "read", "copy", *PARTS}
    others = sorted({name for line in lines for name in line["seconds"]} - own)
    cells = []
    for line in lines:
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        row = [line["case"], f"{line['num_grads']:,}", f"{line['parameters']:,}", line["solver"]]
        row += [f"{median[OURS]:,.3g}", f"{2 * median['read']:,.3g}"]
        row += [f"{median[OURS] / median['read'] / 2:.2f}", of_copy(line)]
        row += [f"{median[name]:,.3g}" for name in PARTS]
        row += [f"{line['compile_seconds']:.2g}", f"{1e-6 * line['temporary_bytes']:,.3g}"]
        row += [f"{median[name] / median[OURS]:.2f}" if name in median else "" for name in others]
        cells.append(row)
    head = ["parameters", "m", "d", "solver", "step, ms", "two readings, ms", "step / floor"]
    head += ["of the rate of a copy", *(f"{part.replace('_', ' ')}, ms" for part in PARTS)]
    head += ["compilation, s", "temporaries, MB", *(f"{name} / ours" for name in others)]
    return tpu_tables.markdown(head, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--grid", action="store_true", help="flat windows of many sizes")
    add("--gigabytes", type=float, default=4.5, help="largest window (default: %(default)s)")
    add("--solver", choices=["cholesky", "inverse"], default="cholesky")
    add("--rounds", type=int, default=15, help="timed, after one to warm up (default: %(default)s)")
    add("--original", type=Path, metavar="DIR", help="a checkout of the original")
    add("--out", type=Path, help="file to add lines of JSON to")
    args = parser.parse_args(argv)
    cases = [Case("one leaf", m, ((d,),)) for m, d in GRID] if args.grid else CASES
    lines = []
    with contextlib.ExitStack() as stack:
        out = None if args.out is None else stack.enter_context(args.out.open("a"))
        for case in cases:
            if 4e-9 * case.num_grads * case.parameters > args.gigabytes:
                left_out = f"{case.name}, m = {case.num_grads:,}, d = {case.parameters:,}"
                tqdm.write(f"{left_out} is left out: --gigabytes is {args.gigabytes}", file=sys.stderr)
                continue
            lines.append(measure(case, args.solver, args.rounds, args.original))
            if out is not None:
                line = lines[-1] | {"grid": args.grid} | provenance(("mfac_jax", "jax", "jaxlib", "torch"))
                print(json.dumps(line), file=out, flush=True)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; medians of {args.rounds} rounds\n")
    print(table(lines))


if __name__ == "__main__":
    main()
