"""Time of a step of `scale_by_mfac` beside its floor: the time of reading the window twice.

Two readings are the least there is: all products of the rows with the new gradient have to be known
before the rows are combined. For each case, everything is timed in turn in one process, with a new
gradient at every round; the table has medians. The update is compared with float64 first. "solve" is a step
with so few parameters that reading the window takes no time.

    python -m benchmarks.step_time --original DIR --out benchmarks/results/steps.jsonl

DIR is a checkout of https://github.com/IST-DASLab/M-FAC. With PyTorch, its optimizer is timed in turn
with ours (`original.py` says what is replaced to run it on CPU). `--grid` times flat windows of many
sizes. On a GPU the same commands run there, the original too; products are in float32, without TF32.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

import mfac_jax
from benchmarks import original, timing
from benchmarks.parameter_trees import RESNET20, RESNET20_SIZE, Shapes, count, transformer_shapes
from benchmarks.peers import OptionalExistingFolder
from benchmarks.timing import Timed
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, Flag, OptionalPath, Positive, choices, parse

DAMPING = 1e-3  # of gradients whose squared norm is about one
TOLERANCE = 1e-3  # relative, of F u = g in float64
COLUMNS = 2**16  # that are float64 at a time
COPIED = 2**28  # entries at most: of a larger window as many are copied as tell the bandwidth
FEW = 32  # parameters: a window of these takes no time to read
OURS, SOLVE = "mfac_jax", "solve"
PARTS = ("first_pass", SOLVE, "second_pass")  # the passes by themselves are in lines of older revisions
GRID = tuple(
    (m, d) for d in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000) for m in (32, 128, 512, 1024, 2048)
)

Solver = Literal["auto", "cholesky", "inverse"]
SOLVERS = get_args(Solver)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    grid: Flag = False
    """flat windows of many sizes, in place of the cases of the table"""
    gigabytes: Positive = 4.5
    """largest window"""
    solver: Annotated[Solver, choices(SOLVERS, many=False)] = "auto"
    """of `scale_by_mfac`"""
    rounds: Count = 15
    """timed, after one to warm up"""
    original: OptionalExistingFolder = None
    """a checkout of the original, to be timed too"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


class Case(NamedTuple):
    """A window.

    Attributes:
      name: of the tree of parameters.
      num_grads: rows.
      shapes: of the leaves.
    """

    name: str
    num_grads: int
    shapes: Shapes

    @property
    def parameters(self) -> int:
        """How many numbers a row holds."""
        return count(self.shapes)


CASES = (
    Case("one leaf", 1024, ((RESNET20_SIZE,),)),
    Case("ResNet-20", 1024, RESNET20),
    Case("1,000 leaves", 1024, ((272,),) * 1000),
    Case("one leaf", 1024, ((1_000_000,),)),
    Case("one leaf", 128, ((4_400_000,),)),
    Case("transformer", 128, transformer_shapes()),
)

Window = list[jax.Array]


def draw(case: Case) -> tuple[Callable[[jax.Array], Window], Callable[[jax.Array], Window]]:
    """Make functions of a key that draw rows and a gradient; half of each is common, as in training."""
    ends, scale = np.cumsum(list(map(math.prod, case.shapes)))[:-1], 1 / math.sqrt(2 * case.parameters)

    def leaves(key, *leading):
        common, noise = jax.random.key(0), jax.random.normal(key, (*leading, case.parameters))
        flat = scale * (jax.random.normal(common, noise.shape[-1:]) + noise)
        parts = zip(jnp.split(flat, ends, axis=-1), case.shapes, strict=True)
        return [part.reshape(*leading, *shape) for part, shape in parts]

    return jax.jit(lambda key: leaves(key, case.num_grads)), jax.jit(leaves)


@jax.jit
def _gram(window: Window) -> jax.Array:
    """Inner products of the rows."""
    flat = (rows.reshape(len(rows), -1) for rows in window)
    return sum(jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST) for rows in flat)  # type: ignore


class Step:
    """`scale_by_mfac` on a full window; each call of `step` takes one."""

    def __init__(self, case: Case, window: Window, solver: Solver = "auto"):
        transform = mfac_jax.scale_by_mfac(case.num_grads, DAMPING, solver=solver)
        # In place of a step for each row of the window. A kept inverse is made at the first step.
        state: Any = transform.init([rows[0] for rows in window])
        seen = jnp.asarray(case.num_grads, jnp.int32)
        self.state = state._replace(window=window, gram=_gram(window)[None], grads_seen=seen)
        self._update: Any = jax.jit(transform.update, donate_argnums=1)
        lowered = self._update.lower([rows[0] for rows in window], self.state)
        compiled, self.compile_seconds = timing.stopwatch(lowered.compile)
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes

    @property
    def compilations(self) -> int:
        """How often the step was compiled since the start."""
        return self._update._cache_size()

    def step(self, gradient: Window) -> Window:
        """Take a step; return the update."""
        updates, self.state = self._update(gradient, self.state)
        return updates


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x)


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.negative(x)


def relative_error(window: Window, newest: int, update: np.ndarray) -> float:
    """The error of F u = g in float64, as a share of g; u is flat, and g the newest row."""
    m, square, residual = len(window[0]), 0.0, 0.0
    rows = [np.asarray(leaf).reshape(m, -1) for leaf in window]

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
    """Measure the relative error of everyone's first step; raise if one is large."""
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
    """Make one reading of as many numbers as the window has, and a copy of some of them.

    No copy on CPU: it takes as long as it does for the new memory that it is given.
    """
    flat = None if len(case.shapes) == 1 else jnp.ones((case.num_grads, case.parameters))
    timed: dict[str, Timed] = {"read": lambda _: _sum(step.state.window[0] if flat is None else flat)}
    if jax.default_backend() != "cpu":
        copied = jnp.ones(min(COPIED, case.num_grads * case.parameters))
        timed["copy"] = lambda _: _copy(copied)
    return timed


def measure(case: Case, solver: Solver, rounds: int, folder: Path | None) -> dict[str, Any]:
    """Check and time one case; return a line of results."""
    few = case._replace(shapes=((FEW,),))
    rows, gradient = draw(case)
    rows_of_few, gradient_of_few = draw(few)
    step = Step(case, rows(jax.random.key(8)), solver)
    solve = Step(few, rows_of_few(jax.random.key(8)), solver)
    originals = {} if folder is None else original.steps(folder, step.state.window, DAMPING)
    errors = check(step, originals, gradient(jax.random.key(9)))
    functions: dict[str, Timed] = {OURS: step.step} | floors(case, step) | originals
    timed: dict[str, Timed] = {SOLVE: lambda pair: solve.step(pair[1])}
    for name, function in functions.items():
        timed[name] = lambda pair, function=function: function(pair[0])
    keys = tqdm(jax.random.split(jax.random.key(10), rounds + 1), case.name, unit="round", leave=False)
    seconds = timing.in_turn(timed, ((gradient(key), gradient_of_few(key)) for key in keys))
    return {
        "case": case.name,
        "num_grads": case.num_grads,
        "parameters": case.parameters,
        "leaves": len(case.shapes),
        "solver": solver,
        "relative_errors": errors,
        "compile_seconds": step.compile_seconds,
        "temporary_bytes": step.temporary_bytes,
        "seconds": {name: timing.spread(values) for name, values in seconds.items()},
        "compilations": step.compilations,
        "device": jax.devices()[0].device_kind,
    }


def of_copy(line: dict[str, Any]) -> str:
    """The rate of the two readings in a step over that of a copy, which reads and writes."""
    seconds, entries = line["seconds"], line["num_grads"] * line["parameters"]
    if "copy" not in seconds:
        return ""
    copying = seconds["copy"]["median"] * entries / min(COPIED, entries)
    return f"{copying / seconds[OURS]['median']:.0%}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Write milliseconds and ratios in Markdown."""
    present = {name for line in lines for name in line["seconds"]}
    parts = [part for part in PARTS if part in present]
    others = sorted(present - {OURS, "read", "copy", *parts})
    cells = []
    for line in lines:
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        row = [line["case"], f"{line['num_grads']:,}", f"{line['parameters']:,}", line["solver"]]
        row += [f"{median[OURS]:,.3g}", f"{2 * median['read']:,.3g}"]
        row += [f"{median[OURS] / median['read'] / 2:.2f}", of_copy(line)]
        row += [f"{median[name]:,.3g}" if name in median else "" for name in parts]
        row += [f"{line['compile_seconds']:.2g}", f"{1e-6 * line['temporary_bytes']:,.3g}"]
        row += [f"{median[name] / median[OURS]:.2f}" if name in median else "" for name in others]
        cells.append(row)
    head = ["parameters", "m", "d", "solver", "step, ms", "two readings, ms", "step / floor"]
    head += ["of the rate of a copy", *(f"{part.replace('_', ' ')}, ms" for part in parts)]
    head += ["compilation, s", "temporaries, MB", *(f"{name} / ours" for name in others)]
    return markdown.table(head, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    cases = [Case("one leaf", m, ((d,),)) for m, d in GRID] if options.grid else CASES
    lines = []
    for case in cases:
        if 4e-9 * case.num_grads * case.parameters > options.gigabytes:
            left_out = f"{case.name}, m = {case.num_grads:,}, d = {case.parameters:,}"
            print(f"{left_out} is left out: --gigabytes is {options.gigabytes}", file=sys.stderr)
            continue
        lines.append(measure(case, options.solver, options.rounds, options.original))
        if options.out is not None:
            made_with = provenance.record(("mfac_jax", "jax", "jaxlib", "torch"))
            json_lines.append(options.out, lines[-1] | {"grid": options.grid} | made_with)
    print(timing.conditions(options.rounds))
    print(table(lines))


if __name__ == "__main__":
    main()
