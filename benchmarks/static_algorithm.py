"""The static algorithm beside its published recursion, in JAX and in the original PyTorch code, on CPU.

Precomputation from m gradients of d entries, the diagonal of the inverse Fisher, products, and one entry;
the gradients flat, as the leaves of a ResNet-20 (ours), and in consecutive blocks (ours and the original).
Every round draws new gradients and times everything in turn; medians are printed, with the extremes.
The original is imported from a checkout (https://github.com/IST-DASLab/M-FAC) and needs PyTorch; it is left
out where one of them is missing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from benchmarks import original, timing
from benchmarks.parameter_trees import RESNET20, RESNET20_SIZE
from benchmarks.peers import OptionalExistingFolder
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, Positive, Seed, parse
from mfac_jax import FisherInverse

OURS, TREE, RECURSION = "mfac_jax", "mfac_jax, leaves of ResNet-20", "recursion in JAX"
BATCH_SIZE = 64
GROUP = 32  # rows in a buffer of the recursion that is written with care
QUICK_REPEATS = 5  # in a round, of what takes milliseconds
TOLERANCE = 1e-2  # relative, beside float64: what is timed has to be the inverse


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    num_grads: Count = 256
    """m"""
    parameters: Count = RESNET20_SIZE
    """d; by default that of a ResNet-20, which is then timed as a tree too"""
    damping: Positive = 1e-5
    """added to the diagonal of the Fisher matrix"""
    block: Count = 128
    """size of the consecutive blocks"""
    rounds: Count = 7
    """timed, after one to warm up"""
    seed: Seed = 0
    """of the data"""
    original: OptionalExistingFolder = None
    """a checkout of the original, to be timed too"""
    out: OptionalPath = None
    """file to add a line of JSON to"""


class Method(NamedTuple):
    """One implementation; `state` is what `precompute` returns.

    Attributes:
      prepare: what `precompute` takes, from gradients `(m, d)`; it may be overwritten.
      precompute: the part that is timed as such.
      vector: what `product` takes, from x `(d,)`.
      product: F^-1 x.
      products: F^-1 of each of several vectors, stacked by `vectors`.
      vectors: what `products` takes, from `(k, d)`.
      diagonal: of F^-1.
      entry: of row i and column j, of F^-1.
    """

    prepare: Callable[[jax.Array], Any]
    precompute: Callable[[Any], Any]
    vector: Callable[[jax.Array], Any]
    product: Callable[[Any, Any], Any]
    products: Callable[[Any, Any], Any]
    vectors: Callable[[jax.Array], Any]
    diagonal: Callable[[Any], Any]
    entry: Callable[[Any, int, int], Any]


def ours(damping: float, blocks: int | None, shapes: Sequence[tuple[int, ...]] | None) -> Method:
    """FisherInverse; the gradients flat, or as leaves of these shapes."""

    def split(rows: jax.Array) -> Any:
        if shapes is None:
            return rows + 0
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = jnp.split(rows, ends[:-1], axis=-1)
        leading = rows.shape[:-1]
        return [part.reshape(*leading, *shape) for part, shape in zip(parts, shapes, strict=True)]

    return Method(
        prepare=split,
        precompute=lambda grads: FisherInverse.from_gradients(grads, damping, blocks=blocks),
        vector=split,
        product=lambda fisher, x: fisher.ihvp(x),
        products=lambda fisher, xs: fisher.ihvp(xs),
        vectors=split,
        diagonal=lambda fisher: fisher.diagonal(),
        entry=lambda fisher, i, j: fisher.entry(i, j),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("damping", "length"))
def recursion(grads: jax.Array, damping: float, length: int) -> list[tuple[jax.Array, jax.Array]]:
    """The published recursion: v_i = F_{i-1}^-1 g_i and q_i = m + g_i v_i, in groups `(v, q)` of rows.

    The `length` rows of one group are written into a buffer of their own, in place, and all of the buffer
    is read at every step, with the rows not yet known: of one buffer for all, twice what is needed.
    """
    m, groups = len(grads), []
    for start in range(0, m, length):
        own = grads[start : start + length]

        def step(group, numbered, known=tuple(groups)):
            (vectors, scales), (i, g) = group, numbered
            v = g / damping
            for V, q in (*known, group):
                v = v - _dot(_dot(V, g) / q, V)
            return (vectors.at[i].set(v), scales.at[i].set(m + jnp.vdot(g, v))), None

        empty = jnp.zeros_like(own), jnp.ones_like(own[:, 0])
        groups.append(lax.scan(step, empty, (jnp.arange(len(own)), own))[0])
    return groups


def in_jax(damping: float, length: int) -> Method:
    """The recursion with `length` rows in a buffer, and what follows from its vectors."""

    @jax.jit
    def product(groups, x):
        return x / damping - sum(_dot(_dot(V, x) / q, V) for V, q in groups)

    @jax.jit
    def diagonal(groups):
        total = jnp.full_like(groups[0][0][0], 1 / damping)
        for V, q in groups:
            total = lax.fori_loop(0, len(V), lambda i, s, V=V, q=q: s - V[i] ** 2 / q[i], total)
        return total

    @jax.jit
    def entry(groups, i, j):
        return (i == j) / damping - sum(jnp.sum(V[:, i] * V[:, j] / q) for V, q in groups)

    return Method(
        prepare=lambda grads: grads,
        precompute=lambda grads: recursion(grads, damping, length),
        vector=lambda x: x,
        product=product,
        products=jax.jit(jax.vmap(product, (None, 0))),
        vectors=lambda xs: xs,
        diagonal=diagonal,
        entry=entry,
    )


def of_original(torch: Any, build: Callable[[Any], Any]) -> Method:
    """One of the original's classes for the whole Fisher matrix, on flat vectors."""

    def tensor(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x))

    def entry(state, i, j):
        Hg, denom = state.Hg.reshape(-1, state.Hg.shape[-1]), state.denom.ravel()
        return (i == j) * state.damp - (Hg[:, i] * Hg[:, j] / denom).sum()

    def shaped(state, x):  # HInvFastBatch has an axis of blocks in front
        return x[None] if state.Hg.ndim == 3 else x

    return Method(
        prepare=tensor,
        precompute=build,
        vector=tensor,
        product=lambda state, x: state.mul(shaped(state, x)),
        products=lambda state, xs: torch.stack([state.mul(shaped(state, x)) for x in xs]),
        vectors=tensor,
        diagonal=lambda state: state.diag(),
        entry=entry,
    )


def original_blocked(torch: Any, prun: Any, damping: float, size: int) -> Method:
    """HInvFastBatch on consecutive blocks; those of the full size, and the shorter one at the end."""

    def blocks(x: jax.Array) -> list[Any]:
        whole = x.shape[-1] // size * size
        parts = [np.asarray(x)[..., :whole], np.asarray(x)[..., whole:]]
        parts = [part.reshape(*x.shape[:-1], -1, min(size, part.shape[-1])) for part in parts if part.size]
        return [torch.from_numpy(np.array(np.moveaxis(part, -2, 0))) for part in parts]

    def product(states, x):
        return torch.cat([s.mul(part).ravel() for s, part in zip(states, x, strict=True)])

    def entry(states, i, j):
        first = states[0]
        state, block = (first, i // size) if i < first.b * size else (states[1], 0)
        if i // size != j // size:
            return torch.zeros(())
        columns = state.Hg[block][:, [i % size, j % size]]
        return (i == j) * state.damp - (columns.prod(1) / state.denom[block]).sum()

    return Method(
        prepare=blocks,
        precompute=lambda parts: [prun.HInvFastBatch(part, damp=damping) for part in parts],
        vector=blocks,
        product=product,
        products=lambda states, xs: torch.stack([product(states, x) for x in xs]),
        vectors=lambda xs: [blocks(x) for x in xs],
        diagonal=lambda states: torch.cat([s.diag().ravel() for s in states]),
        entry=entry,
    )


@functools.partial(jax.jit, static_argnames=("m", "d"))
def draw(key: jax.Array, m: int, d: int) -> jax.Array:
    """Draw gradients `(m, d)` of squared norm near one: a common one, 16 directions, and noise."""
    keys = jax.random.split(key, 4)
    common = jax.random.normal(keys[0], (1, d))
    few = _dot(jax.random.normal(keys[1], (m, 16)), jax.random.normal(keys[2], (16, d))) / 4
    return (0.5 * common + few + jax.random.normal(keys[3], (m, d))) / math.sqrt(2 * d)


def flat(result: Any) -> np.ndarray:
    """Flatten a vector of any of the methods, in float64."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(result)]
    return np.concatenate(leaves)


def errors(method: Method, grads: jax.Array, damping: float, block: int | None) -> dict[str, float]:
    """Measure relative errors, beside float64: of F (F^-1 x) = x, and of entries at 8 places."""
    m, d = grads.shape
    state = method.precompute(method.prepare(grads))
    x = jax.random.normal(jax.random.key(7), (d,))
    solution, G = flat(method.product(state, method.vector(x))), np.asarray(grads)
    places = np.linspace(0, d - 1, 8).astype(int)
    starts, width = ((0,), d) if block is None else (range(0, d, block), block)
    residual, columns = np.empty(d), np.empty(len(places))
    for start in starts:
        G_block = G[:, start : start + width].astype(np.float64)
        y = solution[start : start + width]
        residual[start : start + width] = damping * y + G_block.T @ (G_block @ y) / m
        own = (places >= start) & (places < start + width)
        if np.any(own):
            system, chosen = G_block @ G_block.T + m * damping * np.eye(m), G_block[:, places[own] - start]
            inside = np.sum(chosen * np.linalg.solve(system, chosen), axis=0)
            columns[own] = (1 - inside) / damping
    residual -= np.asarray(x, np.float64)
    found = flat(method.diagonal(state))[places]
    entries = np.array([float(method.entry(state, int(i), int(i))) for i in places])
    batch = method.products(state, method.vectors(jnp.stack([x, -x])))
    stacked = [np.asarray(leaf, np.float64).reshape(2, -1) for leaf in jax.tree.leaves(batch)]
    batch_error = np.concatenate(stacked, axis=1) - np.stack([solution, -solution])
    return {
        "product": float(np.linalg.norm(residual) / np.linalg.norm(x)),
        "products": float(np.linalg.norm(batch_error) / np.linalg.norm(solution)),
        "diagonal": float(np.max(np.abs(found / columns - 1))),
        "entry": float(np.max(np.abs(entries / columns - 1))),
    }


def time_round(methods: dict[str, Method], grads: jax.Array, key: jax.Array) -> dict[str, dict[str, list]]:
    """Time every operation of every method, all on the same new data."""
    d, states = grads.shape[1], {}
    seconds = {name: {} for name in methods}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def timed(name: str, what: str, function: Callable[..., Any], *inputs: Any) -> Any:
        result, spent = timing.stopwatch(function, *inputs)
        seconds[name].setdefault(what, []).append(spent)
        return result

    for name, method in methods.items():
        ready = jax.block_until_ready(method.prepare(grads))
        states[name] = timed(name, "precompute", method.precompute, ready)
    vectors = jax.random.normal(key, (BATCH_SIZE, d))
    for i in range(QUICK_REPEATS):
        row, column = map(int, rng.integers(d, size=2))
        for name, method in methods.items():
            x = jax.block_until_ready(method.vector(vectors[i]))
            timed(name, "diagonal", method.diagonal, states[name])
            timed(name, "product", method.product, states[name], x)
            timed(name, "entry", method.entry, states[name], row, column)
    for name, method in methods.items():
        xs = jax.block_until_ready(method.vectors(vectors))
        timed(name, f"{BATCH_SIZE} products", method.products, states[name], xs)
    return seconds


def measure(methods: dict[str, Method], options: Options, block: int | None) -> dict[str, Any]:
    """Measure errors, then times: `{method: {"errors": ..., "seconds": {operation: spread}}}`."""
    key = jax.random.key(options.seed)
    grads = draw(key, options.num_grads, options.parameters)
    result: dict[str, Any] = {}
    for name, method in methods.items():
        row = result[name] = {"errors": errors(method, grads, options.damping, block)}
        if not max(row["errors"].values()) < TOLERANCE:
            raise ValueError(f"{name} is not the inverse: relative errors {row['errors']}.")
    rounds = []
    for i in tqdm(range(options.rounds + 1), desc="one block" if block is None else "blocks", unit="round"):
        of_grads, of_vectors = jax.random.split(jax.random.fold_in(key, i))
        grads = draw(of_grads, options.num_grads, options.parameters)
        rounds.append(time_round(methods, grads, of_vectors))
    for name in methods:
        operations = rounds[0][name]
        timed = {what: [s for r in rounds[1:] for s in r[name][what]] for what in operations}
        result[name]["seconds"] = {what: timing.spread(values) for what, values in timed.items()}
    return result


def table(result: dict[str, Any]) -> str:
    """Write the milliseconds, and how many times ours they are, in Markdown."""
    operations = list(result[OURS]["seconds"])
    lines = []
    for name, row in result.items():
        cells = [name]
        for what in operations:
            s = row["seconds"][what]
            ratio = s["median"] / result[OURS]["seconds"][what]["median"]
            low, middle, high = (f"{1e3 * s[key]:,.3g}" for key in ("min", "median", "max"))
            cells.append(f"{middle} ({low} to {high}), {ratio:.2f}")
        lines.append([*cells, f"{max(row['errors'].values()):.1e}"])
    return markdown.table(["", *operations, "largest relative error"], lines)


def all_methods(options: Options) -> tuple[dict[str, Method], dict[str, Method]]:
    """Make what is timed on one block, and what on consecutive blocks."""
    damping, size = options.damping, options.block
    methods, blocked = {OURS: ours(damping, None, None)}, {OURS: ours(damping, size, None)}
    if options.parameters == RESNET20_SIZE:
        methods[TREE] = ours(damping, None, RESNET20)
    methods[RECURSION] = in_jax(damping, options.num_grads)
    methods[f"{RECURSION}, {GROUP} rows a buffer"] = in_jax(damping, GROUP)
    modules = original.load(options.original, "prun")
    if modules is not None:
        torch, prun = modules
        methods["original, HInvFastSwap"] = of_original(
            torch, lambda grads: prun.HInvFastSwap(grads, damp=damping, cpu="cpu", gpu="cpu")
        )
        methods["original, HInvFastBatch"] = of_original(
            torch, lambda grads: prun.HInvFastBatch(grads[None], damp=damping)
        )
        blocked["original, HInvFastBatch"] = original_blocked(torch, prun, damping, size)
    return methods, blocked


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    methods, blocked = all_methods(options)
    row = {"num_grads": options.num_grads, "parameters": options.parameters, "damping": options.damping}
    row |= {"block": options.block, "rounds": options.rounds, "cores": timing.cores()}
    row |= {"one_block": measure(methods, options, None)}
    row |= {"blocks": measure(blocked, options, options.block)}
    row |= provenance.record(("mfac_jax", "jax", "jaxlib", "numpy", "torch"))
    if options.out is not None:
        json_lines.append(options.out, row)
    print(f"{options.num_grads} gradients of {options.parameters:,} entries")
    print(f"{row['cores']} core(s) of {row['machine']}")
    print("Milliseconds: median (least to most), then how many times ours.")
    print(f"\nOne block\n{table(row['one_block'])}\n\nBlocks of {options.block}\n{table(row['blocks'])}")


if __name__ == "__main__":
    main()
