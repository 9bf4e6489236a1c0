"""The inverse of the Fisher matrix of fixed gradients beside the dense one in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import FisherInverse

NETWORK = {
    "conv": (3, 3, 4, 2),
    "out": {"kernel": (8, 5), "bias": (5,)},
    "temperature": (),
}


def dense_inverse(grads: np.ndarray, damping: float, blocks: list[np.ndarray]) -> np.ndarray:
    """F^-1 in float64; the product with F is the identity."""
    m, d = grads.shape
    inverse = np.zeros((d, d))
    for block in blocks:
        G = grads[:, block].astype(np.float64)
        fisher = damping * np.eye(len(block)) + G.T @ G / m
        if len(block) <= m:
            found = np.linalg.inv(fisher)
        else:
            system = G @ G.T + m * damping * np.eye(m)
            found = (np.eye(len(block)) - G.T @ np.linalg.solve(system, G)) / damping
        np.testing.assert_allclose(fisher @ found, np.eye(len(block)), atol=1e-5)
        inverse[np.ix_(block, block)] = found
    return inverse


def consecutive(d: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, d)) for start in range(0, d, size)]


def relative_error(found, expected) -> float:
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def uniform(m: int, d: int) -> np.ndarray:
    return np.random.default_rng(0).random((m, d))


CASES: dict[str, tuple[np.ndarray, float, Any, list[np.ndarray]]] = {
    "32 x 1000": (uniform(32, 1000), 1e-7, None, [np.arange(1000)]),
    "32 x 10000, blocks of 1000": (uniform(32, 10_000), 1e-6, 1000, consecutive(10_000, 1000)),
    "32 x 950, blocks of 200": (uniform(32, 950), 1e-6, 200, consecutive(950, 200)),
    "64 x 500, blocks of 16": (uniform(64, 500), 1e-6, 16, consecutive(500, 16)),
    "64 x 20": (uniform(64, 20), 1e-4, None, [np.arange(20)]),
    "1 x 7": (uniform(1, 7), 1e-3, None, [np.arange(7)]),
    "gradients of zeros": (np.zeros((32, 1000)), 1e-2, None, [np.arange(1000)]),
}
# Programs for each shape and precision: some of them say most.
QUICK = {
    ("32 x 1000", np.float32),
    ("gradients of zeros", np.float32),
    ("64 x 500, blocks of 16", np.float64),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if (case, dtype) in QUICK else pytest.mark.slow)
        for case in CASES
        for dtype in (np.float32, np.float64)
    ],
)
def test_products_diagonal_and_entries_are_those_of_the_dense_inverse(case, dtype):
    grads, damping, blocks, expected_blocks = CASES[case]
    grads, random = grads.astype(dtype), np.random.default_rng(1)
    d = grads.shape[1]
    x = random.standard_normal((3, d)).astype(dtype)
    chosen = random.choice(d, min(d, 20), replace=False)
    expected = dense_inverse(grads, damping, expected_blocks)
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    with jax.enable_x64(dtype == np.float64):
        fisher = FisherInverse.from_gradients(jnp.asarray(grads), damping, blocks=blocks)
        assert relative_error(fisher.ihvp(jnp.asarray(x[0])), expected @ x[0]) < tolerance
        assert relative_error(fisher.ihvp(jnp.asarray(x)), x @ expected) < tolerance
        assert relative_error(fisher.diagonal(), np.diag(expected)) < tolerance
        assert relative_error(fisher.submatrix(chosen), expected[np.ix_(chosen, chosen)]) < tolerance
        i, j = int(chosen[0]), int(chosen[-1])
        for a, b in [(i, i), (i, j), (j, i)]:
            scale = expected[a, a] if a == b else np.abs(expected[np.ix_(chosen, chosen)]).max()
            assert abs(float(fisher.entry(a, b)) - expected[a, b]) < tolerance * scale


def network_gradients(m: int) -> Any:
    random = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(random.standard_normal((m, *s)), jnp.float32), NETWORK, is_leaf=is_shape
    )


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def as_matrix(grads) -> np.ndarray:
    return np.concatenate([np.reshape(g, (len(g), -1)) for g in jax.tree.leaves(grads)], axis=1)


def by_kind(path) -> str:
    return "vectors" if jax.tree_util.keystr(path[-1:]) == "['bias']" else "rest"


@pytest.mark.parametrize(
    "blocks",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (None, "leaf", 50)), by_kind],
    ids=["one", "leaf", "50", "label"],
)
def test_trees_of_leaves_are_one_matrix(blocks):
    grads = network_gradients(24)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    sizes = [g[0].size for g in jax.tree.leaves(grads)]
    starts = np.cumsum([0, *sizes])
    leaves = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    if blocks is None:
        expected_blocks = [np.concatenate(leaves)]
    elif blocks == "leaf":
        expected_blocks = leaves
    elif blocks == 50:
        expected_blocks = [leaf[part] for leaf in leaves for part in consecutive(len(leaf), 50)]
    else:
        kinds = [by_kind(path) for path in paths]
        groups = [[x for x, k in zip(leaves, kinds, strict=True) if k == kind] for kind in set(kinds)]
        expected_blocks = [np.concatenate(group) for group in groups]
    matrix = as_matrix(grads)
    expected = dense_inverse(matrix, 1e-3, expected_blocks)
    fisher = FisherInverse.from_gradients(grads, 1e-3, blocks=blocks)
    x = jax.tree.map(lambda g: g[0] + 1, grads)
    assert relative_error(flat(fisher.ihvp(x)), expected @ flat(x)) < 1e-5
    assert relative_error(flat(fisher.diagonal()), np.diag(expected)) < 1e-5
    assert jax.tree.map(jnp.shape, fisher.diagonal()) == jax.tree.map(jnp.shape, x)
    chosen = np.random.default_rng(0).choice(len(matrix[0]), 40)
    assert relative_error(fisher.submatrix(chosen), expected[np.ix_(chosen, chosen)]) < 1e-5


def test_it_is_a_pytree_that_passes_jit():
    grads = network_gradients(24)
    x, matrix = jax.tree.map(lambda g: g[0] + 1, grads), as_matrix(grads)
    expected = dense_inverse(matrix, 1e-3, [np.arange(len(matrix[0]))]) @ flat(x)
    fisher: Any = jax.jit(lambda g: FisherInverse.from_gradients(g, 1e-3))(grads)
    assert relative_error(flat(fisher.ihvp(x)), expected) < 1e-5
    inside = jax.jit(lambda g, x: FisherInverse.from_gradients(g, 1e-3).ihvp(x))(grads, x)
    assert relative_error(flat(inside), expected) < 1e-5


def test_gradients_that_repeat_leave_the_diagonal_positive_and_products_finite():
    grads = jnp.ones((16, 300)) * 1e3
    fisher: Any = FisherInverse.from_gradients(grads, 1e-9)
    assert np.all(np.asarray(fisher.diagonal()) > 0)
    assert np.all(np.isfinite(fisher.ihvp(jnp.arange(300.0))))
    orthogonal = jnp.zeros(300).at[0].set(1).at[1].set(-1)
    np.testing.assert_allclose(fisher.ihvp(orthogonal), orthogonal / 1e-9, rtol=1e-3, atol=1e3)


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        (
            {"a": jnp.ones((4, 2)), "b": jnp.ones((5, 2))},
            {},
            ValueError,
            r"\['a'\]: \(4, 2\), \['b'\]: \(5",
        ),
        (jnp.ones(()), {}, ValueError, "one leading axis"),
        (jnp.ones((0, 3)), {}, ValueError, "one leading axis"),
        ({}, {}, ValueError, "at least one leaf"),
        (jnp.ones((4, 3)).at[2, 1].set(jnp.nan), {}, ValueError, r"indices \[2\] have a NaN"),
        (jnp.ones((4, 3), int), {}, TypeError, "real floating-point"),
        (jnp.ones((4, 3)), {"damping": 0.0}, ValueError, "damping must be a finite number > 0"),
        (jnp.ones((4, 3)), {"blocks": 0}, ValueError, "blocks must be an int >= 1"),
        (jnp.ones((4, 3)), {"blocks": "all"}, ValueError, "blocks must be one of None, 'leaf'"),
    ],
)
def test_bad_gradients_and_options_are_refused(grads, options, error, message):
    with pytest.raises(error, match=message):
        FisherInverse.from_gradients(grads, **({"damping": 1.0} | options))


def test_bad_vectors_and_indices_are_refused():
    fisher: Any = FisherInverse.from_gradients({"a": jnp.ones((4, 3)), "b": jnp.ones((4, 2))}, 1.0)
    for tree in ({"a": jnp.ones(3)}, {"a": jnp.ones(3), "b": jnp.ones(3)}):
        with pytest.raises(ValueError, match="tree must have"):
            fisher.ihvp(tree)
    with pytest.raises(ValueError, match="one more axis of the same length in front"):
        fisher.ihvp({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))})
    with pytest.raises(IndexError, match="below 5, the number of parameters"):
        fisher.entry(0, 5)
    with pytest.raises(TypeError, match="sequence of ints"):
        fisher.submatrix([0.5])


@pytest.mark.parametrize("blocks", [None, "leaf", np.int64(4)])
def test_leaves_without_entries_change_nothing(blocks):
    grads: Any = {"a": jnp.asarray(uniform(3, 6), jnp.float32)}
    alone: Any = FisherInverse.from_gradients(grads, 1e-2, blocks=blocks)
    with_empty: Any = {**grads, "none": None, "empty": jnp.zeros((3, 0, 2))}
    fisher: Any = FisherInverse.from_gradients(with_empty, 1e-2, blocks=blocks)
    x: Any = {"a": jnp.arange(6.0), "none": None, "empty": jnp.zeros((0, 2))}
    products = fisher.ihvp(x)
    np.testing.assert_array_equal(products["a"], alone.ihvp({"a": x["a"]})["a"])
    assert jax.tree.map(jnp.shape, products) == jax.tree.map(jnp.shape, x)
    assert fisher.diagonal()["empty"].shape == (0, 2)
    np.testing.assert_array_equal(fisher.submatrix([5, 0]), alone.submatrix([5, 0]))
    assert fisher.submatrix([]).shape == (0, 0)


@pytest.mark.parametrize("indices", [[[1], [1, 2]], "ab", None, [10**30]])
def test_what_is_no_sequence_of_ints_is_refused(indices):
    fisher: Any = FisherInverse.from_gradients(jnp.ones((2, 3)), 1.0)
    with pytest.raises(TypeError, match="indices must be a sequence of ints that are known before tracing"):
        fisher.submatrix(indices)
    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(fisher.submatrix)(jnp.arange(2))


def test_numpy_gradients_in_float64_are_taken_without_a_warning():
    fisher: Any = FisherInverse.from_gradients(np.eye(3), 1.0)
    np.testing.assert_allclose(fisher.ihvp(np.ones(3)), 0.75)
