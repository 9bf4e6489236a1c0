"""Train a small Flax network on scikit-learn's handwritten digits.

A seed sets the split into training and validation data (80 to 20 per cent), the initial parameters and the
order of the batches. With mfac among the optimizers, fisher.png shows its Fisher matrix.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from examples import digits_data
from examples.common import command_line
from examples.common.command_line import Count, Folder, OptionalPath
from examples.common.options import RATES, Comparison, DigitsModel, Rates, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Comparison):
    """What the user can choose."""

    problem: ClassVar[str] = "digits"

    optimizers: Annotated[tuple[str, ...], names(problem)] = Comparison.optimizers
    rates: Rates = (*RATES[problem].items(),)
    seeds: Count = 3
    evaluations: Count = 22
    out: Folder = Path("out", "digits")
    model: DigitsModel = "mlp"
    """mlp: 64-128-10; cnn: two convolutions"""
    epochs: Count = 12
    """passes over the training data"""
    batch_size: Count = 64
    """images a step"""
    data_dir: OptionalPath = None
    """folder of a digits.npz with your x (n, 64) or (n, 8, 8) and y (n,)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    with options.working() as folders:
        # Bad data are refused before JAX is imported, which takes seconds.
        digits_data.load(options.data_dir)
        from examples import digits

        digits.run(options, folders)


if __name__ == "__main__":
    main()
