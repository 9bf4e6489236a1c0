"""How the time of a step grows: a fit of a d m + b m^2 + c m^3 + e to the times of flat windows.

The paper gives O(d m + m^3). No term may be negative; residuals are relative. `speed_report.py` prints the
fit of each solver, with the share of each term at every point, and draws it. The solve, a small part of
most steps, is fitted by itself too: there m^2 and m^3 can be told apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize

from benchmarks.step_time import OURS, SOLVE
from examples.common import markdown

TERMS = ("d m", "m^2", "m^3", "1")


class Fit(NamedTuple):
    """Seconds for a unit of each of `TERMS`, and the relative residual at each point."""

    seconds: np.ndarray
    residuals: np.ndarray


def terms(m: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The values of `TERMS` at each point, `(points, 4)`."""
    m, d = np.asarray(m, float), np.asarray(d, float)
    return np.stack([d * m, m**2, m**3, np.ones_like(m)], axis=-1)


def fit(terms: np.ndarray, seconds: np.ndarray) -> Fit:
    """Fit by least squares of the relative residuals, no coefficient below zero."""
    relative = terms / np.asarray(seconds)[:, None]
    scale = np.linalg.norm(relative, axis=0)
    found, _ = scipy.optimize.nnls(relative / scale, np.ones(len(relative)))
    return Fit(found / scale, relative @ (found / scale) - 1)


def points(lines: Sequence[Mapping[str, Any]], part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Collect m, d and the median seconds of each line."""
    m, d = (np.array([line[key] for line in lines]) for key in ("num_grads", "parameters"))
    return m, d, np.array([line["seconds"][part]["median"] for line in lines])


def law(found: Fit, names: Sequence[str]) -> str:
    """Write the terms with their coefficients, and how far they are off."""
    total = " + ".join(f"{s:.3g} s x {term}" for s, term in zip(found.seconds, names, strict=True))
    root = f"root mean square residual {np.sqrt(np.mean(found.residuals**2)):.1%}"
    return f"{total}; {root}, largest {np.max(np.abs(found.residuals)):.0%}"


def report(solver: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Write the fit, and beside it every point with the shares of the terms."""
    m, d, seconds = points(lines, OURS)
    found, rows = fit(terms(m, d), seconds), []
    of_solve = fit(terms(m, d)[:, 1:], points(lines, SOLVE)[-1])
    for point, parts in enumerate(terms(m, d) * found.seconds):
        shares = [f"{part / parts.sum():.0%}" for part in parts]
        row = [f"{m[point]:,}", f"{d[point]:,}", f"{1e3 * seconds[point]:.3g}", f"{1e3 * parts.sum():.3g}"]
        rows.append([*row, f"{found.residuals[point]:+.0%}", *shares])
    head = ["m", "d", "measured, ms", "fit, ms", "residual", *TERMS]
    laws = f"{solver}: {law(found, TERMS)}\n{solver}, the solve alone: {law(of_solve, TERMS[1:])}"
    return f"{laws}\n\n{markdown.table(head, rows)}"


def draw(of_solver: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw time over m for each d: points as measured, lines as fitted."""
    figure, axes = plt.subplots(
        1,
        len(of_solver),
        figsize=(4.5 * len(of_solver), 4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, (solver, lines) in zip(axes[0], of_solver.items(), strict=True):
        m, d, seconds = points(lines, OURS)
        found = fit(terms(m, d), seconds)
        for index, size in enumerate(sorted(set(d))):
            own = d == size
            smooth = np.geomspace(m[own].min(), m[own].max(), 50)
            fitted = terms(smooth, np.full_like(smooth, size)) @ found.seconds
            axis.loglog(smooth, 1e3 * fitted, color=f"C{index}")
            axis.loglog(m[own], 1e3 * seconds[own], "o", color=f"C{index}", label=f"d = {size:,}")
        axis.set(title=f"solver='{solver}'", xlabel="m")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds for a step")
    axes[0, 0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)
