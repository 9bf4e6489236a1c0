"""With the state donated, a compiled training step writes into the window and never copies it."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from mfac_jax import mfac, mfac_published, scale_by_mfac

NUM_GRADS = 64  # the diagonal metric has four temporaries of a row's size
# Leaves of one size, so that a copy of any of them would take a third of the window or more.
PARAMS = {"bias": jnp.ones(4096), "kernel": jnp.ones((32, 128)), "conv": jnp.ones((4, 4, 8, 32))}


def preconditioner(**options):
    return scale_by_mfac(NUM_GRADS, 1.0, **options)


def injected(factory, **kwargs):
    return optax.inject_hyperparams(factory, static_args=("num_grads", "storage", "metric"))(
        **({"num_grads": NUM_GRADS} | kwargs)
    )


# Twice as many rows: the same float32 temporaries are then the same part of the window. Gram matrices are
# four times as large, and so are the leaves.
HALF: dict[str, Any] = {"num_grads": 2 * NUM_GRADS, "storage": jnp.bfloat16}
BYTES: dict[str, Any] = {"num_grads": 4 * NUM_GRADS, "storage": jnp.int8}


def half(**options):
    return scale_by_mfac(damping=1.0, **HALF, **options)


TRANSFORMS = {
    "alone": preconditioner(),
    "a block a leaf": preconditioner(blocks="leaf"),
    "inverse kept": preconditioner(solver="inverse"),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), preconditioner(), optax.scale(-0.1)),
    "named_chain": optax.named_chain(("mfac", preconditioner()), ("rate", optax.scale(-0.1))),
    "masked": optax.masked(preconditioner(), {"bias": False, "kernel": True, "conv": True}),
    "partition": optax.partition(
        {"mfac": preconditioner(), "sgd": optax.sgd(0.1)}, {"bias": "sgd", "kernel": "mfac", "conv": "mfac"}
    ),
    "inject_hyperparams": injected(scale_by_mfac, damping=1.0),
    "apply_if_finite": optax.apply_if_finite(preconditioner(), 3),
    "mfac": mfac(0.1, NUM_GRADS, metric="diagonal", weight_decay=1e-3, storage=None),
    "mfac_published": mfac_published(0.1, NUM_GRADS),
    "inject_hyperparams of mfac": injected(
        mfac, learning_rate=0.1, metric="diagonal", weight_decay=1e-3, storage=None
    ),
    "apply_if_finite of mfac": optax.apply_if_finite(
        mfac(0.1, NUM_GRADS, metric="diagonal", storage=None), 3
    ),
    "bfloat16": half(),
    "bfloat16, a block a leaf": half(blocks="leaf"),
    "bfloat16, inverse kept": half(solver="inverse"),
    "bfloat16, chain": optax.chain(optax.clip_by_global_norm(1.0), half(), optax.scale(-0.1)),
    "bfloat16, masked": optax.masked(half(), {"bias": False, "kernel": True, "conv": True}),
    "bfloat16, inject_hyperparams": injected(scale_by_mfac, damping=1.0, **HALF),
    "bfloat16, mfac": mfac(0.1, metric="diagonal", **HALF),
    "bfloat16, inject_hyperparams of mfac": injected(mfac, learning_rate=0.1, metric="diagonal", **HALF),
    "bfloat16 parameters": mfac(0.1, 2 * NUM_GRADS, metric="diagonal", storage=None),
    "int8": scale_by_mfac(damping=1.0, **BYTES),
    "int8, inverse kept": scale_by_mfac(damping=1.0, solver="inverse", **BYTES),
    "int8, mfac": mfac(0.1, metric="diagonal", **BYTES),
    "int8, inject_hyperparams of mfac": injected(mfac, learning_rate=0.1, metric="diagonal", **BYTES),
}


class TrainingStep(NamedTuple):
    compiled: Any
    state: Any

    def window(self) -> list[jax.Array]:
        return jax.tree.leaves(optax.tree.get(self.state, "window"))


def compile_training(tx: optax.GradientTransformation, steps: int, params: Any = PARAMS) -> TrainingStep:
    def train(carry, _):
        params, state = carry
        gradients = jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p)))(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def train_all(params, state):
        if steps == 1:
            return train((params, state), None)[0]
        return jax.lax.scan(train, (params, state), length=steps)[0]

    state = tx.init(params)
    return TrainingStep(jax.jit(train_all, donate_argnames="state").lower(params, state).compile(), state)


QUICK = ("mfac", "inverse kept", "apply_if_finite of mfac", "bfloat16, mfac", "int8, mfac")


@pytest.fixture(
    scope="module",
    params=[*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMS if n not in QUICK)],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def step(name):
    times = {"bfloat16": 4, "int8": 16}.get(name.split(",")[0].split(" ")[0], 1)
    dtype = jnp.bfloat16 if name == "bfloat16 parameters" else jnp.float32
    longer = jax.tree.map(lambda p: jnp.concatenate([p] * times).astype(dtype), PARAMS)
    return compile_training(TRANSFORMS[name], 1, longer)


def copies_of_the_window(step: TrainingStep) -> list[str]:
    """The copy instructions of the program whose result is as large as a leaf of the window."""
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy(?:-start)?\(", step.compiled.as_text())
    return [shape for shape in copies if math.prod(map(int, shape.split(","))) >= NUM_GRADS * 4096]


def temporaries(step: TrainingStep) -> float:
    """Temporary memory of the program in units of the window."""
    return step.compiled.memory_analysis().temp_size_in_bytes / sum(rows.nbytes for rows in step.window())


def test_temporaries_are_below_a_tenth_of_the_window(step):
    assert temporaries(step) < 0.1


def test_the_program_has_no_copy_of_the_window(name, step):
    if name.startswith("apply_if_finite"):
        # Around a conditional inside a conditional XLA writes copies of a buffer to itself. They take
        # no memory (see above) and no time; two a leaf are all there may be.
        assert len(copies_of_the_window(step)) <= 2 * len(step.window())
    else:
        assert not copies_of_the_window(step)


def test_the_outputs_take_the_memory_of_the_state(step):
    # Scalars may be left out: apply_if_finite has one that it writes and never reads.
    arrays = [leaf for leaf in jax.tree.leaves(step.state) if leaf.ndim]
    assert step.compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in arrays)


@pytest.mark.slow
def test_a_scan_over_steps_never_copies_the_window():
    step = compile_training(TRANSFORMS["mfac"], steps=10)
    assert not copies_of_the_window(step)
    assert temporaries(step) < 0.1


@pytest.mark.slow
def test_many_leaves_take_hardly_more_operations_than_one():
    def operations(leaves):
        tx, params = preconditioner(), [jnp.ones(800 // leaves)] * leaves
        compiled: Any = jax.jit(tx.update).lower(params, tx.init(params)).compile()
        return compiled.cost_analysis()["flops"]

    assert operations(200) < 1.5 * operations(1)
