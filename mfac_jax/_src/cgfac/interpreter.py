"""Walks the program that a loss was traced to, operation by operation, and notes the uses of kernels."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal

from mfac_jax._src.cgfac.uses import Origin, Use, use_in

_DATA, _CONSTANT = Origin(has_data=True), Origin()
_INLINED = ("jit", "remat2")  # remat2 is jax.checkpoint
_SAME_AXES = ("convert_element_type", "copy", "sharding_constraint", "pvary", "reshard")


class Interpreter:
    """Runs a program once, and notes the uses of kernels on the way.

    Attributes:
      perturbations: what to add to the output of each use; None for nothing.
      uses: found so far.
      bias_of_use: by the number of a use, the number of the parameter that was added to its output.
    """

    def __init__(self, perturbations: Sequence[jax.Array] | None):
        self.perturbations = perturbations
        self.uses: list[Use] = []
        self.bias_of_use: dict[int, int] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], origins: Sequence[Origin]
    ) -> tuple[list[Any], list[Origin]]:
        """The outputs, and what they were computed from."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        known_origins = dict.fromkeys(jaxpr.constvars, _DATA)
        known_origins.update(zip(jaxpr.invars, origins, strict=True))
        atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
        readers = collections.Counter(v for v in atoms if not isinstance(v, Literal))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        def origin_of(atom):
            if isinstance(atom, Literal):
                return _CONSTANT
            origin = known_origins[atom]
            # An output that is read twice also goes where no bias is added to it. Then the bias has another
            # gradient than the output, and is no row of the layer.
            return origin if readers[atom] == 1 else origin._replace(use=None)

        for eqn in jaxpr.eqns:
            inputs, froms = [read(v) for v in eqn.invars], [origin_of(v) for v in eqn.invars]
            with eqn.ctx.manager:
                outputs, origins = self._operation(eqn, inputs, froms)
            known.update(zip(eqn.outvars, outputs, strict=True))
            known_origins.update(zip(eqn.outvars, origins, strict=True))
        return [read(v) for v in jaxpr.outvars], [origin_of(v) for v in jaxpr.outvars]

    def _operation(
        self, eqn: JaxprEqn, inputs: Sequence[Any], origins: Sequence[Origin]
    ) -> tuple[list[Any], list[Origin]]:
        if eqn.primitive.name in _INLINED:
            inner = eqn.params["jaxpr"]
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, origins)
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
        use = use_in(eqn, inputs, origins, outputs[0])
        if use:
            number = len(self.uses)
            self.uses.append(use)
            if self.perturbations is not None:
                outputs[0] = outputs[0] + self.perturbations[number]
            return outputs, [Origin(use=number, has_data=True)]
        has_data = any(origin.has_data for origin in origins)
        origin = self._origin_after(eqn, inputs, origins)._replace(has_data=has_data)
        return outputs, [origin] * len(outputs)

    def _origin_after(self, eqn: JaxprEqn, inputs: Sequence[Any], origins: Sequence[Origin]) -> Origin:
        """What an operation without a kernel leaves of the origins; notes a bias that it adds."""
        name = eqn.primitive.name
        if name in _SAME_AXES:
            return origins[0]
        if name in ("reshape", "squeeze", "broadcast_in_dim") and _keeps_last_axes(eqn, inputs[0].shape):
            return origins[0]._replace(has_all_axes=False)
        if name == "add":
            for output, bias in (origins, origins[::-1]):
                if output.use is not None and bias.parameter is not None:
                    self.bias_of_use[output.use] = bias.parameter
        return _CONSTANT


def _keeps_last_axes(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether the operation only adds or drops axes in front."""
    core = shape[next((i for i, size in enumerate(shape) if size > 1), len(shape)) :]
    aval: Any = eqn.outvars[0].aval
    out = aval.shape
    is_last = out[len(out) - len(core) :] == core
    if eqn.primitive.name == "broadcast_in_dim":
        axes = eqn.params["broadcast_dimensions"][len(shape) - len(core) :]
        return is_last and axes == tuple(range(len(out) - len(core), len(out)))
    return is_last and math.prod(out) == math.prod(core)
