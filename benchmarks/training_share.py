"""What an optimizer takes of a whole training step: a ResNet-20 (batch 128) and a small transformer.

For each, the steps of all optimizers and the gradient alone are timed in turn in one process; the share
of an optimizer is what its step takes beyond the gradient. With kfac-jax and soap_jax installed they
are timed too.

    python benchmarks/training_share.py --out benchmarks/results/training.jsonl
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared

import jax
import jax.numpy as jnp
import optax
import optimizers
import step_time
import tpu_tables
from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_cifar10
import train_text
import workload as wl

import mfac_jax

WORKLOADS: dict[str, Callable[[], wl.Workload]] = {
    "ResNet-20": functools.partial(train_cifar10.make_workload, epochs=200, batch_size=128, seed=0),
    "transformer": functools.partial(train_text.make_workload, seed=0),
}
OTHERS = ("sgd", "adamw", "muon", "soap", "kfac")
NUM_GRADS = (32, 128, 512)
GRADIENT = "gradient alone"
RATE = 1e-3


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(loss, params, model_state, data, indices, key):
    return jax.value_and_grad(loss, has_aux=True)(params, model_state, data, indices, key)


def start(workload: wl.Workload, tx: optax.GradientTransformation) -> optimizers.Start:
    """The first state, and the step."""
    params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
    state = wl.TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))
    step = functools.partial(wl.train_step, workload.loss, tx)
    return state, lambda state, indices: step(state, workload.data, indices, jax.random.key(0))


def steps(workload: wl.Workload) -> dict[str, step_time.Timed]:
    """From indices of a batch to the loss, by name of the optimizer; each keeps its own state."""
    params, model_state, data, key = workload.params, workload.model_state, workload.data, jax.random.key(0)

    def advancing(state, step):
        def advance(indices):
            nonlocal state
            state, loss = step(state, indices)
            return loss

        return advance

    found = {GRADIENT: lambda indices: _gradient(workload.loss, params, model_state, data, indices, key)}
    for name in OTHERS:
        missing = optimizers.why_missing(name) or optimizers.UNSUPPORTED.get((name, workload.name))
        if missing:
            print(f"{workload.name} without {name}: {missing}")
        elif name == "kfac":
            found[name] = advancing(*optimizers.start(workload, name, RATE, None, 0))
        else:
            found[name] = advancing(*start(workload, optimizers.TRANSFORMS[name](RATE)))
    for m in NUM_GRADS:
        found[f"mfac, m = {m}"] = advancing(*start(workload, mfac_jax.mfac(RATE, m)))
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Milliseconds, and shares, in Markdown."""
    rows = []
    for line in lines:
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        for name, value in median.items():
            share = "" if name == GRADIENT else f"{max(0, 1 - median[GRADIENT] / value):.0%}"
            adam = f"{value / median['adamw']:.2f}"
            rows.append([line["workload"], f"{line['parameters']:,}", name, f"{value:,.3g}", share, adam])
    return tpu_tables.markdown(
        ["", "parameters", "", "step, ms", "optimizer's share", "step / AdamW's"], rows
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
            steps(workload), iter(workload.batches[: args.rounds + 1]), args.rounds
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
