"""A gradient as a sum of products of rows, and what the operations of a program make of it.

A `Term` stands for an array that need not be formed: the sum over `rows` of `data` times `grad`, as in
`jnp.einsum`. Its axes have names, which are numbers. A name that both factors and the array have is that of
a stack of independent products. Transposing the array only renames, padding it pads a factor.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class CannotFollowError(Exception):
    """What an operation gives is no sum of products of rows; the text says why."""


class Place(NamedTuple):
    """Where an axis of `grad` lies in the value that it was read from: for telling which bias was added."""

    root: Hashable
    stride: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "grad"),
    meta_fields=("data_axes", "grad_axes", "places", "axes", "rows", "origin", "slots"),
)
@dataclasses.dataclass(frozen=True)
class Term:
    """One product of rows.

    Attributes:
      data: the factor that does not depend on the cotangent of the loss; None for ones.
      grad: the factor that does.
      data_axes, grad_axes: names of the factors' axes.
      places: of the axes of `grad`.
      axes: names that make up each axis of the array; none for an axis of size one.
      rows: names that are summed over, that of the examples first.
      origin: which value `grad` was read from, and what was done to it; None once that is not known.
      slots: for a stack of which only some entries were written, its name, and these with their origins.
    """

    data: jax.Array | None
    grad: jax.Array
    data_axes: tuple[int, ...]
    grad_axes: tuple[int, ...]
    places: tuple[Place, ...]
    axes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    origin: Hashable = None
    slots: tuple[int, tuple[tuple[int, Hashable], ...]] | None = None

    def size(self, name: int) -> int:
        """The size of the axis with this name."""
        if name in self.grad_axes:
            return self.grad.shape[self.grad_axes.index(name)]
        assert self.data is not None
        return self.data.shape[self.data_axes.index(name)]

    def on_both(self, name: int) -> bool:
        return name in self.data_axes and name in self.grad_axes

    def _fresh(self) -> int:
        """A name that no axis has."""
        return 1 + max((-1, *self.data_axes, *self.grad_axes))

    def transposed(self, permutation: Sequence[int]) -> "Term":
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def reshaped(self, shape: Sequence[int]) -> "Term":
        """The array with another shape; raise if that would mix entries of two factors in one axis."""
        names = [name for group in self.axes for name in group]
        pieces, groups = regrouped([self.size(name) for name in names], shape)
        fresh = self._fresh()
        split: dict[int, tuple[list[int], list[int]]] = {}  # by the old name, the new ones and their sizes
        for name, sizes in zip(names, pieces, strict=True):
            new = [name] if len(sizes) == 1 else [fresh + i for i in range(len(sizes))]
            fresh += len(new)
            split[name] = (new, sizes)
        axes = tuple(tuple(split[names[i]][0][j] for i, j in group) for group in groups)
        data, data_axes, _ = _split(self.data, self.data_axes, self.data_axes, split)
        grad, grad_axes, places = _split(self.grad, self.grad_axes, self.places, split)
        slots = self.slots if self.slots and self.slots[0] in grad_axes else None
        return Term(data, grad, data_axes, grad_axes, places, axes, self.rows, self.origin, slots)

    def summed(self, axes: Sequence[int]) -> "Term":
        """The sum over axes that both factors have: they are rows."""
        names = tuple(name for axis in axes for name in self.axes[axis])
        if self.data is not None and not all(self.on_both(name) for name in names):
            raise CannotFollowError("its gradient is summed over an axis of one factor")
        rest = tuple(group for axis, group in enumerate(self.axes) if axis not in axes)
        return dataclasses.replace(self, axes=rest, rows=(*names, *self.rows), slots=None)

    def edited(self, axis: int, edit: Callable[[Any, int], Any], label: Hashable) -> "Term":
        """The array with an axis padded, sliced or reversed: that of the factors which have it."""
        if len(self.axes[axis]) != 1:
            raise CannotFollowError("a part of it is used that cuts through several axes")
        (name,) = self.axes[axis]
        data, grad, origin = self.data, self.grad, self.origin
        if name in self.data_axes:
            data = edit(data, self.data_axes.index(name))
        if name in self.grad_axes:
            number = self.grad_axes.index(name)
            grad = edit(grad, number)
            origin = None if origin is None else (origin, label, self.places[number])
        return dataclasses.replace(self, data=data, grad=grad, origin=origin, slots=None)

    def placed(self, axis: int, entry: int, size: int) -> "Term":
        """The array with an axis of size one padded to `size`: one entry of a stack."""
        if any(self.size(name) > 1 for name in self.axes[axis]) or self.slots is not None:
            raise CannotFollowError("a part of it is used that cuts through several axes")
        clean = self.reshaped([1 if i == axis else self._length(i) for i in range(len(self.axes))])
        name = clean._fresh()

        def in_stack(x):
            return lax.pad(
                x[None], jnp.zeros((), x.dtype), [(entry, size - entry - 1, 0), *[(0, 0, 0)] * x.ndim]
            )

        axes = (*clean.axes[:axis], (name,), *clean.axes[axis + 1 :])
        return dataclasses.replace(
            clean._with_first_axis(name, Place("slots", 1), in_stack),
            axes=axes,
            origin=None,
            slots=(name, ((entry, self.origin),)),
        )

    def _length(self, axis: int) -> int:
        return math.prod(self.size(name) for name in self.axes[axis])

    def _with_first_axis(self, name: int, place: Place, change: Callable[[Any], Any]) -> "Term":
        return dataclasses.replace(
            self,
            data=None if self.data is None else change(self.data),
            grad=change(self.grad),
            data_axes=() if self.data is None else (name, *self.data_axes),
            grad_axes=(name, *self.grad_axes),
            places=(place, *self.places),
        )

    def after_loop(self, root: Hashable, adds: bool) -> "Term":
        """A term of the body of a loop, after the loop has stacked the factors of all its iterations.

        The iterations are rows if the loop adds them, and else the first axis of the array.
        """
        name = self._fresh()
        term = self._with_first_axis(name, Place(root, 1), lambda x: x)
        origin = None if self.origin is None else (root, self.origin)
        slots = self.slots and (self.slots[0], tuple((entry, (root, old)) for entry, old in self.slots[1]))
        term = dataclasses.replace(term, origin=origin, slots=slots)
        if adds:
            return dataclasses.replace(term, rows=(*self.rows, name))
        return dataclasses.replace(term, axes=((name,), *self.axes))

    def scaled(self, factor: jax.Array) -> "Term":
        """The array times a number. It goes to the data, so that `grad` still is what a bias has."""
        if self.data is None:
            return dataclasses.replace(self, grad=_times(self.grad, factor), origin=None, slots=None)
        return dataclasses.replace(self, data=_times(self.data, factor))

    def multiplied(self, factor: jax.Array, axes: Sequence[int]) -> "Term":
        """The array times one that has these of its axes, if one factor has them all."""
        sizes = [self._length(axis) for axis in axes]
        if list(factor.shape) != sizes:
            raise CannotFollowError("its gradient is multiplied entry by entry")
        names = [name for axis in axes for name in self.axes[axis]]
        factor = factor.reshape([self.size(name) for name in names])
        if self.data is not None and set(names) <= set(self.data_axes):
            return dataclasses.replace(self, data=_times(self.data, _spread(factor, names, self.data_axes)))
        if set(names) <= set(self.grad_axes):
            grad = _times(self.grad, _spread(factor, names, self.grad_axes))
            return dataclasses.replace(self, grad=grad, origin=None, slots=None)
        raise CannotFollowError("its gradient is multiplied entry by entry")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("terms",), meta_fields=("carries",))
@dataclasses.dataclass(frozen=True)
class Sum:
    """What a gradient is: terms, and carries of the loop that the program is the body of, by number."""

    terms: tuple[Term, ...] = ()
    carries: tuple[int, ...] = ()

    @property
    def has_product(self) -> bool:
        """Whether any term is more than a sum of rows of one factor."""
        return any(term.data is not None for term in self.terms)

    def plus(self, other: "Sum") -> "Sum":
        terms = list(self.terms)
        for term in other.terms:
            joined = ((i, _joined(old, term)) for i, old in enumerate(terms))
            number, both = next(((i, both) for i, both in joined if both is not None), (len(terms), term))
            terms[number : number + 1] = [both]
        return Sum(tuple(terms), (*self.carries, *other.carries))

    def map(self, change: Callable[[Term], Term]) -> "Sum":
        if self.carries:
            raise CannotFollowError("a loop changes its gradient at each iteration")
        return Sum(tuple(change(term) for term in self.terms))


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("reason", "has_product"))
@dataclasses.dataclass(frozen=True)
class Unknown:
    """A gradient that is no sum of terms: why, and whether products went into it."""

    reason: str
    has_product: bool = False


def structure(term: Term) -> tuple:
    """What two terms must share for one to stand in the other's place."""
    arrays = tuple((x.shape, jnp.dtype(x.dtype)) for x in (term.data, term.grad) if x is not None)
    name = None if term.slots is None else term.slots[0]
    return arrays, term.data_axes, term.grad_axes, term.places, term.axes, term.rows, name


def _joined(one: Term, other: Term) -> Term | None:
    """One term for two that wrote different entries of the same stack, or None."""
    if one.slots is None or other.slots is None or structure(one) != structure(other):
        return None
    slots = sorted((*one.slots[1], *other.slots[1]), key=lambda slot: slot[0])
    if len({entry for entry, _ in slots}) < len(slots):
        return None
    data = None if one.data is None or other.data is None else one.data + other.data
    return dataclasses.replace(
        one, data=data, grad=one.grad + other.grad, slots=(one.slots[0], tuple(slots))
    )


def strides_of(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def regrouped(
    sizes: Sequence[int], shape: Sequence[int]
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """How axes are split for a reshape: the pieces of each, and which pieces make up each new axis."""
    if 0 in (*sizes, *shape):
        raise CannotFollowError("it has no entries")
    if math.prod(sizes) != math.prod(shape):
        raise CannotFollowError("sums over its entries are used")
    pieces: list[list[int]] = [[] for _ in sizes]
    groups: list[list[tuple[int, int]]] = [[] for _ in shape]
    old, new = ([i for i, size in enumerate(all_sizes) if size > 1] for all_sizes in (sizes, shape))
    left, wanted = (list(all_sizes) for all_sizes in (sizes, shape))
    while old:
        i, j = old[0], new[0]
        piece = min(left[i], wanted[j])
        if left[i] % piece or wanted[j] % piece:
            raise CannotFollowError("a reshape mixes its axes")
        groups[j].append((i, len(pieces[i])))
        pieces[i].append(piece)
        left[i], wanted[j] = left[i] // piece, wanted[j] // piece
        old, new = old[left[i] == 1 :], new[wanted[j] == 1 :]
    return pieces, groups


def _split(
    x: Any, names: Sequence[int], places: Sequence[Any], split: dict[int, tuple[list[int], list[int]]]
) -> tuple[Any, tuple[int, ...], tuple[Any, ...]]:
    """A factor with the axes that `split` names in pieces; axes of size one have none."""
    if x is None:
        return None, (), ()
    shape, new_names, new_places = [], [], []
    for name, size, place in zip(names, x.shape, places, strict=True):
        pieces, sizes = split.get(name, ([name], [size]))
        shape.extend(sizes)
        new_names.extend(pieces[: len(sizes)])
        if isinstance(place, Place):
            steps = strides_of(sizes)
            new_places.extend(Place(place.root, place.stride * step) for step in steps)
    return x if tuple(shape) == x.shape else x.reshape(shape), tuple(new_names), tuple(new_places)


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, factor.dtype)
    return x.astype(dtype) * jnp.expand_dims(factor, range(x.ndim - factor.ndim)).astype(dtype)


def _spread(factor: jax.Array, names: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """An array of the axes `names` with those of `axes`, of size one where it has none."""
    order = sorted(range(len(names)), key=lambda i: axes.index(names[i]))
    shape = [factor.shape[names.index(name)] if name in names else 1 for name in axes]
    return jnp.transpose(factor, order).reshape(shape)
