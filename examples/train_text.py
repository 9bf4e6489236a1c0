"""Train a character transformer in Flax nnx.

The text is that of --text or --data-dir, by default the sources of Python's standard library. Nine tenths
of it are for training. A seed sets the initial parameters and the batches. The windows of text that losses
are measured on are always the same.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from examples import text_data
from examples.common import command_line
from examples.common.command_line import Count, Folder
from examples.common.options import RATES, Comparison, Rates, Text, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Comparison, Text):
    """What the user can choose."""

    problem: ClassVar[str] = "text"

    optimizers: Annotated[tuple[str, ...], names(problem)] = Comparison.optimizers
    rates: Rates = (*RATES[problem].items(),)
    seeds: Count = 1
    evaluations: Count = 6
    out: Folder = Path("out", "text")
    steps: Count = 600
    """training steps"""
    batch_size: Count = 32
    """windows of text a step"""
    layers: Count = 3
    """transformer blocks"""
    width: Count = 96
    """features of a character"""
    heads: Count = 4
    """attention heads; must divide --width"""
    context: Count = 64
    """characters in a window"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    if options.width % options.heads:
        command_line.refuse(
            f"--heads must divide --width, got {options.heads} heads and a width of {options.width}"
        )
    with options.working() as folders:
        # A bad text is refused before JAX is imported, which takes seconds.
        text_data.read_parts(options.context, options.data_dir, options.text)
        from examples import text

        text.run(options, folders)


if __name__ == "__main__":
    main()
