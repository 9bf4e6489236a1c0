"""What each operation of a program makes of the gradients that are sums of products of rows."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mfac_jax._src.cgfac.terms import CannotFollow, Place, Sum, Term, Unknown, strides_of


class _IsUnknown(CannotFollow):
    """What an operation is applied to is unknown already; the text says why."""


class Known(NamedTuple):
    """A value of the program, and what it was computed from.

    Attributes:
      value: the array.
      has_data: whether anything but parameters and constants went into it.
      has_grad: whether the cotangent of the loss went into it.
      tracked: what the value is as a sum of products; None where nobody asks.
      root: a number of the value, if it is no constant. Another shape or dtype of the same entries has the same number.
      spread: an array of fewer entries, and its axes here, if the value repeats it; or None.
    """

    value: Any
    has_data: bool = False
    has_grad: bool = False
    tracked: Sum | Unknown | None = None
    root: int | None = None
    spread: tuple[Any, tuple[int, ...]] | None = None

    @property
    def is_zero(self) -> bool:
        """Whether it is seen to be zero."""
        if self.spread is not None and not self.spread[1]:
            return _is_zero(self.spread[0])
        return _is_zero(self.value) or self.tracked == Sum()


def _is_zero(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.Array) and jnp.ndim(x) == 0 and bool(x == 0)


SAME_ENTRIES = ("convert_element_type", "copy", "copy_p", "reshape", "squeeze", "expand_dims")
_IDENTITY = (
    *("convert_element_type", "copy", "copy_p", "reduce_precision", "name", "optimization_barrier"),
    *("sharding_constraint", "mesh_cast", "reshard", "pvary", "pcast"),
    # Under manual axes every shard has the rows of its own examples.
    *("psum", "psum2", "psum_invariant", "psum_invariant_p", "unreduced_psum"),
)
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_WITHOUT_PRODUCT = (
    "it is also used without a product with data (such as in a weight normalisation, or in a penalty on its "
    "entries: take that out of the loss, and chain optax.add_decayed_weights)"
)
_REASONS = {
    **dict.fromkeys(
        ("scatter-add", "scatter", "gather", "scatter_add", "dynamic_update_slice", "dynamic_slice"),
        "it is read by an index that the program computes (such as a lookup in a table). Stacked kernels can be "
        "handed to jax.lax.scan as xs",
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
            raise CannotFollow(_REASONS.get(name, f"the operation {name!r} is in its gradient"))
        return _RULES[name](eqn, inputs, number)
    except _IsUnknown as error:
        return Unknown(str(error), has_product(name, inputs))
    except CannotFollow as error:
        return Unknown(f"{error}{line_of(eqn)}", has_product(name, inputs))


def has_product(name: str, inputs: Sequence[Known]) -> bool:
    """Whether products went into what an operation gives."""
    return name in _PRODUCTS or any(x.tracked is not None and x.tracked.has_product for x in inputs)


def tracked_of(known: Known) -> Sum | Unknown:
    """What a value is; raise if that is no sum of terms."""
    if known.is_zero:
        return Sum()
    if isinstance(known.tracked, Sum):
        return known.tracked
    if isinstance(known.tracked, Unknown):
        raise _IsUnknown(known.tracked.reason)
    raise CannotFollow(_WITHOUT_PRODUCT)


def _map(change: Callable[[JaxprEqn, Term, int], Term]):
    """The rule of an operation on one array that does the same to each term."""

    def rule(eqn, inputs, number):
        return tracked_of(inputs[0]).map(lambda term: change(eqn, term, number))

    return rule


def _add(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del eqn, number
    one, other = map(tracked_of, inputs)
    return one.plus(other)


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
    if not any(has_product("", [known]) or isinstance(known.tracked, Sum) for known in inputs):
        raise CannotFollow(_WITHOUT_PRODUCT)
    total, dtype = tracked_of(one), eqn.outvars[0].aval.dtype
    source, axes = (other.value, ()) if jnp.ndim(other.value) == 0 else other.spread or (None, ())
    if source is None:
        raise CannotFollow("its gradient is multiplied entry by entry (such as by a mask)")
    factor = jnp.asarray(source, dtype)
    factor = 1 / factor if eqn.primitive.name == "div" else factor
    return total.map(lambda term: term.multiplied(factor, axes) if axes else term.scaled(factor))


def _broadcast(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """New axes of size one."""
    del number
    out = eqn.outvars[0].aval
    if inputs[0].is_zero:
        return Sum()
    if out.size != jnp.size(inputs[0].value):
        raise CannotFollow("sums over its entries are used")
    return tracked_of(inputs[0]).map(lambda term: term.reshaped(out.shape))


def _pad(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    del number
    if not inputs[1].is_zero:
        raise CannotFollow("the operation 'pad' is in its gradient")
    config = [tuple(int(x) for x in axis) for axis in eqn.params["padding_config"]]
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
    params, shape = eqn.params, eqn.invars[0].aval.shape
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
    size, start = eqn.outvars[0].aval.shape[axis], 0
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
        if eqn.invars[0].aval.shape[axis] > 1:
            term = term.edited(axis, lambda x, i: lax.rev(x, (i,)), "rev")
    return term


def _reduce(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """The sum over a stack of products; of what is none, the gradient of something that was added."""
    del number
    (known,), axes = inputs, eqn.params["axes"]
    if isinstance(known.tracked, Sum):
        try:
            return known.tracked.map(lambda term: term.summed(axes))
        except CannotFollow:
            pass
    x = known.value
    if not known.has_grad:
        raise CannotFollow("the operation 'reduce_sum' is in its gradient")
    names = tuple(range(x.ndim))
    rest = tuple((axis,) for axis in names if axis not in axes)
    return Sum((Term(None, x, (), names, _places(x), rest, tuple(axes), known.root),))


def _places(x: jax.Array) -> tuple[Place, ...]:
    return tuple(Place(0, stride) for stride in strides_of(x.shape))


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
    return Sum((_term((left, left.value, names[0]), (right, right.value, names[1]), axes, rows),))


def _term(
    left: tuple[Known, jax.Array, Sequence[int]],
    right: tuple[Known, jax.Array, Sequence[int]],
    axes: tuple[tuple[int, ...], ...],
    rows: tuple[int, ...],
) -> Term:
    """The term of a product of two factors: what each is, its array, and the names of its axes."""
    data, grad = (left, right) if right[0].has_grad else (right, left)
    if data[0].has_grad or not grad[0].has_grad or not data[0].has_data:
        raise CannotFollow(
            "it is multiplied with parameters or constants, not with data (such as in a penalty)"
        )
    known, x, names = grad
    return Term(data[1], x, tuple(data[2]), tuple(names), _places(x), axes, rows, known.root)


def _convolution(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """A convolution that sums over the places of another one: the gradient of that one's kernel."""
    del number
    params: Mapping[str, Any] = eqn.params
    lhs, rhs, out = params["dimension_numbers"]
    left, right = inputs
    x, window = jnp.transpose(left.value, lhs), right.value
    groups, of_batch = params["feature_group_count"], params["batch_group_count"] > 1
    groups = params["batch_group_count"] if of_batch else groups
    n_places = x.ndim - 2
    names_in, names_place = range(4, 4 + n_places), range(4 + n_places, 4 + 2 * n_places)
    batch, feature, group, outputs = range(4)
    for i in range(n_places):
        x = _patches(eqn, x, 2 + 2 * i, i, window.shape[rhs[2 + i]], eqn.outvars[0].aval.shape[out[2 + i]])
    between = [name for i in range(n_places) for name in (names_place[i], names_in[i])]
    split = [batch, feature]
    if groups > 1:
        n, f, *rest = x.shape
        shape = (groups, n // groups, f, *rest) if of_batch else (n, groups, f // groups, *rest)
        x, split = x.reshape(shape), [group, batch, feature] if of_batch else [batch, group, feature]
    names_window = {rhs[0]: [outputs], rhs[1]: [feature]} | {
        rhs[2 + i]: [names_place[i]] for i in range(n_places)
    }
    shape_window = {axis: [size] for axis, size in enumerate(window.shape)}
    if groups > 1:
        names_window[rhs[0]] = [group, outputs]
        shape_window[rhs[0]] = [groups, window.shape[rhs[0]] // groups]
    window = window.reshape([size for axis in range(window.ndim) for size in shape_window[axis]])
    axes_of_out = {out[0]: (batch,), out[1]: tuple(names_window[rhs[0]])}
    axes_of_out |= {out[2 + i]: (names_in[i],) for i in range(n_places)}
    term = _term(
        (left._replace(root=None), x, [*split, *between]),
        (right, window, [name for axis in range(right.value.ndim) for name in names_window[axis]]),
        tuple(axes_of_out[axis] for axis in range(len(out))),
        (feature, *names_place),
    )
    return Sum((term,))


def _patches(eqn: JaxprEqn, x: jax.Array, axis: int, number: int, places: int, size: int) -> jax.Array:
    """What the entries of a kernel meet: the axis becomes two, of the places and of the kernel's entries.

    They are cut out, not convolved with ones: nothing is rounded, in any dtype and on any device.
    """
    params = eqn.params
    step, inner = params["rhs_dilation"][number], params["lhs_dilation"][number]
    apart = params["window_strides"][number]
    low = params["padding"][number][0]
    length = (x.shape[axis] - 1) * inner + 1
    high = (places - 1) * step + (size - 1) * apart + 1 - low - length
    padding = [(low, high, inner - 1) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    parts = [
        lax.slice_in_dim(x, i * apart, i * apart + (places - 1) * step + 1, step, axis) for i in range(size)
    ]
    return jnp.stack(parts, axis + 1)


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
        _map(lambda eqn, term, number: term.reshaped(eqn.outvars[0].aval.shape)),
    ),
    "transpose": _map(lambda eqn, term, number: term.transposed(eqn.params["permutation"])),
    "pad": _pad,
    "slice": _map(_slice),
    "split": _map(_split),
    "concatenate": _concatenate,
    "rev": _map(_reverse),
    "reduce_sum": _reduce,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
}
