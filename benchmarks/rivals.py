"""The rivals of M-FAC that need more than a line: transforms, schedules, and what is evaluated."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks.normuon import normuon
from benchmarks.soap import soap
from examples.common.optimizers import warmup_cosine


def matrices(params: optax.Params) -> optax.Params:
    """Muon's dimension numbers: a kernel is a matrix of (h * w * in, out), a vector none."""

    def dimensions(p):
        return (
            optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim > 1 else None
        )

    return jax.tree.map(dimensions, params)


def import_package(name: str) -> Any:
    """Import a package that users install; psgd_jax 0.2.9 expects a module of optax where it once was."""
    sys.modules.setdefault("optax._src.clipping", importlib.import_module("optax.transforms._clipping"))
    return importlib.import_module(name)


def _kron(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """PSGD-Kron of psgd_jax."""
    tx = import_package("psgd_jax.kron").kron(learning_rate)
    return optax.GradientTransformation(tx.init, tx.update)  # it refuses the extra arguments it declares


# -------------------------------------------------------------------------------- without a rate to tune


class AverageState(NamedTuple):
    """State of `averaged`.

    Attributes:
      step: () int32, steps so far.
      average: mean of the parameters, later ones weigh more.
      inner: state of the transform inside.
    """

    step: jax.Array
    average: optax.Params
    inner: Any


def averaged(inner: optax.GradientTransformation, gamma: float = 8.0) -> optax.GradientTransformation:
    """Keep the mean of the parameters by polynomial decay: step t weighs (1 + gamma) / (t + gamma).

    DoG's authors evaluate this mean, with gamma = 8 (Ivgi, Hinder and Carmon, *DoG is SGD's Best Friend*,
    2023, arXiv 2302.12022).
    """

    def init(params):
        return AverageState(jnp.zeros((), jnp.int32), params, inner.init(params))

    def update(updates, state, params: Any = None):
        updates, inner_state = inner.update(updates, state.inner, params)
        step = state.step + 1
        share = (1 + gamma) / (step + gamma)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda mean, p: mean + share * (p - mean), state.average, new)
        return updates, AverageState(step, average, inner_state)

    return optax.GradientTransformation(init, update)


def _dog(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return averaged(optax.contrib.dog(learning_rate))


def schedule(optimizer: str, steps: int) -> optax.Schedule:
    """The shape that all share, with a peak of one; what needs another has its own."""
    shared = warmup_cosine(1.0, steps)
    shapes = {
        # D-Adaptation and Prodigy divide by a sum of rates: the first one may not be zero.
        "dadapt-adamw": lambda step: shared(step + 1),
        "prodigy": lambda step: shared(step + 1),
        # Their averages take the place of a decay.
        "schedule-free-adamw": optax.warmup_constant_schedule(0.0, 1.0, max(1, steps // 10)),
        "dog": optax.constant_schedule(1.0),
    }
    return shapes.get(optimizer, shared)


def _of_schedule_free(opt_state, params):
    return optax.contrib.schedule_free_eval_params(optax.tree.get(opt_state, "ScheduleFreeState"), params)


def _of_average(opt_state, params):
    del params
    return optax.tree.get(opt_state, "AverageState").average


# Where an optimizer is not evaluated at its newest parameters: from its state and those to the others.
EVALUATED: Mapping[str, Callable[[Any, optax.Params], optax.Params]] = {
    "schedule-free-adamw": _of_schedule_free,
    "dog": _of_average,
}

# From a schedule to a transform.
TRANSFORMS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "nadamw": optax.nadamw,
    "muon": lambda rate: optax.contrib.muon(rate, muon_weight_dimension_numbers=matrices),
    "normuon": lambda rate: normuon(rate, matrices),
    "soap": soap,
    "kron": _kron,
    # Its authors ask for the safeguard where there is a warm-up.
    "prodigy": lambda rate: optax.contrib.prodigy(rate, safeguard_warmup=True),
    "dadapt-adamw": optax.contrib.dadapt_adamw,
    "schedule-free-adamw": optax.contrib.schedule_free_adamw,
    "dog": _dog,
}
