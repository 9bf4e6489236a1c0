"""Calls outside of jit: after the second step nothing is compiled or traced, and memory does not grow."""

import gc
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mfac_jax

SHAPES = {"bias": (5,), "kernel": (4, 3)}
NUM_GRADS = 4
slow = pytest.mark.slow
EVENTS = ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_trace_duration")


class Counter:
    """Compilations and traces. A program that comes from the folder of programs counts too."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event in EVENTS:
            self.names.append(f"{event.split('/')[-1]} of {kwargs.get('fun_name')}")

    def compiled(self) -> list[str]:
        """Without traces: the shapes of a new chain's state are traced, and compiled never."""
        return [name for name in self.names if "compile" in name]


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


GRADIENTS = [tree(seed) for seed in range(8)]
Call = Callable[[int], Any]


def steps(tx: optax.GradientTransformation) -> Call:
    """Each call takes a step; some gradients are refused."""
    params = tree(9)
    carried = [tx.init(params)]
    bad = {name: x + jnp.nan for name, x in params.items()}

    def call(i):
        updates, carried[0] = tx.update(bad if i % 7 == 1 else GRADIENTS[i % 8], carried[0], params)
        return updates

    return call


def scale(**options) -> Call:
    return steps(mfac_jax.scale_by_mfac(NUM_GRADS, options.pop("damping", 0.5), **options))


def injected(factory, *static: str, **options) -> Call:
    inject = optax.inject_hyperparams(factory, static_args=("num_grads", *static))
    return steps(inject(num_grads=NUM_GRADS, **options))


def state_after_steps() -> Any:
    tx = mfac_jax.mfac(num_grads=NUM_GRADS)
    state: Any = tx.init(tree(9))
    for g in GRADIENTS:
        _, state = tx.update(g, state)
    return state


def products() -> Call:
    state = optax.tree.get(state_after_steps(), "ScaleByMFACState")
    return lambda i: mfac_jax.ihvp(state, GRADIENTS[i % 8], 1e-3 * (1 + i % 5))


def figures() -> Call:
    state = state_after_steps()
    return lambda i: mfac_jax.diagnostics(state)


def fisher(**options) -> Call:
    """Methods of `FisherInverse`, each with other numbers at each call."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)

    def call(i):
        inverse = mfac_jax.FisherInverse.from_gradients(stacked, 1e-2 * (1 + i % 3), **options)
        indices = np.random.default_rng(i).integers(0, 17, 1 + i % 150)
        found = inverse.submatrix(indices)
        assert found.shape == (len(indices),) * 2
        return inverse.ihvp(GRADIENTS[i % 8]), inverse.diagonal(), inverse.entry(i % 17, 3), found

    return call


def halving(count):
    return 0.5 ** (1 + count / 100)


WARM = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 100)
CALLS: dict[str, Callable[[], Call]] = {
    "scale_by_mfac": scale,
    "kept inverse": lambda: scale(solver="inverse"),
    "kept inverse, moving damping": lambda: scale(solver="inverse", damping=halving, relative_damping=True),
    "a block per leaf": lambda: scale(blocks="leaf", solver="inverse"),
    "blocks of a function": lambda: scale(blocks=str),
    "diagonal metric": lambda: scale(metric="diagonal", relative_damping=True),
    "rotated metric": lambda: scale(metric="rotated", relative_damping=True),
    "bfloat16": lambda: scale(storage=jnp.bfloat16),
    "int8": lambda: scale(storage=jnp.int8),
    "step adaptation": lambda: scale(step_adaptation=0.3),
    "step adaptation of a schedule": lambda: scale(step_adaptation=halving),
    "momentum": lambda: scale(window_momentum=0.9, nesterov=True),
    "on the host": lambda: scale(host_chunk=2),
    "mfac": lambda: steps(mfac_jax.mfac(num_grads=NUM_GRADS)),
    "mfac, kept inverse": lambda: steps(mfac_jax.mfac(num_grads=NUM_GRADS, solver="inverse")),
    "mfac, schedules": lambda: steps(mfac_jax.mfac(WARM, NUM_GRADS, damping=halving)),
    "mfac, weight decay": lambda: steps(
        mfac_jax.mfac(0.1, NUM_GRADS, weight_decay=0.1, mask={"bias": False, "kernel": True})
    ),
    "mfac without momentum": lambda: steps(mfac_jax.mfac(0.1, NUM_GRADS, momentum=None, blocks="leaf")),
    "mfac_published": lambda: steps(mfac_jax.mfac_published(0.1, NUM_GRADS)),
    "inject_hyperparams(mfac)": lambda: injected(mfac_jax.mfac, learning_rate=0.1),
    "inject_hyperparams(mfac), schedules": lambda: injected(
        mfac_jax.mfac, learning_rate=WARM, damping=halving
    ),
    "inject_hyperparams(mfac), kept inverse": lambda: injected(
        mfac_jax.mfac, "solver", learning_rate=0.1, solver="inverse"
    ),
    "inject_hyperparams(scale_by_mfac)": lambda: injected(
        mfac_jax.scale_by_mfac, "solver", damping=0.5, solver="inverse"
    ),
    "inject_hyperparams(mfac_published)": lambda: injected(mfac_jax.mfac_published, learning_rate=0.1),
    "masked": lambda: steps(optax.masked(mfac_jax.mfac(0.1, NUM_GRADS), {"bias": False, "kernel": True})),
    "chain": lambda: steps(optax.chain(optax.clip_by_global_norm(1.0), mfac_jax.mfac(0.1, NUM_GRADS))),
    "ihvp": products,
    "diagnostics": figures,
    "FisherInverse": fisher,
    "FisherInverse, a block per leaf": lambda: fisher(blocks="leaf"),
    "FisherInverse, blocks of 3": lambda: fisher(blocks=3),
}
# What fails where a loop, a conditional or a size slips out of a jit. The rest is slow.
QUICK = ("inject_hyperparams(mfac), kept inverse", "FisherInverse")
SETTLED = 2_000  # calls in which caches of JAX grow by up to 8 MB
# What would grow first; `main` measures them all, for longer.
MEASURED = ("kept inverse, moving damping", "mfac, schedules", "inject_hyperparams(mfac)", "FisherInverse")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=slow) for n in CALLS])
def test_calls_outside_of_jit_compile_nothing_after_the_second(counter, name):
    call = CALLS[name]()
    for i in range(2):
        call(i)
    counter.names.clear()
    for i in range(2, 12):
        jax.block_until_ready(call(i))
    assert not counter.compiled()


def test_the_counter_sees_a_loop_outside_of_jit(counter):
    for bound in range(3):
        jax.lax.while_loop(lambda x, bound=bound: x < bound, lambda x: x + 1, jnp.asarray(0))
    assert len(counter.compiled()) >= 3


def resident_memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def compiled_and_grown(name: str, counter: Counter, calls: int) -> tuple[list[str], int, int]:
    """What was compiled, how many bytes of memory and how many arrays came to stay in so many calls."""
    call = CALLS[name]()
    for i in range(2):
        call(i)
    counter.names.clear()
    for i in range(2, SETTLED):
        call(i)
    gc.collect()
    memory, arrays = resident_memory(), len(jax.live_arrays())
    for i in range(SETTLED, calls):
        call(i)
    gc.collect()
    return counter.compiled(), resident_memory() - memory, len(jax.live_arrays()) - arrays


@pytest.mark.exhaustive
@slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", MEASURED)
def test_many_calls_outside_of_jit_take_no_memory(counter, name):
    compiled, memory, arrays = compiled_and_grown(name, counter, SETTLED + 1_000)
    assert not compiled
    assert arrays == 0
    assert memory < 2**21  # a program for each call would be 3 GB; heaps that settle are a few 100 kB


def main() -> None:
    """All calls, or those that are named, 10,000 times: about four hours of one core."""
    found = Counter()
    jax.monitoring.register_event_duration_secs_listener(found)
    for each in sys.argv[1:] or CALLS:
        names, grown, more = compiled_and_grown(each, found, 10_000)
        print(f"{each}: {len(names)} compilations, {grown / 2**20:+.1f} MB, {more:+d} arrays", flush=True)


if __name__ == "__main__":
    main()
