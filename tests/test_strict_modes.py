"""Strict users: every public name works under each flag by which JAX refuses what it else lets pass."""

import contextlib

import jax
import numpy as np
import pytest

import mfac_jax
from mfac_jax import components, pruning
from tests.strict_cases import CASES

FLAGS = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
}
OTHER_FLAGS = {"x64": lambda: jax.enable_x64(True), "disable_jit": jax.disable_jit}
ALL_CASES = [pytest.param(name, what, id=f"{name}, {what}") for name in CASES for what in CASES[name]]


@contextlib.contextmanager
def flags(*names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context((FLAGS | OTHER_FLAGS)[name]())
        yield


def unchanged(function):
    return function


def traced_without_leaks(function):
    """The function, compiled; before its first call it is traced, and no tracer may outlive that."""
    compiled, is_traced = jax.jit(function), []

    def call(*args):
        if not is_traced:
            with jax.checking_leaks():
                jax.eval_shape(function, *args)
            is_traced.append(True)
        return compiled(*args)

    return call


def assert_same(found, expected, rtol):
    """Both trees are equal: text exactly, numbers up to this part of themselves, or of one."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(y, str):
            assert x == y
            continue
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        x, y = x.astype(np.float64), y.astype(np.float64)
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def test_every_public_name_has_a_case():
    # The names of components are those of the case "components".
    assert set(CASES) == set(mfac_jax.__all__) | set(pruning.__all__)
    assert set(components.__all__) == {
        "Coordinates",
        "Metric",
        "Solver",
        "StepLength",
        "StepView",
        "Storage",
    }


@pytest.mark.parametrize("name", CASES)
def test_a_public_name_works_under_all_flags_at_once(name):
    case = next(iter(CASES[name].values()))
    with flags(*FLAGS):
        compiled, direct = case(traced_without_leaks), case(unchanged)
    assert_same(direct, compiled, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flag", [*FLAGS, *OTHER_FLAGS])
@pytest.mark.parametrize("run", [jax.jit, unchanged], ids=["jit", "not"])
@pytest.mark.parametrize(("name", "what"), ALL_CASES)
def test_a_flag_changes_no_number(name, what, run, flag):
    case = CASES[name][what]
    expected = case(run)
    with flags(flag):
        found = case(run)
    if flag != "x64":  # more digits in sums, and integers of 64 bits
        assert_same(found, expected, rtol=0 if flag in FLAGS else 1e-5)
