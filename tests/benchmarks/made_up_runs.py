"""Runs of the comparison that were never run, and the report on them."""

import json
import math
from pathlib import Path

from benchmarks import report_comparison


def record(optimizer: str, rate: float, final: float | None, **changes) -> dict:
    """A made-up run whose loss falls from 2.3 by a constant factor."""
    middle = None if final is None else math.sqrt(2.3 * final)
    evaluations = [
        {"step": 50 * i, "seconds": 0.1 * i, "train_loss": loss, "valid_loss": loss, "valid_accuracy": 0.5}
        for i, loss in enumerate((2.3, middle, final))
    ]
    defaults = {"study": "tuning", "problem": "digits-mlp", "damping": None, "seed": 0, "data": "default"}
    context = {
        "limit": None,
        "step_ms": 2.0,
        "steps": 100,
        "parameters": 10,
        "source": "made up",
        "jobs": 2,
    }
    machine = {"revision": "abc", "versions": {"jax": "1"}, "machine": {"cpus": 2}, "device": "cpu"}
    run = {"optimizer": optimizer, "rate": rate, "evaluations": evaluations}
    return defaults | context | machine | run | changes


def made_up() -> list[dict]:
    rates = (0.01, 0.02, 0.05)
    records = [record("sgd", rate, loss) for rate, loss in zip(rates, (0.5, 0.21, None), strict=True)]
    records += [record("mfac", rate, loss) for rate, loss in zip(rates, (0.4, 0.1, 0.06), strict=True)]
    records += [record("sgd", 0.02, loss, seed=seed) for seed, loss in ((1, 0.2), (2, 0.23))]
    records += [record("mfac", 0.05, loss, seed=seed) for seed, loss in ((1, 0.05), (2, 0.07))]
    records += [record("muon", 0.01, None)]
    records += [
        record("mfac", rate, rate + damping, study="grid", damping=damping)
        for rate in rates
        for damping in (0.1, 1.0)
    ]
    return [*records, *(record("adamw", rate, rate, study="grid") for rate in rates)]


def report(folder: Path, lines: list[dict]) -> str:
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_comparison.main([str(folder / "runs.jsonl"), "--out", str(folder / "docs")])
    return report_comparison.report(report_comparison.studies(lines))


def results_rows(text: str, title: str) -> dict[str, str]:
    """The lines of a section's first table by the name of the optimizer."""
    lines = text.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()
    return {line.split("`")[1]: line for line in lines if "`" in line}
