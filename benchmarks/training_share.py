"""What an optimizer takes of a whole training step: a ResNet-20 (batch 128) and a small transformer.

For each optimizer, whole steps and its update alone are timed, all in turn in one process. With kfac-jax,
which has no update alone, and soap_jax installed they are timed too.

    python benchmarks/training_share.py --out benchmarks/results/training.jsonl
"""

import argparse
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared

import jax
import jax.numpy as jnp
import optax

import mfac_jax
from benchmarks import optimizers, step_time, tpu_tables
from benchmarks.provenance import provenance
from examples import train_cifar10, train_text
from examples.common.training import TrainState, train_step
from examples.common.workload import Workload

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "ResNet-20": functools.partial(train_cifar10.make_workload, epochs=200, batch_size=128, seed=0),
    "transformer": functools.partial(train_text.make_workload, seed=0),
}
OTHERS = ("sgd", "adamw", "muon", "lbfgs", "soap", "kfac")
NUM_GRADS = (32, 128, 512)
ALONE = ", alone"
RATE = 1e-3


def transform(name: str) -> optax.GradientTransformation:
    """An optimizer of the comparison, or L-BFGS without its line search."""
    if name == "lbfgs":
        return optax.chain(optax.scale_by_lbfgs(), optax.scale(-RATE))
    return optimizers.TRANSFORMS[name](RATE)


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(loss, params, model_state, data, indices, key):
    return jax.grad(loss, has_aux=True)(params, model_state, data, indices, key)[0]


def gradients(workload: Workload, number: int) -> list[Any]:
    """At the first parameters, of the first batches."""
    fixed = workload.loss, workload.params, workload.model_state, workload.data
    return [_gradient(*fixed, indices, jax.random.key(0)) for indices in workload.batches[:number]]


def start(workload: Workload, tx: optax.GradientTransformation) -> TrainState:
    """A state of its own."""
    params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
    opt_state = jax.tree.map(jnp.copy, tx.init(params))  # some hold one array twice: no donation
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state)


def training(state: TrainState, step: Callable[..., tuple[TrainState, jax.Array]]) -> step_time.Timed:
    """From indices of a batch to the loss, a step further at each call."""

    def advance(indices):
        nonlocal state
        state, loss = step(state, indices)
        return loss

    return advance


def updating(workload: Workload, tx: optax.GradientTransformation, grads: Sequence[Any]) -> step_time.Timed:
    """The optimizer alone, on one of these gradients after the other."""
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


def steps(workload: Workload, rounds: int) -> dict[str, step_time.Timed]:
    """Whole steps by name of the optimizer, and the optimizer alone."""
    found, chosen = {}, {}
    for name in OTHERS:
        missing = optimizers.why_missing(name) or optimizers.UNSUPPORTED.get((name, workload.name))
        if missing:
            print(f"{workload.name} without {name}: {missing}")
        elif name == "kfac":
            found[name] = training(*optimizers.start(workload, name, RATE, None, 0))
        else:
            chosen[name] = transform(name)
    chosen |= {f"mfac, m = {m}": mfac_jax.mfac(RATE, m) for m in NUM_GRADS}
    grads, key = gradients(workload, rounds + 1), jax.random.key(0)
    for name, tx in chosen.items():
        step = functools.partial(train_step, workload.loss, tx)
        found[name] = training(
            start(workload, tx), lambda state, indices, step=step: step(state, workload.data, indices, key)
        )
        found[name + ALONE] = updating(workload, tx, grads)
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Milliseconds, and shares, in Markdown."""
    rows = []
    for line in lines:
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        for name, value in median.items():
            if not name.endswith(ALONE):
                alone = median.get(name + ALONE)
                cells = ["", ""] if alone is None else [f"{alone:,.3g}", f"{alone / value:.1%}"]
                rows.append([line["workload"], f"{line['parameters']:,}", name, f"{value:,.3g}", *cells])
    return tpu_tables.markdown(
        ["", "parameters", "", "whole step, ms", "optimizer alone, ms", "its share"], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed, after one to warm up")
    parser.add_argument("--out", type=Path, help="file to add lines of JSON to")
    args = parser.parse_args(argv)
    lines = []
    for name, make in WORKLOADS.items():
        workload = make()
        seconds = step_time.time_in_turn(
            steps(workload, args.rounds), iter(workload.batches[: args.rounds + 1]), args.rounds
        )
        line = {"workload": name, "parameters": sum(x.size for x in jax.tree.leaves(workload.params))}
        lines.append(line | {"batch": workload.batches.shape[1], "seconds": seconds})
    if args.out is not None:
        lineage = provenance(("mfac_jax", "jax", "jaxlib", "optax", "flax", "kfac_jax", "soap_jax"))
        with args.out.open("a") as file:
            file.writelines(json.dumps(line | lineage) + "\n" for line in lines)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; medians of {args.rounds} rounds\n")
    print(table(lines))


if __name__ == "__main__":
    main()
