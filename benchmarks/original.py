"""The original PyTorch implementation of M-FAC, from a checkout of https://github.com/IST-DASLab/M-FAC.

Its optimizer was written for CUDA. On CPU it runs with what this file replaces, in memory, when it is
loaded: `torch.lu` without pivots, which PyTorch has for CUDA alone, by the Cholesky decomposition of the
same matrix; and `nn.parallel.parallel_apply`, which finds no device of an int, by a loop.
`with_triangular_solves` replaces its loops over gradients too, as the CUDA extension of the checkout
does.
"""

import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import peers, timing


def load(folder: Path | None, name: str) -> tuple[Any, Any] | None:
    """Import PyTorch and a module of the checkout; print what is missing, if anything is."""
    if folder is None or not (folder / f"{name}.py").is_file():
        reason = "pass --original" if folder is None else f"{folder} has no {name}.py: pass --original"
        print(f"Without the original: {reason} with a checkout of github.com/IST-DASLab/M-FAC.")
        return None
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        print(f"Without the original: it needs PyTorch (pip install torch), which is not there: {error}")
        return None
    torch.set_num_threads(timing.cores())
    peers.make_importable(folder)
    return torch, importlib.import_module(name)


def steps(
    folder: Path, window: Sequence[jax.Array], damping: float
) -> dict[str, Callable[[Sequence[jax.Array]], Any]]:
    """Make steps of its dynamic algorithm from this window on, as it is and with triangular solves.

    They run where JAX runs. On a GPU that needs a PyTorch for it; with a compiler of CUDA at hand, the
    extension of the checkout is compiled, and is what the original then takes for its loops.
    """
    on_gpu = jax.default_backend() == "gpu"
    compiled = on_gpu and _compile_extension(folder)
    loaded = load(folder, "optim")
    if loaded is None:
        return {}
    torch, optim = loaded
    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        torch.lu = lambda matrix, pivot: (_upper_factor(torch, matrix),)
    optim.nn = types.SimpleNamespace(parallel=types.SimpleNamespace(parallel_apply=_in_a_loop))

    def flat(leaves):
        return torch.cat([torch.from_dlpack(x).reshape(-1) for x in leaves])

    def step(kind):
        rows = [torch.from_dlpack(rows).reshape(len(rows), -1) for rows in window]
        state = kind(torch.cat(rows, dim=1), dev=device, gpus=[device], damp=damping)

        def timed(gradient):
            update = state.update_mul(flat(gradient))
            if on_gpu:
                torch.cuda.synchronize()
            return update

        return timed

    if compiled:
        return {"original, CUDA": step(optim.HInvFastUpMulti)}
    kinds = {
        "original": optim.HInvFastUpMulti,
        "original, triangular solves": with_triangular_solves(torch, optim.HInvFastUpMulti),
    }
    return {name: step(kind) for name, kind in kinds.items()}


def _compile_extension(folder: Path) -> bool:
    """Whether the checkout's extension for CUDA is there to be imported; compiled, if it was not."""
    try:
        extension = importlib.import_module("torch.utils.cpp_extension")
        sources = [str(folder / name) for name in ("hinv_cuda.cpp", "hinv_cuda_kernel.cu")]
        sys.modules["hinv_cuda"] = extension.load(name="hinv_cuda", sources=sources)
    except Exception as error:  # whatever a compiler, or none, may raise
        print(f"Without the CUDA extension of the original: {type(error).__name__}: {error}")
        return False
    return True


def _in_a_loop(functions, inputs):
    return [function(x) for function, x in zip(functions, inputs, strict=True)]


def _upper_factor(torch, matrix):
    """U of A = L U with ones on the diagonal of L, for a symmetric and positive definite matrix."""
    factor = torch.linalg.cholesky(matrix)
    return torch.diagonal(factor)[:, None] * factor.T


def with_triangular_solves(torch: Any, kind: type) -> type:
    """Replace each of the class's two loops over the gradients by a triangular solve."""

    class TriangularSolves(kind):
        def setup(self):
            identity = torch.eye(self.m, device=self.dev)
            diagonal = self.m * identity
            self.giHig = torch.triu(torch.lu(self.lambd * self.dots + diagonal, pivot=False)[0] - diagonal)
            self.denom = self.m + torch.diagonal(self.giHig)
            self.coef = self.lambd * torch.linalg.solve_triangular(
                self._unit_lower(), identity, upper=False, unitriangular=True
            )

        def mul(self, x, dots=None):
            dots = self.grads_matmul(x) if dots is None else dots
            half = torch.linalg.solve_triangular(
                self._unit_lower(), self.lambd * dots[:, None], upper=False, unitriangular=True
            )
            return self.lambd * x - self.matmul_grads((half[:, 0] / self.denom).matmul(self.coef))

        def _unit_lower(self):
            return (self.giHig / self.denom[:, None]).T

    return TriangularSolves
