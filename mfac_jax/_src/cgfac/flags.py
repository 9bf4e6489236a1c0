"""What the values of a program depend on: on data, and on the cotangent of the loss."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal

INLINED = ("jit", "pjit", "closed_call", "remat2", "checkpoint")  # remat2 is jax.checkpoint

Flag = tuple[bool, bool]  # whether data went into it, and whether the cotangent did
Flags = tuple[Flag, ...]


def opened(program: Any) -> tuple[Any, Sequence[Any]]:
    """The operations of a program, and its constants."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def inlined(eqn: JaxprEqn) -> Any:
    """The program that an operation runs."""
    return eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"]


def sizes_of_scan(eqn: JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and carries of a loop: inside of it, only they have all their axes."""
    jaxpr, _ = opened(eqn.params["jaxpr"])

    def whole(outer, inner):
        return sum(x.aval.ndim == y.aval.ndim for x, y in zip(outer, inner, strict=True))

    n_carry = whole(eqn.outvars, jaxpr.outvars)
    return whole(eqn.invars, jaxpr.invars) - n_carry, n_carry


def flags_after(eqn: JaxprEqn, inputs: Sequence[Flag]) -> list[Flag]:
    """What the outputs of an operation depend on."""
    name = eqn.primitive.name
    if name in INLINED:
        return _flags_of(inlined(eqn), inputs)
    if name == "scan":
        return _flags_of(eqn.params["jaxpr"], flags_in_loop(eqn, inputs))
    if name == "cond":
        branches = (_flags_of(branch, inputs[1:]) for branch in eqn.params["branches"])
        return [_either(inputs[0], *of_output) for of_output in zip(*branches, strict=True)]
    return [_either(*inputs)] * len(eqn.outvars)


def flags_in_loop(eqn: JaxprEqn, inputs: Sequence[Flag]) -> Flags:
    """What the inputs of the body of a scan depend on, in any iteration."""
    n_consts, n_carry = sizes_of_scan(eqn)
    while True:
        carry = _flags_of(eqn.params["jaxpr"], inputs)[:n_carry]
        before = inputs[n_consts : n_consts + n_carry]
        after = [_either(*pair) for pair in zip(before, carry, strict=True)]
        if list(before) == after:
            return tuple(inputs)
        inputs = [*inputs[:n_consts], *after, *inputs[n_consts + n_carry :]]


def _flags_of(program: Any, inputs: Sequence[Flag]) -> list[Flag]:
    jaxpr, _ = opened(program)
    flags = dict.fromkeys(jaxpr.constvars, (True, False)) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return (False, False) if isinstance(atom, Literal) else flags[atom]

    for eqn in jaxpr.eqns:
        flags.update(zip(eqn.outvars, flags_after(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _either(*flags: Flag) -> Flag:
    return any(data for data, _ in flags), any(grad for _, grad in flags)
