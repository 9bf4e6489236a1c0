"""Scores and updates of the Optimal Brain Surgeon beside dense float64 matrices."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import quadratic_losses
from mfac_jax.pruning import obs_scores, obs_update
from tests.pruning.small_network import (
    AFTER,
    ALL,
    BEFORE,
    DAMPING,
    MASKED,
    G,
    W,
    as_flat,
    as_masks,
    as_tree,
    constrained_minimiser,
    fisher,
    sum_of_independent_updates,
)

# The scores and the updates.


@pytest.mark.parametrize("before", [ALL, BEFORE], ids=["all", "masks"])
def test_scores_are_those_of_the_dense_inverse(before):
    expected = W**2 / (2 * np.diag(np.linalg.inv(fisher(before))))
    with jax.enable_x64(True):
        scores = obs_scores(as_tree(W), as_tree(G), DAMPING, masks=as_masks(before))
    assert scores["conv"]["bias"] is None
    chosen = before[3:]
    np.testing.assert_allclose(as_flat(scores)[chosen], expected[3:][chosen], rtol=1e-10)


@pytest.mark.parametrize("gradient_term", [0.0, 0.7])
@pytest.mark.parametrize("before", [ALL, BEFORE], ids=["all", "masks_before"])
@pytest.mark.parametrize(
    ("update", "reference"),
    [("joint", constrained_minimiser), ("independent", sum_of_independent_updates)],
)
def test_updates_are_the_dense_ones(update, reference, before, gradient_term):
    expected = reference(before, AFTER, gradient_term)
    masks_before = None if before is ALL else as_masks(before)
    with jax.enable_x64(True):
        moved: Any = obs_update(
            as_tree(W),
            as_tree(G),
            as_masks(AFTER),
            DAMPING,
            masks_before=masks_before,
            update=update,
            gradient_term=gradient_term,
        )
    assert np.linalg.norm(as_flat(moved) - expected) < 1e-9 * np.linalg.norm(expected)
    assert np.all(as_flat(moved)[~AFTER] == 0)


def test_the_longest_move_is_a_multiple_of_what_goes():
    with jax.enable_x64(True):
        options: Any = {"damping": DAMPING, "gradient_term": 0.0}
        free, short, long = (
            as_flat(obs_update(as_tree(W), as_tree(G), as_masks(AFTER), **options, step_limit=limit))
            for limit in (math.inf, 0.1, 1e3)
        )
    kept = AFTER | ~MASKED
    np.testing.assert_allclose(np.linalg.norm((short - W)[kept]), 0.1 * np.linalg.norm(W[~kept]))
    cosine = (short - W)[kept] @ (free - W)[kept]
    np.testing.assert_allclose(cosine, np.linalg.norm((short - W)[kept]) * np.linalg.norm((free - W)[kept]))
    np.testing.assert_array_equal(long, free)


@pytest.mark.slow
def test_the_joint_update_has_the_lowest_loss_in_a_thousand_cases():
    losses = quadratic_losses.random_losses(seed=1, cases=1000)
    assert len(losses.joint) == 1000
    assert np.all(losses.joint > 0)
    for other in (losses.independent, losses.zeroing):
        assert np.all(losses.joint <= other * (1 + 1e-12))  # rounding: largest excess found 5e-15
    # And they are cases that tell the three apart.
    assert np.mean(losses.joint < 0.5 * losses.independent) > 0.5
    assert 0.05 < np.mean(losses.independent > losses.zeroing) < 0.5


@pytest.mark.slow
def test_the_distribution_of_the_losses_is_printed(capsys):
    quadratic_losses.main(["--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "joint / independent",
        "joint / zeroing",
        "independent / zeroing",
    ]
    assert float(lines[2].split("|")[-2]) <= 1
