"""The data of the example scripts: every form is read, and what is broken is refused by its fault."""

import importlib
import io
import os
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import cifar10_data, text_data
from tests.examples.scripts import error_of

RANDOM = np.random.default_rng(0)
TRAIN, TEST = (RANDOM.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (10, 4))
TRAIN_LABELS, TEST_LABELS = np.arange(10, dtype=np.uint8), np.arange(4, dtype=np.uint8)


def canonical_parts():
    """The five training files and the test file: name, images as rows of channels, labels."""
    for name, images, labels in (("data_batch_", TRAIN, TRAIN_LABELS), ("test_batch", TEST, TEST_LABELS)):
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        parts = range(5) if name == "data_batch_" else [None]
        for i in parts:
            piece = slice(None) if i is None else slice(2 * i, 2 * i + 2)
            yield f"{name}{'' if i is None else i + 1}", rows[piece], labels[piece]


def write_binary(folder: Path) -> None:
    (folder / "cifar-10-batches-bin").mkdir()
    for name, rows, labels in canonical_parts():
        np.hstack([labels[:, None], rows]).tofile(folder / "cifar-10-batches-bin" / f"{name}.bin")


def write_pickles(folder: Path) -> None:
    (folder / "cifar-10-batches-py").mkdir()
    for name, rows, labels in canonical_parts():
        content = pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol=2)
        (folder / "cifar-10-batches-py" / name).write_bytes(content)


def write_npz(folder: Path, **changes) -> None:
    arrays = {"train_images": TRAIN, "train_labels": TRAIN_LABELS}
    arrays |= {"test_images": TEST, "test_labels": TEST_LABELS} | changes
    np.savez(folder / "images.npz", allow_pickle=False, **arrays)


def write_jpeg(folder: Path) -> None:
    arrays = {}
    for part, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        files = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(np.full_like(image, image[0, 0, 0])).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)], dtype=np.int32)
        arrays[f"{part}_labels"] = labels
    np.savez(folder / "jpeg.npz", **arrays)


@pytest.mark.parametrize("write", [write_binary, write_pickles, write_npz])
def test_cifar_10_is_read_from_each_of_its_forms(write, tmp_path):
    np.savez(tmp_path / "a_stranger.npz", weights=np.ones(3))
    write(tmp_path)
    inner = next((path for path in tmp_path.iterdir() if path.name != "a_stranger.npz"), tmp_path)
    for given in (tmp_path, inner):
        data = cifar10_data.load(given)
        np.testing.assert_array_equal(data.images, TRAIN)
        np.testing.assert_array_equal(data.valid_images, TEST)
        assert data.labels.tolist() == TRAIN_LABELS.tolist()
        assert data.valid_labels.dtype == np.int32
        assert data.can_be_flipped


def test_cifar_10_is_read_from_jpeg_files_in_an_npz(tmp_path):
    write_jpeg(tmp_path)
    data = cifar10_data.load(tmp_path)
    assert data.images.shape == TRAIN.shape
    assert np.abs(data.images - TRAIN[:, :1, :1, :1].astype(int)).max() <= 3
    assert data.valid_labels.tolist() == TEST_LABELS.tolist()


def test_cifar_10_is_read_from_tensorflow_datasets(monkeypatch):
    parts = [{"image": TRAIN, "label": TRAIN_LABELS}, {"image": TEST, "label": TEST_LABELS}]
    fake: dict = {"load": lambda name, **options: parts, "as_numpy": lambda part: part}
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(**fake))
    cifar10_data.load.cache_clear()
    np.testing.assert_array_equal(cifar10_data.load(None, True).images, TRAIN)
    cifar10_data.load.cache_clear()


def test_without_cifar_10_the_digits_stand_in_and_the_output_says_so():
    data = cifar10_data.load()
    assert data.images.shape == (1437, 32, 32, 3)
    assert "scikit-learn's digits, enlarged to 32 x 32 x 3" in data.source
    assert not data.can_be_flipped


def broken_cifar_10(kind: str, folder: Path) -> None:
    if kind == "cut":
        write_binary(folder)
        path = folder / "cifar-10-batches-bin" / "data_batch_3.bin"
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "missing":
        write_pickles(folder)
        (folder / "cifar-10-batches-py" / "test_batch").unlink()
    elif kind == "code":
        write_pickles(folder)
        (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(os.system))
    elif kind == "text":
        (folder / "images.npz").write_text("no npz")
    elif kind == "labels":
        write_npz(folder, test_labels=np.full(4, 10))
    elif kind == "shape":
        write_npz(folder, train_images=TRAIN[:, :16])
    elif kind == "jpeg":
        write_jpeg(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", r"no CIFAR-10 in .*Looked for cifar-10-batches-bin/data_batch_1.bin, .*train_jpeg"),
        ("cut", r"cannot read .*data_batch_3.bin has 6145 bytes, which is not a multiple of 3073"),
        ("missing", r"cannot read .*No such file .*test_batch"),
        ("code", r"cannot read .*system has no place in a CIFAR-10 file"),
        ("text", r"cannot read .*images.npz is not an npz file"),
        ("labels", r"labels must be 0 to 9, they range from 10 to 10"),
        ("shape", r"images must be uint8 \(n, 32, 32, 3\).*they are uint8 \(10, 16, 32, 3\)"),
        ("jpeg", r"jpeg.npz holds JPEG files; install Pillow"),
    ],
)
def test_broken_cifar_10_is_refused_by_its_fault(kind, message, tmp_path, capsys, monkeypatch):
    broken_cifar_10(kind, tmp_path)
    importlib.import_module("matplotlib.backends.backend_agg")  # which needs Pillow too
    monkeypatch.setitem(sys.modules, "PIL", None)  # as where Pillow is not installed
    assert re.search(message, error_of("train_cifar10", capsys, "--data-dir", tmp_path, "--out", tmp_path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "No such file or directory: .*digits.npz"),
        ({"x": np.ones((20, 64))}, "y is not a file"),
        ({"x": np.ones((20, 63)), "y": np.zeros(20, int)}, r"npz x must be \(n, 64\) or \(n, 8, 8\)"),
        ({"x": np.full((20, 64), np.nan), "y": np.zeros(20, int)}, "digits.npz x must be finite"),
        ({"x": np.ones((20, 64)), "y": np.full(20, 10)}, "labels from 0 to 9"),
        ({"x": np.ones((50, 64)), "y": np.arange(50) // 5}, "got 40: lower --batch-size"),
        ({"x": np.ones((9, 64)), "y": np.arange(9)}, "cannot be split into training and validation"),
    ],
)
def test_data_that_is_not_digits_is_refused_by_its_fault(tmp_path, capsys, arrays, message):
    if arrays is not None:
        np.savez(tmp_path / "digits.npz", **arrays)
    assert re.search(message, error_of("train_digits", capsys, "--data-dir", tmp_path, "--out", tmp_path))


def test_text_is_read_from_a_file_or_a_folder_and_else_from_pythons_library(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"b")
    (tmp_path / "a.txt").write_bytes(b"a")
    assert text_data.read_text(tmp_path)[0] == b"ab"
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"To be")
    assert text_data.read_text(tmp_path)[0] == b"To be"
    assert text_data.read_text(text=tmp_path / "b.txt")[0] == b"b"
    assert len(text_data.read_text()[0]) == 1_000_000
