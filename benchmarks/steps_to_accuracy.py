"""Steps and seconds that optimizers take to a validation accuracy of 97 % on scikit-learn's digits.

The network and the schedule are those of examples/digits.py. Each optimizer's rate is the best of its
grid on seeds that are not reported: the fewest steps, where a run that does not get there counts as a step
more than it has. K-FAC is that of kfac-jax, where it is installed. Seconds are those of training steps
alone.

    python -m benchmarks.steps_to_accuracy --out benchmarks/results/accuracy.jsonl
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from tqdm import tqdm

import mfac_jax
from benchmarks import optimizers, timing
from examples import digits
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import OptionalPath, choices, parse
from examples.common.optimizers import NeedsFactors, warmup_cosine
from examples.common.training import bind_step, first_state
from examples.common.workload import Workload

TARGET, EVERY = 0.97, 4  # steps between two evaluations
WINDOW = "cgfac, 4 batches"  # and a damping of 1e-3
SEEDS, SEEDS_FOR_RATES = range(5), range(10, 12)
RATES = {
    "cgfac": (0.03, 0.1, 0.3),
    WINDOW: (0.03, 0.1, 0.3),
    "mfac": (3e-3, 1e-2, 3e-2),
    "kfac": (0.03, 0.1, 0.3),
    "adam": (3e-3, 1e-2, 3e-2),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    models: Annotated[tuple[str, ...], choices(digits.MODELS)] = ("mlp",)
    """networks of `examples.digits`"""
    optimizers: Annotated[tuple[str, ...], choices(RATES)] = tuple(RATES)
    """which to compare"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


def start(workload: Workload, optimizer: str, rate: float, seed: int) -> optimizers.Start:
    """Make a run's first state and its compiled step; the first result is thrown away."""
    if optimizer != WINDOW:
        return optimizers.start(workload, optimizer, rate, None, seed)
    peak, key = warmup_cosine(1.0, len(workload.batches)), jax.random.key(seed)
    arguments = (workload.params, workload.model_state, workload.data, workload.batches[0], key)
    with_factors = mfac_jax.value_and_grad_with_factors(workload.loss, has_aux=True)
    factors = jax.eval_shape(with_factors, *arguments)[2]
    tx = mfac_jax.cgfac(lambda count: rate * peak(count), 1e-3, num_batches=4, factors=factors)
    tx = NeedsFactors(*tx)
    step = bind_step(workload, tx, seed)
    jax.block_until_ready(step(first_state(workload, tx), workload.batches[0]))
    return first_state(workload, tx), step


def run(model: str, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once; `steps` and `seconds` are None if the run does not reach the target."""
    workload = digits.make_workload(model, seed=seed)
    state, step = start(workload, optimizer, rate, seed)
    evaluate, spent, accuracy = jax.jit(workload.evaluate), 0.0, 0.0
    line = {
        "model": model,
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "steps": None,
        "seconds": None,
    }
    for number, indices in enumerate(workload.batches, start=1):
        (state, _), seconds = timing.stopwatch(step, state, indices)
        spent += seconds
        if number % EVERY == 0:
            accuracy = float(evaluate(state.params, state.model_state, workload.data)["valid_accuracy"])
            if accuracy >= TARGET and line["steps"] is None:
                line |= {"steps": number, "seconds": round(spent, 4)}
    return line | {"of": len(workload.batches), "all_seconds": round(spent, 4), "final_accuracy": accuracy}


def best_rate(model: str, optimizer: str) -> float:
    """Find the rate of the grid with the fewest steps."""

    def steps(rate):
        found = [run(model, optimizer, rate, seed) for seed in SEEDS_FOR_RATES]
        return sum(line["steps"] or line["of"] + 1 for line in found)

    return min(tqdm(RATES[optimizer], desc=f"{model}, {optimizer}, rates", unit="rate"), key=steps)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Write one row per optimizer, as Markdown."""

    def spread(values):
        return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "-"

    rows = []
    for model, optimizer in dict.fromkeys((line["model"], line["optimizer"]) for line in lines):
        runs = [line for line in lines if (line["model"], line["optimizer"]) == (model, optimizer)]
        there = [line for line in runs if line["steps"] is not None]
        per_step = [1e3 * line["all_seconds"] / line["of"] for line in runs]
        row = [model, optimizer, f"{runs[0]['rate']:g}", f"{len(there)} of {len(runs)}"]
        row += [spread([line["steps"] for line in there]), spread([line["seconds"] for line in there])]
        accuracy = np.mean([line["final_accuracy"] for line in runs])
        rows.append([*row, f"{np.median(per_step):.3g}", f"{accuracy:.3f}"])
    header = ["network", "optimizer", "rate", "runs that reach it", "steps", "seconds", "ms a step"]
    return markdown.table([*header, "accuracy at the end"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    lines = []
    for model in options.models:
        for optimizer in options.optimizers:
            missing = optimizers.why_missing(optimizer)
            if missing:
                print(f"without {optimizer}: {missing}")
                continue
            rate = best_rate(model, optimizer)
            for seed in tqdm(SEEDS, desc=f"{model}, {optimizer}, {rate:g}", unit="seed"):
                lines.append(run(model, optimizer, rate, seed))
                if options.out is not None:
                    made_with = provenance.record(("mfac_jax", "jax", "jaxlib", "optax", "kfac-jax"))
                    json_lines.append(options.out, lines[-1] | made_with)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print(f"medians (least to most) of {len(SEEDS)} seeds\n")
    print(table(lines))


if __name__ == "__main__":
    main()
