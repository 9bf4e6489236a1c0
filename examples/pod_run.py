"""The training of the sharded character transformer, from its last checkpoint to its end."""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import mfac_jax
from examples import pod_hosts
from examples import pod_transformer as pod
from examples.common.checkpoints import Checkpoint, open_folder, restore_newest, save
from examples.common.command_line import refuse
from examples.common.optimizers import warmup_cosine
from examples.common.run_folders import check_settings
from examples.common.training import TrainState, run_steps
from examples.train_pod import Options, check_sizes

VOCABULARY = 256  # bytes
VALID_BATCHES = 4
PREEMPTED = 75  # the exit code that asks to be started again (EX_TEMPFAIL)
# Settings that may differ when a run is continued.
FREE_SETTINGS = ("fsdp", "tensor", "host_chunk", "coordinator", "num_processes", "process_id")
FREE_SETTINGS += ("checkpoint_dir", "save_every", "data_dir", "text")


class Run(NamedTuple):
    """A training run on a mesh.

    Attributes:
      shapes: of the state, with its shardings.
      init: makes the state, each device its part.
      step: `(state, tokens)` to the state after a step and the loss before it.
      evaluate: `(params, tokens)` to the loss.
      batch: the tokens of the given step.
      valid_batches: tokens that are held out.
    """

    shapes: TrainState
    init: Callable[[], TrainState]
    step: Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    batch: Callable[[int], jax.Array]
    valid_batches: list[jax.Array]


def make_mesh(options: Options) -> Mesh:
    """Arrange all devices as `fsdp` times `tensor`."""
    devices = jax.device_count()
    fsdp = options.fsdp or devices // options.tensor
    if fsdp * options.tensor != devices:
        refuse(
            f"--fsdp times --tensor must be the number of devices, {devices}, got {fsdp} x {options.tensor}"
        )
    check_sizes(options, fsdp)
    return jax.make_mesh((fsdp, options.tensor), pod.AXES, axis_types=(AxisType.Auto,) * 2)


def make_run(options: Options, text: np.ndarray, mesh: Mesh) -> Run:
    """Make model, optimizer and batches. Nothing is on a device yet but held-out tokens.

    Raises:
      ValueError: the mesh cannot split a parameter.
    """
    size = pod.Size(VOCABULARY, options.context, options.width, options.layers, options.heads)
    dtype = jnp.dtype(options.dtype)
    graph, abstract = pod.abstract(size, dtype)
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(abstract, mesh))
    params = nnx.to_pure_dict(abstract)
    tx = mfac_jax.mfac(
        warmup_cosine(options.rate, options.steps), options.num_grads, host_chunk=options.host_chunk
    )

    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), pod.batch_sharding(mesh)
    loss = functools.partial(pod.loss, graph, activations=by_batch)
    state_shardings = mfac_jax.state_shardings(tx, params, shardings)
    everywhere = TrainState(replicated, shardings, {}, state_shardings)

    def init() -> TrainState:
        params = nnx.to_pure_dict(pod.split(size, dtype, options.seed)[1])
        return TrainState(jnp.zeros((), jnp.int32), params, {}, tx.init(params))

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params, tokens)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, {}, opt_state), value

    train, valid = np.split(text, [int(0.9 * len(text))])
    shape = (options.batch_size, options.context + 1)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), everywhere
    )
    return Run(
        shapes=shapes,
        init=jax.jit(init, out_shardings=everywhere),
        # The state is donated, so that the window is updated in place.
        step=jax.jit(step, donate_argnums=0, out_shardings=(everywhere, replicated)),
        evaluate=jax.jit(loss, out_shardings=replicated),
        batch=lambda step: sequences(train, (options.seed, step), shape, by_batch),
        valid_batches=[sequences(valid, (i,), shape, by_batch) for i in range(VALID_BATCHES)],
    )


def sequences(
    text: np.ndarray, seed: Sequence[int], shape: tuple[int, int], sharding: NamedSharding
) -> jax.Array:
    """Draw random pieces of the text; each host reads those of its own devices.

    They depend on the seed alone, so a resumed run sees what it would have seen, on any number of hosts.
    """
    starts = np.random.default_rng(seed).integers(0, len(text) - shape[1], shape[0])

    def rows(index: Any) -> np.ndarray:
        return text[starts[index[0]][:, None] + np.arange(shape[1])].astype(np.int32)

    return jax.make_array_from_callback(shape, sharding, rows)


def train(
    run: Run, options: Options, checkpoints: ocp.CheckpointManager, start: Checkpoint
) -> list[dict[str, float]]:
    """Train to the end, from a checkpoint on; return the reports of the whole run."""
    state, losses, reports = start.state, start.record["losses"], start.record["reports"]
    first, speaks = int(state.step), jax.process_index() == 0
    with tqdm(total=options.steps, initial=first, unit="step", disable=not speaks) as bar:
        steps = run_steps(run.step, state, map(run.batch, range(first + 1, options.steps + 1)))
        for step, (state, loss) in enumerate(steps, first + 1):
            losses.append(loss)
            bar.update()
            if step % options.report_every == 0 or step == options.steps:
                reports.append(measure(run, state, step, losses))
                losses.clear()
                if speaks:
                    bar.write(describe(reports[-1]))
            if checkpoints.should_save(step):  # also before a preemption; written while the next steps run
                record = start.record | {"losses": list(map(float, losses)), "reports": reports}
                save(checkpoints, step, state, record)
            if checkpoints.reached_preemption(step):
                if speaks:
                    bar.write(f"The machine is about to be taken away: step {step} is saved.")
                break
    checkpoints.wait_until_finished()
    return reports


def start_from(run: Run, checkpoints: ocp.CheckpointManager, settings: dict[str, Any]) -> Checkpoint:
    """Restore the last checkpoint, or begin. The record has the losses since the last of its reports."""

    def check(record: dict[str, Any]) -> None:
        check_settings(record.get("settings", {}), settings, checkpoints.directory)

    begin = {"losses": [], "reports": [], "settings": settings}
    return restore_newest(checkpoints, run.shapes, check) or Checkpoint(run.init(), begin)


def measure(run: Run, state: TrainState, step: int, losses: Sequence[Any]) -> dict[str, float]:
    """Make a report: the mean loss of the batches since the last one, and that of held-out text."""
    valid = [float(run.evaluate(state.params, batch)) for batch in run.valid_batches]
    train = [float(loss) for loss in losses]
    return {"step": step, "train_loss": float(np.mean(train)), "valid_loss": float(np.mean(valid))}


def describe(report: dict[str, float]) -> str:
    """Put a report in words."""
    return f"step {report['step']}: loss {report['train_loss']:.3f}, held out {report['valid_loss']:.3f}"


def run(options: Options, content: bytes, source: str) -> None:
    """Train on the text, which is empty if it cannot be used: `source` then says why."""
    text = f"{len(content)} characters, {zlib.crc32(content)}" if content else source
    versions = f"jax {jax.__version__}, mfac_jax {mfac_jax.__version__}"
    pod_hosts.check_agreement("text and versions", f"{text}, {versions}")
    if not content:
        refuse(source)
    mesh = make_mesh(options)
    try:
        run = make_run(options, np.frombuffer(content, np.uint8), mesh)
    except ValueError as error:
        refuse(error)
    settings = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_SETTINGS
    }
    settings["text"] = [len(content), zlib.crc32(content)]
    with (
        pod_hosts.shared(options.checkpoint_dir),
        open_folder(
            options.checkpoint_dir, save_interval_steps=options.save_every, save_on_steps={options.steps}
        ) as checkpoints,
    ):
        start = start_from(run, checkpoints, settings)
        if jax.process_index() == 0:
            print_start(run, mesh, source)
        reports = train(run, options, checkpoints, start)
        is_done = checkpoints.latest_step() == options.steps
    if jax.process_index() == 0 and reports:
        print(f"{describe(reports[-1])}. Checkpoints are in {options.checkpoint_dir}")
    if not is_done:
        sys.exit(PREEMPTED)


def print_start(run: Run, mesh: Mesh, source: str) -> None:
    """Print what is about to be trained, and where."""
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(run.shapes.params))
    leaves = jax.tree.leaves(run.shapes)
    share = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    print(
        f"{params:,} parameters on {dict(mesh.shape)} {mesh.devices.flat[0].device_kind} devices of "
        f"{jax.process_count()} process(es), {share / 2**20:,.1f} MiB of state on each; {source}"
    )
