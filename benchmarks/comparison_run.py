"""One run of compare_optimizers.py, in a process of its own: a problem, an optimizer, a rate, a seed."""

import functools
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import optimizers, timing
from examples import cifar10, digits, text
from examples.common.workload import Workload

# Losses are measured before the first step and this many times in a run of "tuning"; else at its end alone.
EVALUATIONS = {"digits-mlp": 22, "digits-cnn": 22, "noisy-digits": 12, "cifar10": 6, "text": 10}
NOISE = 0.3  # share of random labels in noisy-digits


class Run(NamedTuple):
    """What distinguishes a run from all others, in the words of runs.jsonl.

    Attributes:
      study: "tuning", "grid" for the scan of --grid, "variants" for that of --variants.
      problem: one of `EVALUATIONS`.
      optimizer: one of `optimizers.TRANSFORMS`, or "kfac".
      rate: peak learning rate.
      damping: None for the optimizer's own.
      seed: of parameters, batches and labels.
      data: "given" with --data-dir, else "default".
      limit: steps that the run is cut to, or None.
    """

    study: str
    problem: str
    optimizer: str
    rate: float
    damping: float | None
    seed: int
    data: str
    limit: int | None


class Setting(NamedTuple):
    """What all runs of a process need, and what does not change their results."""

    data_dir: Path | None
    jobs: int


@functools.lru_cache(maxsize=1)
def make_workload(problem: str, seed: int, limit: int | None, data_dir: Path | None) -> Workload:
    """Make the problem; the digits are always those of scikit-learn."""
    if problem.startswith("digits"):
        workload = digits.make_workload(problem.removeprefix("digits-"), epochs=12, seed=seed)
    elif problem == "noisy-digits":
        workload = with_noisy_labels(digits.make_workload(epochs=4, batch_size=4, seed=seed), seed)
    elif problem == "cifar10":
        workload = cifar10.make_workload(
            epochs=2, batch_size=64, samples=10_000, data_dir=data_dir, seed=seed
        )
    else:
        workload = text.make_workload(data_dir=data_dir, seed=seed)
    return workload._replace(batches=workload.batches[:limit])


def with_noisy_labels(workload: Workload, seed: int) -> Workload:
    """Draw a share of the training labels at random; those for validation stay right."""
    rng = np.random.default_rng(seed)
    labels = np.array(workload.data["y"])
    is_random = rng.random(len(labels)) < NOISE
    labels[is_random] = rng.integers(0, 10, is_random.sum())
    source = f"{workload.source}, {100 * NOISE:g} % of the training labels at random"
    return workload._replace(data=workload.data | {"y": jax.numpy.asarray(labels)}, source=source)


def start_process(cores: "multiprocessing.Queue[int]") -> None:
    """Settle on one core with one thread; called before JAX starts."""
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {cores.get()})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"


def train(run: Run, setting: Setting) -> dict[str, Any]:
    """Do one run; return its line of runs.jsonl."""
    workload = make_workload(run.problem, run.seed, run.limit, setting.data_dir)
    state, step = optimizers.start(workload, run.optimizer, run.rate, run.damping, run.seed)
    evaluate = jax.jit(workload.evaluate)
    total = len(workload.batches)
    every = math.ceil(total / EVALUATIONS[run.problem]) if run.study == "tuning" else total
    evaluations, seconds = [], []
    for done in range(total + 1):
        if done % every == 0 or done == total:
            current = optimizers.evaluated(workload, run.optimizer, state)
            metrics = jax.device_get(evaluate(*current, workload.data))
            digits = {name: float(f"{value:.6g}") for name, value in metrics.items()}  # for a smaller file
            evaluations.append({"step": done, "seconds": round(sum(seconds), 6)} | digits)
            if not math.isfinite(digits["train_loss"]):
                break
        if done < total:
            (state, _), spent = timing.stopwatch(step, state, workload.batches[done])
            seconds.append(spent)
    return run._asdict() | {
        "evaluations": evaluations,
        "step_ms": round(1e3 * float(np.median(seconds)), 4),
        "diverged": not math.isfinite(evaluations[-1]["train_loss"]),
        "steps": total,
        "parameters": sum(x.size for x in jax.tree.leaves(workload.params)),
        "source": _without_folder(workload.source, setting.data_dir),
        "jobs": setting.jobs,
        "device": jax.devices()[0].device_kind,
    }


def _without_folder(source: str, data_dir: Path | None) -> str:
    """Where data are from, without the names of folders on this machine."""
    return source if data_dir is None else source.replace(f"{data_dir}{os.sep}", "")
