"""What the examples share: training problems, optimizers by name, and the training loop."""

import contextlib
import functools
import json
import os
import pickle
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp

import mfac_jax

# What numpy and pickle raise on files that are missing, cut short, or of another kind.
READ_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


class DataError(Exception):
    """Data that cannot be used; the message says what was looked for and what to do."""


class CheckpointError(Exception):
    """Checkpoints that do not belong to this run; the message says what to do."""


class Workload(NamedTuple):
    """A training problem.

    Workloads that differ only in their seed share `loss` and `evaluate`, so jit compiles them once.

    Attributes:
      name: what reports call it.
      source: where the data are from, in words.
      params: initial parameters.
      model_state: batch statistics and the like, `{}` where the model has none.
      data: arrays on the device; an argument of the functions, since XLA folds closed-over constants.
      batches: what a step trains on, indices `(steps, batch)` int32.
      loss: `(params, model_state, data, indices, key)` to the loss of the batch and the new model state.
      evaluate: `(params, model_state, data)` to `train_loss`, `valid_loss` and, for classifiers,
        `valid_accuracy`.
    """

    name: str
    source: str
    params: Any
    model_state: Any
    data: dict[str, jax.Array]
    batches: np.ndarray
    loss: Callable[..., tuple[jax.Array, Any]]
    evaluate: Callable[..., dict[str, jax.Array]]


def epoch_batches(samples: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Indices `(steps, batch)`: every epoch in a new order, its incomplete batch left out."""
    if batch_size > samples:
        raise DataError(f"a batch of {batch_size} needs as many samples, got {samples}: lower --batch-size")
    random = np.random.default_rng(seed)
    per_epoch = samples // batch_size
    orders = [random.permutation(samples)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch_size).astype(np.int32)


class NeedsFactors(optax.GradientTransformationExtraArgs):
    """An optimizer that wants the factors of the layers, as `curvature`, beside the gradient."""


# From a learning-rate schedule to an optimizer; what is not named here is the default of its library.
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "mfac": mfac_jax.mfac,
    "cgfac": lambda schedule: NeedsFactors(*mfac_jax.cgfac(schedule)),
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "adamw": optax.adamw,
    "nadamw": optax.nadamw,
    "muon": optax.contrib.muon,
}
# Default peak learning rates of the examples.
RATES = {
    "digits": {"mfac": 3e-3, "cgfac": 0.1, "sgd": 0.2, "adamw": 0.05, "nadamw": 0.05, "muon": 0.05},
    "cifar10": {"mfac": 3e-3, "sgd": 0.2, "adamw": 5e-3, "nadamw": 5e-3, "muon": 0.02},
    "text": {"mfac": 3e-3, "cgfac": 0.1, "sgd": 0.5, "adamw": 5e-3, "nadamw": 5e-3, "muon": 0.02},
}


def make_optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """The optimizer with the schedule that all share: a tenth of warm-up, then a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))
    return OPTIMIZERS[name](schedule)


class TrainState(NamedTuple):
    """All that a training step changes."""

    step: jax.Array  # () int32
    params: optax.Params
    model_state: Any
    opt_state: optax.OptState


class History(NamedTuple):
    """The course of a run; it ends early where the loss is no longer finite.

    Attributes:
      losses: of the batch of every step, before the step.
      evaluations: what `Workload.evaluate` measured, with the `step` and the `seconds` spent in training
        steps up to there, without evaluation and compilation.
      records: what the callback of `train` returned after every evaluation.
    """

    losses: list[float]
    evaluations: list[dict[str, float]]
    records: list[Any]


# The state is donated, so that M-FAC's window of gradients is updated in place.
@functools.partial(jax.jit, static_argnames=("loss", "tx"), donate_argnames="state")
def train_step(loss, tx, state: TrainState, data, indices, key) -> tuple[TrainState, jax.Array]:
    """The state after one step, and the loss before it. A step's key depends on its number alone."""
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
      tx: the optimizer; its `update` gets the loss as `value`.
      seed: of what is random in the loss.
      evaluate_every: steps between two evaluations; the last step is always evaluated.
      checkpoint_dir: where a checkpoint is kept of each of the last two evaluations. One that is there
        already is continued, exactly as if the run had not been interrupted.
      progress: called with the number of steps that were done.
      callback: called with the state and the evaluation after each of them, also after the one that is
        restored. The next step invalidates the state's arrays: copy what is to be kept. What it returns,
        representable in JSON, is kept in the history and in the checkpoint.
    """
    params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
    state = TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))
    state = jax.device_put(state, jax.devices()[0])  # as a restored one is: jit then sees no difference
    history = History([], [], [])
    evaluate = jax.jit(workload.evaluate)
    with _open_checkpoints(checkpoint_dir) as checkpoints:
        if checkpoints is not None and checkpoints.latest_step() is not None:
            state, history = _restore(checkpoints, state)
            callback(state, history.evaluations[-1])
        total, done = len(workload.batches), len(history.losses)
        step = _compiled_step(workload, tx, state, seed) if done < total else None
        progress(done)
        while step and done < total and np.isfinite(history.losses[-1:]).all():
            until = min(total, (done // evaluate_every + 1) * evaluate_every)
            start = time.perf_counter()
            state, losses = _advance(step, state, workload.batches[done:until], progress)
            seconds = time.perf_counter() - start + sum(e["seconds"] for e in history.evaluations[-1:])
            done = until
            metrics = jax.device_get(evaluate(state.params, state.model_state, workload.data))
            evaluation = {"step": done, "seconds": seconds} | {k: float(v) for k, v in metrics.items()}
            history.losses.extend(losses)
            history.evaluations.append(evaluation)
            history.records.append(callback(state, evaluation))
            if checkpoints is not None:
                _save(checkpoints, state, history)
    return history


def _compiled_step(workload: Workload, tx, state: TrainState, seed: int):
    """`(state, indices) -> (state, loss)`, compiled by a step whose result is thrown away."""
    key = jax.random.key(seed)

    def step(state, indices):
        return train_step(workload.loss, tx, state, workload.data, indices, key)

    jax.block_until_ready(step(jax.tree.map(jnp.copy, state), workload.batches[0]))
    return step


def _advance(step, state: TrainState, batches: np.ndarray, progress) -> tuple[TrainState, list[float]]:
    """The state after a step on each batch, and their losses."""
    losses = []
    for indices in batches:
        state, loss = step(state, indices)
        losses.append(loss)
        jax.block_until_ready(losses[-2:][0])  # the step before: at most one waits in the queue
        progress(1)
    return jax.block_until_ready(state), [float(loss) for loss in losses]


def prepare_checkpoint_dir(folder: Path, settings: dict, resume: bool) -> None:
    """Write the settings of a new run, or refuse checkpoints that this run must not continue.

    Args:
      folder: the checkpoints of one run, given to `train` as `checkpoint_dir`.
      settings: what the run depends on, representable in JSON.
      resume: whether checkpoints in the folder are wanted.
    """
    path = folder / "settings.json"
    with _open_checkpoints(folder) as checkpoints:
        has_checkpoint = checkpoints is not None and checkpoints.latest_step() is not None
    if not has_checkpoint:
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    if not resume:
        raise CheckpointError(
            f"{folder} holds checkpoints: pass --resume to continue them, or another --checkpoint-dir"
        )
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; pass another --checkpoint-dir") from error
    check_settings(saved, settings, folder)


def check_settings(saved: dict, settings: dict, folder: os.PathLike) -> None:
    """Refuse checkpoints in the folder that were made with other settings."""
    names = [name for name in saved | settings if saved.get(name) != settings.get(name)]
    if names:
        differences = ", ".join(
            f"{name} was {saved.get(name)!r}, is {settings.get(name)!r}" for name in names
        )
        raise CheckpointError(
            f"the checkpoints in {folder} are of another configuration: {differences}. Pass the same "
            "settings, or another --checkpoint-dir."
        )


def _open_checkpoints(folder: Path | None):
    """A context with the checkpoint manager of the folder, or with None."""
    if folder is None:
        return contextlib.nullcontext()
    # Not in the background: a run that ends, for whatever reason, then has all checkpoints it passed.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _save(checkpoints: ocp.CheckpointManager, state: TrainState, history: History) -> None:
    state_item, history_item = ocp.args.StandardSave(state), ocp.args.JsonSave(history._asdict())
    items = ocp.args.Composite(state=state_item, history=history_item)
    checkpoints.save(len(history.losses), args=items)


def _restore(checkpoints: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, History]:
    items = ocp.args.Composite(state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore())
    try:
        restored: Any = checkpoints.restore(checkpoints.latest_step(), args=items)
        return restored.state, History(**restored.history)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"cannot restore {checkpoints.directory}, perhaps from another version: {error}. Pass another "
            "--checkpoint-dir."
        ) from error
