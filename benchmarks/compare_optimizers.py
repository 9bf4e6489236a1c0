"""Compare optimizers: same models, data, seeds, schedule shape and number of tuning trials.

Every rate of an optimizer's grid is tried with seed 0; the rate with the lowest final training loss is then
run with the other seeds. Each run becomes a line of runs.jsonl when it ends, and is not repeated when the
command is given again. report_comparison.py makes tables and pictures of the file.

Results of an older revision of this repository are kept: the peers' do not depend on it. To redo runs after
a change of M-FAC, delete their lines from runs.jsonl. The report names M-FAC entries of several revisions.

The problems are those of examples/, and noisy-digits: the MLP on batches of 4 images, with 30 % of the
training labels drawn at random, to see who mistakes noise for a direction. kfac and soap need packages that
are not installed with this one: kfac_jax (pip; with JAX 0.10 also tfp-nightly in place of
tensorflow-probability) and a checkout of haydn-jones/SOAP_JAX; without them the file says that they are
missing.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared

import jax
import numpy as np
from tqdm import tqdm

# Beside this file, and in examples/, which `optimizers` puts on the path.
from benchmarks import optimizers as opt
from benchmarks import provenance
from examples import train_cifar10, train_digits, train_text
from examples.common import command_line
from examples.common.json_lines import without_nan
from examples.common.provenance import revision
from examples.common.workload import DataError, Workload

# Losses are measured before the first step and this many times in a run of "tuning"; else at its end alone.
EVALUATIONS = {"digits-mlp": 22, "digits-cnn": 22, "noisy-digits": 12, "cifar10": 6, "text": 10}
PACKAGES = ("mfac_jax", "jax", "jaxlib", "flax", "optax", "numpy")


class Run(NamedTuple):
    """What distinguishes a run from all others, in the words of runs.jsonl.

    Attributes:
      study: "tuning", "grid" for the scan of --grid, "variants" for that of --variants.
      damping: None for the optimizer's own.
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


class Options(NamedTuple):
    """What all runs of a process need, and what does not change their results."""

    data_dir: Path | None
    soap: Path | None
    jobs: int


# ------------------------------------------------------------------------------ in the child processes


@functools.lru_cache(maxsize=1)
def make_workload(problem: str, seed: int, limit: int | None, data_dir: Path | None) -> Workload:
    """The problem; the digits are always those of scikit-learn."""
    if problem.startswith("digits"):
        workload = train_digits.make_workload(problem.removeprefix("digits-"), epochs=12, seed=seed)
    elif problem == "noisy-digits":
        workload = with_noisy_labels(train_digits.make_workload(epochs=4, batch_size=4, seed=seed), seed)
    elif problem == "cifar10":
        workload = train_cifar10.make_workload(
            epochs=2, batch_size=64, samples=10_000, data_dir=data_dir, seed=seed
        )
    else:
        workload = train_text.make_workload(data_dir=data_dir, seed=seed)
    return workload._replace(batches=workload.batches[:limit])


def with_noisy_labels(workload: Workload, seed: int) -> Workload:
    """30 % of the training labels drawn at random; those for validation stay right."""
    rng = np.random.default_rng(seed)
    labels = np.array(workload.data["y"])
    is_random = rng.random(len(labels)) < 0.3
    labels[is_random] = rng.integers(0, 10, is_random.sum())
    source = f"{workload.source}, 30 % of the training labels at random"
    return workload._replace(data=workload.data | {"y": jax.numpy.asarray(labels)}, source=source)


def start_process(cores: "multiprocessing.Queue[int]", options: Options) -> None:
    """Settle on one core with one thread; called before JAX starts."""
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {cores.get()})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    if options.soap is not None:
        sys.path[:0] = [str(options.soap / "src"), str(options.soap)]


def train(run: Run, options: Options) -> dict[str, Any]:
    """Do one run; its line of runs.jsonl."""
    workload = make_workload(run.problem, run.seed, run.limit, options.data_dir)
    state, step = opt.start(workload, run.optimizer, run.rate, run.damping, run.seed)
    evaluate = jax.jit(workload.evaluate)
    total = len(workload.batches)
    every = math.ceil(total / EVALUATIONS[run.problem]) if run.study == "tuning" else total
    evaluations, seconds, spent = [], [], 0.0
    for done in range(total + 1):
        if done % every == 0 or done == total:
            metrics = jax.device_get(evaluate(state.params, state.model_state, workload.data))
            metrics = {name: float(value) for name, value in metrics.items()}
            digits = {name: float(f"{value:.6g}") for name, value in metrics.items()}  # for a smaller file
            evaluations.append({"step": done, "seconds": round(spent, 6)} | digits)
            if not math.isfinite(metrics["train_loss"]):
                break
        if done < total:
            begin = time.perf_counter()
            state, loss = step(state, workload.batches[done])
            jax.block_until_ready((state, loss))
            seconds.append(time.perf_counter() - begin)
            spent += seconds[-1]
    return run._asdict() | {
        "evaluations": evaluations,
        "step_ms": round(1e3 * float(np.median(seconds)), 4),
        "diverged": not math.isfinite(evaluations[-1]["train_loss"]),
        "steps": total,
        "parameters": sum(x.size for x in jax.tree.leaves(workload.params)),
        "source": _without_folder(workload.source, options.data_dir),
        "jobs": options.jobs,
        "device": jax.devices()[0].device_kind,
    }


def _without_folder(source: str, data_dir: Path | None) -> str:
    """Where data are from, without the names of folders on this machine."""
    return source if data_dir is None else source.replace(f"{data_dir}{os.sep}", "")


# --------------------------------------------------------------------------------------- in the parent


class Store:
    """runs.jsonl: what was done already, and where every new result goes at once."""

    def __init__(self, path: Path, soap: Path | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records = read_records(path)
        self.context = {
            "revision": revision(),
            "versions": versions(soap),
            "machine": provenance.machine(),
        }

    def append(self, record: dict[str, Any]) -> None:
        """Write a line, complete with revision, versions and machine."""
        self.records.append(without_nan(record | self.context))
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1], allow_nan=False) + "\n")

    def loss(self, run: Run) -> float | None:
        """Its final training loss, infinite where it diverged; None if it was not done yet.

        A result of an older revision counts; delete its line to redo the run.
        """
        wanted = run._asdict()
        for record in reversed(self.records):  # of several records of a run the last counts
            if "evaluations" in record and all(record[name] == value for name, value in wanted.items()):
                loss = record["evaluations"][-1]["train_loss"]
                return math.inf if loss is None else loss
        return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of runs.jsonl; a last line that was cut short is removed, its run is done again."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path} is not a file of this command: {error}; pass another --out") from error


def versions(soap: Path | None) -> dict[str, str]:
    """Of Python and of every package that takes part and is installed; of a checkout, its commit."""
    names = {*PACKAGES, *opt.PACKAGES.values()}
    installed = {d.name.replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    found = {name: installed[name] for name in sorted(names & set(installed))}
    if soap is not None:
        found["soap_jax"] = _commit(soap)
    return found | {"python": platform.python_version()}


def _commit(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "a folder without git"


class Runner:
    """The pool of processes, and the file that their results go to."""

    def __init__(self, options: Options, store: Store) -> None:
        context = multiprocessing.get_context("spawn")  # JAX starts in the children
        cores = context.Queue()
        for core in _cores(options.jobs):
            cores.put(core)
        self.options, self.store, self.failed = options, store, 0
        self.pool = concurrent.futures.ProcessPoolExecutor(
            options.jobs, context, initializer=start_process, initargs=(cores, options)
        )

    def missing(self, optimizers: Sequence[str], problems: Sequence[str]) -> set[tuple[str, str]]:
        """Optimizer and problem where there can be no run; each is written down with its reason."""
        reasons = dict(zip(optimizers, self.pool.map(opt.why_missing, optimizers), strict=True))
        pairs = {}
        for optimizer in optimizers:
            for problem in problems:
                reason = reasons[optimizer] or opt.UNSUPPORTED.get((optimizer, problem))
                if reason:
                    pairs[optimizer, problem] = reason
        for (optimizer, problem), reason in pairs.items():
            print(f"{optimizer} is left out on {problem}: {reason}", file=sys.stderr)
            self.store.append({"missing": optimizer, "problem": problem, "reason": reason})
        return set(pairs)

    def run(self, runs: Iterable[Run], description: str) -> None:
        """Do what was not done yet; a run that fails is written down, and the others go on."""
        waiting = {
            self.pool.submit(train, run, self.options): run for run in runs if self.store.loss(run) is None
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
    """A core for each process; more processes than cores share them."""
    if not hasattr(os, "sched_getaffinity"):
        return [0] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job % len(cores)] for job in range(jobs)]


def tuning(args: argparse.Namespace, problem: str, optimizer: str) -> list[Run]:
    """A run with seed 0 for every rate of the grid."""
    data, steps = "given" if args.data_dir else "default", args.steps
    if "digits" in problem:
        data = "default"
    rates = opt.rates(opt.RATES[optimizer], problem)
    return [Run("tuning", problem, optimizer, rate, None, 0, data, steps) for rate in rates]


def grid(args: argparse.Namespace, problem: str) -> list[Run]:
    """The scan of --grid on the problem."""
    runs = []
    for optimizer, rates in opt.GRID_RATES.items():
        first = tuning(args, problem, optimizer)[0]._replace(study="grid")
        dampings = opt.GRID_DAMPINGS if optimizer == "mfac" else (None,)
        runs += [first._replace(rate=rate, damping=damping) for damping in dampings for rate in rates]
    return runs


def variants(args: argparse.Namespace, problem: str) -> list[Run]:
    """The runs of --variants on the problem."""
    first = tuning(args, problem, "mfac")[0]._replace(study="variants")
    names = (*opt.VARIANTS, *opt.IDEAS)
    rates = opt.rates(opt.VARIANT_RATES, problem)
    return [first._replace(optimizer=name, rate=rate) for name in names for rate in rates]


def compare(args: argparse.Namespace, runner: Runner) -> None:
    """The whole comparison, or another study, one problem after the other."""
    if args.grid or args.variants:
        for problem in args.problems:
            runs = grid(args, problem) * args.grid + variants(args, problem) * args.variants
            runner.run(runs, f"{problem}, other studies")
        return
    missing = runner.missing(args.optimizers, args.problems)
    for problem in args.problems:
        present = [name for name in args.optimizers if (name, problem) not in missing]
        trials = {name: tuning(args, problem, name) for name in present}
        runner.run([run for runs in trials.values() for run in runs], f"{problem}, seed 0")
        repeats = []
        for runs in trials.values():
            losses = [runner.store.loss(run) for run in runs]
            best = min(
                zip(losses, runs, strict=True), key=lambda pair: math.inf if pair[0] is None else pair[0]
            )
            if best[0] is not None and best[0] < math.inf:
                repeats += [best[1]._replace(seed=seed) for seed in range(1, args.seeds)]
        runner.run(repeats, f"{problem}, other seeds")


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add, problems, names = parser.add_argument, list(EVALUATIONS), list(opt.RATES)
    add("--problems", nargs="+", choices=problems, default=problems, help="which (default: all)")
    add("--optimizers", nargs="+", choices=names, default=names, help="which (default: all)")
    add("--seeds", type=command_line.number(1), default=3, help="runs at the best rate (default: 3)")
    add("--steps", type=command_line.number(1), help="cut every run to so many steps, for a quick trial")
    add(
        "--jobs",
        type=command_line.number(1),
        default=1,
        help="processes side by side, one thread each (default: 1)",
    )
    add("--data-dir", type=Path, help="for cifar10 and text, as in examples/")
    add("--soap", type=Path, help="checkout of SOAP_JAX, the package of SOAP")
    add("--grid", action="store_true", help="scan rates and dampings of M-FAC, and rates of AdamW, instead")
    add(
        "--variants",
        action="store_true",
        help="change M-FAC's settings one at a time, and add the ideas of ideas.py, instead",
    )
    add(
        "--out",
        type=Path,
        default=Path("out", "comparison"),
        help="folder of runs.jsonl (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing in runs.jsonl; `argv` is the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for option, folder in (("--data-dir", args.data_dir), ("--soap", args.soap)):
        if folder is not None and not folder.is_dir():
            parser.error(f"{option}: {folder} is not a folder")
    try:
        runner = Runner(
            Options(args.data_dir, args.soap, args.jobs), Store(args.out / "runs.jsonl", args.soap)
        )
        try:
            compare(args, runner)
        finally:
            runner.pool.shutdown(cancel_futures=True)
    except (DataError, OSError) as error:
        parser.error(str(error))
    except concurrent.futures.BrokenExecutor as error:
        sys.exit(f"A process ended, perhaps for want of memory: pass a smaller --jobs. {error}")
    print(f"Results are in {runner.store.path}; report_comparison.py makes tables and pictures of them.")
    if runner.failed:
        sys.exit(
            f"{runner.failed} runs failed: see above; they are tried again when the command is repeated."
        )


if __name__ == "__main__":
    main()
