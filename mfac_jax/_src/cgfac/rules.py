"""What each operation of a program makes of the gradients that are sums of products of rows."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mfac_jax._src.cgfac.convolutions import convolution
from mfac_jax._src.cgfac.flags import opened
from mfac_jax._src.cgfac.known import Known, is_data_first
from mfac_jax._src.cgfac.terms import CannotFollowError, Sum, Term, Unknown, regrouped, strides_of


class _UnknownError(CannotFollowError):
    """What an operation is applied to is unknown already; the text says why."""


_SAME_ENTRIES = (
    *("convert_element_type", "copy", "copy_p", "reshape", "squeeze", "expand_dims", "transpose"),
    *("broadcast_in_dim", "optimization_barrier", "sharding_constraint", "reshard", "pvary", "name"),
)
_IDENTITY = (
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "name", "optimization_barrier"),
    *("sharding_constraint", "mesh_cast", "reshard", "pvary", "pcast"),
    # Under manual axes every shard has the rows of its own examples.
    *("psum", "psum2", "psum_invariant", "psum_invariant_p", "unreduced_psum"),
)
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "triangular_solve")
_WITHOUT_PRODUCT = (
    "it is also used without a product with data (such as in a weight normalisation, or in a penalty: take "
    "that out of the loss, and chain optax.add_decayed_weights)"
)
_LOOKUPS = ("scatter", "scatter-add", "scatter_add", "gather", "dynamic_slice", "dynamic_update_slice")
_REASONS = {
    **dict.fromkeys(
        _LOOKUPS,
        "it is read by an index that the program computes (such as a lookup in a table; stacked kernels "
        "can be xs of jax.lax.scan)",
    ),
    "while": "it is used in a loop without a fixed number of steps",
    "shard_map": "it is used inside of a shard_map. Call value_and_grad_with_factors in there",
    "select_n": "its gradient is masked",
}


def track(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum | Unknown:
    """What an output of an operation is."""
    name = eqn.primitive.name
    try:
        if name in _IDENTITY:
            return tracked_of(inputs[number if len(inputs) > 1 else 0])
        if name not in _RULES:
            if name not in _LOOKUPS and not (has_product(inputs) or _may_be_product(eqn)):
                raise CannotFollowError(_WITHOUT_PRODUCT)
            raise CannotFollowError(_REASONS.get(name, f"the operation {name!r} is in its gradient"))
        return _RULES[name](eqn, inputs, number)
    except _UnknownError as error:
        return Unknown(str(error), has_product(inputs) or _may_be_product(eqn))
    except CannotFollowError as error:
        return Unknown(f"{error}{line_of(eqn)}", has_product(inputs) or _may_be_product(eqn))


def source(eqn: JaxprEqn, inputs: Sequence[Known], fresh: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The root and the strides of what an operation on one array gives."""
    name = eqn.primitive.name
    if name not in _SAME_ENTRIES or len(inputs) != 1 or inputs[0].root is None:
        return fresh, None
    (known,), shape = inputs, _shape(eqn.outvars[0])
    strides = [place.stride for place in known.places]
    if name == "transpose":
        return known.root, tuple(strides[axis] for axis in eqn.params["permutation"])
    if shape == known.value.shape:
        return known.root, known.strides
    try:
        pieces, groups = regrouped(known.value.shape, shape)
    except CannotFollowError:  # mixed, or repeated
        return fresh, None
    steps = [[stride * step for step in strides_of(p)] for stride, p in zip(strides, pieces, strict=True)]
    found = []
    for group in groups:
        parts = [(steps[i][k], pieces[i][k]) for i, k in group]
        if any(one[0] != other[0] * other[1] for one, other in itertools.pairwise(parts)):
            return fresh, None
        found.append(parts[-1][0] if parts else 1)
    return known.root, tuple(found)


def _may_be_product(eqn: JaxprEqn) -> bool:
    """Whether the operation is a product, or a program of which nobody knows."""
    if eqn.primitive.name in _LOOKUPS:
        return False
    params = (p for param in eqn.params.values() for p in (param if isinstance(param, tuple) else (param,)))
    return eqn.primitive.name in _PRODUCTS or any(hasattr(opened(param)[0], "eqns") for param in params)


def has_product(inputs: Sequence[Known]) -> bool:
    """Whether products went into what an operation gives."""
    return any(known.tracked is not None and known.tracked.has_product for known in inputs)


def tracked_of(known: Known) -> Sum:
    """What a value is; raise if that is no sum of terms."""
    if known.is_zero:
        return Sum()
    if isinstance(known.tracked, Sum):
        return known.tracked
    if isinstance(known.tracked, Unknown):
        raise _UnknownError(known.tracked.reason)
    raise CannotFollowError(_WITHOUT_PRODUCT)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _map(change: Callable[[JaxprEqn, Term, int], Term]):
    """The rule of an operation on one array that does the same to each term."""

    def rule(eqn, inputs, number):
        return tracked_of(inputs[0]).map(lambda term: change(eqn, term, number))

    return rule


def _add(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del eqn, number
    # A loop over examples adds up the gradients of a bias as they are.
    is_loop = any(isinstance(known.tracked, Sum) and known.tracked.carries for known in inputs)
    one, other = (
        _added(known, ()) if is_loop and known.has_grad and _is_unknown_vector(known) else tracked_of(known)
        for known in inputs
    )
    return one.plus(other)


def _is_unknown_vector(known: Known) -> bool:
    return jnp.ndim(known.value) == 1 and not isinstance(known.tracked, Sum)


def _subtract(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del eqn, number
    one, other = map(tracked_of, inputs)
    return one.plus(other.map(lambda term: term.scaled(jnp.asarray(-1, term.grad.dtype))))


def _multiply(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """A sum times a number, or times an array that only one factor of each term meets."""
    del number
    if any(known.is_zero for known in inputs):
        return Sum()
    one, other = inputs
    if eqn.primitive.name == "mul" and not isinstance(one.tracked, Sum):
        one, other = other, one
    if not any(has_product([known]) or isinstance(known.tracked, Sum) for known in inputs):
        raise CannotFollowError(_WITHOUT_PRODUCT)
    total, out = tracked_of(one), eqn.outvars[0].aval
    source, axes = (other.value, ()) if jnp.ndim(other.value) == 0 else other.spread or (None, ())
    if source is None:
        raise CannotFollowError("its gradient is multiplied entry by entry (such as by a mask)")
    factor = jnp.asarray(source, out.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    factor = 1 / factor if eqn.primitive.name == "div" else factor
    return total.map(lambda term: term.multiplied(factor, axes) if axes else term.scaled(factor))


def _broadcast(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """New axes of size one."""
    del number
    shape = _shape(eqn.outvars[0])
    if inputs[0].is_zero:
        return Sum()
    return tracked_of(inputs[0]).map(lambda term: term.reshaped(shape))


def _pad(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del number
    if not inputs[1].is_zero:
        raise CannotFollowError("the operation 'pad' is in its gradient")
    config = [(int(low), int(high), int(inner)) for low, high, inner in eqn.params["padding_config"]]
    return tracked_of(inputs[0]).map(lambda term: _padded(term, inputs[0].value.shape, config))


def _padded(term: Term, shape: Sequence[int], config: Sequence[tuple[int, int, int]]) -> Term:
    for axis, (low, high, inner) in enumerate(config):
        if (low, high) == (0, 0) and (inner == 0 or shape[axis] < 2):
            continue
        if shape[axis] == 1:
            term = term.placed(axis, low, low + 1 + high)
            continue

        def edit(x, i, padding=(low, high, inner)):
            return lax.pad(
                x, jnp.zeros((), x.dtype), [padding if j == i else (0, 0, 0) for j in range(x.ndim)]
            )

        term = term.edited(axis, edit, ("pad", low, high, inner))
    return term


def _slice(eqn: JaxprEqn, term: Term, number: int) -> Term:
    del number
    params, shape = eqn.params, _shape(eqn.invars[0])
    steps = params["strides"] or (1,) * len(shape)
    parts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    for axis, part in enumerate(parts):
        if part != (0, shape[axis], 1):
            term = term.edited(
                axis, lambda x, i, part=part: lax.slice_in_dim(x, *part, axis=i), ("slice", part)
            )
    return term


def _split(eqn: JaxprEqn, term: Term, number: int) -> Term:
    ends = list(itertools.accumulate(eqn.params["sizes"]))
    part = (ends[number] - eqn.params["sizes"][number], ends[number])
    return term.edited(
        eqn.params["axis"], lambda x, i: lax.slice_in_dim(x, *part, axis=i), ("slice", (*part, 1))
    )


def _concatenate(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del number
    axis, total = eqn.params["dimension"], Sum()
    size, start = _shape(eqn.outvars[0])[axis], 0
    for known in inputs:
        shape = known.value.shape
        config = [(0, 0, 0)] * len(shape)
        config[axis] = (start, size - start - shape[axis], 0)
        total = total.plus(tracked_of(known).map(lambda term, args=(shape, config): _padded(term, *args)))
        start += shape[axis]
    return total


def _reverse(eqn: JaxprEqn, term: Term, number: int) -> Term:
    del number
    for axis in eqn.params["dimensions"]:
        if _shape(eqn.invars[0])[axis] > 1:
            term = term.edited(axis, lambda x, i: lax.rev(x, (i,)), "rev")
    return term


def _reduce(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """The sum over a stack of products; of what is none, the gradient of something that was added."""
    del number
    (known,), axes = inputs, eqn.params["axes"]
    if isinstance(known.tracked, Sum):
        try:
            return known.tracked.map(lambda term: term.summed(axes))
        except CannotFollowError:
            pass
    if not known.has_grad:
        raise CannotFollowError("the operation 'reduce_sum' is in its gradient")
    return _added(known, axes)


def _added(known: Known, rows: Sequence[int]) -> Sum:
    """The gradient of what was added to a value, from that of the value."""
    names = tuple(range(known.value.ndim))
    rest = tuple((axis,) for axis in names if axis not in rows)
    return Sum((Term(None, known.value, (), names, known.places, rest, tuple(rows), known.root),))


def _product(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """A product of matrices that sums over rows."""
    del number
    left, right = inputs
    (contracted, batch) = eqn.params["dimension_numbers"]
    names: list[list[int]] = [[-1] * known.value.ndim for known in inputs]
    shared = [*zip(*batch, strict=True), *zip(*contracted, strict=True)]
    for name, pair in enumerate(shared):
        for side, axis in enumerate(pair):
            names[side][axis] = name
    fresh = itertools.count(len(shared))
    names = [[next(fresh) if name < 0 else name for name in side] for side in names]
    free = [[name for name in side if name >= len(shared)] for side in names]
    stack = range(len(batch[0]))
    axes = tuple((name,) for name in (*stack, *free[0], *free[1]))
    rows = tuple(range(len(stack), len(shared)))
    factors = (left, tuple(names[0])), (right, tuple(names[1]))
    (data, data_axes), (grad, grad_axes) = factors if is_data_first(left, right) else factors[::-1]
    return Sum((Term(data.value, grad.value, data_axes, grad_axes, grad.places, axes, rows, grad.root),))


def line_of(eqn: JaxprEqn) -> str:
    """The line of the user's program that an operation comes from, as text."""
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    own = str(Path(__file__).parents[2]) + os.sep
    for frame in frames:
        name = frame.file_name
        is_library = f"{os.sep}site-packages{os.sep}" in name or name.startswith((own, "<"))
        if not is_library and os.path.basename(name) not in ("contextlib.py", "functools.py"):
            return f" ({os.path.basename(name)}:{frame.line_num})"
    return ""


_RULES: dict[str, Callable[[JaxprEqn, Sequence[Known], int], Sum]] = {
    **dict.fromkeys(("add", "add_any"), _add),
    "sub": _subtract,
    **dict.fromkeys(("mul", "div"), _multiply),
    "neg": _map(lambda eqn, term, number: term.scaled(jnp.asarray(-1, term.grad.dtype))),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(
        ("reshape", "squeeze", "expand_dims"),
        _map(lambda eqn, term, number: term.reshaped(_shape(eqn.outvars[0]))),
    ),
    "transpose": _map(lambda eqn, term, number: term.transposed(eqn.params["permutation"])),
    "pad": _pad,
    "slice": _map(_slice),
    "split": _map(_split),
    "concatenate": _concatenate,
    "rev": _map(_reverse),
    "reduce_sum": _reduce,
    "dot_general": _product,
    "conv_general_dilated": convolution,
}
