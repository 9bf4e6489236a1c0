"""examples/train_pod.py on several processes, through kills, and on other numbers of devices."""

import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from examples import launch_local, pod_run, train_pod
from examples import pod_transformer as pod
from examples.common import checkpoints, command_line
from examples.common.training import TrainState
from tests.examples.scripts import ENVIRONMENT

MODULE = "examples.train_pod"
TINY = ["--width=32", "--layers=1", "--heads=2", "--context=16", "--batch-size=8", "--num-grads=8"]
TINY += ["--report-every=7"]
WORDS = ["the", "window", "holds", "the", "last", "gradients"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Words in a random order."""
    words = np.random.default_rng(0).choice(WORDS, 2000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


def arguments(text: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY, "--text", str(text), "--checkpoint-dir", str(folder), *more]


def on_processes(processes: int, devices: int, argv: list[str]) -> None:
    """Run the script to its end."""
    command = [sys.executable, "-m", "examples.launch_local", "--processes", str(processes)]
    command += ["--devices", str(devices), MODULE, *argv]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=1000)


def result(argv: list[str]) -> tuple[dict[str, Any], TrainState]:
    """What the last checkpoint holds, its state restored onto one device."""
    options = command_line.parse(train_pod.Options, argv, None)
    one_device: dict[str, Any] = {"axis_types": (AxisType.Auto,) * 2, "devices": jax.devices()[:1]}
    mesh = jax.make_mesh((1, 1), pod.AXES, **one_device)
    content, _ = train_pod.read_text(options)
    run = pod_run.make_run(options, np.frombuffer(content, np.uint8), mesh)
    with checkpoints.open_folder(options.checkpoint_dir) as found:
        last = checkpoints.restore_newest(found, run.shapes)
    assert last is not None
    for leaf, like in zip(jax.tree.leaves(last.state), jax.tree.leaves(run.shapes), strict=True):
        assert leaf.sharding == like.sharding
    return last.record, last.state


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def assert_same_run(found: list[str], expected: list[str]) -> None:
    """The same numbers to rounding."""
    (progress, state), (expected_progress, expected_state) = result(found), result(expected)
    assert state.step == expected_state.step
    for name in ("window", "second_moment", "gram", "coefficients"):
        one, other = (flat(optax.tree.get(s.opt_state, name)) for s in (state, expected_state))
        assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other), name
    start = flat(pod.split(pod.Size(256, 16, 32, 1, 2), np.dtype("float32"))[1])
    moved, expected_move = (flat(s.params) - start for s in (state, expected_state))
    assert np.linalg.norm(moved - expected_move) < 1e-5 * np.linalg.norm(expected_move)
    for report, wanted in zip(progress["reports"], expected_progress["reports"], strict=True):
        assert report == pytest.approx(wanted, rel=1e-5)


def assert_bit_identical(found: list[str], expected: list[str]) -> None:
    (progress, state), (expected_progress, expected_state) = result(found), result(expected)
    assert progress == expected_progress
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


@pytest.mark.slow
def test_two_processes_are_one(text, tmp_path):
    two, one = (arguments(text, tmp_path / name, "--steps", "20") for name in ("two", "one"))
    on_processes(2, 1, two)
    train_pod.main([*one, "--tensor", "2"])
    assert_same_run(two, one)


def on_two_hosts(argv: list[str], *own: list[str], folders: tuple[Path, Path]) -> list[subprocess.Popen]:
    """The script on two hosts, each with flags and a working directory of its own."""
    shared = ["--coordinator", f"127.0.0.1:{launch_local.free_port()}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, *argv, *shared, "--process-id", str(i), *flags],
            env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "1"},
            cwd=folder,
        )
        for i, (flags, folder) in enumerate(zip(own, folders, strict=True))
    ]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        pytest.param(
            (["--width", "32"], ["--width", "none"]),
            "all hosts must have the same flags, got",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (["--text", "words.txt"],) * 2,
            "all hosts must have the same text and versions, got",
            marks=pytest.mark.slow,
        ),
        ((["--checkpoint-dir", "runs"],) * 2, "all hosts must have the same --checkpoint-dir, got"),
    ],
)
def test_hosts_that_do_not_agree_are_refused_on_each(text, tmp_path, capfd, own, message):
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
    (folders[0] / "words.txt").write_bytes(text.read_bytes())
    children = on_two_hosts(arguments(text, tmp_path / "runs"), *own, folders=folders)
    addresses = set()
    while all(child.poll() is None for child in children):
        addresses |= listening(children)
        time.sleep(0.05)
    # 127.0.0.1, of gloo and of the coordinator: nothing else may be reached from other machines.
    assert addresses == {"0100007F", "0000000000000000FFFF00000100007F"}
    assert [child.wait(timeout=120) for child in children] == [2, 2]
    assert capfd.readouterr().err.count(message) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fsdp 4", r"--fsdp times --tensor must be the number of devices, 8, got 4 x 1"),
        ("--fsdp 3", r"--batch-size must be a multiple of --fsdp, got 8 and 3"),
        ("--tensor 2 --batch-size 6", r"--batch-size must be a multiple of --fsdp, got 6 and 4"),
        ("--tensor 8", r"--heads must divide --width 32 and be a multiple of --tensor 8, got 2"),
        ("--width 36", r"axis \d of leaf \[.*'attention_out'.*, 36 long, is split over .*fsdp.* of 8 dev"),
        ("--context 1000", r"the text must have 20 times --context characters, got"),
        ("--text no-such-file", r"cannot read the text"),
        ("--coordinator here:1", r"--coordinator HOST:PORT needs --num-processes and --process-id"),
        ("--num-processes 2 --process-id 0", r"need --coordinator HOST:PORT, got None"),
        ("--rate nan", r"--rate: must be a number above 0, got 'nan'"),
        ("--seed -1", r"--seed: must be a whole number, at least 0, got '-1'"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_compiled(
    text, tmp_path, capsys, flags, message
):
    with pytest.raises(SystemExit, match="2"):
        train_pod.main([*arguments(text, tmp_path), *flags.split()])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_a_finished_run_is_reported_again_and_not_continued_with_other_settings(text, tmp_path, capsys):
    argv = arguments(text, tmp_path, "--steps", "2", "--save-every", "1")
    train_pod.main(argv)
    first = capsys.readouterr().out.splitlines()
    (tmp_path / "2" / "record" / "metadata").write_text("{")
    train_pod.main(argv)
    repaired = capsys.readouterr()
    assert "The checkpoint of step 2 is damaged, and now called damaged-2: " in repaired.err
    assert f"{tmp_path}: continues after step 1.\n" in repaired.err
    assert first[-1] == repaired.out.splitlines()[-1]
    train_pod.main([*argv, "--fsdp", "4", "--tensor", "2"])
    again = capsys.readouterr()
    assert f"{tmp_path}: continues after step 2.\n" in again.err
    assert first[-1] == again.out.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        train_pod.main([*argv, "--num-grads", "9"])
    assert "num_grads was 8, is 9" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state/ocdbt.process_1/d", "record/metadata", "state/_METADATA"])
def test_all_hosts_continue_the_newest_checkpoint_that_each_can_read(file, text, tmp_path, capfd):
    flags = ["--steps=12", "--save-every=5", "--tensor=2"]
    cut, alone = (arguments(text, tmp_path / name, *flags) for name in ("cut", "alone"))
    for argv in (cut, alone):
        on_processes(2, 1, argv)
    damaged = tmp_path / "cut" / "12" / file
    # Of the files of one host the largest has its part of the arrays.
    path = max(damaged.iterdir(), key=lambda path: path.stat().st_size) if damaged.is_dir() else damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    on_processes(2, 1, cut)
    errors = capfd.readouterr().err
    assert errors.count("The checkpoint of step 12 is damaged, and now called damaged-12: ") == 1
    assert errors.count(f"{tmp_path / 'cut'}: continues after step 10.") == 1
    assert_bit_identical(cut, alone)


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_on_all_hosts(text, tmp_path, capfd):
    argv = arguments(text, tmp_path, "--steps=3000")
    first = launch_local.start([MODULE, *argv], 2, 1)
    while not (tmp_path / "1").exists():
        time.sleep(0.01)
    second = launch_local.start([MODULE, *argv], 2, 1)
    assert [child.wait(timeout=120) for child in second] == [2, 2]
    assert capfd.readouterr().err.count(f"another run writes into {tmp_path}: wait for its end, or") == 2
    for child in first:
        child.kill()
        child.wait()


def listening(children: list[subprocess.Popen]) -> set[str]:
    """The addresses, as Linux writes them, on which the processes wait for connections."""
    sockets = set()
    for child in children:
        for file in Path(f"/proc/{child.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    waiting = [line for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]
    return {line[1].split(":")[0] for line in waiting}


def killed(children: list[subprocess.Popen], folder: Path, saving: bool, delay: float) -> None:
    """Kill one process, up to `delay` seconds after a save has begun, or else after one was completed."""
    before = set(folder.glob("[0-9]*"))
    while all(child.poll() is None for child in children):
        new = set(folder.glob("[0-9]*")) - before
        if any(("tmp" in path.name) == saving for path in new):
            time.sleep(random.uniform(0, delay))
            break
        time.sleep(0.001)
    random.choice(children).kill()
    assert launch_local.wait(children) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "kills"), [(1, 4, 14), (2, 2, 6)])
def test_a_run_that_is_killed_time_and_again_ends_in_the_same_bits(
    text, tmp_path, processes, devices, kills
):
    flags = ["--steps=1000", "--width=64", "--num-grads=128", "--save-every=5", "--tensor=2"]
    cut, alone = (arguments(text, tmp_path / name, *flags) for name in ("cut", "alone"))
    saving = 0
    for kill in range(kills):
        children = launch_local.start([MODULE, *cut], processes, devices)
        is_saving = kill % 2 == 0
        killed(children, tmp_path / "cut", is_saving, delay=0.05 if is_saving else 1.0)
        saving += any("tmp" in path.name for path in (tmp_path / "cut").iterdir())
    print(f"{kills} kills, {saving} of them while saving")
    assert saving >= kills // 4
    for argv in (cut, alone):
        on_processes(processes, devices, argv)
    assert_bit_identical(cut, alone)


@pytest.mark.slow
def test_hosts_that_are_about_to_be_taken_away_save_and_are_continued(text, tmp_path):
    flags = ["--steps=3000", "--save-every=3000"]
    cut, alone = (arguments(text, tmp_path / name, *flags) for name in ("cut", "alone"))
    children = launch_local.start([MODULE, *cut], 2, 1)
    while not (tmp_path / "cut" / "1").exists():  # the first step is always saved
        time.sleep(0.01)
    children[1].terminate()
    assert [child.wait(timeout=120) for child in children] == [pod_run.PREEMPTED] * 2
    assert any(1 < int(path.name) < 3000 for path in (tmp_path / "cut").glob("[0-9]*"))
    for argv in (cut, alone):
        on_processes(2, 1, argv)
    assert_bit_identical(cut, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 1), (4, 1)])
def test_a_checkpoint_of_four_processes_is_continued_by(processes, devices, text, tmp_path):
    # Beyond some 25 steps this run doubles rounding errors at each step, as that of AdamW does at 5e-2.
    flags = ["--steps", "20", "--save-every", "5"]
    argv, alone = (arguments(text, tmp_path / name, *flags) for name in ("four", "one"))
    children = launch_local.start([MODULE, *argv], 4, 1)
    killed(children, tmp_path / "four", saving=False, delay=0)
    on_processes(processes, devices, argv)
    on_processes(1, 1, alone)
    assert_same_run(argv, alone)
