"""Check our SOAP and NorMuon against their authors' PyTorch code, on the same streams of gradients.

    python -m benchmarks.check_rivals --soap CHECKOUT --normuon CHECKOUT

The checkouts are of github.com/nikhilvyas/SOAP and github.com/zichongli5/NorMuon, and PyTorch has to be
installed. Both sides compute in float64: the authors' casts to shorter numbers are turned off while this
runs. For every array the largest difference of the steps is printed, relative to their largest entry.

The first gradient of a matrix that is not square leaves directions that it does not touch. A basis of
those is arbitrary, and so is Adam in it. So SOAP goes on from the authors' first bases, after a check that
they diagonalize our covariances too.

NorMuon runs without momentum, which is optax's (see `normuon.py`).
"""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers, rivals
from benchmarks.normuon import normuon
from benchmarks.soap import soap
from examples.common import markdown
from examples.common.command_line import Count, parse

RATE = 0.01
# Matrices, one of which has a side that keeps its axes, a vector and a kernel.
SHAPES = {"square": (12, 12), "wide": (8, 20), "tall": (20, 8), "long side": (40, 6), "vector": (9,)}
KERNEL = {"kernel": (3, 3, 4, 10)}
MAX_SIDE = 36  # the kernel's matrix has that many rows


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    soap: peers.OptionalExistingFolder = None
    """checkout of SOAP's authors"""
    normuon: peers.OptionalExistingFolder = None
    """checkout of NorMuon's authors"""
    steps: Count = 50
    """gradients of a stream"""


def streams(shapes: dict[str, tuple[int, ...]], steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Draw gradients with a mean, in which some rows and columns are far larger than others."""
    rng = np.random.default_rng(0)
    scales = {name: np.exp(rng.normal(size=shape)) for name, shape in shapes.items()}
    means = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for _ in range(steps):
        yield {name: scales[name] * (means[name] + rng.normal(size=shapes[name])) for name in shapes}


def authors_steps(torch, tensors: dict[str, Any], optimizer, gradients) -> dict[str, np.ndarray]:
    """Give the authors' optimizer the gradients; return what it adds to the parameters."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradients[name].reshape(tensor.shape))
    optimizer.step()
    return {name: (tensor - before[name]).detach().numpy() for name, tensor in tensors.items()}


def authors_bases(leaf, state: dict[str, Any]):
    """Put the authors' bases into our state; refuse them if they do not diagonalize our covariances."""
    bases = [jnp.asarray(basis.numpy()) if len(basis) else None for basis in state["Q"]]
    for ours, basis in zip(leaf.covariances, bases, strict=False):
        if ours is not None and basis is not None:
            turned = basis.T @ ours @ basis
            off = float(jnp.max(jnp.abs(turned - jnp.diag(jnp.diag(turned)))) / jnp.max(jnp.abs(turned)))
            if off > 1e-12:
                raise ValueError(f"the first bases leave {off:.1e} beside the diagonal")
    return leaf._replace(bases=tuple(bases[: len(leaf.bases)]))


def soap_differences(torch, folder: Path, steps: int) -> dict[str, float]:
    """Run both SOAPs; return the largest relative difference for each array."""
    peers.make_importable(folder)
    authors: Any = importlib.import_module("soap")
    shapes = SHAPES | KERNEL
    tx = soap(RATE, max_side=MAX_SIDE)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = tx.init(params)
    matrices = {name: shape if len(shape) < 3 else (-1, shape[-1]) for name, shape in shapes.items()}
    zeros = {name: np.zeros(shape).reshape(matrices[name]) for name, shape in shapes.items()}
    tensors = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in zeros.items()}
    optimizer = authors.SOAP(tensors.values(), lr=RATE, weight_decay=0, max_precond_dim=MAX_SIDE)
    differences = dict.fromkeys(shapes, 0.0)
    for number, gradients in enumerate(streams(shapes, steps)):
        theirs = authors_steps(torch, tensors, optimizer, gradients)
        ours, state = jax.jit(tx.update)(gradients, state, params)
        if number == 0:
            soap_state = optax.tree.get(state, "SOAPState")
            leaves = {
                name: authors_bases(leaf, optimizer.state[tensors[name]])
                for name, leaf in soap_state.leaves.items()
            }
            state = (soap_state._replace(leaves=leaves), *state[1:])
        for name in shapes:
            differences[name] = max(differences[name], relative(ours[name], theirs[name]))
    return differences


def normuon_differences(torch, folder: Path, steps: int) -> dict[str, float]:
    """Run both NorMuons on matrices; return the largest relative difference for each."""
    peers.make_importable(folder)
    authors: Any = importlib.import_module("normuon")
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    tx = normuon(RATE, rivals.matrices, beta=0.0)
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = tx.init(params)
    # The authors' rows are the output neurons.
    tensors = {name: torch.nn.Parameter(torch.zeros(shape[::-1])) for name, shape in shapes.items()}
    optimizer = authors.SingleDeviceNorMuon(tensors.values(), lr=RATE, momentum=0.0)
    differences = dict.fromkeys(shapes, 0.0)
    for gradients in streams(shapes, steps):
        transposed = {name: np.ascontiguousarray(gradient.T) for name, gradient in gradients.items()}
        theirs = authors_steps(torch, tensors, optimizer, transposed)
        ours, state = jax.jit(tx.update)(gradients, state, params)
        for name in shapes:
            differences[name] = max(differences[name], relative(ours[name], theirs[name].T))
    return differences


def relative(ours, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest entry; where all is zero both have to be."""
    difference = np.max(np.abs(np.asarray(ours).reshape(theirs.shape) - theirs))
    return float(difference / max(np.max(np.abs(theirs)), np.finfo(float).tiny))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the differences; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    torch: Any = importlib.import_module("torch")
    torch.set_default_dtype(torch.float64)
    checks = {"SOAP": (soap_differences, options.soap), "NorMuon": (normuon_differences, options.normuon)}
    uncast: dict[str, Any] = {"float": lambda tensor: tensor, "bfloat16": lambda tensor: tensor}
    with jax.enable_x64(True), mock.patch.multiple(torch.Tensor, **uncast):
        for name, (differences, folder) in checks.items():
            if folder is None:
                print(f"Without {name}: pass a checkout of its authors' code.")
                continue
            rows = [[of, f"{value:.1e}"] for of, value in differences(torch, folder, options.steps).items()]
            print(markdown.table([f"{name}, {options.steps} steps", "largest relative difference"], rows))


if __name__ == "__main__":
    main()
