"""The process of `old_and_new` that takes steps with the `mfac_jax` on its path.

It imports nothing of this repository but `mfac_jax`, so that it runs beside any revision. First it prints
the file that `mfac_jax` comes from. Then it answers each line of JSON: a case, which it compiles, or
`{"steps": k}`, where the answer is the seconds that these steps took.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import mfac_jax

DAMPING = 1e-3  # of gradients whose squared norm is about one


def start(num_grads: int, optimizer: Any, shapes: list[list[int]]) -> Callable[[int], float]:
    """Compile a step of `mfac`, or of `scale_by_mfac` with that solver.

    Returns:
      A function that takes so many steps, and returns their seconds.
    """
    ends = list(itertools.accumulate(map(math.prod, shapes)))

    @jax.jit
    def draw(number):
        flat = jax.random.normal(jax.random.key(number), (ends[-1],)) / math.sqrt(ends[-1])
        return [part.reshape(shape) for part, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)]

    if optimizer == "mfac":
        transform: Any = mfac_jax.mfac(num_grads=num_grads, storage=None)
    else:
        transform = mfac_jax.scale_by_mfac(num_grads, DAMPING, solver=optimizer)
    params, numbers = draw(0), itertools.count(1)
    state = jax.jit(transform.init)(params)
    update = jax.jit(transform.update, donate_argnums=1)  # without donation the window would be copied

    def take(steps: int) -> float:
        nonlocal state
        gradients = jax.block_until_ready([draw(next(numbers)) for _ in range(steps)])
        begin = time.perf_counter()
        for gradient in gradients:
            _, state = update(gradient, state, params)
        jax.block_until_ready(state)
        return time.perf_counter() - begin

    take(1)
    return take


def main() -> None:
    """Answer until the input ends."""
    print(mfac_jax.__file__, flush=True)
    take: Any = None
    for request in map(json.loads, sys.stdin):
        if "steps" in request:
            print(take(**request), flush=True)
        else:
            take = None  # frees the window of the case before
            take = start(**request)
            print("ready", flush=True)


if __name__ == "__main__":
    main()
