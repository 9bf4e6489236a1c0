"""Who comes from Adam, or from the PyTorch code of M-FAC, is told what takes the place of an argument."""

import inspect
import re
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from mfac_jax import cgfac, mfac, mfac_published, scale_by_mfac
from tests.mfac.small_runs import PARAMS

FACTORIES = (mfac, mfac_published, scale_by_mfac, cgfac)
FOREIGN: dict[str, Any] = {
    "b1": 0.9,
    "b2": 0.999,
    "damp": 1e-5,
    "eps": 1e-8,
    "eps_root": 0.0,
    "lr": 1e-3,
    "mu_dtype": jnp.bfloat16,
    "nesterov": True,
    "ngrads": 1024,
    "weight_decay_mask": None,
    "weightdecay": 1e-4,
    "window_size": 64,
}
# What Python says of all names that it does not know, and nothing is said beyond that.
UNKNOWN = {
    mfac: set(),
    mfac_published: set(),
    scale_by_mfac: {"lr", "weight_decay_mask", "weightdecay"},
    cgfac: {"mu_dtype", "ngrads"},
}


def said(make, **options) -> str:
    with pytest.raises(TypeError) as error:
        make(**options)
    return str(error.value)


@pytest.mark.parametrize("make", FACTORIES)
def test_every_foreign_argument_is_explained_where_it_has_a_counterpart(make):
    own = inspect.signature(make).parameters
    for name in FOREIGN.keys() - own.keys() - UNKNOWN[make]:
        message = said(make, **{name: FOREIGN[name]})
        assert message.startswith(f"{make.__name__} has no argument {name!r}. ")
        if name not in ("b2", "nesterov"):
            found = re.fullmatch(r".* Its counterpart is (\w+) \(default: (.+)\)\.", message)
            assert found
            assert found[2] == repr(own[found[1]].default)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (mfac, "b1", "Its counterpart is momentum (default: 0.9)."),
        (mfac, "eps", "Its counterpart is damping (default: 1.0)."),
        (mfac, "nesterov", "Its momentum always has Nesterov's term."),
        (scale_by_mfac, "b1", "Its counterpart is window_momentum (default: 0.0)."),
        (scale_by_mfac, "b2", "A metric keeps a second moment of its own, without a setting."),
        (cgfac, "window_size", "Its counterpart is num_batches (default: 1)."),
    ],
)
def test_the_message_names_argument_and_counterpart(make, name, message):
    whole = f"{make.__name__} has no argument '{name}'. {message}"
    assert said(make, **{name: FOREIGN[name]}) == whole


@pytest.mark.parametrize("make", FACTORIES)
def test_the_first_foreign_argument_is_named(make):
    options = {"eps": 1e-8, "b1": 0.9, "shampoo": 1}
    assert "'eps'" in said(make, **options)


@pytest.mark.parametrize("make", FACTORIES)
def test_all_other_names_are_left_to_python(make):
    for name in ("shampoo", *UNKNOWN[make]):
        message = f"{make.__name__}() got an unexpected keyword argument '{name}'"
        assert said(make, **{name: FOREIGN.get(name)}).startswith(message)


@pytest.mark.parametrize("make", FACTORIES)
def test_the_signature_shows_the_own_arguments_alone(make):
    parameters = inspect.signature(make).parameters.values()
    kinds = {p.kind for p in parameters}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert FOREIGN.keys() & {p.name for p in parameters} == (
        {"nesterov"} if make is scale_by_mfac else set()
    )


@pytest.mark.parametrize("make", [mfac, mfac_published, scale_by_mfac])
def test_inject_hyperparams_reads_the_signature(make):
    injected = optax.inject_hyperparams(make, static_args="num_grads")
    state: Any = injected(num_grads=2, damping=0.5).init(PARAMS)
    assert state.hyperparams["damping"] == 0.5
    assert "b1" in said(injected, b1=0.9)
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(make, static_args="b1")
