"""The command lines of the examples: help for every option, and one clear line for what is wrong."""

import dataclasses
import re
import sys
from typing import Annotated

import pytest

from examples.common import command_line
from tests.examples.scripts import SCRIPTS, error_of


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        SCRIPTS[name].main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m examples.{name} ")
    sections = re.split(r"^\W+(?=--)", text.split("show this help")[1], flags=re.MULTILINE)[1:]
    explained = {section.split()[0]: section for section in sections}
    fields = dataclasses.fields(SCRIPTS[name].Options)
    assert set(explained) == {f"--{field.name.replace('_', '-')}" for field in fields}
    for section in sections:
        words = re.split(r"  +|│\s*│", section.strip(" │╰╯─\n"))
        assert len(words) > 1, section
        assert len(words[-1].split()) > 1, section
    assert not re.search(r"default: (None|False|\[|\()", text)


def test_help_shows_defaults_as_they_are_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, shown in (
        ("train_digits", ["mfac sgd adamw", "mfac=0.01 cgfac=0.1 ", "22", "mlp"]),
        ("prune_digits", ["0.5 0.75 0.875 ", "0", "128"]),
        ("train_pod", ["out/pod", "0.01"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            SCRIPTS[name].main(["--help"])
        text = capsys.readouterr().out
        assert all(f"(default: {default}" in text for default in shown)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_text", "--data-dir {}", "neither {}/tinyshakespeare.txt nor another *.txt in that folder"),
        ("train_text", "--text {}/none.txt", "cannot read the text: [Errno 2] No such file or directory"),
        ("train_text", "--text {}/short.md", "must exceed --context 64, it has 10 characters"),
        ("train_text", "--heads 5", "--heads must divide --width, got 5 heads and a width of 96"),
        (
            "train_text",
            "--checkpoint-dir {0}/short.md",
            "--checkpoint-dir: must be a folder, but {0}/short.",
        ),
        ("train_cifar10", "--tfds", "install tensorflow_datasets, or pass --data-dir"),
        ("train_cifar10", "--samples 100", "a batch of 128 needs as many samples, got 100: lower --"),
        ("train_cifar10", "--samples x", "--samples: must be a whole number, at least 1, got 'x'"),
        (
            "train_cifar10",
            "--optimizers cgfac",
            "--optimizers: invalid choice 'cgfac': choose from mfac",
        ),
        (
            "train_digits",
            "--rates adam=1",
            "--rates: unknown optimizer 'adam': write NAME=RATE with a",
        ),
        ("train_digits", "--rates sgd=-1", "the rate of sgd must be a number above 0, got '-1'"),
        (
            "train_digits",
            "--rates sgd",
            "the rate of sgd must be a number above 0, got '': write e.g.",
        ),
        ("train_digits", "--optimizers", "--optimizers: needs at least one value, got 0"),
        ("train_digits", "--model mlp cnn", "--model: needs one value, got 2"),
        ("train_digits", "--seeds 0", "--seeds: must be a whole number, at least 1, got '0'"),
        ("train_digits", "--epochs x", "--epochs: must be a whole number, at least 1, got 'x'"),
        ("train_digits", "--epoch 3", "unknown argument '--epoch': did you mean --epochs?"),
        ("train_digits", "3", "unknown argument '3': --help lists all options"),
        ("train_digits", "--resume", "--resume needs the --checkpoint-dir of the runs to continue"),
        ("train_digits", "--out {0}/short.md", "--out: must be a folder, but {0}/short.md is a file: pass"),
        ("train_digits", "--out {0}/short.md/new", "--out: must be a folder, but {0}/short.md is a file"),
        (
            "prune_digits",
            "--sparsity 1",
            "--sparsity: must be a number from 0 to below 1, got '1': w",
        ),
        ("prune_digits", "--seed -1", "--seed: must be a whole number, at least 0, got '-1'"),
        ("prune_digits", "--num-grads 0", "--num-grads: must be a whole number, at least 1, got '0'"),
        ("prune_digits", "--data-dir {0}", "cannot read x and y from {0}/digits.npz"),
        ("prune_resnet20", "", "pass --data-dir with CIFAR-10, or --tfds"),
        ("prune_resnet20", "--tfds", "pass --weights, or a --data-dir with resnet20_cifar10_torch.npz"),
        ("prune_resnet20", "--data-dir {0}", "cannot read a ResNet-20 from {0}/resnet20_cifar10_torch.npz"),
        ("prune_resnet20", "--data-dir {0} --pattern 2:4", "2:4 prunes half at most: pass --sparsity 0.5"),
        ("prune_resnet20", "--data-dir {0} --methods obs", "invalid choice 'obs'"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_cure(name, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # as where it is not installed
    (tmp_path / "short.md").write_text("x" * 100)
    given = arguments.format(tmp_path).split()
    given += [] if "--out" in given else ["--out", str(tmp_path)]
    assert message.format(tmp_path) in error_of(name, capsys, *given)


@dataclasses.dataclass
class Options:
    """Options for the tests."""

    numbers: Annotated[tuple[int, ...], command_line.option(command_line.number(0), "N", many=True)] = (1,)
    """some numbers"""
    name: command_line.OptionalText = None
    """a name"""
    fast: command_line.Flag = False
    """whether to be fast"""


def test_options_are_typed_in_each_usual_form():
    assert command_line.parse(Options, [], None) == Options()
    argv = ["--numbers", "3", "0", "--name=a b", "--fast"]
    assert command_line.parse(Options, argv, None) == Options((3, 0), "a b", True)


def test_unknown_words_are_left_to_others_where_that_is_wanted():
    argv = ["--other", "1", "--name", "x", "--help"]
    options, rest = command_line.parse_known(Options, argv)
    assert options == Options(name="x")
    assert rest == ["--other", "1", "--help"]


def test_the_words_after_the_module_are_the_scripts_own(monkeypatch):
    split = SCRIPTS["launch_local"].split
    command = ["examples.train_pod", "--steps", "3", "--devices", "x"]
    assert split(["--processes", "3", "--devices=2", *command]) == (
        ["--processes", "3", "--devices=2"],
        command,
    )
    assert split(["--help", "x"]) == (["--help"], ["x"])
    assert split(["--devices"]) == (["--devices"], [])


def test_the_launcher_refuses_to_start_nothing(capsys):
    assert "name a module to start, e.g. examples.train_pod" in error_of("launch_local", capsys)
