"""Train a sharded character transformer on one laptop or on all hosts of a pod, through preemptions.

The parameters are split over the mesh axes `fsdp` and `tensor`, and M-FAC's window with them. The same
command line goes on every host. On a TPU pod or under Slurm add `--coordinator auto`, elsewhere
`--coordinator HOST:PORT --num-processes N --process-id I`.

The run is saved in --checkpoint-dir after the first step and every --save-every steps, in the background.
If it is killed, start it again: it continues from its last whole checkpoint, on any number of devices.
On the same number of devices it ends in the very same numbers. With --coordinator, hosts save the step they
are at if one of them is about to be taken away (SIGTERM), and end with the exit code 75. Each folder takes
one run at a time; in a bucket nothing keeps a second one out.

Several processes on this machine:

    python -m examples.launch_local --processes 2 --devices 2 examples.train_pod --steps 100
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated

from examples import launch_local, text_data
from examples.common import command_line
from examples.common.command_line import (
    USAGE_ERROR,
    Count,
    OptionalCount,
    OptionalSeed,
    OptionalText,
    Positive,
    Seed,
    refuse,
)
from examples.common.data import DataError
from examples.common.options import RATES, Text
from examples.common.process import orderly


def shared_folder(text: str) -> str:
    """Read a folder, or the URL of one."""
    return text if "://" in text else str(command_line.output_folder(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """The options that differ between hosts."""

    coordinator: OptionalText = None
    """HOST:PORT of the first process, or auto on TPU pods and under Slurm"""
    num_processes: OptionalCount = None
    """processes in all; not with auto"""
    process_id: OptionalSeed = None
    """number of this process, from 0; not with auto"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Connection, Text):
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


def check_connection(options: Connection) -> None:
    """Refuse a part of the options where all or none are needed."""
    own = options.num_processes, options.process_id
    if options.coordinator in (None, "auto") and own != (None, None):
        refuse(f"--num-processes and --process-id need --coordinator HOST:PORT, got {options.coordinator}")
    if options.coordinator not in (None, "auto") and None in own:
        refuse("--coordinator HOST:PORT needs --num-processes and --process-id too")


def check_sizes(options: Options, fsdp: int | None) -> None:
    """Refuse sizes that the mesh cannot split; `fsdp` is None as long as nobody knows the devices."""
    if fsdp is not None and options.batch_size % fsdp:
        refuse(f"--batch-size must be a multiple of --fsdp, got {options.batch_size} and {fsdp}")
    if options.width % options.heads or options.heads % options.tensor:
        refuse(
            f"--heads must divide --width {options.width} and be a multiple of --tensor {options.tensor}, "
            f"got {options.heads}"
        )


def read_text(options: Options) -> tuple[bytes, str]:
    """Read the text and where it is from; nothing and the reason if it cannot be used."""
    try:
        content, source = text_data.read_text(options.data_dir, options.text)
    except DataError as error:
        return b"", str(error)
    if len(content) < 20 * options.context:
        return b"", f"the text must have 20 times --context characters, got {len(content)}"
    return content, source


def main(argv: Sequence[str] | None = None) -> None:
    """Train; `argv` is the command line."""
    connection, others = command_line.parse_known(Connection, argv)
    check_connection(connection)
    try:
        options = command_line.parse(Options, argv, __doc__)
        check_sizes(options, options.fsdp)
    except SystemExit as end:
        alone = connection.coordinator is None or launch_local.SAME_FLAGS in os.environ
        if end.code == USAGE_ERROR and not alone:
            from examples import pod_hosts  # after the message: this takes seconds

            pod_hosts.connect(connection, others)  # hosts whose flags are right wait for this one
        raise
    content, source = read_text(options)
    if not content and connection.coordinator is None:
        refuse(source)
    cure = "Start the same command again, without --resume: it continues from its last checkpoint, in"
    with orderly(f"Interrupted. {cure} {options.checkpoint_dir}."):
        from examples import pod_hosts, pod_run  # import JAX, which takes seconds

        pod_hosts.connect(connection, others)
        pod_run.run(options, content, source)


if __name__ == "__main__":
    main()
