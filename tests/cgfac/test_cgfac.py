"""CG-FAC against explicit Kronecker products and Gauss-Newton matrices in float64; its state, bad input."""

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax import (
    cgfac,
    empirical_fisher,
    gauss_newton,
    ihvp,
    nnx_value_and_grad_with_factors,
    scale_by_cgfac,
    scale_by_mfac,
    value_and_grad_with_factors,
)

LayerFactors: Any = mfac_jax.LayerFactors  # of NumPy's arrays too
NAN, INF = float("nan"), float("inf")
# Of float32 solutions: rounding of 1e-7, times the largest eigenvalue over the damping, some 1e3 to 1e4.
AFTER_CG = 1e-3


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def layer(kernel: tuple[int, ...], split: int, rows: tuple[int, ...], bias: bool, seed: int = 0):
    """A random gradient of a layer whose kernel has `split` axes of inputs, and its factors."""
    rng = np.random.default_rng(seed)
    size_in, size_out = np.prod(kernel[:split], dtype=int), np.prod(kernel[split:], dtype=int)
    gradient = {"kernel": rng.standard_normal(kernel)}
    if bias:
        gradient["bias"] = rng.standard_normal(kernel[split:])
    inputs, output_grads = rng.standard_normal((*rows, size_in)), rng.standard_normal((*rows, size_out))
    return gradient, inputs, output_grads


def kronecker_solution(gradient, inputs, output_grads, damping: float):
    """(A (x) B + damping I)^-1 times the gradient, `(in, out)`, with the bias as last row."""
    n, size_in, size_out = len(inputs), inputs.shape[-1], output_grads.shape[-1]
    a, b = inputs.reshape(-1, size_in), output_grads.reshape(-1, size_out)
    V = gradient["kernel"].reshape(size_in, size_out)
    if "bias" in gradient:
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        V = np.concatenate([V, gradient["bias"].reshape(1, -1)])
    fisher = np.kron(a.T @ a / n, b.T @ b / len(b))
    return np.linalg.solve(fisher + damping * np.eye(V.size), V.ravel()).reshape(V.shape)


def as_matrix(tree, size_out: int) -> np.ndarray:
    rows = [np.reshape(tree["kernel"], (-1, size_out))]
    return np.concatenate([*rows, np.reshape(tree["bias"], (1, -1))] if "bias" in tree else rows)


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def tx_and_state(params, *args, **options) -> tuple[Any, Any]:
    tx = scale_by_cgfac(*args, **options)
    return tx, tx.init(params)


LAYERS = {
    "more examples than entries": ((6, 5), 1, (40,)),
    "fewer examples than inputs": ((30, 5), 1, (12,)),
    "fewer examples than outputs": ((6, 25), 1, (12,)),
    "fewer examples than either": ((20, 25), 1, (6,)),
    "one example": ((5, 4), 1, (1,)),
    "places": ((6, 5), 1, (4, 3, 2)),
    "convolution": ((3, 3, 2, 7), 3, (5, 4, 4)),
    "several axes": ((6, 2, 3), 1, (9, 4)),
}


@pytest.mark.parametrize(("tolerance", "damping"), [(1e-1, 1.0), (1e-3, 1e-3), (1e-8, 1e-3)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_is_below_the_tolerance_asked_for(x64, name, bias, tolerance, damping):
    kernel, split, rows = LAYERS[name]
    gradient, inputs, output_grads = layer(kernel, split, rows, bias)
    tx, state = tx_and_state(gradient, damping, tolerance=tolerance, max_iterations=3000)
    factors = {"kernel": LayerFactors(inputs, output_grads, "bias" if bias else None)}
    updates, state = tx.update(gradient, state, curvature=factors)
    expected = kronecker_solution(gradient, inputs, output_grads, damping)
    assert relative_error(as_matrix(updates, output_grads.shape[-1]), expected) < tolerance
    assert 0 < int(state.iterations[0]) < 3000
    assert not np.any(state.indefinite)


def test_the_gradient_of_the_batch_needs_no_more_than_its_own_space(x64):
    """A gradient a^T b / N is in both spans, so the damping divides no rounding outside of them."""
    _, inputs, output_grads = layer((40, 30), 1, (8,), False)
    gradient = {"kernel": (inputs.T @ output_grads / 8).astype(np.float32)}
    inputs, output_grads = np.float32(inputs), np.float32(output_grads)
    tx, state = tx_and_state(gradient, 1e-6, tolerance=1e-3, max_iterations=3000)
    updates, state = tx.update(gradient, state, curvature={"kernel": LayerFactors(inputs, output_grads)})
    outside = updates["kernel"] - inputs.T @ np.linalg.lstsq(inputs.T, updates["kernel"])[0]
    assert np.linalg.norm(outside) < 1e-3 * np.linalg.norm(updates["kernel"])


def linear_loss(params, x, y):
    """Of a linear network of any depth, with squared error."""
    for W in params:
        x = x @ W
    return jnp.mean(jnp.sum((x - y) ** 2, axis=1)) / 2


def test_a_linear_network_with_squared_error_has_the_natural_gradient_of_gauss_newton(x64):
    """H = I: rows whose squares add up to the derivative of the outputs make the Gauss-Newton matrix."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(shape)) for shape in ((5, 4), (4, 6), (6, 3))]
    x, y, damping = rng.standard_normal((20, 5)), rng.standard_normal((20, 3)), 0.1
    _, gradient, factors = value_and_grad_with_factors(linear_loss)(params, x, y)
    for number in range(3):
        back = functools.reduce(jnp.matmul, params[number + 1 :], jnp.eye(params[number].shape[1]))
        of_outputs = jnp.sqrt(3.0) * back.T  # B = back back^T from three rows
        factors[str(number)] = LayerFactors(factors[str(number)].inputs, of_outputs)
    tx, state = tx_and_state(params, damping, tolerance=1e-10, max_iterations=3000)
    updates, _ = tx.update(gradient, state, curvature=factors)
    for number, W in enumerate(params):

        def outputs_of(W, number=number):
            layers = [*params[:number], W, *params[number + 1 :]]
            return functools.reduce(jnp.matmul, layers, jnp.asarray(x))

        J = np.asarray(jax.jacobian(outputs_of)(W)).reshape(-1, W.size)
        matrix = J.T @ J / len(x) + damping * np.eye(W.size)
        expected = np.linalg.solve(matrix, gradient[number].ravel()).reshape(W.shape)
        assert relative_error(updates[number], expected) < 1e-9


# Other matrices.

MLP = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
X = jax.random.normal(jax.random.key(0), (12, 4))
LABELS = jnp.arange(12) % 3
PARAMS = MLP.init(jax.random.key(1), X)["params"]


def cross_entropy(outputs, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def apply(params, x=X):
    return MLP.apply({"params": params}, x)


def loss(params):
    return cross_entropy(apply(params))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def dense(product, params) -> np.ndarray:
    """The matrix of a linear function of trees."""
    vector, unravel = ravel_pytree(params)
    product = jax.jit(product)
    return np.stack([flat(product(unravel(e))) for e in jnp.eye(len(vector), dtype=vector.dtype)], axis=1)


@pytest.mark.parametrize("kind", ["cross-entropy", pytest.param("squared error", marks=pytest.mark.slow)])
def test_gauss_newton_is_that_of_the_jacobian_and_the_hessian(x64, kind):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    x = X.astype(jnp.float64)
    of_outputs = cross_entropy if kind == "cross-entropy" else lambda z: jnp.mean(optax.l2_loss(z).sum(1))
    found = dense(gauss_newton(lambda p: apply(p, x), of_outputs, params), params)
    J = np.concatenate(
        [np.reshape(j, (36, -1)) for j in jax.tree.leaves(jax.jacobian(lambda p: apply(p, x))(params))], 1
    )
    H = np.reshape(jax.hessian(of_outputs)(apply(params, x)), (36, 36))
    np.testing.assert_allclose(found, J.T @ H @ J, atol=1e-12)


def test_the_empirical_fisher_matrix_is_that_of_the_gradients():
    grads = jax.vmap(
        jax.grad(lambda p, i: cross_entropy(apply(p, X[i][None]), LABELS[i][None])), (None, 0)
    )(PARAMS, jnp.arange(12))
    G = np.concatenate([np.reshape(g, (12, -1)) for g in jax.tree.leaves(grads)], axis=1)
    np.testing.assert_allclose(dense(empirical_fisher(grads), PARAMS), G.T @ G / 12, atol=1e-6)


def test_a_function_is_solved_as_one_system():
    gradient = jax.grad(loss)(PARAMS)
    matrix = gauss_newton(apply, cross_entropy, PARAMS)
    tx, state = tx_and_state(PARAMS, 0.1, tolerance=1e-3, max_iterations=200)
    updates, state = jax.jit(tx.update)(gradient, state, curvature=jax.tree_util.Partial(matrix))
    expected = np.linalg.solve(dense(matrix, PARAMS) + 0.1 * np.eye(flat(PARAMS).size), flat(gradient))
    assert relative_error(flat(updates), expected) < 1e-3
    assert len(set(np.asarray(state.iterations))) == 1


def test_a_preconditioner_changes_the_way_and_not_the_solution():
    gradient = jax.grad(loss)(PARAMS)
    matrix = gauss_newton(apply, cross_entropy, PARAMS)
    window = scale_by_mfac(8, 0.1)
    mfac_state: Any = window.init(PARAMS)
    update, gradient_at = jax.jit(window.update), jax.jit(jax.grad(lambda p, x: cross_entropy(apply(p, x))))
    for seed in range(8):
        noise = jax.random.normal(jax.random.key(seed), X.shape)
        _, mfac_state = update(gradient_at(PARAMS, X + noise), mfac_state)
    tx, state = tx_and_state(PARAMS, 0.1, tolerance=1e-4, max_iterations=200)
    preconditioner = functools.partial(ihvp, mfac_state, damping=0.1)
    plain, plain_state = jax.jit(functools.partial(tx.update, curvature=matrix))(gradient, state)
    preconditioned = functools.partial(tx.update, curvature=matrix, preconditioner=preconditioner)
    updates, state = jax.jit(preconditioned)(gradient, state)
    assert relative_error(flat(updates), flat(plain)) < 1e-3
    assert float(state.residuals[0]) != float(plain_state.residuals[0])


def test_a_warm_start_at_the_solution_takes_no_iteration_and_a_bad_one_is_no_worse_than_none():
    gradient, inputs, output_grads = layer((6, 5), 1, (40,), True)
    gradient = jax.tree.map(np.float32, gradient)
    factors = {"kernel": LayerFactors(np.float32(inputs), np.float32(output_grads), "bias")}
    tx, state = tx_and_state(gradient, 0.1, tolerance=1e-2, max_iterations=200, warm_start=True)
    updates, once = tx.update(gradient, state, curvature=factors)
    again, twice = tx.update(jax.tree.map(lambda g: 3 * g, gradient), once, curvature=factors)
    assert int(once.iterations[0]) > int(twice.iterations[0]) == 0
    chex.assert_trees_all_close(again, jax.tree.map(lambda u: 3 * u, updates), rtol=1e-5)
    bad = once._replace(solution=jax.tree.map(lambda u: -1e20 * u[::-1], once.solution))
    from_bad, _ = tx.update(gradient, bad, curvature=factors)
    assert relative_error(flat(from_bad), flat(updates)) < 0.02


def test_blocks_do_not_wait_for_each_other_in_what_they_return():
    """A layer in a hard system's company has the solution and the count that it has alone."""
    layers = layer((6, 5), 1, (40,), False), layer((7, 4), 1, (9,), False, seed=1)
    (easy, *of_easy), (hard, *of_hard) = jax.tree.map(np.float32, layers)
    factors = {"easy": LayerFactors(*of_easy), "hard": LayerFactors(of_hard[0] * 30, of_hard[1])}
    both = {"easy": easy["kernel"], "hard": hard["kernel"]}
    tx, state = tx_and_state(both, 0.1, tolerance=1e-4, max_iterations=500)
    together, state = tx.update(both, state, curvature=factors)
    for number, name in enumerate(both):
        alone, alone_state = tx.update(
            {name: both[name]}, tx.init({name: both[name]}), curvature={name: factors[name]}
        )
        assert int(alone_state.iterations[0]) == int(state.iterations[number])
        assert relative_error(together[name], alone[name]) < 1e-3


STEP = value_and_grad_with_factors(loss)

# Several batches.


def test_the_window_is_one_batch_of_all_that_it_holds(x64):
    """Three batches, two places each, remembered of four: F is that of the last three together."""
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((5, 2, 6)), rng.standard_normal((5, 2, 4))) for _ in range(4)]
    gradient = {"kernel": rng.standard_normal((6, 4)), "bias": rng.standard_normal(4)}
    options = {"tolerance": 1e-10, "max_iterations": 3000}
    factors = [{"kernel": LayerFactors(jnp.asarray(a), jnp.asarray(b), "bias")} for a, b in batches]
    tx, state = tx_and_state(
        gradient, 0.1, num_batches=3, factors=jax.eval_shape(lambda: factors[0]), **options
    )
    for number, curvature in enumerate(factors):
        updates, state = tx.update(gradient, state, curvature=curvature)
        kept = [
            batches[max(0, k)] for k in range(number - 2, number + 1)
        ]  # the first stands for those to come
        inputs, output_grads = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        expected = kronecker_solution(gradient, inputs, output_grads, 0.1)
        assert relative_error(as_matrix(updates, 4), expected) < 1e-9


@pytest.mark.parametrize("step", [0, 1])
def test_factors_that_are_not_finite_leave_the_state_and_make_no_step(step):
    _, gradient, factors = STEP(PARAMS)
    tx, state = tx_and_state(PARAMS, 0.1, num_batches=2, factors=factors)
    for _ in range(step):
        _, state = tx.update(gradient, state, curvature=factors)
    first = factors["layers_0/kernel"]
    spoiled = {
        **factors,
        "layers_0/kernel": LayerFactors(first.inputs, first.output_grads.at[0, 0].set(NAN), first.bias),
    }
    updates, new = tx.update(gradient, state, curvature=spoiled)
    assert not np.any(flat(updates))
    assert int(new.grads_rejected) == 1
    chex.assert_trees_all_equal(new._replace(grads_rejected=state.grads_rejected), state)


# What a network has beside layers.


class Normed(nn.Module):
    """A layer and a scale that is none."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(5)(x))))


def test_a_leaf_without_factors_has_a_multiple_of_the_identity():
    model = Normed()
    params = model.init(jax.random.key(0), X)["params"]
    run = value_and_grad_with_factors(lambda p: cross_entropy(model.apply({"params": p}, X)))
    _, gradient, factors = run(params)
    assert set(factors) == {"Dense_0/kernel", "Dense_1/kernel"}
    tx, state = tx_and_state(params, 0.1)
    updates, state = tx.update(gradient, state, curvature=factors)
    g = gradient["LayerNorm_0"]["scale"]
    np.testing.assert_allclose(updates["LayerNorm_0"]["scale"], g / (12 * jnp.mean(g**2) + 0.1), rtol=1e-4)
    assert list(np.asarray(state.iterations) == 0) == [False, False, False, False, True, True]


def test_masked_leaves_stay_out():
    _, gradient, factors = value_and_grad_with_factors(loss)(PARAMS)
    mask = {"layers_0": False, "layers_2": {"kernel": True, "bias": False}}
    tx: Any = optax.masked(scale_by_cgfac(0.1), mask)
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS, curvature=factors)
    chex.assert_trees_all_equal(updates["layers_0"], gradient["layers_0"])
    chex.assert_trees_all_equal(updates["layers_2"]["bias"], gradient["layers_2"]["bias"])
    alone = {"kernel": gradient["layers_2"]["kernel"]}
    without_bias = LayerFactors(factors["layers_2/kernel"].inputs, factors["layers_2/kernel"].output_grads)
    tx, state = tx_and_state(alone, 0.1)
    expected, _ = tx.update(alone, state, curvature={"kernel": without_bias})
    chex.assert_trees_all_close(updates["layers_2"]["kernel"], expected["kernel"], rtol=1e-5)


def test_the_norm_constraint_bounds_the_norm_in_the_fisher_matrix():
    """Of a solution x the squared norm is its product with the gradient; of c x it is c^2 times that."""
    _, gradient, factors = value_and_grad_with_factors(loss)(PARAMS)
    free, _ = scale_by_cgfac(0.1).update(gradient, scale_by_cgfac(0.1).init(PARAMS), curvature=factors)
    size = flat(free) @ flat(gradient)
    for limit in (size / 4, 2 * size):
        tx, state = tx_and_state(PARAMS, 0.1, norm_constraint=float(limit))
        updates, _ = tx.update(gradient, state, curvature=factors)
        squared = (flat(updates) @ flat(gradient)) ** 2 / size
        assert squared == pytest.approx(min(limit, size), rel=1e-4)
        assert (
            relative_error(
                flat(updates) * np.linalg.norm(flat(free)), flat(free) * np.linalg.norm(flat(updates))
            )
            < 1e-5
        )


# The optax world.


OPTIONS = {
    "default": {},
    "warm start": {"warm_start": True},
    "window": {"num_batches": 3, "factors": jax.eval_shape(STEP, PARAMS)[2]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_under_jit_with_a_donated_state_is_that_without(name):
    tx = cgfac(0.3, weight_decay=1e-3, **OPTIONS[name])

    def step(params, state):
        _, gradient, factors = STEP(params)
        updates, state = tx.update(gradient, state, params, curvature=factors)
        return optax.apply_updates(params, updates), state

    plain, donated = (PARAMS, tx.init(PARAMS)), jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    compiled = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=(0, 1))
    chex.clear_trace_counter()
    for _ in range(4):
        before = donated
        plain, donated = step(*plain), compiled(*donated)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert jax.tree.map(jax.typeof, before[1]) == jax.tree.map(jax.typeof, donated[1])
    chex.assert_trees_all_close(plain[0], donated[0], rtol=AFTER_CG, atol=0.1 * AFTER_CG)


@pytest.mark.parametrize(
    "wrapped",
    {
        "chain": optax.chain(optax.identity(), cgfac(0.1)),
        "partition": optax.partition({"all": cgfac(0.1)}, "all"),
        "inject_hyperparams": optax.inject_hyperparams(
            cgfac, static_args=("max_iterations", "num_batches")
        )(0.1),
        "apply_if_finite": optax.apply_if_finite(cgfac(0.1), 3),
        "MultiSteps": optax.MultiSteps(cgfac(0.1), 1).gradient_transformation(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_wrapper_changes_nothing(wrapped):
    _, gradient, factors = STEP(PARAMS)
    tx = wrapped[1]
    updates, _ = jax.jit(tx.update)(gradient, tx.init(PARAMS), PARAMS, curvature=factors)
    expected, _ = jax.jit(cgfac(0.1).update)(gradient, cgfac(0.1).init(PARAMS), PARAMS, curvature=factors)
    chex.assert_trees_all_close(updates, expected, rtol=AFTER_CG, atol=0.1 * AFTER_CG)


def test_init_takes_shapes_in_the_place_of_arrays():
    shapes = jax.eval_shape(lambda: PARAMS)
    for options in OPTIONS.values():
        tx = cgfac(0.1, **options)
        chex.assert_trees_all_equal(tx.init(shapes), tx.init(PARAMS))


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    tx = cgfac(0.1, **OPTIONS["window"])
    step = jax.jit(lambda state: tx.update(STEP(PARAMS)[1], state, PARAMS, curvature=STEP(PARAMS)[2]))
    _, state = step(tx.init(PARAMS))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(step(restored), step(state))


def test_map_params_reaches_the_solution_and_nothing_else():
    tx = cgfac(0.1, momentum=None, warm_start=True)
    names = jax.tree.map(lambda _: "parameter", PARAMS)
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(PARAMS), names, transform_non_params=lambda _: "no parameter"
    )
    assert optax.tree.get(mapped, "solution") == names
    assert optax.tree.get(mapped, "iterations") == "no parameter"
    window = cgfac(0.1, **OPTIONS["window"])
    chex.assert_trees_all_equal(
        optax.tree.map_params(window, lambda x: x, window.init(PARAMS)), window.init(PARAMS)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_leaves_of_half_precision_keep_their_dtype(dtype):
    _, gradient, factors = STEP(PARAMS)
    expected, _ = scale_by_cgfac().update(gradient, scale_by_cgfac().init(PARAMS), curvature=factors)
    params, gradient = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, gradient))
    tx, state = tx_and_state(params)
    updates, state = tx.update(gradient, state, curvature=factors)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert state.residuals.dtype == jnp.float32
    assert relative_error(flat(updates), flat(expected)) < 30 * float(jnp.finfo(dtype).eps)


def test_vmap_over_problems_takes_the_plain_steps_of_each():
    tx = scale_by_cgfac(0.1)

    def step(scale):
        _, gradient, factors = STEP(jax.tree.map(lambda p: scale * p, PARAMS))
        return tx.update(gradient, tx.init(PARAMS), curvature=factors)

    together, step = jax.jit(jax.vmap(step))(jnp.array([0.5, 3.0])), jax.jit(step)
    for number, scale in enumerate((0.5, 3.0)):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=number: x[i], together),
            step(scale),
            rtol=AFTER_CG,
            atol=0.1 * AFTER_CG,
        )


def relative_errors(actual, expected) -> list[float]:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [relative_error(np.asarray(x), np.asarray(y)) for x, y in pairs]


def train_on_one_and_on_eight(batch: int, damping: float, dtype):
    """The parameters after three steps, on one device and with the batch split over eight."""
    model = nn.Sequential([nn.Dense(16, param_dtype=dtype), nn.tanh, nn.Dense(3, param_dtype=dtype)])
    x, labels = jax.random.normal(jax.random.key(3), (batch, 12), dtype), jnp.arange(batch) % 3
    params = model.init(jax.random.key(1), x)
    tx = cgfac(0.3, damping)

    @jax.jit
    def step(params, state, x, labels):
        run = value_and_grad_with_factors(lambda p: cross_entropy(model.apply(p, x), labels))
        _, gradient, factors = run(params)
        updates, state = tx.update(gradient, state, params, curvature=factors)
        return optax.apply_updates(params, updates), state

    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, sharded = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), ("data",)))
    one, many = (params, tx.init(params)), jax.device_put((params, tx.init(params)), everywhere)
    x_sharded, labels_sharded = jax.device_put((x, labels), sharded)
    for _ in range(3):
        one, many = step(*one, x, labels), step(*many, x_sharded, labels_sharded)
    return one[0], many[0]


BATCHES = pytest.mark.parametrize("batch", [64, 8], ids=["more examples than entries", "fewer"])


@BATCHES
def test_a_batch_sharded_over_eight_devices_trains_as_on_one(batch):
    one, many = train_on_one_and_on_eight(batch, 0.1, jnp.float32)
    assert max(relative_errors(many, one)) < 1e-5


@pytest.mark.slow
@BATCHES
def test_in_double_precision_so_does_one_at_the_damping_of_the_default(x64, batch):
    """In float32 rounding is multiplied with the condition number, and the two differ by 3e-4."""
    one, many = train_on_one_and_on_eight(batch, 1e-2, jnp.float64)
    assert max(relative_errors(many, one)) < 1e-10


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parameters_and_batch_may_both_be_sharded(axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    place = functools.partial(NamedSharding, mesh)
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 6)), "bias": jnp.zeros(6)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2)

    tx = cgfac(0.1, 0.1)

    @jax.jit
    def step(params, x):
        _, gradient, factors = value_and_grad_with_factors(loss)(params, x)
        return tx.update(gradient, tx.init(params), params, curvature=factors)[0]

    expected = step(params, X)
    with jax.set_mesh(mesh):
        split = {"kernel": place(PartitionSpec(None, "model")), "bias": place(PartitionSpec("model"))}
        params, x = jax.device_put(params, split), jax.device_put(X, place(PartitionSpec("data")))
        updates = jax.device_get(step(params, x))
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


def test_no_array_of_a_compiled_step_is_as_large_as_a_kronecker_factor():
    """4,096 inputs, 4,000 outputs, so that the layer itself is no square."""
    tx = scale_by_cgfac(0.1)

    def step(gradient, inputs, output_grads, state):
        return tx.update(gradient, state, curvature={"kernel": LayerFactors(inputs, output_grads, "bias")})

    gradient = jax.eval_shape(lambda: {"kernel": jnp.ones((4096, 4000)), "bias": jnp.ones(4000)})
    rows = jax.eval_shape(lambda: (jnp.ones((128, 4096)), jnp.ones((128, 4000))))
    compiled = jax.jit(step).lower(gradient, *rows, jax.eval_shape(tx.init, gradient)).compile()
    found = re.findall(r"f32\[([\d,]+)\]", str(compiled.as_text()))
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    large = {shape for shape in shapes if np.prod(shape) > 128 * 4200}
    assert (4096, 4000) in large <= {(4096, 4000), (4097, 4000)}
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * 4 * 4096 * 4000  # the layer with its bias, and its update


# Flax.


def test_an_nnx_optimizer_trains_and_batch_statistics_move():
    rngs = nnx.Rngs(1)
    model: Any = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, cgfac(0.3), wrt=nnx.Param)
    run = nnx_value_and_grad_with_factors(lambda model: cross_entropy(model(X)))

    @nnx.jit
    def step(model, optimizer):
        value, gradient, factors = run(model)
        optimizer.update(model, gradient, curvature=factors)
        return value

    before = np.asarray(model.layers[1].mean[...])
    values = [float(step(model, optimizer)) for _ in range(30)]
    assert values[-1] < values[0] / 4
    assert not np.allclose(before, np.asarray(model.layers[1].mean[...]))


# Bad input.


@pytest.mark.parametrize("damping", [1e-30, 1e20])
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("value", [1e38, 1e-30, 0.0])
def test_updates_are_finite_whatever_the_factors(value, warm_start, damping):
    """Also those that come after, from good factors."""
    _, gradient, factors = STEP(PARAMS)
    tx, state = tx_and_state(PARAMS, damping, warm_start=warm_start)
    large = jax.tree.map(lambda g: 1e13 * g, gradient)
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, value), factors)
    for g, curvature in ((large, spoiled), (gradient, spoiled), (gradient, factors)):
        updates, state = tx.update(g, state, curvature=curvature)
        assert np.all(np.isfinite(flat(updates)))
        assert np.all(np.isfinite(flat(state)))
    few = {"kernel": LayerFactors(jnp.full((3, 30), value), jnp.ones((3, 5)))}
    wide = {"kernel": jnp.ones((30, 5))}
    updates, state = tx.update(wide, tx.init(wide), curvature=few)
    assert np.all(np.isfinite(flat(updates)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_damping_divides_no_rounding_of_layers_in_half_precision(dtype):
    """What is outside of the spans is rounding of the gradient, of 16 bits where the layer is."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((256, 200), (16, 256)))

    def loss(w):
        return jnp.mean(
            jnp.sum(jnp.tanh((x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32) / 16) ** 2, 1)
        )

    _, gradient, factors = value_and_grad_with_factors(lambda p: loss(p["w"]))({"w": w})
    tx, state = tx_and_state({"w": w}, 1e-4, max_iterations=100)
    updates, _ = tx.update(gradient, state, curvature=factors)
    inside = x.T @ jnp.linalg.lstsq(x.T, updates["w"])[0]
    assert jnp.linalg.norm(updates["w"] - inside) < 0.02 * jnp.linalg.norm(inside)


@pytest.mark.parametrize("eigenvalue", [-5.0, -0.1, NAN, INF, -INF, 1e38])
def test_an_operator_that_is_not_positive_definite_is_reported_and_the_update_finite(eigenvalue):
    values = jnp.array([2.0, eigenvalue, 1.0])
    tx, state = tx_and_state(jnp.ones(3), 0.1, warm_start=True)
    for gradient in (jnp.array([0.3, 1.0, -2.0]), jnp.array([1.0, 0.1, 0.1]), jnp.zeros(3)):
        updates, state = tx.update(gradient, state, curvature=lambda v: values * v)
        assert np.all(np.isfinite(updates))
        assert float(updates @ gradient) >= 0
        if np.any(gradient) and eigenvalue != 1e38 and eigenvalue != -0.1:
            assert bool(state.indefinite[0])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_leaves_the_state(bad):
    _, gradient, factors = STEP(PARAMS)
    tx, state = tx_and_state(PARAMS, 1e-3, warm_start=True)
    _, state = tx.update(gradient, state, curvature=factors)
    spoiled = {**gradient, "layers_0": jax.tree.map(lambda g: g.at[0].set(bad), gradient["layers_0"])}
    updates, new = tx.update(spoiled, state, curvature=factors)
    chex.assert_trees_all_equal(updates, spoiled)
    assert int(new.grads_rejected) == 1
    chex.assert_trees_all_equal(new._replace(grads_rejected=state.grads_rejected), state)


def test_a_zero_gradient_takes_no_iteration_and_no_step():
    _, gradient, factors = STEP(PARAMS)
    tx, state = tx_and_state(PARAMS, 1e-3)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, gradient), state, curvature=factors)
    assert not np.any(flat(updates))
    assert not np.any(state.iterations)


@pytest.mark.parametrize("scale", [1e-30, 1e12])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    _, gradient, factors = STEP(PARAMS)
    tx, state = tx_and_state(PARAMS, 1e-2)
    plain, _ = tx.update(gradient, state, curvature=factors)
    scaled, _ = tx.update(jax.tree.map(lambda g: scale * g, gradient), state, curvature=factors)
    assert relative_error(flat(scaled) / scale, flat(plain)) < AFTER_CG


KERNEL = jnp.ones((3, 2))
GOOD = LayerFactors(jnp.ones((4, 3)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("curvature", "error", "message"),
    [
        (None, ValueError, "curvature must be given"),
        ({}, ValueError, "must have the factors of a layer"),
        ({"kernel": jnp.ones(3)}, TypeError, "LayerFactors"),
        ([GOOD], TypeError, "must be a dict"),
        ({"kernle": GOOD}, ValueError, "'kernle' is none of 'bias', 'kernel'"),
        ({"kernel": LayerFactors(GOOD.inputs, GOOD.output_grads, "b")}, ValueError, "'b' is none of"),
        ({"kernel": LayerFactors(jnp.ones((4, 5)), GOOD.output_grads)}, ValueError, "'kernel' is (3, 2)"),
        ({"kernel": LayerFactors(GOOD.inputs, jnp.ones((4, 5)))}, ValueError, "5 outputs"),
        ({"kernel": LayerFactors(GOOD.inputs[0], GOOD.output_grads)}, ValueError, "(1, 3)"),
        ({"kernel": LayerFactors(GOOD.inputs[:0], GOOD.output_grads)}, ValueError, "axis of examples"),
        ({"kernel": LayerFactors(GOOD.inputs, GOOD.output_grads, "kernel")}, ValueError, "in two layers"),
        (
            {"bias": LayerFactors(jnp.ones((4, 1)), GOOD.output_grads, "kernel")},
            ValueError,
            "'kernel' is (3, 2)",
        ),
    ],
)
def test_a_bad_curvature_is_refused_before_tracing(curvature, error, message):
    params = {"bias": jnp.ones(2), "kernel": KERNEL}
    tx, state = tx_and_state(params, 0.1)
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda: tx.update(params, state, curvature=curvature))


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"damping": -1.0},
        {"damping": NAN},
        {"tolerance": 0.0},
        {"tolerance": INF},
        {"max_iterations": 0},
        {"norm_constraint": 0.0},
        {"norm_constraint": -1.0},
        {"num_batches": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("factory", [scale_by_cgfac, cgfac])
def test_options_out_of_range_are_refused(factory, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*got {value!r}"):
        factory(**options)


@pytest.mark.parametrize(
    "options",
    [{"max_iterations": 1.5}, {"warm_start": 1}, {"damping": "1"}, {"num_batches": 2, "factors": [GOOD]}],
    ids=str,
)
def test_options_of_another_type_are_refused(options):
    with pytest.raises(TypeError, match=list(options)[-1]):
        scale_by_cgfac(**options)


def test_a_state_of_another_transform_is_refused():
    state = scale_by_cgfac(warm_start=True).init(PARAMS)
    with pytest.raises(ValueError, match="warm_start=False, got warm_start=True"):
        scale_by_cgfac().update(PARAMS, state, curvature=STEP(PARAMS)[2])
    with pytest.raises(ValueError, match="got 4 leaves in place of 1"):
        scale_by_cgfac().update(PARAMS, scale_by_cgfac().init(KERNEL), curvature=STEP(PARAMS)[2])
    tx, state = tx_and_state({"kernel": KERNEL}, 0.1)
    of_three = {"kernel": LayerFactors(GOOD.inputs[:3], GOOD.output_grads[:3])}
    window = scale_by_cgfac(num_batches=2, factors={"kernel": GOOD})
    with pytest.raises(ValueError, match="must have the shapes of the factors"):
        window.update({"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature=of_three)
    with pytest.raises(ValueError, match="num_batches=3, got num_batches=2"):
        scale_by_cgfac(num_batches=3, factors={"kernel": GOOD}).update(
            {"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature={"kernel": GOOD}
        )
    with pytest.raises(ValueError, match="must give a tree like the parameters"):
        tx.update({"kernel": KERNEL}, state, curvature=lambda v: v["kernel"])
    with pytest.raises(ValueError, match="num_batches must be 1"):
        window.update({"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature=lambda v: v)
    with pytest.raises(ValueError, match="preconditioner must be a function"):
        tx.update({"kernel": KERNEL}, state, curvature={"kernel": GOOD}, preconditioner=lambda v: v)
