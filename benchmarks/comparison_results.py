"""What `report_comparison` reads off the runs of `compare_optimizers`: groups, rates, times."""

import inspect
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

import mfac_jax
from benchmarks.comparison_plots import STYLES, Record, Scan
from benchmarks.optimizers import TUNING_SEED

OURS = "mfac-default"
RIVALS = ("muon", "soap", "nadamw")  # tuned, and stronger than the others
ROUNDING = 1e-7  # in float32 smaller losses near a sum of logits are rounding: they count as equal
PEERS = ("sgd", "adamw", "nadamw")  # the best of these, tuned, sets the loss that all have to reach
NEAR_ZERO = 0.1  # a loss that falls below this part of the initial one counts as going to zero


class Summary(NamedTuple):
    """The figures of an optimizer on a problem.

    Attributes:
      scan: final training loss for each rate with the tuning seed, rates rising, infinite for divergence.
      best_rate: the one with the lowest loss in the scan.
      runs: those at the best rate with other seeds; empty where every rate diverged.
      step_ms: median over all runs of a run's time a step.
    """

    scan: Scan
    best_rate: float
    runs: list[Record]
    step_ms: float


# ------------------------------------------------------------------------------------------ figures


def final_loss(record: Record) -> float:
    """The last training loss, infinite if the run diverged."""
    loss = record["evaluations"][-1]["train_loss"]
    return math.inf if loss is None else loss


def scan_of(records: list[Record]) -> dict[float, float]:
    """Final training loss for each rate, rates rising; of several runs at a rate the last counts."""
    return dict(sorted({record["rate"]: final_loss(record) for record in records}.items()))


def summarize(records: list[Record]) -> dict[str, Summary]:
    """A summary for each optimizer in the tuning runs of one problem."""
    summaries = {}
    for name in STYLES:
        own = [record for record in records if record["optimizer"] == name]
        scan = scan_of([record for record in own if record["seed"] == TUNING_SEED])
        if scan:
            best = min(scan, key=lambda rate: scan[rate])
            others = [r for r in own if r["rate"] == best and r["seed"] != TUNING_SEED]
            runs = others if scan[best] < math.inf else []
            step_ms = float(np.median([r["step_ms"] for r in own]))
            summaries[name] = Summary(scan, best, sorted(runs, key=lambda r: r["seed"]), step_ms)
    return summaries


def width(scan: Scan, limit: float) -> tuple[float, bool]:
    """Measure how many decades of rates around the best one have a loss of at most `limit`.

    Between two rates log(loss) is taken as linear in log(rate); towards a rate that
    diverged it rises at once.

    Returns:
      The width, NaN if the best loss is above the limit, and whether it reaches an end of the grid, so that
      it may be larger.
    """
    rates, losses = np.log10(list(scan)), np.array(list(scan.values()))
    best = int(np.argmin(losses))
    if not losses[best] <= limit < math.inf:
        return math.nan, False
    tiny = np.finfo(float).tiny
    logs, log_limit = np.log(np.maximum(losses, tiny)), math.log(max(limit, tiny))
    ends, is_open = [], False
    for direction in (-1, 1):
        at = best
        while 0 <= at + direction < len(rates) and logs[at + direction] <= log_limit:
            at += direction
        beyond, end = at + direction, rates[at]
        if 0 <= beyond < len(rates):
            end += (log_limit - logs[at]) / (logs[beyond] - logs[at]) * (rates[beyond] - rates[at])
        else:
            is_open = True
        ends.append(end)
    return float(ends[1] - ends[0]), is_open


def first_at(record: Record, target: float, axis: str) -> float:
    """Find where log(loss), linear between evaluations, reaches the target; infinite for never."""
    previous = None
    for evaluation in record["evaluations"]:
        loss = evaluation["train_loss"]
        if loss is None:
            return math.inf
        if loss <= target:
            if previous is None or loss <= 0:
                return evaluation[axis]
            share = math.log(previous["train_loss"] / target) / math.log(previous["train_loss"] / loss)
            return previous[axis] + share * (evaluation[axis] - previous[axis])
        previous = evaluation
    return math.inf


def target_loss(summaries: Mapping[str, Summary]) -> tuple[float, str | None]:
    """Find the loss that every seed of the best tuned peer reaches, and that peer."""
    peers = [name for name in PEERS if name in summaries]
    losses = {name: max(map(final_loss, summaries[name].runs), default=math.inf) for name in peers}
    losses = {name: loss for name, loss in losses.items() if loss < math.inf}
    best = min(losses, key=lambda name: losses[name], default=None)
    return (losses[best], best) if best else (math.nan, None)


class Standing(NamedTuple):
    """M-FAC, untuned, beside the best of the tuned rivals.

    Attributes:
      ours: mean over the seeds.
      theirs: the lowest mean of a rival.
      whose: that rival.
    """

    ours: float
    theirs: float
    whose: str

    @property
    def ratio(self) -> float:
        """Ours over theirs; both at least what rounding leaves."""
        return max(self.ours, ROUNDING) / max(self.theirs, ROUNDING)


def standing(summaries: Mapping[str, Summary], column: str) -> Standing | None:
    """Compare a loss, by its name in the evaluations; None where runs of M-FAC or a rival are missing."""
    means = {}
    for name in (OURS, *RIVALS):
        summary = summaries.get(name)
        if summary is None or (not summary.runs and min(summary.scan.values()) < math.inf):
            return None
        values = [run["evaluations"][-1][column] for run in summary.runs]
        means[name] = math.inf if None in values or not values else float(np.mean(values))
    whose = min(RIVALS, key=lambda name: means[name])
    return Standing(means[OURS], means[whose], whose)


def seconds_to_loss_of(summaries: Mapping[str, Summary], rival: str) -> tuple[float, float] | None:
    """Seconds of the rival's whole runs, and those until M-FAC, untuned, is at their mean final loss.

    Means over the seeds, infinite where a seed does not get there; None where runs are missing or diverged.
    """
    if any(name not in summaries or not summaries[name].runs for name in (OURS, rival)):
        return None
    target = max(float(np.mean([final_loss(run) for run in summaries[rival].runs])), ROUNDING)
    if math.isinf(target):
        return None
    theirs = np.mean([run["evaluations"][-1]["seconds"] for run in summaries[rival].runs])
    ours = np.mean([first_at(run, target, "seconds") for run in summaries[OURS].runs])
    return float(theirs), float(ours)


# ------------------------------------------------------------------------------------------- groups


def identity(record: Record) -> tuple:
    """What two records of the same run have in common."""
    study = (record[name] for name in ("study", "problem", "data", "limit"))
    return (*study, record["optimizer"], record["rate"], record["damping"], record["seed"])


def by_section(runs: list[Record]) -> dict[str, list[Record]]:
    """Group the runs by problem, data and limit, which must not mix; the title names what differs."""
    groups: dict[tuple, list[Record]] = {}
    for run in runs:
        groups.setdefault((run["problem"], run["data"], run["limit"]), []).append(run)
    sections = {}
    for (problem, data, limit), own in groups.items():
        same = [key for key in groups if key[0] == problem]
        title = problem
        if data == "default" and len({key[1] for key in same}) > 1:
            title += ", default data"
        if limit is not None and len({key[2] for key in same}) > 1:
            title += f", {limit} steps"
        sections[title] = own
    return sections


def select(sections: Mapping[str, list[Record]], study: str) -> dict[str, list[Record]]:
    """Choose the runs of a study; sections without any are left out."""
    chosen = {title: [run for run in own if run["study"] == study] for title, own in sections.items()}
    return {title: own for title, own in chosen.items() if own}


def grid_scans(records: list[Record]) -> dict[float | None, dict[float, float]]:
    """The scans of --grid on one problem: M-FAC's at each damping, AdamW's at None."""
    dampings = sorted({record["damping"] for record in records}, key=lambda d: math.inf if d is None else d)
    return {damping: scan_of([r for r in records if r["damping"] == damping]) for damping in dampings}


def full_scans(tuning: list[Record], grid: list[Record]) -> dict[str, dict[float, float]]:
    """The rates tried by each optimizer with the tuning seed, and those of --grid at its own damping."""
    default = inspect.signature(mfac_jax.mfac).parameters["damping"].default
    runs = [run for run in tuning if run["seed"] == TUNING_SEED]
    runs += [run for run in grid if run["damping"] in (None, default)]
    scans = {name: scan_of([run for run in runs if run["optimizer"] == name]) for name in STYLES}
    return {name: scan for name, scan in scans.items() if len(scan) > 1}


def initial_loss(records: list[Record]) -> float:
    """The training loss before the first step, which all optimizers share for a seed."""
    return records[0]["evaluations"][0]["train_loss"]


def goes_to_zero(records: list[Record]) -> bool:
    """Whether the best final loss is a small part of the initial one."""
    return min(map(final_loss, records)) < NEAR_ZERO * initial_loss(records)
