"""Runs the program of a gradient once, and finds the products of rows that the gradient is a sum of.

Loops and conditionals are run as they are, with bodies that return the rows too.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from mfac_jax._src.cgfac import rules
from mfac_jax._src.cgfac.flags import (
    INLINED,
    Flags,
    flags_after,
    flags_in_loop,
    inlined,
    opened,
    sizes_of_scan,
)
from mfac_jax._src.cgfac.known import Known
from mfac_jax._src.cgfac.terms import CannotFollowError, Sum, Term, Unknown, structure


def run(
    program: Any, inputs: Sequence[Known], wanted: Sequence[bool], roots: Iterator[int] | None = None
) -> list[Known]:
    """The outputs of a program; what they are as sums of products, where that is wanted."""
    jaxpr, consts = opened(program)
    roots = itertools.count() if roots is None else roots
    needed = _needed(jaxpr, wanted)
    known = {
        v: Known(x, has_data=True, root=next(roots)) for v, x in zip(jaxpr.constvars, consts, strict=True)
    }
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return Known(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            outputs = _operation(
                eqn, [read(v) for v in eqn.invars], [v in needed for v in eqn.outvars], roots
            )
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _needed(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """The variables that must be followed to know what the wanted outputs are."""
    needed = {
        v for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted and _is_variable(v)
    }
    for eqn in reversed(jaxpr.eqns):
        asked = [v in needed for v in eqn.outvars]
        if any(asked):
            needed.update(filter(_is_variable, _sources(eqn, asked)))
    return needed


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, Literal) and jnp.issubdtype(getattr(atom.aval, "dtype", int), jnp.floating)


def _sources(eqn: JaxprEqn, asked: Sequence[bool]) -> list[Any]:
    """What the wanted outputs of an operation are made of."""
    name = eqn.primitive.name
    if name in INLINED:
        jaxpr, _ = opened(inlined(eqn))
        inner = _needed(jaxpr, asked)
        return [v for v, own in zip(eqn.invars, jaxpr.invars, strict=True) if own in inner]
    if name == "cond":
        bodies = [opened(branch)[0] for branch in eqn.params["branches"]]
        inner = set().union(*(_needed(body, asked) for body in bodies))
        pairs = [pair for body in bodies for pair in zip(eqn.invars[1:], body.invars, strict=True)]
        return [v for v, own in pairs if own in inner]
    if name == "scan":
        n_consts, n_carry = sizes_of_scan(eqn)
        carries = zip(eqn.invars[n_consts : n_consts + n_carry], asked[:n_carry], strict=True)
        return [v for v, is_asked in carries if is_asked]
    if name.startswith("scatter"):  # a lookup; of whole matrices, if the table has three axes
        out: Any = eqn.outvars[0].aval
        return list(eqn.invars[2:]) if out.ndim > 2 else []
    return list(eqn.invars)


def _operation(
    eqn: JaxprEqn, inputs: Sequence[Known], wanted: Sequence[bool], roots: Iterator[int]
) -> list[Known]:
    name = eqn.primitive.name
    if name in INLINED:
        return run(inlined(eqn), _kept_apart(eqn, inputs), wanted, roots)
    if name in ("scan", "cond") and any(wanted):
        outputs, tracked = (_scan if name == "scan" else _cond)(eqn, inputs, wanted, next(roots))
    else:
        outputs = eqn.primitive.bind(
            *(x.value for x in inputs), **eqn.primitive.get_bind_params(eqn.params)
        )
        outputs, tracked = outputs if eqn.primitive.multiple_results else [outputs], None
    flags = flags_after(eqn, [(x.has_data, x.has_grad) for x in inputs])
    found = []
    for number, (value, (has_data, has_grad)) in enumerate(zip(outputs, flags, strict=True)):
        root, strides = rules.source(eqn, inputs, next(roots))
        known = Known(value, has_data, has_grad, None, root, strides, _spread(eqn, inputs))
        if wanted[number] and (has_grad or (inputs and all(x.is_zero for x in inputs))):
            of_value = rules.track(eqn, inputs, number) if tracked is None else tracked[number]
            known = known._replace(tracked=of_value)
        found.append(known)
    return found


def _spread(eqn: JaxprEqn, inputs: Sequence[Known]) -> tuple[Any, tuple[int, ...]] | None:
    """What an array repeats, and along which axes it does not."""
    if eqn.primitive.name != "broadcast_in_dim":
        return None
    (x, *_) = inputs
    shape, axes = jnp.shape(x.value), eqn.params["broadcast_dimensions"]
    if x.spread is not None and not x.spread[1]:
        return x.spread
    kept = [i for i, size in enumerate(shape) if size > 1]
    value = x.value if len(kept) == len(shape) else jnp.reshape(x.value, [shape[i] for i in kept])
    return value, tuple(axes[i] for i in kept)


def _kept_apart(eqn: JaxprEqn, inputs: Sequence[Known]) -> list[Known]:
    """The inputs of `jax.checkpoint`, so that XLA computes again what is to be computed again."""
    apart = eqn.params.get("prevent_cse", False)
    apart = list(apart) if isinstance(apart, tuple) else [apart] * len(inputs)
    chosen = [i for i, is_apart in enumerate(apart) if is_apart and eqn.params["differentiated"]]
    found = list(inputs)
    if chosen:
        values = lax.optimization_barrier([inputs[i].value for i in chosen])
        for i, value in zip(chosen, values, strict=True):
            found[i] = found[i]._replace(value=value)
    return found


def _as_known(values: Sequence[Any], flags: Flags, tracked: Sequence[Any]) -> list[Known]:
    """The inputs of a body."""
    return [
        Known(value, *of_value, sums, number)
        for number, (value, of_value, sums) in enumerate(zip(values, flags, tracked, strict=True))
    ]


def _body_of_scan(
    body: ClosedJaxpr, n_consts: int, flags: Flags, wanted: tuple[bool, ...], adds: tuple[bool, ...]
) -> Callable[..., Any]:
    """A body for `jax.lax.scan` that returns what the wanted outputs are too."""
    sums = [Sum(carries=(number,)) if is_sum else None for number, is_sum in enumerate(adds)]

    def step(carry, x):
        consts, carry = carry
        values = [*consts, *carry, *x]
        tracked = [None] * n_consts + sums + [None] * len(x)
        # Numbers of roots go on after those of the inputs.
        outputs = run(body, _as_known(values, flags, tracked), wanted, itertools.count(len(values)))
        values = [y.value for y in outputs]
        found = [_tracked(y) if is_wanted else None for y, is_wanted in zip(outputs, wanted, strict=True)]
        return (consts, values[: len(adds)]), (values[len(adds) :], found)

    return step


def _tracked(known: Known) -> Sum | Unknown:
    try:
        return rules.tracked_of(known)
    except CannotFollowError as error:
        return Unknown(str(error), rules.has_product([known]))


def _scan(
    eqn: JaxprEqn, inputs: Sequence[Known], wanted: Sequence[bool], root: int
) -> tuple[list[Any], list[Sum | Unknown | None]]:
    """A loop: carries that only add are sums over its iterations, other outputs are stacks of them."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    n_consts, n_carry = sizes_of_scan(eqn)
    flags = flags_in_loop(eqn, [(x.has_data, x.has_grad) for x in inputs])
    values = [x.value for x in inputs]
    first = (values[:n_consts], values[n_consts : n_consts + n_carry])
    xs = values[n_consts + n_carry :]
    adds = tuple(wanted[:n_carry])
    while True:
        step = _body_of_scan(body, n_consts, flags, tuple(wanted), adds)
        _, (_, found) = jax.eval_shape(step, first, [_first_entry(x) for x in xs])
        still = tuple(a and _only_adds(found[i], i) for i, a in enumerate(adds))
        if still == adds:
            break
        adds = still
    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    (_, carry), (ys, found) = lax.scan(step, first, xs, length=length, **options)
    tracked: list[Sum | Unknown | None] = []
    for number, of_body in enumerate(found):
        is_carry = number < n_carry
        if isinstance(of_body, Sum):
            of_body = _after_loop(of_body, root, number, inputs[n_consts + number] if is_carry else None)
        tracked.append(of_body)
    return [*carry, *ys], tracked


def _first_entry(x: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda x: x[0], x)


def _only_adds(of_body: Sum | Unknown | None, number: int) -> bool:
    return isinstance(of_body, Sum) and of_body.carries == (number,)


def _after_loop(of_body: Sum, root: int, number: int, first: Known | None) -> Sum | Unknown:
    """What an output of a loop is, from what the body makes of it and, for a carry, its first value."""
    is_carry = first is not None
    if is_carry != _only_adds(of_body, number):
        return Unknown("a loop changes its gradient at each iteration", of_body.has_product)
    terms = Sum(tuple(term.after_loop(root, adds=is_carry) for term in of_body.terms))
    if first is None:
        return terms
    before = _tracked(first)
    return before.plus(terms) if isinstance(before, Sum) else before


def _branch(
    body: ClosedJaxpr,
    flags: Flags,
    carries: tuple[Any, ...],
    wanted: tuple[bool, ...],
    slots: tuple[tuple[int | None, ...], ...] | None,
) -> Callable[..., Any]:
    """A branch that returns the factors of its terms, in the places of `slots`; without these, its sums."""

    def branch(values, likes):
        outputs = run(body, _as_known(values, flags, carries), wanted, itertools.count(len(values)))
        found = [_tracked(y) if is_wanted else None for y, is_wanted in zip(outputs, wanted, strict=True)]
        values = [y.value for y in outputs]
        if slots is None:
            return values, found
        filled = []
        for like, own, of_output in zip(likes, slots, found, strict=True):
            terms = of_output.terms if isinstance(of_output, Sum) else ()
            filled.append(
                [_factors(terms[i]) if i is not None else x for x, i in zip(like, own, strict=True)]
            )
        return values, filled

    return branch


def _factors(term: Term) -> tuple[jax.Array | None, jax.Array]:
    return term.data, term.grad


def _cond(
    eqn: JaxprEqn, inputs: Sequence[Known], wanted: Sequence[bool], root: int
) -> tuple[list[Any], list[Sum | Unknown | None]]:
    """A conditional: terms of the branch that was taken, zeros for those that only others have."""
    (index, *rest), branches = inputs, eqn.params["branches"]
    values = [x.value for x in rest]
    flags = tuple((x.has_data, x.has_grad) for x in rest)
    carries = tuple(x.tracked if isinstance(x.tracked, Sum) and not x.tracked.terms else None for x in rest)
    args = (flags, carries, tuple(wanted))
    found = [jax.eval_shape(_branch(body, *args, None), values, None)[1] for body in branches]
    tracked, likes, slots = [], [], [[] for _ in branches]
    for of_branches in zip(*found, strict=True):
        total, own = _shared(of_branches, root)
        tracked.append(total)
        terms = total.terms if isinstance(total, Sum) else ()
        likes.append([jax.tree.map(_zeros, _factors(term)) for term in terms])
        for of_branch, numbers in zip(slots, own or [[]] * len(branches), strict=True):
            of_branch.append(tuple(numbers))
    functions = [_branch(b, *args, tuple(own)) for b, own in zip(branches, slots, strict=True)]
    outputs, filled = lax.switch(index.value, functions, values, likes)
    return outputs, [_with_factors(*pair) for pair in zip(tracked, filled, strict=True)]


def _with_factors(total: Sum | Unknown | None, factors: Sequence[Any]) -> Sum | Unknown | None:
    """A sum with these factors in its terms."""
    if not isinstance(total, Sum):
        return total
    pairs = zip(total.terms, factors, strict=True)
    terms = [dataclasses.replace(term, data=data, grad=grad) for term, (data, grad) in pairs]
    return Sum(tuple(terms), total.carries)


def _shared(
    of_branches: Sequence[Sum | Unknown | None], root: int
) -> tuple[Sum | Unknown | None, list[list[int | None]] | None]:
    """What an output of several branches is, and for each branch, which of its terms is in which place.

    Terms of different branches that look alike share a place: only one of them is computed.
    """
    sums = [x for x in of_branches if isinstance(x, Sum)]
    if len(sums) < len(of_branches):
        return next(x for x in of_branches if not isinstance(x, Sum)), None
    if len({x.carries for x in sums}) > 1:
        return Unknown("branches change its gradient", any(x.has_product for x in sums)), None
    places: list[tuple[Term, dict[int, int]]] = []  # a term, and its number in each branch that has it
    for number, of_branch in enumerate(sums):
        for i, term in enumerate(of_branch.terms):
            free = (own for like, own in places if number not in own and structure(like) == structure(term))
            own = next(free, None)
            if own is None:
                places.append((term, {number: i}))
            else:
                own[number] = i
    terms = []
    for term, own in places:
        origins = tuple((number, sums[number].terms[i].origin) for number, i in own.items())
        is_known = all(origin is not None for _, origin in origins)
        terms.append(dataclasses.replace(term, origin=(root, origins) if is_known else None, slots=None))
    return Sum(tuple(terms), sums[0].carries), [[own.get(i) for _, own in places] for i in range(len(sums))]


def _zeros(like: Any) -> jax.Array:
    """Zeros of a type, which may be sharded over explicit axes, or vary along those of a shard_map."""
    explicit = like.sharding is not None and not like.sharding.mesh.are_all_axes_auto
    zeros = jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding if explicit else None)
    varying = tuple(like.manual_axis_type.varying) if like.manual_axis_type else ()
    return lax.pcast(zeros, varying, to="varying") if varying else zeros
