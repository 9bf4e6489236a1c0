"""What an optimizer takes of a whole training step: a ResNet-20 (batch 128) and a small transformer.

For each optimizer, whole steps and its update alone are timed, all in turn in one process. With kfac-jax
installed it is timed too; it has no update alone.

    python -m benchmarks.training_share --out benchmarks/results/training.jsonl
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import mfac_jax
from benchmarks import optimizers, timing
from benchmarks.timing import Timed
from examples import cifar10, text
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, parse
from examples.common.training import Step, TrainState, bind_step, first_state
from examples.common.workload import Workload

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "ResNet-20": functools.partial(cifar10.make_workload, epochs=200, batch_size=128, seed=0),
    "transformer": functools.partial(text.make_workload, seed=0),
}
OTHERS = ("sgd", "adamw", "muon", "lbfgs", "soap", "kfac")
NUM_GRADS = (32, 128, 512)
ALONE = ", alone"
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    rounds: Count = 15
    """timed, after one to warm up"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


def transform(name: str) -> optax.GradientTransformation:
    """An optimizer of the comparison, or L-BFGS without its line search."""
    if name == "lbfgs":
        return optax.chain(optax.scale_by_lbfgs(), optax.scale(-RATE))
    return optimizers.TRANSFORMS[name](RATE)


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(loss, params, model_state, data, indices, key):
    return jax.grad(loss, has_aux=True)(params, model_state, data, indices, key)[0]


def gradients(workload: Workload, number: int) -> list[Any]:
    """Compute the gradients of the first batches at the first parameters."""
    fixed = workload.loss, workload.params, workload.model_state, workload.data
    return [_gradient(*fixed, indices, jax.random.key(0)) for indices in workload.batches[:number]]


def start(workload: Workload, tx: optax.GradientTransformation) -> TrainState:
    """Make the first state; no array is in it twice, as that one could not be donated."""
    state = first_state(workload, tx)
    return state._replace(opt_state=jax.tree.map(jnp.copy, state.opt_state))


def training(state: TrainState, step: Step) -> Timed:
    """Make a function that takes one training step on a batch at each call."""

    def advance(indices):
        nonlocal state
        state, loss = step(state, indices)
        return loss

    return advance


def updating(workload: Workload, tx: optax.GradientTransformation, grads: Sequence[Any]) -> Timed:
    """Make a function that takes the optimizer's step alone, on the next of these gradients."""
    _, params, _, state = start(workload, tx)
    following = itertools.cycle(grads)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def advance(_):
        nonlocal params, state
        params, state = update(next(following), state, params)
        return params

    return advance


def steps(workload: Workload, rounds: int) -> dict[str, Timed]:
    """Make whole steps by name of the optimizer, and the optimizer alone."""
    found, chosen = {}, {}
    for name in OTHERS:
        missing = optimizers.why_missing(name) or optimizers.UNSUPPORTED.get((name, workload.name))
        if missing:
            print(f"{workload.name} without {name}: {missing}")
        elif name == "kfac":
            found[name] = training(*optimizers.start(workload, name, RATE, None, 0))
        else:
            chosen[name] = transform(name)
    # `metric_share.py` has what the rotated metric takes beside that.
    chosen |= {f"mfac, m = {m}": mfac_jax.mfac(RATE, m, metric="diagonal", storage=None) for m in NUM_GRADS}
    grads = gradients(workload, rounds + 1)
    for name, tx in chosen.items():
        found[name] = training(start(workload, tx), bind_step(workload, tx, 0))
        found[name + ALONE] = updating(workload, tx, grads)
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Write milliseconds and shares in Markdown."""
    rows = []
    for line in lines:
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        for name, value in median.items():
            if not name.endswith(ALONE):
                alone = median.get(name + ALONE)
                cells = ["", ""] if alone is None else [f"{alone:,.3g}", f"{alone / value:.1%}"]
                rows.append([line["workload"], f"{line['parameters']:,}", name, f"{value:,.3g}", *cells])
    header = ["", "parameters", "", "whole step, ms", "optimizer alone, ms", "its share"]
    return markdown.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    lines = []
    for name, make in WORKLOADS.items():
        workload = make()
        batches = tqdm(workload.batches[: options.rounds + 1], name, unit="round", leave=False)
        seconds = timing.in_turn(steps(workload, options.rounds), batches)
        lines.append(
            {
                "workload": name,
                "parameters": sum(x.size for x in jax.tree.leaves(workload.params)),
                "batch": workload.batches.shape[1],
                "seconds": {kind: timing.spread(values) for kind, values in seconds.items()},
            }
        )
    if options.out is not None:
        packages = ("mfac_jax", "jax", "jaxlib", "optax", "flax", "kfac_jax")
        made_with = provenance.record(packages)
        json_lines.append(options.out, *(line | made_with for line in lines))
    print(timing.conditions(options.rounds))
    print(table(lines))


if __name__ == "__main__":
    main()
