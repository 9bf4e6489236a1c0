"""The clock of all benchmarks: functions timed in turn, and what is kept of their seconds."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# From what a round draws, such as a new gradient, to whatever has to be waited for.
Timed = Callable[[Any], Any]


def stopwatch(function: Callable[..., Any], *inputs: Any) -> tuple[Any, float]:
    """Call the function and wait for its result; return the result and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*inputs))
    return result, time.perf_counter() - start


def in_turn(functions: Mapping[str, Timed], inputs: Iterable[Any]) -> dict[str, list[float]]:
    """Time each function in each round; the first round warms up and does not count.

    They run in turn, so that other work of the machine disturbs all of them alike.

    Args:
      functions: what to time, by name.
      inputs: one a round. Each is ready before the clock starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for value in map(jax.block_until_ready, inputs):
        for name, function in functions.items():
            seconds[name].append(stopwatch(function, value)[1])
    return {name: rounds[1:] for name, rounds in seconds.items()}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": float(np.median(seconds)), "min": min(seconds), "max": max(seconds)}


def cores() -> int:
    """How many cores this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert count is not None
    return count


def conditions(rounds: int) -> str:
    """The line above a table of times: device, cores and rounds."""
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; medians of {rounds} rounds\n"
