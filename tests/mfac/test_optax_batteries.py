"""optax's own test batteries, which ship in its wheel, run on `mfac_jax.mfac` and
`mfac_jax.mfac_published`.

absl leaves one method a case on a battery's class; each still holds the function it was made from
and the arguments of its case. The functions run again with the arguments that choose the optimizer
set to `mfac`, and with every combination of the others (problems, dtypes) but the complex dtypes,
which M-FAC refuses (see test_validation.py).
"""

import inspect
import os
import unittest
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from optax._src import alias
from optax.schedules import _inject

import mfac_jax

# sharding_test sets XLA_FLAGS and builds optimizers with arguments that are deprecated.
with mock.patch.dict(os.environ), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from optax._src import alias_test, float64_test, sharding_test
    from optax.contrib import _common_test

# With these, M-FAC converges on every problem of the batteries in the steps they allow.
_CONFIGURATIONS = {
    "default": ("mfac", {"learning_rate": 0.01, "num_grads": 8}),
    "as published": (
        "mfac_published",
        {"learning_rate": 0.03, "num_grads": 4, "damping": 1.0, "weight_decay": None},
    ),
    "every option": (
        "mfac_published",
        {
            "learning_rate": 0.03,
            "num_grads": 3,
            "damping": 1.0,
            "momentum": 0.5,
            "weight_decay": 1e-5,
            "blocks": "leaf",
            "solver": "inverse",
        },
    ),
}
_QUICK = "ShardingTest.test_init_with_abstract_input-default"  # all others are slow
_BATTERIES = [
    alias_test.AliasTest,
    _common_test.ContribTest,
    float64_test.Float64Test,
    sharding_test.ShardingTest,
]
_METHODS = {
    "AliasTest.test_gradient_accumulation",
    "AliasTest.test_optimization",
    "AliasTest.test_optimizers_accept_extra_args",
    "AliasTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
    "AliasTest.test_preserve_dtype",
    "AliasTest.test_state_shape_dtype_shard_stability",
    "ContribTest.test_gradient_accumulation",
    "ContribTest.test_optimizers",
    "ContribTest.test_optimizers_accept_extra_args",
    "ContribTest.test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such",
    "ContribTest.test_optimizers_can_be_wrapped_in_inject_hyperparams",
    "ContribTest.test_preserve_dtype",
    "ContribTest.test_state_shape_dtype_shard_stability",
    "Float64Test.test_mixed_dtype_input_outputs",
    "ShardingTest.test_init_with_abstract_input",
    "ShardingTest.test_state_sharding_type_init_match_update",
    "ShardingTest.test_state_sharding_type_preserved_with_jit",
}
_METHODS_LEFT_OUT = {
    "AliasTest.test_explicit_dtype",  # of options that sgd and adam have
    "ShardingTest.test_microbatch_with_explicit_sharding",  # there is no optimizer in it
}


class Case(NamedTuple):
    battery: type[unittest.TestCase]
    method: Callable[..., None]
    arguments: dict[str, Any]

    def run(self) -> None:
        """Run the case, its set-up and clean-up; errors and skips come out as exceptions."""
        body = {"runTest": lambda test: self.method(test, **self.arguments)}
        type(self.battery.__name__, (self.battery,), body)().debug()


def _cases_of_optax() -> list[Case]:
    cases = []
    for battery in _BATTERIES:
        for name, test in vars(battery).items():
            if name.startswith("test"):
                arguments = inspect.getclosurevars(test).nonlocals["testcase_params"]
                names = list(inspect.signature(test.__wrapped__).parameters)[1:]
                named = (
                    arguments if isinstance(arguments, dict) else dict(zip(names, arguments, strict=True))
                )
                cases.append(Case(battery, test.__wrapped__, named))
    return cases


def _method_name(case: Case) -> str:
    return f"{case.battery.__name__}.{case.method.__name__}"


def _cases_of_mfac() -> dict[str, Case]:
    """optax's cases with `mfac` for the optimizer; those that became equal are one."""
    cases = {}
    for label, (name, kwargs) in _CONFIGURATIONS.items():
        constructor = getattr(mfac_jax, name)
        choice = {
            "opt_name": name,
            "opt_kwargs": kwargs,
            "wrapper_name": None,
            "wrapper_kwargs": None,
            "optimizer": constructor(**kwargs),
            "transform_constr": constructor,
            "transform_kwargs": kwargs,
        }
        for case in _cases_of_optax():
            others = {name: value for name, value in case.arguments.items() if name not in choice}
            tests_an_optimizer = {"opt_kwargs", "optimizer", "transform_constr"} & case.arguments.keys()
            if tests_an_optimizer and not {jnp.complex64, jnp.complex128} & set(others.values()):
                chosen = {name: choice[name] for name in case.arguments.keys() - others.keys()}
                values = [getattr(value, "__name__", str(value)) for value in others.values()]
                cases["-".join([_method_name(case), label, *values])] = case._replace(
                    arguments=chosen | others
                )
    return cases


_CASES = _cases_of_mfac()


@pytest.fixture
def optax_with_mfac(monkeypatch):
    """optax as the batteries need it to see `mfac`.

    They look optimizers up by name among optax's aliases. They know the arguments of these that
    `inject_hyperparams` cannot trace and pass them as `static_args`; `num_grads`, a size, is one more.
    They compare versions as strings, by which jax 0.10 is older than 0.7, and skip.
    """
    inject = _inject.inject_hyperparams
    for name in ("mfac", "mfac_published"):
        monkeypatch.setattr(alias, name, getattr(mfac_jax, name), raising=False)
    monkeypatch.setattr(
        _inject,
        "inject_hyperparams",
        lambda factory, static_args=(): inject(factory, {*static_args, "num_grads"}),
    )
    monkeypatch.setattr(jax, "__version__", "9")
    x64 = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", x64)  # Float64Test leaves it on where it fails


@pytest.mark.usefixtures("optax_with_mfac")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name.startswith(_QUICK) else [pytest.mark.slow])
        for name, case in _CASES.items()
    ],
)
def test_every_case_of_the_batteries_passes_and_none_is_skipped(case):
    try:
        case.run()
    except unittest.SkipTest as skip:
        pytest.fail(f"skipped: {skip}")


def test_every_method_that_tests_an_optimizer_is_taken():
    """Fails where a new optax has a new method: choose whether it belongs to `mfac`."""
    assert {_method_name(case) for case in _CASES.values()} == _METHODS
    assert {_method_name(case) for case in _cases_of_optax()} == _METHODS | _METHODS_LEFT_OUT
