"""What a user calls, once for each public name: the cases of `test_strict_modes.py`.

A case gets `run`, which is `jax.jit` or leaves a function as it is, and returns what it computed. Dtypes
and axes are those of a strict user: nothing here asks for a promotion.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax import components, pruning

Run = Callable[[Callable[..., Any]], Callable[..., Any]]
ROWS = 3
X = np.random.RandomState(0).randn(8, 4).astype(np.float32)
Y = np.random.RandomState(1).randn(8, 3).astype(np.float32)


def params(dtype=jnp.float32):
    kernel = jnp.asarray(np.random.RandomState(2).randn(4, 3), dtype)
    return {"dense": {"bias": jnp.zeros(3, dtype), "kernel": kernel}}


def outputs(p, x):
    return jnp.tanh(jnp.dot(x, p["dense"]["kernel"]) + p["dense"]["bias"][None])


def loss(p, x=None):
    x = jnp.asarray(X, p["dense"]["bias"].dtype) if x is None else x
    return jnp.mean(jnp.square(outputs(p, x) - jnp.asarray(Y, x.dtype)))


def batch_loss(p, batch):
    x, y = batch
    return jnp.mean(jnp.square(outputs(p, x) - y))


@functools.partial(jax.jit, static_argnames="number")
def stacked(p, number=3):
    """Gradients at neighbouring points, on a leading axis."""
    grads = [jax.grad(loss)(jax.tree.map(lambda w, k=k: w * (1 + k / 8), p)) for k in range(number)]
    return jax.tree.map(lambda *g: jnp.stack(g), *grads)


@jax.jit
def stream(p):
    """Gradients of an ordinary run, at its worst: zeros at first, repeats, the other way, zeros again."""
    zeros, g = jax.tree.map(jnp.zeros_like, p), jax.grad(loss)(p)
    return [zeros, g, g, jax.tree.map(lambda x: -2 * x, g), zeros, g]


def trained(run: Run, tx, p=None):
    """The parameters and the state after a run."""
    p = params() if p is None else p
    state, update = run(tx.init)(p), run(tx.update)
    for g in stream(p):
        updates, state = update(g, state, p)
        p = optax.apply_updates(p, updates)
    return p, state


@functools.cache
def past(**options):
    """A chain of `mfac`, and its state after a run: what other functions are given."""
    tx = pruning.keep_pruned(mfac_jax.mfac(0.1, ROWS, **options), masks())
    return tx, trained(jax.jit, tx)[1]


def mfac_state(state):
    return optax.tree.get(state, "ScaleByMFACState")


def factors_of(run: Run, p=None):
    p = params() if p is None else p
    return run(mfac_jax.value_and_grad_with_factors(loss))(p)


def trained_by_layers(run: Run, tx, p=None):
    p = params() if p is None else p
    evaluate = run(mfac_jax.value_and_grad_with_factors(loss))
    state, update = run(tx.init)(p), run(lambda g, s, p, f: tx.update(g, s, p, curvature=f))
    first = evaluate(p)[1:]
    for grads, factors in (first, first, jax.tree.map(jnp.zeros_like, first)):
        updates, state = update(grads, state, p, factors)
        p = optax.apply_updates(p, updates)
    return p, state


def trained_by_layer(run: Run, layer):
    p, tx = params()["dense"], mfac_jax.scale_by_cgfac(1.0)
    return run(lambda p, layer: tx.update(p, tx.init(p), curvature={"kernel": layer}))(p, layer)


def experts(run: Run):
    """Two layers in one kernel."""
    grads, tx = stacked(params(), 2)["dense"]["kernel"], mfac_jax.scale_by_cgfac(1.0)
    layout = mfac_jax.KernelLayout((2, 4, 3), (0,), (1,), (2,))
    inputs, output_grads = (jnp.stack([jnp.asarray(x), -jnp.asarray(x)]) for x in (X, Y))
    layer = mfac_jax.LayerFactors(inputs, output_grads, layout=layout)
    return run(lambda g, layer: tx.update(g, tx.init(g), curvature={"": layer}))(grads, layer)


def trained_by_operator(run: Run, tx, operator, **extra):
    p = params()
    state = run(tx.init)(p)

    def step(p, state):
        return tx.update(jax.grad(loss)(p), state, p, curvature=operator(p), **extra)

    for _ in range(2):
        updates, state = run(step)(p, state)
        p = optax.apply_updates(p, updates)
    return p, state


def gauss_newton_of(p):
    x, y = jnp.asarray(X), jnp.asarray(Y)
    return mfac_jax.gauss_newton(lambda p: outputs(p, x), lambda out: jnp.mean(jnp.square(out - y)), p)


def empirical_fisher_of(p):
    return mfac_jax.empirical_fisher(stacked(p))


def own_metric():
    def scaled(tree):
        return jax.tree.map(lambda x: x / 2, tree)

    def update(state, gradients, count):
        return state, components.Coordinates(scaled, scaled)

    return components.Metric("halved", lambda new: (), update)


def own_solver():
    def solve(state, K, shift, rhs):
        system = K + shift[:, None, None] * jnp.eye(K.shape[-1], dtype=K.dtype)[None]
        return jnp.linalg.solve(system, rhs[..., None])[..., 0], state

    return components.Solver("lu", lambda zeros, b, m: (), lambda state, *_: state, solve)


def own_step_length():
    def update(state, view):
        return state, jnp.full_like(view.log_step, -0.7)

    return components.StepLength("half", lambda zeros: (), update)


def own_storage():
    def dots(rows, x, dtype):
        return jnp.sum(rows.astype(dtype) * x[None].astype(dtype), axis=tuple(range(1, rows.ndim)))

    return components.Storage(
        name="float16",
        row=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16),
        encode=lambda x, rows: x.astype(jnp.float16),
        decode=lambda row: row.astype(jnp.float32),
        dots=dots,
        combine=lambda c, rows: jnp.tensordot(c, rows.astype(c.dtype), 1),
    )


def seen(run: Run, **options):
    """The state of `scale_by_mfac` after a run."""
    return trained(run, mfac_jax.scale_by_mfac(ROWS, 0.1, **options))[1]


def fisher(run: Run, blocks, index=3):
    p = params()
    inverse = mfac_jax.FisherInverse.from_gradients(stacked(p), 1e-3, blocks=blocks)

    def used(inverse, p):
        return inverse.ihvp(p), inverse.diagonal(), inverse.entry(0, index), inverse.submatrix([0, 5, 7])

    batch = inverse.ihvp(stacked(p))
    return run(used)(inverse, p), batch


def collected(per_example):
    return mfac_jax.collect_gradients(batch_loss, params(), [(X, Y)] * 8, 5, per_example=per_example)


def logged():
    log = mfac_jax.DiagnosticsLog(every=1)
    log(0, past()[1])
    return log.records


def remasked(run: Run):
    tx, state = past(damping=1.0)  # with less, rows that are parallel cancel in the last update
    state = run(lambda state, masks: pruning.set_masks(tx, state, masks))(state, masks(0.8))
    return state, run(tx.update)(stream(params())[1], state, params())


def nnx_factors(run: Run):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    step = mfac_jax.nnx_value_and_grad_with_factors(lambda model, x: jnp.mean(jnp.square(model(x))))
    graph, state = nnx.split(model)

    def pure(state, x):
        value, grads, factors = step(nnx.merge(graph, state), x)
        return value, nnx.to_pure_dict(grads), factors

    return run(pure)(state, jnp.asarray(X))


def replicated():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def shardings():
    found = mfac_jax.state_shardings(mfac_jax.mfac(0.1, ROWS), params(), replicated())
    return [str(sharding.spec) for sharding in jax.tree.leaves(found)]


def pruned(grads=None, **options):
    return pruning.prune(params(), stacked(params()) if grads is None else grads, 0.5, **options)


def masks(above=0.4):
    return {"dense": {"bias": None, "kernel": jnp.abs(params()["dense"]["kernel"]) > above}}


def kept():
    return pruning.obs_update(params(), stacked(params()), masks(), 1e-3)


def numbers(make) -> Any:
    """Learning rate, rows, damping, momentum and weight decay, as numbers of one kind."""
    return make(0.1), ROWS, make(0.2), make(0.9), make(1e-3)


SCHEDULE = optax.cosine_decay_schedule(0.1, 20)

# By public name, then by what is special about the case.
CASES: dict[str, dict[str, Callable[[Run], Any]]] = {
    "mfac": {
        "": lambda run: trained(run, mfac_jax.mfac(0.1, ROWS)),
        "inverse": lambda run: trained(run, mfac_jax.mfac(0.1, ROWS, solver="inverse")),
        "schedules": lambda run: trained(
            run, mfac_jax.mfac(SCHEDULE, ROWS, SCHEDULE, weight_decay=SCHEDULE, step_adaptation=SCHEDULE)
        ),
        "injected": lambda run: trained(
            run,
            optax.inject_hyperparams(mfac_jax.mfac, static_args=("num_grads",))(
                learning_rate=0.1, num_grads=ROWS, damping=0.3, momentum=0.8, weight_decay=1e-3
            ),
        ),
    },
    "mfac_published": {
        "": lambda run: trained(run, mfac_jax.mfac_published(0.1, ROWS, 1e-3)),
        "schedules": lambda run: trained(run, mfac_jax.mfac_published(SCHEDULE, ROWS, SCHEDULE)),
    },
    "scale_by_mfac": {
        "": lambda run: seen(run),
        "inverse": lambda run: seen(run, solver="inverse", blocks="leaf"),
        "nesterov": lambda run: seen(run, relative_damping=True, window_momentum=0.9, nesterov=True),
        "diagonal, adapted": lambda run: seen(run, metric="diagonal", step_adaptation=0.3, blocks="leaf"),
        "rotated": lambda run: seen(run, metric="rotated", relative_damping=True),
        "bfloat16": lambda run: seen(run, storage=jnp.bfloat16),
        "int8": lambda run: seen(run, storage=jnp.int8),
        "low rank": lambda run: seen(run, storage=components.low_rank(0.4), window_momentum=0.9),
        "bfloat16 parameters": lambda run: trained(
            run, mfac_jax.mfac(SCHEDULE, ROWS, weight_decay=1e-3), params(jnp.bfloat16)
        ),
        "float16 parameters": lambda run: trained(
            run, mfac_jax.mfac_published(0.1, ROWS), params(jnp.float16)
        ),
        "repeats": lambda run: trained(run, mfac_jax.scale_by_mfac(ROWS, 1e-12)),
        "repeats, inverse": lambda run: trained(run, mfac_jax.scale_by_mfac(ROWS, 1e-12, solver="inverse")),
        "numbers of JAX": lambda run: trained(run, mfac_jax.mfac(*numbers(jnp.asarray))),
        "on the host": lambda run: seen(run, host_chunk=2),
        "one row": lambda run: trained(run, mfac_jax.scale_by_mfac(1, 0.1, step_adaptation=0.3)),
        "numbers of NumPy": lambda run: trained(run, mfac_jax.mfac(*numbers(np.float64))),
    },
    "components": {
        "": lambda run: seen(
            run,
            metric=own_metric(),
            solver=own_solver(),
            step_adaptation=own_step_length(),
            storage=own_storage(),
        ),
    },
    "ScaleByMFACState": {"": lambda run: run(lambda state: state)(mfac_state(past()[1]))},
    "state_shardings": {
        "": lambda run: shardings(),
        "on a mesh": lambda run: trained(
            run, mfac_jax.mfac(0.1, ROWS), jax.device_put(params(), replicated())
        ),
    },
    "memory_estimate": {
        "": lambda run: list(mfac_jax.memory_estimate(params(), ROWS, metric="rotated", storage=jnp.int8))
    },
    "MemoryEstimate": {"": lambda run: str(mfac_jax.memory_estimate(params(), ROWS))},
    "ihvp": {"": lambda run: run(mfac_jax.ihvp)(mfac_state(past()[1]), params(), 0.1)},
    "diagnostics": {
        "": lambda run: run(mfac_jax.diagnostics)(past()[1]),
        "at first": lambda run: run(mfac_jax.diagnostics)(mfac_jax.mfac(0.1, ROWS).init(params())),
    },
    "Diagnostics": {"": lambda run: mfac_jax.diagnostics(past()[1])._asdict()},
    "DiagnosticsLog": {"": lambda run: logged()},
    "FisherInverse": {
        "": lambda run: fisher(run, None),
        "leaf": lambda run: fisher(run, "leaf"),
        "blocks": lambda run: fisher(run, 2),
        "wide blocks": lambda run: fisher(run, 5),
    },
    "collect_gradients": {
        "": lambda run: collected(False),
        "per example": lambda run: collected(True),
    },
    "cgfac": {
        "": lambda run: trained_by_layers(run, mfac_jax.cgfac(tolerance=1e-5)),
        "all": lambda run: trained_by_layers(
            run, mfac_jax.cgfac(SCHEDULE, SCHEDULE, weight_decay=SCHEDULE)
        ),
        "bfloat16": lambda run: trained_by_layers(run, mfac_jax.cgfac(), params(jnp.bfloat16)),
        "numbers of NumPy": lambda run: trained_by_layers(
            run,
            mfac_jax.cgfac(*np.asarray([0.1, 0.1, 0.9, 1e-3]), tolerance=np.float64(0.1)),
        ),
    },
    "scale_by_cgfac": {
        "": lambda run: trained_by_layers(run, mfac_jax.scale_by_cgfac(tolerance=1e-5)),
        "batches": lambda run: trained_by_layers(
            run,
            mfac_jax.scale_by_cgfac(0.1, num_batches=2, norm_constraint=1.0, factors=factors_of(run)[2]),
        ),
    },
    "ScaleByCGFACState": {"": lambda run: mfac_jax.scale_by_cgfac().init(params())},
    "LayerFactors": {
        "": lambda run: trained_by_layer(run, mfac_jax.LayerFactors(jnp.asarray(X), jnp.asarray(Y), "bias"))
    },
    "KernelLayout": {"": experts},
    "gauss_newton": {
        "": lambda run: trained_by_operator(run, mfac_jax.cgfac(tolerance=1e-5), gauss_newton_of),
        "preconditioned": lambda run: trained_by_operator(
            run, mfac_jax.scale_by_cgfac(norm_constraint=1.0), gauss_newton_of, preconditioner=lambda v: v
        ),
    },
    "empirical_fisher": {
        "": lambda run: trained_by_operator(run, mfac_jax.cgfac(tolerance=1e-5), empirical_fisher_of)
    },
    "value_and_grad_with_factors": {
        "": lambda run: factors_of(run),
        "bfloat16": lambda run: factors_of(run, params(jnp.bfloat16)),
    },
    "nnx_value_and_grad_with_factors": {"": nnx_factors},
    "pruning": {"": lambda run: sorted(pruning.__all__)},
    "KeepPrunedState": {"": lambda run: pruning.keep_pruned(optax.sgd(0.1), masks()).init(params())},
    "apply_masks": {"": lambda run: run(pruning.apply_masks)(params(), masks())},
    "keep_pruned": {"": lambda run: trained(run, pruning.keep_pruned(optax.sgd(0.1), masks()))},
    "set_masks": {"": remasked},
    "kernel_masks": {"": lambda run: pruning.kernel_masks(params())},
    "obs_scores": {
        "": lambda run: run(lambda p, g: pruning.obs_scores(p, g, 1e-3))(params(), stacked(params())),
    },
    "obs_update": {"": lambda run: kept()},
    "prune": {
        "": lambda run: pruned(),
        "again": lambda run: pruned(stacked, num_steps=2, pattern="2:4"),
        "blocks": lambda run: pruned(pattern="block:2", update="independent"),
    },
    "pruning_report": {"": lambda run: pruning.pruning_report(masks())},
    "sparsity": {"": lambda run: pruning.sparsity(masks())},
    "sparsity_by_leaf": {"": lambda run: pruning.sparsity_by_leaf(masks())},
}
