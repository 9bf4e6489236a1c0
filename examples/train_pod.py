"""Train a sharded character transformer on one laptop or on all hosts of a pod, through preemptions.

The parameters are split over the mesh axes `fsdp` and `tensor`, and M-FAC's window with them. The same
command line goes on every host; on a TPU pod or under Slurm add `--coordinator auto`, elsewhere
`--coordinator HOST:PORT --num-processes N --process-id I`. The run is saved in --checkpoint-dir every
--save-every steps, and after the first, in the background. A run that was killed continues from its last
complete checkpoint when it is started again, on any number of devices; on the same number it ends in the
very same numbers. With --coordinator, hosts of which one is about to be taken away (SIGTERM) save the step
they are at, and end with the exit code 75. One run a folder at a time.

Several processes on this machine:

    python examples/launch_local.py --processes 2 --devices 2 examples/train_pod.py --steps 100
"""

import argparse
import functools
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import mfac_jax
from examples import comparison, train_text
from examples import pod_transformer as pod
from examples.common.checkpoints import CheckpointError, check_settings
from examples.common.workload import DataError

VOCABULARY = 256  # bytes
VALID_BATCHES = 4
PREEMPTED = 75  # the exit code by which programs say that it is worth to try again
MESSAGE_BYTES = 8192  # of what hosts tell each other about their command lines
# What a run may be continued with another value of.
FREE_SETTINGS = ("fsdp", "tensor", "host_chunk", "coordinator", "num_processes", "process_id")
FREE_SETTINGS += ("checkpoint_dir", "save_every", "data_dir", "text")


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Any  # () int32, as an array, its shape or its sharding; so all of them
    params: Any  # a dict
    opt_state: optax.OptState


class Progress(NamedTuple):
    """What a run has measured: the losses of the batches since the last report, and all reports."""

    losses: list[Any]
    reports: list[dict[str, float]]


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


# --------------------------------------------------------------------------------------- several hosts


def connect(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Find the other hosts; refuse command lines that differ on every host, before they are read."""
    connection = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_connection(connection)
    args, others = connection.parse_known_args(argv)
    given = [args.num_processes, args.process_id]
    if args.coordinator in (None, "auto") and given != [None, None]:
        parser.error(
            f"--num-processes and --process-id need --coordinator HOST:PORT, got {args.coordinator}"
        )
    if args.coordinator is None:
        return
    if args.coordinator == "auto":
        jax.distributed.initialize()
    elif args.num_processes is None or args.process_id is None:
        parser.error("--coordinator HOST:PORT needs --num-processes and --process-id too")
    else:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    check_agreement(parser, "flags", " ".join(others))


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The options that differ between hosts."""
    add = parser.add_argument
    add("--coordinator", help="HOST:PORT of the first process, or auto on TPU pods and under Slurm")
    add("--num-processes", type=comparison.count, help="processes in all; not with auto")
    add("--process-id", type=int, help="number of this process, from 0; not with auto")


def check_agreement(parser: argparse.ArgumentParser, name: str, own: str) -> None:
    """Refuse hosts that say different things."""
    padded = np.frombuffer(own.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)
    gathered = np.reshape(multihost_utils.process_allgather(padded), (-1, MESSAGE_BYTES))
    hosts: dict[str, list[int]] = {}
    for host, message in enumerate(gathered):
        hosts.setdefault(bytes(message).decode(errors="replace").strip(), []).append(host)
    if len(hosts) > 1:
        said = "; ".join(f"hosts {', '.join(map(str, who[:8]))}: {what!r}" for what, who in hosts.items())
        parser.error(f"all hosts must have the same {name}, got {said}. Start them with the same.")


def check_shared(parser: argparse.ArgumentParser, folder: epath.Path) -> None:
    """Refuse a folder that is not the same on all hosts: they would wait for each other's files."""
    number = multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31))
    proof = folder / f"first-host-{number}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        proof.touch()
    multihost_utils.sync_global_devices(proof.name)
    found = "with" if proof.exists() else "without"
    check_agreement(parser, "--checkpoint-dir", f"{folder}, {found} the first host's files")
    if jax.process_index() == 0:
        proof.unlink()


# --------------------------------------------------------------------------------------------- the run


def make_mesh(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Mesh:
    """All devices, `fsdp` times `tensor`."""
    if not 0 < args.rate < math.inf or args.seed < 0:
        parser.error(f"--rate must be above 0 and --seed at least 0, got {args.rate} and {args.seed}")
    devices = jax.device_count()
    fsdp = args.fsdp or devices // args.tensor
    if fsdp * args.tensor != devices:
        parser.error(
            f"--fsdp times --tensor must be the number of devices, {devices}, got {fsdp} x {args.tensor}"
        )
    if args.batch_size % fsdp:
        parser.error(f"--batch-size must be a multiple of --fsdp, got {args.batch_size} and {fsdp}")
    if args.width % args.heads or args.heads % args.tensor:
        parser.error(
            f"--heads must divide --width {args.width} and be a multiple of --tensor {args.tensor}, got "
            f"{args.heads}"
        )
    return jax.make_mesh((fsdp, args.tensor), pod.AXES, axis_types=(AxisType.Auto,) * 2)


def make_run(args: argparse.Namespace, text: np.ndarray, mesh: Mesh) -> Run:
    """The model, the optimizer and the batches; nothing is on a device yet but held-out tokens.

    Raises:
      ValueError: a parameter cannot be split so.
    """
    size = pod.Size(VOCABULARY, args.context, args.width, args.layers, args.heads)
    dtype = jnp.dtype(args.dtype)
    graph, abstract = pod.abstract(size, dtype)
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(abstract, mesh))
    params = nnx.to_pure_dict(abstract)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, max(1, args.steps // 10), max(2, args.steps)
    )
    tx = mfac_jax.mfac(schedule, args.num_grads, host_chunk=args.host_chunk)

    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), pod.batch_sharding(mesh)
    loss = functools.partial(pod.loss, graph, activations=by_batch)
    state_shardings = mfac_jax.state_shardings(tx, params, shardings)
    everywhere = TrainState(replicated, shardings, state_shardings)

    def init() -> TrainState:
        params = nnx.to_pure_dict(pod.split(size, dtype, args.seed)[1])
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params, tokens)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), value

    train, valid = np.split(text, [int(0.9 * len(text))])
    shape = (args.batch_size, args.context + 1)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), everywhere
    )
    return Run(
        shapes=shapes,
        init=jax.jit(init, out_shardings=everywhere),
        # The state is donated, so that the window is updated in place.
        step=jax.jit(step, donate_argnums=0, out_shardings=(everywhere, replicated)),
        evaluate=jax.jit(loss, out_shardings=replicated),
        batch=lambda step: sequences(train, (args.seed, step), shape, by_batch),
        valid_batches=[sequences(valid, (i,), shape, by_batch) for i in range(VALID_BATCHES)],
    )


def sequences(
    text: np.ndarray, seed: Sequence[int], shape: tuple[int, int], sharding: NamedSharding
) -> jax.Array:
    """Random pieces of the text; a host reads those of its own devices.

    They depend on the seed alone, so a resumed run sees what it would have seen, on any number of hosts.
    """
    starts = np.random.default_rng(seed).integers(0, len(text) - shape[1], shape[0])

    def rows(index: Any) -> np.ndarray:
        return text[starts[index[0]][:, None] + np.arange(shape[1])].astype(np.int32)

    return jax.make_array_from_callback(shape, sharding, rows)


def train(
    run: Run, args: argparse.Namespace, checkpoints: ocp.CheckpointManager, settings: dict[str, Any]
) -> list[dict[str, float]]:
    """Train to the end, from the last checkpoint on if there is one; the reports of the whole run."""
    state, progress = restore(run, checkpoints, settings)
    first, speaks = int(state.step), jax.process_index() == 0
    bar = tqdm(total=args.steps, initial=first, unit="step", disable=not speaks)
    for step in range(first + 1, args.steps + 1):
        state, loss = run.step(state, run.batch(step))
        progress.losses.append(loss)
        jax.block_until_ready(progress.losses[-2:][0])  # at most one step waits in the queue
        bar.update()
        if step % args.report_every == 0 or step == args.steps:
            progress.reports.append(measure(run, state, step, progress.losses))
            progress.losses.clear()
            if speaks:
                bar.write(describe(progress.reports[-1]))
        if checkpoints.should_save(step):  # also before a preemption
            save(checkpoints, step, state, progress, settings)
        if checkpoints.reached_preemption(step):
            if speaks:
                bar.write(f"The machine is about to be taken away: step {step} is saved.")
            break
    bar.close()
    checkpoints.wait_until_finished()
    return progress.reports


def save(checkpoints: ocp.CheckpointManager, step: int, state: TrainState, progress: Progress, settings):
    """Start to write a checkpoint; the next step may begin meanwhile."""
    record = {"losses": [float(loss) for loss in progress.losses], "reports": progress.reports}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record | {"settings": settings})
    )
    checkpoints.save(step, args=items)


def restore(
    run: Run, checkpoints: ocp.CheckpointManager, settings: dict[str, Any]
) -> tuple[TrainState, Progress]:
    """The last complete checkpoint, onto this mesh; a new run if there is none."""
    latest = checkpoints.latest_step()
    if latest is None:
        return run.init(), Progress([], [])
    items = ocp.args.Composite(progress=ocp.args.JsonRestore())
    record: Any = checkpoints.restore(latest, args=items)["progress"]
    check_settings(record["settings"], settings, checkpoints.directory)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(run.shapes))
    state: Any = checkpoints.restore(latest, args=items)["state"]
    return state, Progress(record["losses"], record["reports"])


def measure(run: Run, state: TrainState, step: int, losses: Sequence[Any]) -> dict[str, float]:
    """A report: the mean loss of the batches since the last one, and that of held-out text."""
    valid = [float(run.evaluate(state.params, batch)) for batch in run.valid_batches]
    train = [float(loss) for loss in losses]
    return {"step": step, "train_loss": float(np.mean(train)), "valid_loss": float(np.mean(valid))}


def describe(report: dict[str, float]) -> str:
    """A report in words."""
    return f"step {report['step']}: loss {report['train_loss']:.3f}, held out {report['valid_loss']:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the command line."""
    parser = make_parser()
    connect(parser, argv)
    args = parser.parse_args(argv)
    try:
        content, source = train_text.read_text(args.data_dir, args.text)
    except DataError as error:
        content, source = b"", str(error)
    text = f"{len(content)} characters, {zlib.crc32(content)}" if content else source
    versions = f"jax {jax.__version__}, mfac_jax {mfac_jax.__version__}"
    check_agreement(parser, "text and versions", f"{text}, {versions}")
    check_shared(parser, args.checkpoint_dir)
    if not content:
        parser.error(source)
    if len(content) < 20 * args.context:
        parser.error(f"the text must have 20 times --context characters, got {len(content)}")
    mesh = make_mesh(parser, args)
    try:
        run = make_run(args, np.frombuffer(content, np.uint8), mesh)
    except ValueError as error:
        parser.error(str(error))
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    settings["text"] = [len(content), zlib.crc32(content)]
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=args.save_every,
        save_on_steps={args.steps},
        max_to_keep=2,
        cleanup_tmp_directories=True,  # of saves that were cut off
    )
    with ocp.CheckpointManager(args.checkpoint_dir, options=options) as checkpoints:
        if jax.process_index() == 0:
            print_start(run, mesh, source, checkpoints.latest_step())
        try:
            reports = train(run, args, checkpoints, settings)
            is_done = checkpoints.latest_step() == args.steps
        except CheckpointError as error:
            parser.error(str(error))
    if jax.process_index() == 0 and reports:
        print(f"{describe(reports[-1])}. Checkpoints are in {args.checkpoint_dir}")
    if not is_done:
        sys.exit(PREEMPTED)


def print_start(run: Run, mesh: Mesh, source: str, latest: int | None) -> None:
    """What is about to be trained, where."""
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(run.shapes.params))
    leaves = jax.tree.leaves(run.shapes)
    share = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    print(
        f"{params:,} parameters on {dict(mesh.shape)} {mesh.devices.flat[0].device_kind} devices of "
        f"{jax.process_count()} process(es), {share / 2**20:,.1f} MiB of state on each; {source}"
    )
    print("A new run." if latest is None else f"Continues after step {latest}.")


def shared_folder(text: str) -> epath.Path:
    """For argparse: a folder, or the URL of one, as Orbax takes them (gs://BUCKET/RUN)."""
    return epath.Path(text if "://" in text else comparison.output_folder(text).absolute())


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""

    class Formatter(comparison.HelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    add, count = parser.add_argument, comparison.count
    add_connection(parser)
    add("--fsdp", type=count, help="devices along the axis fsdp; all that --tensor leaves if not given")
    add("--tensor", type=count, default=1, help="devices along the axis tensor")
    add("--steps", type=count, default=300, help="training steps")
    add("--batch-size", type=count, default=32, help="sequences a step, of all hosts together")
    add("--context", type=count, default=64, help="characters of a sequence")
    add("--width", type=count, default=96, help="features of a character")
    add("--layers", type=count, default=3, help="transformer blocks")
    add("--heads", type=count, default=4, help="attention heads")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and window")
    add("--num-grads", type=count, default=32, help="gradients in M-FAC's window")
    add("--host-chunk", type=count, help="keep the window on the host; rows on the device at a time")
    add("--rate", type=float, default=3e-3, help="learning rate at the end of the warm-up")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--report-every", type=count, default=50, help="steps between two reports")
    add("--save-every", type=count, default=50, help="steps between two checkpoints")
    checkpoints = "out/pod"  # a str, which argparse checks as it checks what is typed
    add("--checkpoint-dir", type=shared_folder, default=checkpoints, help="folder or URL, of all hosts")
    train_text.add_text(parser)
    return parser


if __name__ == "__main__":
    main()
