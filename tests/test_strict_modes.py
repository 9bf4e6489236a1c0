"""Strict users: every public name works under each flag by which JAX refuses what it else lets pass."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mfac_jax
from mfac_jax import components, pruning
from tests.strict_cases import CASES, ROWS, X, Y, batch_loss, masks, params, stacked, stream

FLAGS = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
}
ALL_CASES = [pytest.param(name, what, id=f"{name}, {what}") for name in CASES for what in CASES[name]]


@contextlib.contextmanager
def flags(*names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(FLAGS[name]())
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
    assert_finite(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(y, str):
            assert x == y
        else:
            x, y = np.asarray(x), np.asarray(y)
            assert x.dtype == y.dtype
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=rtol, atol=rtol)


def assert_finite(tree):
    for x in jax.tree.leaves(tree):
        assert isinstance(x, str) or np.all(np.isfinite(np.asarray(x).astype(float)))


# The others share their programs with these.
SHORT = ["mfac", "cgfac", "FisherInverse", "value_and_grad_with_factors", "nnx_value_and_grad_with_factors"]


def stepped(tx, as_array, **extra):
    """The state, and the update, of a step."""
    p, g = (jax.tree.map(as_array, tree) for tree in (params(), stream(params())[1]))
    updates, state = tx.update(g, tx.init(p), p, **extra)
    return updates, state


def trees(as_array) -> tuple[Any, Any]:
    """Parameters and stacked gradients."""
    return jax.tree.map(as_array, (params(), stacked(params())))


def layer(as_array):
    return {"dense/kernel": mfac_jax.LayerFactors(as_array(X), as_array(Y), "dense/bias")}


def inverse_of(as_array):
    p, grads = trees(as_array)
    fisher = mfac_jax.FisherInverse.from_gradients(grads, 1e-3)
    return fisher.ihvp(p), fisher.diagonal()


# By name, what is done with trees that a function makes arrays of.
WITH_FLOAT64 = {
    "init": lambda make: mfac_jax.mfac(num_grads=ROWS).init(trees(make)[0]),
    "mfac": lambda make: stepped(mfac_jax.mfac(num_grads=ROWS, weight_decay=1e-3), make),
    "mfac_published": lambda make: stepped(mfac_jax.mfac_published(num_grads=ROWS), make),
    "cgfac": lambda make: stepped(mfac_jax.cgfac(), make, curvature=layer(make)),
    "FisherInverse": inverse_of,
    "collect_gradients": lambda make: mfac_jax.collect_gradients(
        batch_loss, trees(make)[0], [(make(X), make(Y))], 1
    ),
    "obs_update": lambda make: pruning.obs_update(*trees(make), masks(), 1e-3),
}


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
        "low_rank",
        "rotated_metric",
    }


@pytest.mark.parametrize("name", CASES)
def test_a_public_name_works_under_all_flags_at_once(name):
    case = next(iter(CASES[name].values()))
    with flags(*FLAGS):
        found = case(unchanged)
    assert_finite(found)


@pytest.mark.parametrize(
    "name", SHORT + [pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in SHORT]
)
def test_a_public_name_leaks_no_tracer_and_gives_the_same_under_jit(name):
    case = next(iter(CASES[name].values()))
    with flags(*FLAGS):
        compiled, direct = case(traced_without_leaks), case(unchanged)
    assert_same(direct, compiled, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mfac", "cgfac", "gauss_newton", "FisherInverse", "prune", "set_masks"])
def test_no_tracer_outlives_an_operation_outside_of_jit(name):
    with jax.checking_leaks():  # which compiles every operation anew
        next(iter(CASES[name].values()))(unchanged)


@pytest.mark.parametrize("name", WITH_FLOAT64)
def test_float64_of_numpy_is_float32_without_a_warning(name):
    function = WITH_FLOAT64[name]
    double = function(lambda x: np.asarray(x, np.float64))
    assert_same(double, function(lambda x: jnp.asarray(x, jnp.float32)), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_FLOAT64)
def test_float64_of_numpy_stays_float64_with_x64(name):
    function = WITH_FLOAT64[name]
    with jax.enable_x64(True):
        double = function(lambda x: np.asarray(x, np.float64))
        assert_same(double, function(lambda x: jnp.asarray(x, jnp.float64)), rtol=0)
    assert "float64" in {str(x.dtype) for x in jax.tree.leaves(double)}


@pytest.mark.slow
@pytest.mark.parametrize("run", [jax.jit, unchanged], ids=["jit", "not"])
@pytest.mark.parametrize(("name", "what"), ALL_CASES)
def test_flags_change_no_number(name, what, run):
    expected = CASES[name][what](run)
    with flags(*FLAGS):
        assert_same(CASES[name][what](run), expected, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("run", [jax.jit, unchanged], ids=["jit", "not"])
@pytest.mark.parametrize(("name", "what"), ALL_CASES)
def test_all_flags_at_once_with_x64(name, what, run):
    with flags(*FLAGS), jax.enable_x64(True):
        assert_finite(CASES[name][what](run))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_public_name_works_with_jit_disabled(name):
    case = next(iter(CASES[name].values()))
    expected = case(jax.jit)
    with jax.disable_jit(), jax.debug_nans(True):
        assert_same(case(unchanged), expected, rtol=1e-4)
