"""The processes that do the runs of compare_optimizers.py, and the file that keeps their results."""

import concurrent.futures
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import optimizers as opt
from benchmarks.comparison_run import Run, Setting, start_process, train
from benchmarks.problems import PROBLEMS
from examples.common import json_lines, provenance
from examples.common.data import DataError


class Store:
    """runs.jsonl: what was done already, and where every new result goes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path)
        self.context = provenance.record((*provenance.PACKAGES, *opt.PACKAGES.values()))

    def append(self, record: dict[str, Any]) -> None:
        """Write a line, complete with date, revision, versions and machine."""
        self.records.append(json_lines.without_nan(record | self.context))
        json_lines.append(self.path, self.records[-1])

    def loss(self, run: Run) -> float | None:
        """The run's final training loss, infinite where it diverged; None if it was not done yet.

        A result of an older revision counts; delete its line to redo the run.
        """
        wanted = run._asdict()
        for record in reversed(self.records):  # of several records of a run the last counts
            if "evaluations" in record and all(record[name] == value for name, value in wanted.items()):
                loss = record["evaluations"][-1]["train_loss"]
                return math.inf if loss is None else loss
        return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read runs.jsonl. A last line that was cut short is removed, and its run is done again."""
    if not path.exists():
        return []
    json_lines.drop_cut_line(path)
    try:
        return json_lines.read(path)
    except ValueError as error:
        raise DataError(f"{path} is not a file of this command: {error}; pass another --out") from error


class Runner:
    """The pool of processes, and the file that their results go to."""

    def __init__(self, setting: Setting, store: Store) -> None:
        context = multiprocessing.get_context("spawn")  # JAX starts in the children
        cores = context.Queue()
        for core in _cores(setting.jobs):
            cores.put(core)
        self.setting, self.store, self.failed = setting, store, 0
        self.pool = concurrent.futures.ProcessPoolExecutor(
            setting.jobs, context, initializer=start_process, initargs=(cores,)
        )

    def missing(self, optimizers: Sequence[str], problems: Sequence[str]) -> set[tuple[str, str]]:
        """Find the optimizers and problems that cannot run; write each down with its reason."""
        reasons = dict(zip(optimizers, self.pool.map(opt.why_missing, optimizers), strict=True))
        pairs = {}
        for optimizer in optimizers:
            for problem in problems:
                reason = reasons[optimizer] or opt.UNSUPPORTED.get((optimizer, problem))
                reason = reason or PROBLEMS[problem].why_missing()
                if reason:
                    pairs[optimizer, problem] = reason
        for (optimizer, problem), reason in pairs.items():
            print(f"{optimizer} is left out on {problem}: {reason}", file=sys.stderr)
            self.store.append({"missing": optimizer, "problem": problem, "reason": reason})
        return set(pairs)

    def run(self, runs: Iterable[Run], description: str) -> None:
        """Do what was not done yet. A run that fails is written down, and the others go on."""
        waiting = {
            self.pool.submit(train, run, self.setting): run for run in runs if self.store.loss(run) is None
        }
        finished = concurrent.futures.as_completed(waiting)
        for future in tqdm(finished, description, total=len(waiting), unit="run", disable=not waiting):
            try:
                self.store.append(future.result())
            except (DataError, OSError, concurrent.futures.BrokenExecutor):
                raise
            except Exception as error:  # other people's optimizers may raise anything
                self.failed += 1
                text = f"{type(error).__name__}: {error}"
                print(f"{waiting[future]}: {text}", file=sys.stderr)
                self.store.append(waiting[future]._asdict() | {"error": text})


def _cores(jobs: int) -> list[int]:
    """Choose a core for each process; more processes than cores share them."""
    if not hasattr(os, "sched_getaffinity"):
        return [0] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job % len(cores)] for job in range(jobs)]
