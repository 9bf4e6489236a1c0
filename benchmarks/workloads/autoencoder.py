"""A deep autoencoder of scikit-learn's digits: 12 numbers have to hold an image of 64."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from sklearn.model_selection import train_test_split

from examples.common.data import epoch_batches
from examples.common.workload import Workload
from examples.digits_data import load

WIDTHS = (128, 64, 12, 64, 128)


class Autoencoder(nn.Module):
    """Dense layers with tanh between them; the narrow one and the output are linear."""

    @nn.compact
    def __call__(self, x):  # noqa: D102
        pixels = x.shape[-1]
        for width in WIDTHS:
            x = nn.Dense(width)(x)
            x = x if width == min(WIDTHS) else nn.tanh(x)
        return nn.Dense(pixels)(x)


def _squared_error(params, images):
    """Mean over images of the sum over pixels, as autoencoders are usually compared."""
    return jnp.sum((Autoencoder().apply({"params": params}, images) - images) ** 2, axis=-1).mean()


def _loss(params, model_state, data, indices, key):
    del key  # nothing is random
    return _squared_error(params, data["x"][indices]), model_state


def _evaluate(params, model_state, data):
    del model_state
    return {
        "train_loss": _squared_error(params, data["x"]),
        "valid_loss": _squared_error(params, data["x_valid"]),
    }


def make_workload(epochs: int = 200, batch_size: int = 256, *, seed: int) -> Workload:
    """Make the workload; the seed sets the split into training and validation data, parameters, batches."""
    images, labels = load(None)
    x, x_valid = train_test_split(images, test_size=0.2, stratify=labels, random_state=seed)
    return Workload(
        name="autoencoder",
        source=f"scikit-learn: {len(x):,} training and {len(x_valid):,} validation images",
        params=Autoencoder().init(jax.random.key(seed), x[:1])["params"],
        model_state={},
        data={"x": jnp.asarray(x), "x_valid": jnp.asarray(x_valid)},
        batches=epoch_batches(len(x), batch_size, epochs, seed),
        loss=_loss,
        evaluate=_evaluate,
    )
