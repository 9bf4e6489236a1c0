"""Makes the factors of layers from gradients that are sums of products; says what was left out."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax._src.cgfac.layers import KernelLayout, LayerFactors
from mfac_jax._src.cgfac.terms import CannotFollowError, Sum, Term, Unknown, regrouped

KERNEL = "kernel"


class Found(NamedTuple):
    """What was found of each parameter.

    Attributes:
      factors: of each captured kernel, by its path.
      report: 'kernel', 'bias of dense/kernel', or the reason why a parameter was left out, by its path.
      missed: paths of the kernels among those left out.
    """

    factors: dict[str, LayerFactors]
    report: dict[str, str]
    missed: list[str]


class _Kernel(NamedTuple):
    """A captured kernel: its factors, and for each use what a bias of it must be a sum of."""

    factors: LayerFactors
    sums: list[Any]


def assembled(leaves: Mapping[str, Any], gradients: Sequence[Sum | Unknown | None]) -> Found:
    """The factors of all layers, from what the gradient of each parameter is."""
    kernels: dict[str, _Kernel] = {}
    sums: dict[str, list[Any]] = {}
    report: dict[str, str] = {}
    missed: list[str] = []
    for (path, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if isinstance(gradient, Unknown):
            report[path] = f"left out: {gradient.reason}"
            has_product = gradient.has_product
        elif gradient is None or not gradient.terms:
            report[path], has_product = "left out: the loss does not depend on it", False
        elif not gradient.has_product:
            report[path] = "left out: it has no product with data, and is the bias of no kernel"
            sums[path], has_product = [_signature(term, range(leaf.ndim)) for term in gradient.terms], False
        else:
            has_product = True
            try:
                kernels[path], report[path] = _kernel(leaf.shape, gradient.terms), KERNEL
            except CannotFollowError as error:
                report[path] = f"left out: {error}"
        if has_product and leaf.ndim > 1 and leaf.size and report[path] != KERNEL:
            missed.append(path)
    biases = _biases(kernels, sums)
    report |= {bias: f"bias of {kernel}" for kernel, bias in biases.items()}
    factors = {path: dataclasses.replace(x.factors, bias=biases.get(path)) for path, x in kernels.items()}
    return Found(factors, report, missed)


def _kernel(shape: Sequence[int], terms: Sequence[Term]) -> _Kernel:
    """A kernel's layer; raise if its uses do not have the same examples, or split its axes differently."""
    if 0 in shape:
        raise CannotFollowError("it has no entries")
    if not all(term.rows for term in terms):
        raise CannotFollowError("it is multiplied with data that has no batch axis")
    examples = {term.size(term.rows[0]) for term in terms}
    if len(examples) > 1:
        counts = " and ".join(map(str, sorted(examples)))
        raise CannotFollowError(f"its uses have different numbers of examples, {counts}")
    fine = [size for size in shape if size > 1]
    for term in terms:
        sizes = [term.size(name) for group in term.axes for name in group]
        fine = [piece for pieces in regrouped(fine, sizes)[0] for piece in pieces]
    terms = [_with_ones(term).reshaped(fine) for term in terms]
    sides = [_sides(term) for term in terms]
    stack, data, grad = sides[0]
    if any(side not in ((stack, data, grad), (stack, grad, data)) for side in sides):
        raise CannotFollowError("its uses split its axes into inputs and outputs in different ways")
    (stack, data, grad) = sides[0]
    is_plain = not stack and (_is_prefix(data) or _is_prefix(grad))
    inputs, outputs = (grad, data) if is_plain and not _is_prefix(data) else (data, grad)
    (n,) = examples
    rows = [_rows(term, stack, inputs, outputs, n) for term in terms]
    a, b = (_one_after_another([pair[side] for pair in rows], bool(stack)) for side in (0, 1))
    layout = None if is_plain else KernelLayout(tuple(fine), stack, inputs, outputs)
    side: Literal["inputs", "outputs"] = "outputs" if grad == outputs else "inputs"
    # A bias is added to the outputs of all uses.
    has_one_side = all(own == grad for _, _, own in sides)
    sums = [_signature(term, (*stack, *grad)) for term in terms] if has_one_side else []
    return _Kernel(LayerFactors(a, b, layout=layout, bias_side=side), sums)


def _with_ones(term: Term) -> Term:
    """The term with ones for the factor that it does not have."""
    if term.data is not None:
        return term
    ones = jnp.ones([term.size(name) for name in term.rows], term.grad.dtype)
    return dataclasses.replace(term, data=ones, data_axes=term.rows)


def _sides(term: Term) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of a stack, those of the data, and those of the cotangent."""
    axes = list(enumerate(name for (name,) in term.axes))
    stack = tuple(axis for axis, name in axes if term.on_both(name))
    data = tuple(axis for axis, name in axes if axis not in stack and name in term.data_axes)
    return stack, data, tuple(axis for axis, _ in axes if axis not in (*stack, *data))


def _is_prefix(axes: Sequence[int]) -> bool:
    return list(axes) == list(range(len(axes)))


def _rows(
    term: Term, stack: Sequence[int], inputs: tuple[int, ...], outputs: tuple[int, ...], n: int
) -> tuple[jax.Array, jax.Array]:
    """The rows of both sides, `(S, N, ..., in)` and `(S, N, ..., out)`, without S if there is no stack."""
    _, data, _ = _sides(term)
    # The loss is a mean: an example's own loss has N times the gradient.
    factors: tuple[Any, Any] = (term.data, term.data_axes), (_times(n, term.grad), term.grad_axes)
    pair = factors if data == inputs else factors[::-1]
    arrays = []
    for (x, names), own in zip(pair, (inputs, outputs), strict=True):
        order = [*_names(term, stack), *term.rows, *_names(term, own)]
        x = jnp.transpose(x, [names.index(name) for name in order])
        of_stack, of_rows = x.shape[: len(stack)], x.shape[len(stack) : len(stack) + len(term.rows)]
        first = (math.prod(of_stack),) if stack else ()
        arrays.append(x.reshape(*first, *of_rows, math.prod(x.shape[len(stack) + len(term.rows) :])))
    return arrays[0], arrays[1]


def _names(term: Term, axes: Sequence[int]) -> list[int]:
    return [name for axis in axes for name in term.axes[axis]]


def _times(n: int, x: jax.Array) -> jax.Array:
    """n x, computed in float32 at least: bfloat16 does not have every n, nor float16 every product."""
    if jnp.finfo(x.dtype).bits > 16:
        return n * x
    product = n * x.astype(jnp.float32)
    return product if x.dtype == jnp.float16 else product.astype(x.dtype)


def _one_after_another(uses: Sequence[jax.Array], has_stack: bool) -> jax.Array:
    """The rows of all uses, as those of places."""
    if len(uses) == 1:
        return uses[0]
    dtype = jnp.result_type(*(x.dtype for x in uses))
    places = 1 + has_stack
    flat = [x.reshape(*x.shape[:places], -1, x.shape[-1]).astype(dtype) for x in uses]
    return jnp.concatenate(flat, axis=places)


def _signature(term: Term, axes: Sequence[int]) -> Any:
    """What a sum of rows was read from, so that two with the same signature are the same array; or None."""
    origin = term.slots[1] if term.slots else term.origin
    is_known = origin is not None and not (term.slots and any(of is None for _, of in term.slots[1]))
    if not is_known:
        return None
    merged: list[tuple[Any, int, int]] = []
    for name in _names(term, axes):
        (root, stride), size = term.places[term.grad_axes.index(name)], term.size(name)
        if merged and merged[-1][0] == root and merged[-1][1] == stride * size:
            merged[-1] = (root, stride, merged[-1][2] * size)
        elif size > 1:
            merged.append((root, stride, size))
    return origin, tuple(merged)


def _biases(kernels: Mapping[str, _Kernel], sums: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The bias of each kernel: what is added to all its outputs, and to nothing else.

    Where several fit, the paths that share most of their beginning belong together.
    """
    pairs = [
        (_shared_keys(kernel, bias), kernel, bias)
        for kernel, found in kernels.items()
        for bias, of_bias in sums.items()
        if found.sums
        and None not in found.sums
        and collections.Counter(found.sums) == collections.Counter(of_bias)
    ]
    taken: dict[str, str] = {}
    for _, kernel, bias in sorted(pairs, key=lambda pair: -pair[0]):
        if kernel not in taken and bias not in taken.values():
            taken[kernel] = bias
    return taken


def _shared_keys(one: str, other: str) -> int:
    """How many keys two paths begin with together."""
    pairs = zip(one.split("/"), other.split("/"), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
