"""The models of the examples: the published shapes, all images, crops, causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import cifar10, resnet20, text


def test_the_resnet_20_has_the_parameters_of_the_published_one():
    assert sum(x.size for x in jax.tree.leaves(resnet20.abstract().params)) == 272_474


@pytest.mark.slow
def test_the_resnet_is_evaluated_on_all_images_though_in_pieces():
    problem = cifar10.make_workload(samples=48, width=2, blocks=1, batch_size=16, seed=0)
    measured = jax.jit(problem.evaluate)(problem.params, problem.model_state, problem.data)
    variables = {"params": problem.params, **problem.model_state}
    for part, metric in (("", "train_loss"), ("valid_", "valid_loss")):
        x, y = resnet20.normalize(problem.data[f"{part}images"]), problem.data[f"{part}labels"]
        logits = jax.jit(functools.partial(resnet20.ResNet(2, 1).apply, train=False))(variables, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        assert float(measured[metric]) == pytest.approx(float(loss), rel=1e-4)
    assert float(measured["valid_accuracy"]) == pytest.approx(float(jnp.mean(logits.argmax(-1) == y)))


def test_augmented_images_are_crops_of_padded_and_mirrored_ones():
    images = np.random.default_rng(0).integers(1, 256, (64, 32, 32, 3), dtype=np.uint8)
    mirrored_ones = 0
    for flip in (False, True):
        augmented = np.asarray(resnet20.augment(jnp.asarray(images), jax.random.key(3), flip))
        for image, result in zip(images, augmented, strict=True):
            candidates = [image, image[:, ::-1]] if flip else [image]
            padded = [np.pad(candidate, ((4, 4), (4, 4), (0, 0))) for candidate in candidates]
            crops = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3), axis=(1, 2, 3))
            found = np.argwhere((crops == result).all(axis=(4, 5, 6)))
            assert len(found) == 1
            mirrored_ones += found[0, 0]
    assert 16 < mirrored_ones < 48


def test_the_transformer_does_not_look_ahead():
    model = text.Transformer(7, 8, 16, 2, 1, text.nnx.Rngs(0))
    ids = jnp.arange(8)[None] % 7
    changed = ids.at[0, 5].set(6)
    logits = jax.jit(model)(jnp.concatenate([ids, changed]))
    same = np.isclose(*logits, atol=1e-6).all(axis=-1)
    assert same.tolist() == [True] * 5 + [False] * 3
