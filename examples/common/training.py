"""The training loop of the examples: one step, steps in a row, a run with evaluations and checkpoints."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import mfac_jax
from examples.common import checkpoints as cp
from examples.common.optimizers import NeedsFactors
from examples.common.workload import Workload


class TrainState(NamedTuple):
    """All that a training step changes."""

    step: Any  # () int32; like all fields an array, or its shape or sharding
    params: Any
    model_state: Any
    opt_state: Any


# From a state and a batch to the next state and the loss before the step.
Step = Callable[[TrainState, Any], tuple[TrainState, jax.Array]]


class History(NamedTuple):
    """The course of a run. It ends early if the loss is no longer finite.

    Attributes:
      losses: the loss of every step's batch, before the step.
      evaluations: what `Workload.evaluate` measured. Each also has its `step` and the `seconds` spent in
        training steps so far, without evaluation and compilation.
      records: what the callback of `train` returned after every evaluation.
    """

    losses: list[float]
    evaluations: list[dict[str, float]]
    records: list[Any]


def first_state(workload: Workload, tx: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step, from copies: training donates its arrays."""
    params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
    state = TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))
    return jax.device_put(state, jax.devices()[0])  # as a restored one is: jit then sees no difference


# The state is donated, so that M-FAC's window of gradients is updated in place.
@functools.partial(jax.jit, static_argnames=("loss", "tx"), donate_argnames="state")
def train_step(loss, tx, state: TrainState, data, indices, key) -> tuple[TrainState, jax.Array]:
    """Take one step; return the new state and the loss before it. The key depends on the step's number."""
    key = jax.random.fold_in(key, state.step)
    arguments = (state.params, state.model_state, data, indices, key)
    extra = {}
    if isinstance(tx, NeedsFactors):
        loss_and_factors = mfac_jax.value_and_grad_with_factors(loss, has_aux=True)
        (value, model_state), grads, extra["curvature"] = loss_and_factors(*arguments)
    else:
        (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, state.opt_state, state.params, value=value, **extra)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, model_state, opt_state), value


def bind_step(workload: Workload, tx: optax.GradientTransformation, seed: int) -> Step:
    """`train_step` on the workload, as a function of the state and the indices of a batch."""
    key = jax.random.key(seed)
    return lambda state, indices: train_step(workload.loss, tx, state, workload.data, indices, key)


def run_steps(step: Step, state: TrainState, batches: Iterable) -> Iterator[tuple[TrainState, jax.Array]]:
    """Yield the state and the loss after a step on each batch. The next step invalidates the state."""
    previous = None
    for batch in batches:
        state, loss = step(state, batch)
        jax.block_until_ready(previous)  # at most one step waits in the queue
        previous = loss
        yield state, loss


def train(
    workload: Workload,
    tx: optax.GradientTransformation,
    seed: int,
    *,
    evaluate_every: int,
    checkpoint_dir: Path | None = None,
    progress: Callable[[int], object] = lambda steps: None,
    callback: Callable[[TrainState, dict[str, float]], object] = lambda state, evaluation: None,
) -> History:
    """Train on all batches of the workload.

    Args:
      workload: what to train.
      tx: the optimizer. Its `update` gets the loss as `value`.
      seed: of what is random in the loss.
      evaluate_every: steps between two evaluations. The last step is always evaluated.
      checkpoint_dir: where the last two evaluations leave a checkpoint each. A checkpoint that is there
        already is continued, exactly as if nothing had interrupted the run: the newest one that is whole.
      progress: called with the number of steps that were done.
      callback: called with state and evaluation after each evaluation, also after the restored one. The
        next step invalidates the state's arrays, so copy what you keep. The history and the checkpoint
        keep what it returns, which JSON must be able to hold.
    """
    state, history = first_state(workload, tx), History([], [], [])
    evaluate = jax.jit(workload.evaluate)
    with _open(checkpoint_dir) as checkpoints:
        found = checkpoints and cp.restore_newest(checkpoints, state)
        if found:
            state, history = found.state, History(**found.record)
            callback(state, history.evaluations[-1])
        total, done = len(workload.batches), len(history.losses)
        step = bind_step(workload, tx, seed)
        if done < total:  # compile by a step whose result is thrown away
            jax.block_until_ready(step(jax.tree.map(jnp.copy, state), workload.batches[0]))
        progress(done)
        while done < total and np.isfinite(history.losses[-1:]).all():
            until = min(total, (done // evaluate_every + 1) * evaluate_every)
            start, losses = time.perf_counter(), []
            for new_state, loss in run_steps(step, state, workload.batches[done:until]):
                state = new_state
                losses.append(loss)
                progress(1)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start + sum(e["seconds"] for e in history.evaluations[-1:])
            done = until
            metrics = jax.device_get(evaluate(state.params, state.model_state, workload.data))
            evaluation = {"step": done, "seconds": seconds} | {k: float(v) for k, v in metrics.items()}
            history.losses.extend(map(float, losses))
            history.evaluations.append(evaluation)
            history.records.append(callback(state, evaluation))
            if checkpoints is not None:
                cp.save(checkpoints, done, state, history._asdict())
    return history


def _open(folder: Path | None) -> contextlib.AbstractContextManager[ocp.CheckpointManager | None]:
    if folder is None:
        return contextlib.nullcontext()
    # Not in the background: however a run ends, it then leaves all checkpoints that it passed.
    return cp.open_folder(folder, enable_async_checkpointing=False)
