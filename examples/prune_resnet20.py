"""Prune a ResNet-20 for CIFAR-10 with weights that were trained in PyTorch.

Three modes: in one step (one-shot), in several steps with new gradients for each (recomputed), or between
epochs of fine-tuning (gradual). Without fine-tuning, each way to prune is measured twice: with the batch
statistics that it leaves, and with statistics estimated anew from training images. The weights are an npz
with the arrays of the PyTorch state dict.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from examples import cifar10_data, resnet20_data
from examples.common import command_line
from examples.common.command_line import NO_DEFAULT, Count, Flag, Folder, OptionalCount, OptionalPath
from examples.common.data import DataError
from examples.common.options import Pruning

WEIGHTS = "resnet20_cifar10_torch.npz"
MODES = ("one-shot", "recomputed", "gradual")
PATTERNS = ("2:4", "block:4")
METHODS = ("magnitude", "M-FAC", "published")  # keys of resnet20_pruning.METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Pruning):
    """What the user can choose."""

    out: Folder = Path("out", "prune_resnet20")
    data_dir: OptionalPath = None
    """folder with CIFAR-10 in any of its forms and resnet20_cifar10_torch.npz; or an *.npz with CIFAR-10"""
    tfds: Flag = False
    """take CIFAR-10 from tensorflow_datasets, kept in --data-dir"""
    weights: OptionalPath = None
    """npz with the weights, in place of resnet20_cifar10_torch.npz in --data-dir"""
    mode: Annotated[str, command_line.choices(MODES, many=False)] = "recomputed"
    """one-shot: one step; recomputed: 16 steps; gradual: 4 at the start of each of the first two thirds of
    the epochs of training, up to the last of --sparsity on a cubic curve"""
    methods: Annotated[tuple[str, ...], command_line.choices(METHODS)] = ("magnitude", "M-FAC")
    """which to compare; the sparsity of each leaf is printed for the last one"""
    pattern: Annotated[str | None, command_line.choices(PATTERNS, many=False), NO_DEFAULT] = None
    """2:4 keeps at most 2 of 4 consecutive inputs; in block:4 each 4 go together; else single weights go"""
    samples: OptionalCount = 10_000
    """use only the first N training images"""
    epochs: Count = 6
    """passes over them, when gradual"""
    batch_size: Count = 64
    """images a step of the training, when gradual"""


def weights_file(options: Options) -> Path:
    """Find the weights: the file given, or the one beside CIFAR-10."""
    if options.weights is not None:
        return options.weights
    if options.data_dir is None:
        raise DataError(f"pass --weights, or a --data-dir with {WEIGHTS}")
    return (options.data_dir.parent if options.data_dir.is_file() else options.data_dir) / WEIGHTS


def main(argv: Sequence[str] | None = None) -> None:
    """Read, prune, and report; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    if options.data_dir is None and not options.tfds:
        command_line.refuse("pass --data-dir with CIFAR-10, or --tfds")
    if options.pattern == "2:4" and max(options.sparsity) > 0.5:
        command_line.refuse("--pattern 2:4 prunes half at most: pass --sparsity 0.5")
    with options.working():
        # Bad data are refused before JAX is imported, which takes seconds.
        resnet20_data.read_arrays(weights_file(options))
        cifar10_data.load(options.data_dir, options.tfds)
        from examples import resnet20_pruning

        resnet20_pruning.run(options)


if __name__ == "__main__":
    main()
