"""Train a small Flax network on scikit-learn's handwritten digits with M-FAC, then prune it.

It prunes by magnitude, by M-FAC in one step, and by M-FAC in sixteen steps with new gradients for each.
Some fine-tuning follows, which keeps pruned weights at zero. At the end of this training the gradients are
so small that one step does as magnitude does. After the first of sixteen steps they tell more. Takes a
minute or two.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from examples import digits_data, train_digits
from examples.common import command_line
from examples.common.command_line import Count, Folder, OptionalPath
from examples.common.options import DigitsModel, Pruning, Shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Pruning):
    """What the user can choose."""

    sparsity: Shares = (0.5, 0.75, 0.875, 0.9, 0.95, 0.98)
    num_grads: Count = 128
    out: Folder = Path("out", "prune_digits")
    model: DigitsModel = train_digits.Options.model
    """mlp: 64-128-10; cnn: two convolutions"""
    epochs: Count = train_digits.Options.epochs
    """passes over the training data before pruning"""
    fine_tuning: Count = 12
    """passes over the training data after pruning"""
    data_dir: OptionalPath = None
    """folder of a digits.npz with your x (n, 64) or (n, 8, 8) and y (n,)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, prune, and report; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    with options.working():
        # Bad data are refused before JAX is imported, which takes seconds.
        digits_data.load(options.data_dir)
        from examples import digits_pruning

        digits_pruning.run(options)


if __name__ == "__main__":
    main()
