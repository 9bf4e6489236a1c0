"""Train a sharded character transformer on one laptop or on all hosts of a pod, through preemptions.

The parameters are split over the mesh axes `fsdp` and `tensor`, and M-FAC's window with them. The same
command line goes on every host. On a TPU pod or under Slurm add `--coordinator auto`, elsewhere
`--coordinator HOST:PORT --num-processes N --process-id I`.

The run is saved in --checkpoint-dir after the first step and every --save-every steps, in the background.
If it is killed, start it again: it continues from its last complete checkpoint, on any number of devices.
On the same number of devices it ends in the very same numbers. With --coordinator, hosts save the step they
are at if one of them is about to be taken away (SIGTERM), and end with the exit code 75. Each folder takes
one run at a time.

Several processes on this machine:

    python -m examples.launch_local --processes 2 --devices 2 examples.train_pod --steps 100
"""

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import mfac_jax
from examples import pod_hosts, train_text
from examples import pod_transformer as pod
from examples.common import command_line
from examples.common.checkpoints import (
    CheckpointError,
    absolute,
    check_settings,
    open_folder,
    restore_record,
    restore_state,
    save,
)
from examples.common.command_line import Count, OptionalCount, Positive, Seed, refuse
from examples.common.optimizers import RATES, warmup_cosine
from examples.common.training import TrainState, run_steps
from examples.common.workload import DataError

VOCABULARY = 256  # bytes
VALID_BATCHES = 4
PREEMPTED = 75  # the exit code that asks to be started again (EX_TEMPFAIL)
# Settings that may differ when a run is continued.
FREE_SETTINGS = ("fsdp", "tensor", "host_chunk", "coordinator", "num_processes", "process_id")
FREE_SETTINGS += ("checkpoint_dir", "save_every", "data_dir", "text")


def shared_folder(text: str) -> str:
    """Read a folder, or the URL of one."""
    return text if "://" in text else str(command_line.output_folder(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(pod_hosts.Connection, train_text.TextOptions):
    """What the user can choose."""

    fsdp: OptionalCount = None
    """devices along the axis fsdp; all that --tensor leaves if not given"""
    tensor: Count = 1
    """devices along the axis tensor"""
    steps: Count = 300
    """training steps"""
    batch_size: Count = 32
    """sequences a step, of all hosts together"""
    context: Count = 64
    """characters of a sequence"""
    width: Count = 96
    """features of a character"""
    layers: Count = 3
    """transformer blocks"""
    heads: Count = 4
    """attention heads"""
    dtype: Annotated[str, command_line.choices(("float32", "bfloat16"), many=False)] = "float32"
    """of parameters and window"""
    num_grads: Count = 32
    """gradients in M-FAC's window"""
    host_chunk: OptionalCount = None
    """keep the window on the host; this many rows are on the device at a time"""
    rate: Positive = RATES["text"]["mfac"]
    """learning rate at the end of the warm-up"""
    seed: Seed = 0
    """of the parameters and the batches"""
    report_every: Count = 50
    """steps between two reports"""
    save_every: Count = 50
    """steps between two checkpoints"""
    checkpoint_dir: Annotated[str, command_line.option(shared_folder, "FOLDER")] = "out/pod"
    """folder or URL (gs://BUCKET/RUN), the same for all hosts"""


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
    if options.batch_size % fsdp:
        refuse(f"--batch-size must be a multiple of --fsdp, got {options.batch_size} and {fsdp}")
    if options.width % options.heads or options.heads % options.tensor:
        refuse(
            f"--heads must divide --width {options.width} and be a multiple of --tensor {options.tensor}, "
            f"got {options.heads}"
        )
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
    run: Run, options: Options, checkpoints: ocp.CheckpointManager, settings: dict[str, Any]
) -> list[dict[str, float]]:
    """Train to the end, from the last checkpoint on; return the reports of the whole run."""
    state, losses, reports = restore(run, checkpoints, settings)
    first, speaks = int(state.step), jax.process_index() == 0
    bar = tqdm(total=options.steps, initial=first, unit="step", disable=not speaks)
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
            record = {"losses": list(map(float, losses)), "reports": reports, "settings": settings}
            save(checkpoints, step, state, record)
        if checkpoints.reached_preemption(step):
            if speaks:
                bar.write(f"The machine is about to be taken away: step {step} is saved.")
            break
    bar.close()
    checkpoints.wait_until_finished()
    return reports


def restore(
    run: Run, checkpoints: ocp.CheckpointManager, settings: dict[str, Any]
) -> tuple[TrainState, list[Any], list[dict[str, float]]]:
    """Restore the last checkpoint, or begin: the state, losses since the last report, all reports."""
    if checkpoints.latest_step() is None:
        return run.init(), [], []
    record = restore_record(checkpoints)
    check_settings(record["settings"], settings, checkpoints.directory)
    return restore_state(checkpoints, run.shapes), record["losses"], record["reports"]


def measure(run: Run, state: TrainState, step: int, losses: Sequence[Any]) -> dict[str, float]:
    """Make a report: the mean loss of the batches since the last one, and that of held-out text."""
    valid = [float(run.evaluate(state.params, batch)) for batch in run.valid_batches]
    train = [float(loss) for loss in losses]
    return {"step": step, "train_loss": float(np.mean(train)), "valid_loss": float(np.mean(valid))}


def describe(report: dict[str, float]) -> str:
    """Put a report in words."""
    return f"step {report['step']}: loss {report['train_loss']:.3f}, held out {report['valid_loss']:.3f}"


def read_text(options: Options) -> tuple[np.ndarray, str]:
    """Read the text and where it is from; refuse one that is too short or differs between hosts."""
    try:
        content, source = train_text.read_text(options.data_dir, options.text)
    except DataError as error:
        content, source = b"", str(error)
    text = f"{len(content)} characters, {zlib.crc32(content)}" if content else source
    versions = f"jax {jax.__version__}, mfac_jax {mfac_jax.__version__}"
    pod_hosts.check_agreement("text and versions", f"{text}, {versions}")
    if not content:
        refuse(source)
    if len(content) < 20 * options.context:
        refuse(f"the text must have 20 times --context characters, got {len(content)}")
    return np.frombuffer(content, np.uint8), source


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the command line."""
    pod_hosts.connect(argv)
    options = command_line.parse(Options, argv, __doc__)
    text, source = read_text(options)
    mesh = make_mesh(options)
    try:
        run = make_run(options, text, mesh)
    except ValueError as error:
        refuse(error)
    pod_hosts.check_shared(absolute(options.checkpoint_dir))
    settings = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_SETTINGS
    }
    settings["text"] = [len(text), zlib.crc32(text.tobytes())]
    with open_folder(
        options.checkpoint_dir,
        save_interval_steps=options.save_every,
        save_on_steps={options.steps},
        cleanup_tmp_directories=True,  # of saves that were cut off
    ) as checkpoints:
        if jax.process_index() == 0:
            print_start(run, mesh, source, checkpoints.latest_step())
        try:
            reports = train(run, options, checkpoints, settings)
            is_done = checkpoints.latest_step() == options.steps
        except CheckpointError as error:
            refuse(error)
    if jax.process_index() == 0 and reports:
        print(f"{describe(reports[-1])}. Checkpoints are in {options.checkpoint_dir}")
    if not is_done:
        sys.exit(PREEMPTED)


def print_start(run: Run, mesh: Mesh, source: str, latest: int | None) -> None:
    """Print what is about to be trained, and where."""
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(run.shapes.params))
    leaves = jax.tree.leaves(run.shapes)
    share = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    print(
        f"{params:,} parameters on {dict(mesh.shape)} {mesh.devices.flat[0].device_kind} devices of "
        f"{jax.process_count()} process(es), {share / 2**20:,.1f} MiB of state on each; {source}"
    )
    print("A new run." if latest is None else f"Continues after step {latest}.")


if __name__ == "__main__":
    main()
