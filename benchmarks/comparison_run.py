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
from benchmarks.problems import PROBLEMS
from examples.common.workload import Workload

REPORTED = ("tuning", "frontier")  # studies whose courses are reported, of all seeds but that for tuning


class Run(NamedTuple):
    """What distinguishes a run from all others, in the words of runs.jsonl.

    Attributes:
      study: "tuning", "grid" for the scan of --grid, "variants" for that of --variants, "frontier" for
        `storage_frontier`.
      problem: one of `PROBLEMS`.
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
    """Make the problem, cut to so many steps."""
    own = PROBLEMS[problem]
    workload = own.make(seed=seed, data_dir=data_dir) if own.reads_data_dir else own.make(seed=seed)
    return workload._replace(batches=workload.batches[:limit])


def start_process(cores: "multiprocessing.Queue[int]") -> None:
    """Settle on one core with one thread; called before JAX starts."""
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {cores.get()})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"


def train(run: Run, setting: Setting) -> dict[str, Any]:
    """Do one run; return its line of runs.jsonl."""
    with jax.enable_x64(PROBLEMS[run.problem].float64):
        return _train(run, setting)


def _train(run: Run, setting: Setting) -> dict[str, Any]:
    workload = make_workload(run.problem, run.seed, run.limit, setting.data_dir)
    state, step = optimizers.start(workload, run.optimizer, run.rate, run.damping, run.seed)
    evaluate = jax.jit(workload.evaluate)
    total = len(workload.batches)
    is_reported = run.study in REPORTED and run.seed != optimizers.TUNING_SEED
    every = math.ceil(total / PROBLEMS[run.problem].evaluations) if is_reported else total
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
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        "source": without_folder(workload.source, setting.data_dir),
        "jobs": setting.jobs,
        "device": jax.devices()[0].device_kind,
    }


def without_folder(source: str, data_dir: Path | None) -> str:
    """Where data are from, without the names of folders on this machine."""
    return source if data_dir is None else source.replace(f"{data_dir}{os.sep}", "")
