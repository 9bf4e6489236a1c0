"""CIFAR-10 from its canonical files, from npz files, or from tensorflow_datasets. Imports no JAX."""

import functools
import importlib
import io
import itertools
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.common.data import READ_ERRORS, DataError

TRAIN_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
IMAGE_KEYS = {"train_images", "train_labels", "test_images", "test_labels"}
JPEG_KEYS = {"train_jpeg", "train_offsets", "train_labels", "test_jpeg", "test_offsets", "test_labels"}


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # images, labels, and those for validation


class Images(NamedTuple):
    """Images `(n, 32, 32, 3)` uint8, labels `(n,)` int32 from 0 to 9, and where they are from."""

    images: np.ndarray
    labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    source: str
    can_be_flipped: bool = True


@functools.lru_cache(maxsize=1)  # every seed of a run asks for the same data
def load(data_dir: Path | None = None, tfds: bool = False) -> Images:
    """Load CIFAR-10 from the path or from tensorflow_datasets, else digits enlarged to 32 x 32."""
    if tfds:
        return _checked(_from_tfds(data_dir), "tensorflow_datasets cifar10")
    if data_dir is None:
        return _enlarged_digits()
    try:
        for folder in (data_dir, data_dir / "cifar-10-batches-bin"):
            if (folder / "data_batch_1.bin").exists():
                return _checked(_read_files(folder, ".bin", _read_binary), str(folder))
        for folder in (data_dir, data_dir / "cifar-10-batches-py"):
            if (folder / "data_batch_1").exists():
                return _checked(_read_files(folder, "", _read_pickle), str(folder))
        files = [data_dir] if data_dir.is_file() else sorted(data_dir.glob("*.npz"))
        for keys, read in ((IMAGE_KEYS, _read_npz_images), (JPEG_KEYS, _read_npz_jpeg)):
            for path in files:
                if keys <= _npz_keys(path):
                    return _checked(read(path), str(path))
    except READ_ERRORS as error:
        raise DataError(f"--data-dir: cannot read CIFAR-10 from {data_dir}: {error}") from error
    raise DataError(
        f"--data-dir: no CIFAR-10 in {data_dir}. Looked for cifar-10-batches-bin/data_batch_1.bin, "
        f"cifar-10-batches-py/data_batch_1, an *.npz with {', '.join(sorted(IMAGE_KEYS))}, "
        f"and an *.npz with {', '.join(sorted(JPEG_KEYS))}. Without --data-dir, digits are used."
    )


def _checked(arrays: Arrays, source: str) -> Images:
    """Give the arrays the right dtypes, or raise an error that names what is wrong."""
    images, labels, valid_images, valid_labels = arrays
    for x, y in ((images, labels), (valid_images, valid_labels)):
        if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or not len(x) or y.shape != (len(x),):
            raise DataError(
                f"{source}: images must be uint8 (n, 32, 32, 3) and labels (n,), "
                f"they are {x.dtype} {x.shape} and {y.shape}"
            )
        if not np.isin(y, np.arange(10)).all():
            raise DataError(f"{source}: labels must be 0 to 9, they range from {y.min()} to {y.max()}")
    return Images(images, labels.astype(np.int32), valid_images, valid_labels.astype(np.int32), source)


def _enlarged_digits() -> Images:
    from sklearn.datasets import load_digits  # takes a second, and is not needed for other data

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    pixels = np.round(x[order] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = pixels.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    labels = y[order].astype(np.int32)
    cut = len(x) * 4 // 5
    source = "scikit-learn's digits, enlarged to 32 x 32 x 3 (no --data-dir)"
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:], source, can_be_flipped=False)


def _read_files(folder: Path, suffix: str, read) -> Arrays:
    parts = [read(folder / f"{name}{suffix}") for name in TRAIN_BATCHES]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels, *read(folder / f"test_batch{suffix}")


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label and 3 x 32 x 32 pixels."""
    records = np.fromfile(path, np.uint8)
    if records.size % 3073:
        raise ValueError(f"{path} has {records.size} bytes, which is not a multiple of 3073")
    records = records.reshape(-1, 3073)
    return _channels_last(records[:, 1:]), records[:, 0]


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return _channels_last(batch[b"data"]), np.asarray(batch[b"labels"])


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays only: a pickle from the network could otherwise run any code."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in {
            ("numpy", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 file")


def _channels_last(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _npz_keys(path: Path) -> set[str]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file")
    with np.load(path) as arrays:
        return set(arrays.files)


def _read_npz_images(path: Path) -> Arrays:
    with np.load(path) as arrays:
        return arrays["train_images"], arrays["train_labels"], arrays["test_images"], arrays["test_labels"]


def _read_npz_jpeg(path: Path) -> Arrays:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"--data-dir: {path} holds JPEG files; install Pillow to read them") from error

    def decode(content: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        files = [content[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    with np.load(path) as arrays:
        train = decode(arrays["train_jpeg"], arrays["train_offsets"]), arrays["train_labels"]
        return *train, decode(arrays["test_jpeg"], arrays["test_offsets"]), arrays["test_labels"]


def _from_tfds(data_dir: Path | None) -> Arrays:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise DataError(f"--tfds: install tensorflow_datasets, or pass --data-dir: {error}") from error
    parts = tfds.load("cifar10", split=["train", "test"], batch_size=-1, data_dir=data_dir)
    train, test = (tfds.as_numpy(part) for part in parts)
    return train["image"], train["label"], test["image"], test["label"]
