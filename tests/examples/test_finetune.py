"""Fine-tuning: word pieces, the encoder beside another library's numbers, and training on a tiny one."""

import functools
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import finetune, finetune_data
from examples.common.optimizers import make_optimizer
from examples.common.training import train
from tests.examples.scripts import error_of

WIDTH, LAYERS = 8, 2
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "un", "##able", "##a", "cafe", "!", "是"]
PIECES += [str(digit) for digit in range(10)] + [f"##{digit}" for digit in range(10)]
VOCABULARY = {piece: number for number, piece in enumerate(PIECES)}


# The first features of three sentences' mean tokens: BertModel of transformers 5, with PyTorch.
SENTENCES = {
    "A man is eating food.": (0.187239, 0.024818, -0.035356, 0.272502),
    "A man eats something.": (0.078374, -0.135530, -0.038412, 0.055304),
    "Stocks fell sharply on Tuesday.": (0.109155, -0.182616, 0.451392, 0.418932),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An encoder with random weights, and texts that one word decides."""
    folder = tmp_path_factory.mktemp("encoder")
    random, shapes = np.random.default_rng(0), {}
    for name, rows in (("word", len(PIECES)), ("position", 16), ("token_type", 2)):
        shapes[f"embeddings.{name}_embeddings.weight"] = (rows, WIDTH)
    shapes |= {f"embeddings.LayerNorm.{kind}": (WIDTH,) for kind in ("weight", "bias")}
    for i in range(LAYERS):
        for part, name in finetune_data.PARTS.items():
            out, into = 4 * WIDTH if part == "up" else WIDTH, 4 * WIDTH if part == "down" else WIDTH
            prefix = f"encoder.layer.{i}.{name}"
            shapes |= {
                f"{prefix}.weight": (out,) if "norm" in part else (out, into),
                f"{prefix}.bias": (out,),
            }
    content, header = b"", {}
    for name, shape in shapes.items():
        values = (0.5 * random.standard_normal(shape) + ("Norm.weight" in name)).astype("<f4").tobytes()
        offsets = [len(content), len(content) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        content += values
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    config = {"num_hidden_layers": LAYERS, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    words = (("good", "positive"), ("bad", "negative"))
    rows = [f"{word} {i},{label}" for i in range(600) for word, label in words]
    (folder / "texts.csv").write_text("\n".join(["text,sentiment", "so so,neutral", *rows]))
    return folder


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Good BAD", ["good", "bad"]),
        ("unable", ["un", "##able"]),
        ("caf\u00e9!good", ["cafe", "!", "good"]),
        ("good\u662fgood\t\x00bad", ["good", "\u662f", "good", "bad"]),
        ("unknown", ["[UNK]"]),
        ("a" * 101, ["[UNK]"]),
        ("", []),
    ],
)
def test_texts_are_split_into_the_longest_known_pieces(text, pieces):
    numbers = finetune_data.encode(text, VOCABULARY, 8)
    assert [PIECES[number] for number in numbers if number] == ["[CLS]", *pieces, "[SEP]"]
    assert len(numbers) == 8


def test_a_long_text_is_cut_before_its_end_mark():
    numbers = finetune_data.encode("good bad " * 9, VOCABULARY, 5)
    assert [PIECES[number] for number in numbers] == ["[CLS]", "good", "bad", "good", "[SEP]"]


def test_half_of_the_texts_are_positive_and_none_is_in_both_parts(folder):
    texts = finetune_data.read_texts(folder, 100, 8)
    assert len(texts.train) == len(texts.train_labels) == 100
    labels = np.concatenate([texts.train_labels, texts.valid_labels])
    assert labels.mean() == 0.5
    rows = np.concatenate([texts.train, texts.valid])
    assert len(np.unique(rows, axis=0)) == len(rows)
    np.testing.assert_array_equal(rows[:, 1] == VOCABULARY["good"], labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 3", "--layers must be at most 2 for this encoder, got 3"),
        ("--layers 2 --samples 400", "must have 700 texts of each label, it has 600: lower --samples"),
    ],
)
def test_what_the_files_do_not_have_is_refused(folder, options, message, tmp_path, capsys):
    arguments = ["--data-dir", folder, "--out", tmp_path, *options.split()]
    assert message in error_of("train_finetune", capsys, *arguments)


def test_a_folder_without_an_encoder_and_missing_packages_are_refused(tmp_path, capsys, monkeypatch):
    arguments = ["--out", tmp_path / "out"]
    message = error_of("train_finetune", capsys, *arguments, "--data-dir", tmp_path)
    assert f"cannot read an encoder from {tmp_path}" in message
    monkeypatch.setattr(finetune_data, "TEXT_PACKAGE", "no_such_package")
    assert "no_such_package is not installed" in error_of("train_finetune", capsys, *arguments)


# --------------------------------------------------------------------------------------------- encoder


def pooled(encoder: finetune_data.Encoder, ids: jax.Array) -> jax.Array:
    """The mean over the tokens behind all layers."""
    x = finetune.embed(jax.tree.map(jnp.asarray, encoder.embeddings), ids)
    for params in encoder.layers.values():
        x = finetune.Layer(encoder.heads).apply({"params": params}, x, ids > 0)
    return finetune.mean(x, ids > 0)


def test_what_fills_up_a_text_changes_nothing(folder):
    encoder = finetune_data.read_encoder(folder, LAYERS)
    ids = jnp.asarray([finetune_data.encode("good bad!", VOCABULARY, tokens=12)])
    of = jax.jit(functools.partial(pooled, encoder))
    np.testing.assert_allclose(of(ids), of(ids[:, :5]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.finetune
def test_the_packaged_encoder_has_the_embeddings_of_transformers():
    folder, _ = finetune_data.folders(None)
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = {piece: number for number, piece in enumerate(lines)}
    ids = jnp.asarray([finetune_data.encode(sentence, vocabulary, 12) for sentence in SENTENCES])
    vectors = np.asarray(pooled(finetune_data.read_encoder(folder, 6), ids))
    np.testing.assert_allclose(vectors[:, :4], list(SENTENCES.values()), atol=2e-5)
    a, b, c = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert a @ b > 0.8
    assert a @ c < 0.2


# -------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_training_learns_the_word_that_decides_and_leaves_the_embeddings(folder):
    make = {"epochs": 8, "samples": 200, "tokens": 6, "layers": LAYERS, "data_dir": folder}
    workload, other = (finetune.make_workload(**make, seed=seed) for seed in (0, 1))
    assert (workload.loss, workload.evaluate) == (other.loss, other.evaluate)
    assert not np.array_equal(workload.params["head"]["kernel"], other.params["head"]["kernel"])
    assert not np.array_equal(workload.batches, other.batches)
    history = train(workload, make_optimizer("adamw", 1e-2, len(workload.batches)), 0, evaluate_every=99)
    last = history.evaluations[-1]
    assert set(last) == {"step", "seconds", "train_loss", "valid_loss", "valid_accuracy"}
    assert last["valid_accuracy"] > 0.95


def test_from_scratch_no_weight_is_kept(folder):
    encoder = finetune_data.read_encoder(folder, LAYERS)
    drawn = finetune.at_random(encoder, 0)
    for before, after in zip(jax.tree.leaves(encoder), jax.tree.leaves(drawn), strict=True):
        assert np.ndim(before) == 0 or (np.shape(before) == np.shape(after) and not np.any(before == after))
