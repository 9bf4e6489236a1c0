"""Values that have derivatives in forward mode alone: reverse mode is refused in plain words."""

from typing import TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Tree = TypeVar("Tree")

_forward_only = Primitive("mfac_jax_forward_only")
_forward_only.def_impl(lambda x, *, name: x)
_forward_only.def_abstract_eval(lambda x, *, name: x)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda ctx, x, *, name: [x])


def _refuse(cotangent, x, *, name: str):
    del cotangent, x
    raise TypeError(
        f"{name} must be differentiated in forward mode, got reverse mode. Its loop ends when the solution "
        "is good enough, and keeps no steps to go back. Use jax.jvp or jax.jacfwd, or "
        "jax.lax.stop_gradient of the updates."
    )


ad.deflinear2(_forward_only, _refuse)


def forward_only(tree: Tree, name: str) -> Tree:
    """The tree as it is. A derivative in reverse mode raises; the message calls it by the name."""
    return jax.tree.map(lambda x: _forward_only.bind(x, name=name), tree)
