"""A picture of M-FAC's diagnostics over a run."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito
TITLES = ["eigenvalues", "directions", "cosines", "norms", "step factor", "damping share"]


def plot_diagnostics(records: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the records of a `mfac_jax.DiagnosticsLog`, in the format that the file's name ends in.

    Lines are the medians of the blocks, shaded from the smallest to the largest.

    Raises:
      ValueError: there are no records.
    """
    if not records:
        raise ValueError("records must not be empty: call the log in the training loop before plotting.")
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True).ravel()
    for axes, title in zip(panels, TITLES, strict=True):
        axes.set_title(title)
        axes.grid(alpha=0.3)
    _draw_curvature(panels, records)
    _draw_steps(panels, records)
    if np.max(_column(records, "gradient_norm")) > 0:  # a logarithmic axis with nothing but zeros warns
        panels[0].set_yscale("log")
        panels[3].set_yscale("log")
    for axes in panels[:4]:
        axes.legend(fontsize="small")
    for axes in panels[3:]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=80)


def _draw_curvature(panels, records: Sequence[dict[str, Any]]) -> None:
    """The panels about the window: eigenvalues, directions, damping share."""
    eigenvalues, directions, share = panels[0], panels[1], panels[5]
    _line(eigenvalues, records, _eigenvalues(records, 0), "largest", BLUE)
    _line(eigenvalues, records, _eigenvalues(records, 0.5), "middle", GREEN)
    _line(eigenvalues, records, _eigenvalues(records, 1), "smallest", PURPLE)
    _line(eigenvalues, records, _column(records, "damping"), "damping", ORANGE, "--")
    _line(directions, records, _column(records, "rows_used"), "gradients in the window", "black", ":")
    _line(directions, records, _column(records, "effective_rank"), "effective rank", BLUE)
    free = [record["rows_used"] * (1 - np.asarray(record["damping_share"])) for record in records]
    _line(directions, records, free, "not ruled by the damping", ORANGE, "--")
    _line(share, records, _column(records, "damping_share"), "damping share", BLUE)
    share.set_ylim(0, 1)


def _draw_steps(panels, records: Sequence[dict[str, Any]]) -> None:
    """The panels about gradients and updates: cosines, norms, step factor."""
    cosines, norms, factor = panels[2:5]
    _line(cosines, records, _column(records, "similarity"), "of two gradients", BLUE)
    newest = _column(records, "newest_similarity")
    _line(cosines, records, newest, "newest and other gradients", GREEN, ":")
    _line(cosines, records, _column(records, "alignment"), "newest gradient and update", ORANGE, "--")
    before = _column(records, "mean_cosine")
    _line(cosines, records, before, "gradient and update before, mean", PURPLE, "-.")
    _line(norms, records, _column(records, "gradient_norm"), "newest gradient", BLUE)
    _line(norms, records, _column(records, "step_norm"), "update", ORANGE, "--")
    _line(norms, records, _column(records, "fisher_norm"), "update, Fisher norm", GREEN, ":")
    _line(factor, records, _column(records, "step_factor"), "step factor", BLUE)


def _line(axes, records, values: Sequence[Any], label: str, color: str, style: str = "-") -> None:
    """The median over the blocks, and their range."""
    steps = _column(records, "step")
    blocks = np.asarray(values, np.float64).reshape(len(steps), -1)
    axes.plot(steps, np.median(blocks, axis=1), label=label, color=color, linestyle=style)
    axes.fill_between(steps, blocks.min(axis=1), blocks.max(axis=1), color=color, alpha=0.15)


def _column(records: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [record[name] for record in records]


def _eigenvalues(records: Sequence[dict[str, Any]], position: float) -> list[Any]:
    """Of each block, at the position from 0, the largest in use, to 1, the smallest."""
    return [
        np.asarray(record["spectrum"])[:, round(position * (max(record["rows_used"], 1) - 1))]
        for record in records
    ]
