"""How the time of a step grows: a fit of a d m + b m^2 + c m^3 + e to the stored times of flat windows.

    python benchmarks/scaling_law.py

reads benchmarks/results/steps.jsonl, prints the fit of each solver with its residuals, and draws
docs/scaling_law.png. The paper gives O(d m + m^3). No term may be negative; residuals are relative.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import tpu_tables

RESULTS = Path(__file__).parent / "results" / "steps.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "scaling_law.png"
TERMS = ("d m", "m^2", "m^3", "1")


class Fit(NamedTuple):
    """Seconds for a unit of each of `TERMS`, and the relative residual at each point."""

    seconds: np.ndarray
    residuals: np.ndarray


def terms(m: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Of each point, `(points, 4)`."""
    m, d = np.asarray(m, float), np.asarray(d, float)
    return np.stack([d * m, m**2, m**3, np.ones_like(m)], axis=-1)


def fit(m: np.ndarray, d: np.ndarray, seconds: np.ndarray) -> Fit:
    """Least squares of the relative residuals, no coefficient below zero."""
    relative = terms(m, d) / np.asarray(seconds)[:, None]
    scale = np.linalg.norm(relative, axis=0)
    found, _ = scipy.optimize.nnls(relative / scale, np.ones(len(relative)))
    return Fit(found / scale, relative @ (found / scale) - 1)


def report(solver: str, lines: Sequence[dict[str, Any]]) -> str:
    """The fit, and every point beside it with the shares of the terms."""
    m, d = (np.array([line[key] for line in lines]) for key in ("num_grads", "parameters"))
    seconds = np.array([line["seconds"]["mfac_jax"]["median"] for line in lines])
    found = fit(m, d, seconds)
    law = " + ".join(f"{s:.3g} s x {term}" for s, term in zip(found.seconds, TERMS, strict=True))
    rows = []
    for point, parts in zip(range(len(m)), terms(m, d) * found.seconds, strict=True):
        shares = [f"{part / parts.sum():.0%}" for part in parts]
        row = [f"{m[point]:,}", f"{d[point]:,}", f"{1e3 * seconds[point]:.3g}", f"{1e3 * parts.sum():.3g}"]
        rows.append([*row, f"{found.residuals[point]:+.0%}", *shares])
    head = ["m", "d", "measured, ms", "fit, ms", "residual", *TERMS]
    largest = f"largest residual {np.max(np.abs(found.residuals)):.0%}"
    root = f"root mean square {np.sqrt(np.mean(found.residuals**2)):.1%}"
    return f"{solver}: {law}; {root}, {largest}\n\n{tpu_tables.markdown(head, rows)}"


def draw(of_solver: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time over m, a line for each d: points as measured, lines as fitted."""
    size = {"figsize": (4.5 * len(of_solver), 4), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(of_solver), sharey=True, squeeze=False, **size)
    for axis, (solver, lines) in zip(axes[0], of_solver.items(), strict=True):
        m, d = (np.array([line[key] for line in lines]) for key in ("num_grads", "parameters"))
        seconds = np.array([line["seconds"]["mfac_jax"]["median"] for line in lines])
        found = fit(m, d, seconds)
        for index, size in enumerate(sorted(set(d))):
            own = d == size
            smooth = np.geomspace(m[own].min(), m[own].max(), 50)
            axis.loglog(smooth, 1e3 * terms(smooth, size + 0 * smooth) @ found.seconds, color=f"C{index}")
            axis.loglog(m[own], 1e3 * seconds[own], "o", color=f"C{index}", label=f"d = {size:,}")
        axis.set(title=solver, xlabel="m")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds for a step")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Print and draw; `argv` is the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    of_solver: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, args.results.read_text().splitlines()):
        if line["leaves"] == 1:
            of_solver.setdefault(line["solver"], []).append(line)
    for solver, lines in of_solver.items():
        print(report(solver, lines))
    draw(of_solver, args.picture)


if __name__ == "__main__":
    main()
