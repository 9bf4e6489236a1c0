"""Train a ResNet-20 in Flax linen on CIFAR-10.

Without --data-dir it trains on scikit-learn's digits, enlarged to 32 x 32 x 3, so that it runs anywhere.
Images are cropped at random on the device; those of CIFAR-10 are also mirrored. A seed sets the initial
parameters, the order of the batches, and crops and mirrors. The training loss is measured like the
validation loss: with running batch statistics and without crops, on at most 4,000 training images.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from examples import cifar10_data
from examples.common import command_line
from examples.common.command_line import Count, Flag, Folder, OptionalCount, OptionalPath
from examples.common.data import check_batch
from examples.common.options import RATES, Comparison, Rates, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Comparison):
    """What the user can choose."""

    problem: ClassVar[str] = "cifar10"

    optimizers: Annotated[tuple[str, ...], names(problem)] = Comparison.optimizers
    rates: Rates = (*RATES[problem].items(),)
    seeds: Count = 1
    evaluations: Count = 4
    out: Folder = Path("out", "cifar10")
    epochs: Count = 4
    """passes over the training data"""
    batch_size: Count = 128
    """images a step"""
    samples: OptionalCount = None
    """use only the first N training images"""
    width: Count = 16
    """channels of the first stage"""
    blocks: Count = 3
    """blocks in each of three stages; 3 is ResNet-20"""
    data_dir: OptionalPath = None
    """folder that holds cifar-10-batches-bin, cifar-10-batches-py or an *.npz; or an *.npz itself"""
    tfds: Flag = False
    """take the data from tensorflow_datasets, which keeps them in --data-dir"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    with options.working() as folders:
        # Bad data are refused before JAX is imported, which takes seconds.
        check_batch(options.samples or options.batch_size, options.batch_size)
        images = cifar10_data.load(options.data_dir, options.tfds).images[: options.samples]
        check_batch(len(images), options.batch_size)
        from examples import cifar10

        cifar10.run(options, folders)


if __name__ == "__main__":
    main()
