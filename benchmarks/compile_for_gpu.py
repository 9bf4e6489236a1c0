"""Compile M-FAC's update for NVIDIA GPUs, with no GPU, and say what it holds, moves and launches there.

XLA compiles for a GPU that is only described; it needs its plugin and NVIDIA's assembler:
`pip install '.[gpu-compile]'`. Kernels are not tuned, since that takes a GPU.
"""

import dataclasses
import importlib.util
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks import gpu_tables, gpu_targets
from benchmarks.gpu_cases import MODES, SEVERAL, STORAGES, TRANSFORMS, TREES, Case, compile_case
from examples.common import json_lines, provenance
from examples.common.command_line import OptionalPath, choices, parse

PLUGIN = "jax_cuda13_plugin"
UNTUNED = {"xla_gpu_autotune_level": 0}  # to tune kernels takes a GPU


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose; every combination is compiled."""

    targets: Annotated[tuple[str, ...], choices(gpu_targets.GPUS)] = ("h100",)
    """GPUs to compile for"""
    modes: Annotated[tuple[str, ...], choices(MODES)] = MODES[:1]
    """one GPU, or how the work is spread over eight"""
    trees: Annotated[tuple[str, ...], choices(TREES)] = tuple(TREES)
    """parameters, each with its own number of gradients"""
    transforms: Annotated[tuple[str, ...], choices(TRANSFORMS)] = tuple(TRANSFORMS)
    """what to compile the update of"""
    storages: Annotated[tuple[str, ...], choices(STORAGES)] = tuple(STORAGES)
    """of the window; parameters are float32"""
    out: OptionalPath = None
    """file to add a line of JSON to for each program"""


def exists(mode: str, storage: str) -> bool:
    """Whether there is such a program: rows of low rank are refused on manual axes."""
    return storage != "low rank" or mode not in ("shard_map", "pmap")


def measure(case: Case) -> dict[str, Any]:
    """Compile a program for GPUs that are not here; return a line of the table."""
    devices = gpu_targets.devices(case.target, 1 if case.mode == "one GPU" else SEVERAL)
    return compile_case(case, devices, UNTUNED)[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Compile each program; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    if importlib.util.find_spec(PLUGIN) is None:
        sys.exit(f"{PLUGIN} is not installed: pip install '.[gpu-compile]'")
    rows = []
    for choice in itertools.product(
        options.targets, options.modes, options.trees, options.transforms, options.storages
    ):
        if not exists(choice[1], choice[-1]):
            print(f"{', '.join(choice)}: refused by scale_by_mfac, left out", file=sys.stderr)
            continue
        row = measure(Case(*choice))
        rows.append(row | provenance.record(("jax", "jaxlib", "jax-cuda13-plugin", "optax")))
        if options.out is not None:
            json_lines.append(options.out, rows[-1])
        print(f"{', '.join(choice)}: compiled in {row['compile_seconds']} s", file=sys.stderr)
    print(gpu_tables.report(rows))


if __name__ == "__main__":
    main()
