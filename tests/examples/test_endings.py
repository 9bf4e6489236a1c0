"""How the examples end: wrong command lines, closed outputs, full disks, second runs, Ctrl-C."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from examples import train_digits
from examples.common import checkpoints, process
from examples.common.command_line import RefusedError
from examples.common.files import DiskFullError, alone_in, replacing
from examples.common.process import orderly
from tests.examples.scripts import ENVIRONMENT, SCRIPTS, error_of, is_png

SMALL = ["--seeds", "1", "--epochs", "1", "--evaluations", "2", "--optimizers", "mfac"]


@pytest.fixture(autouse=True)
def interrupts_count():
    """Children do not inherit that Ctrl-C is ignored, as it is where a shell starts the tests with `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ------------------------------------------------------------------------------------- command lines

WRONG = {
    "train_digits": ["--epochs x", "--epoch 3", "--resume", "--data-dir {0}", "--out {0}/used"],
    "train_cifar10": ["--samples 100", "--data-dir {0}", "--optimizers cgfac"],
    "train_finetune": ["--layers x", "--data-dir {0}"],
    "train_text": ["--heads 5", "--text {0}/none", "--data-dir {0}"],
    "train_pod": ["--steps x", "--heads 5", "--fsdp 3", "--text {0}/none", "--coordinator here:1"],
    "prune_digits": ["--sparsity 1", "--data-dir {0}"],
    "prune_resnet20": ["", "--data-dir {0}", "--data-dir {0} --pattern 2:4"],
    "launch_local": ["", "--processes 0", "examples.train_nothing"],
}
WITHOUT_JAX = """
import json, sys
from importlib import import_module
for name, lines in json.loads(sys.argv[1]).items():
    for line in lines:
        try:
            import_module(f"examples.{name}").main(line.split())
        except SystemExit as end:
            print(name, line, "->", end.code)
assert not {"jax", "optax", "flax", "orbax", "matplotlib", "sklearn"} & set(sys.modules)
"""


def test_wrong_command_lines_and_help_need_no_jax(tmp_path):
    assert set(WRONG) == set(SCRIPTS)
    (tmp_path / "used").touch()
    lines = {name: [*(x.format(tmp_path) for x in wrong), "--help"] for name, wrong in WRONG.items()}
    child = python(WITHOUT_JAX, json.dumps(lines), cwd=tmp_path)
    printed, errors = child.communicate()
    assert child.returncode == 0, errors
    ends = [line for line in printed.splitlines() if "->" in line]
    assert [line.endswith("-> 0") for line in ends] == [line.endswith("--help -> 0") for line in ends]
    assert [line for line in ends if not line.endswith(("-> 0", "-> 2"))] == []
    assert len(ends) == sum(map(len, lines.values()))
    refusals = errors.splitlines()
    assert len(refusals) == len(ends) - len(SCRIPTS)
    assert all(line.startswith("error: ") for line in refusals)


# ------------------------------------------------------------------------------------------- outputs


@pytest.fixture
def nobody_reads(monkeypatch):
    """Both outputs are pipes whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    files = [os.fdopen(os.dup(writer), "w") for _ in range(2)]
    os.close(writer)
    monkeypatch.setattr(sys, "stdout", files[0])
    monkeypatch.setattr(sys, "stderr", files[1])
    yield
    for file in files:
        file.close()


@pytest.mark.slow
def test_a_run_that_nobody_reads_writes_its_files(tmp_path, nobody_reads):
    train_digits.main([*SMALL, "--out", str(tmp_path)])
    for name in ("curves", "diagnostics", "fisher"):
        assert is_png(tmp_path / f"{name}.png")
    assert list(json.loads((tmp_path / "results.json").read_text())["optimizers"]) == ["mfac"]


PRINTS = """
import sys
from pathlib import Path
from examples.common.process import orderly
with orderly(""):
    for stream in (sys.stdout, sys.stderr):
        print("x" * 100_000, file=stream, flush=True)
    with open(sys.argv[1], "w") as file:
        file.write("whole")
"""


@pytest.mark.parametrize(
    ("redirections", "code"),
    [
        *(("| head -c1", 0), ("2>&1 | head -c1", 0), (">&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0)),
        ("> /dev/full", 1),
    ],
)
def test_outputs_that_cannot_be_printed_do_not_end_a_script(redirections, code, tmp_path):
    command = f'set -o pipefail; "$0" -W error -c "$1" "$2" {redirections}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PRINTS, tmp_path / "file"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert (tmp_path / "file").read_text() == "whole"
    last = [line for line in done.stderr.splitlines() if not line.startswith("x")]
    assert last == ["error: not all of the output could be printed: No space left on device"] * code


# ------------------------------------------------------------------------------------------ the disk


@pytest.fixture
def files_end_at():
    """Let no file become longer than so many bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path, files_end_at):
    path = tmp_path / "results.json"
    path.write_text("old")
    files_end_at(1000)
    message = f"cannot write into {tmp_path}: File too large. Free some"
    with pytest.raises(DiskFullError, match=message), replacing(path) as draft:
        draft.write_text("x" * 2000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # other writes fail later
@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_that_does_not_fit_is_told_with_its_folder(in_background, tmp_path, files_end_at):
    def save() -> None:
        with checkpoints.open_folder(tmp_path, enable_async_checkpointing=in_background) as found:
            checkpoints.save(found, 1, {"x": jnp.zeros(10)}, {})
            found.wait_until_finished()
            files_end_at(100_000)
            checkpoints.save(found, 2, {"x": jax.random.normal(jax.random.key(0), (100_000,))}, {})

    with pytest.raises(DiskFullError, match=f"cannot write into {tmp_path}: File too large. Free some"):
        save()
    files_end_at(resource.RLIM_INFINITY)
    with checkpoints.open_folder(tmp_path) as found:
        assert found.all_steps() == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_a_script_with_one_line(number, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"), orderly(""), replacing(tmp_path / "a.png"):
        raise OSError(number, os.strerror(number))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write into {tmp_path}: {os.strerror(number)}. Free some space")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["--checkpoint-dir", "--out"])
def test_a_run_on_a_full_disk_prints_one_line_and_no_traceback(folder, tmp_path):
    child = subprocess.run(
        ["bash", "-c", 'ulimit -f 20; "$@"', "-", sys.executable, "-m", "examples.train_digits", *SMALL]
        + (["--out", tmp_path, "--checkpoint-dir", tmp_path] if folder != "--out" else [folder, tmp_path]),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    assert "Traceback" not in child.stderr
    assert child.stderr.splitlines()[-1].startswith(f"error: cannot write into {tmp_path}")


# ----------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "name", ["train_digits", "train_cifar10", "train_text", "prune_digits", "prune_resnet20"]
)
def test_a_second_run_in_a_folder_is_refused(name, tmp_path, capsys):
    kinds = ["--out", "--checkpoint-dir"] if name.startswith("train") else ["--out"]
    needed = ["--data-dir", tmp_path] if name == "prune_resnet20" else []
    with alone_in(tmp_path / "busy"):
        for kind in kinds:
            others = ["--out", tmp_path / "free"] if kind != "--out" else []
            message = error_of(name, capsys, kind, tmp_path / "busy", *others, *needed)
            assert f"another run writes into {tmp_path / 'busy'}: wait for its end, or pass" in message


def test_one_folder_can_be_named_twice_by_one_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        alone_in(tmp_path, tmp_path / "link"),
        pytest.raises(RefusedError, match="another run"),
        alone_in(tmp_path),
    ):
        pass


HOLDS = """
import sys, time
from pathlib import Path
from examples.common.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_run_that_was_killed_leaves_no_lock(tmp_path):
    child = python(HOLDS, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "holds\n"
    with pytest.raises(RefusedError, match="another run writes into"), alone_in(tmp_path):
        pass
    child.kill()
    child.communicate()
    with alone_in(tmp_path):
        pass


# -------------------------------------------------------------------------------------------- Ctrl-C

WAITS = """
import sys, time
from examples.common.files import replacing
from examples.common.process import orderly
from pathlib import Path
class Destroyed:
    def __del__(self):
        print("waits", flush=True)
        time.sleep(60)
with orderly("Interrupted: pass --resume."):
    with replacing(Path(sys.argv[1])) as draft:
        draft.write_text("new")
        if sys.argv[2] == "in a destructor":
            Destroyed()
        try:
            print("waits", flush=True)
            time.sleep(60)
        except KeyboardInterrupt as error:
            if sys.argv[2] == "through C++":
                raise RuntimeError("of another kind") from error
            raise
"""


@pytest.mark.parametrize("where", ["at once", "through C++", "in a destructor"])
def test_ctrl_c_ends_with_one_line_and_whole_files(where, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    child = python(WAITS, path, where)
    assert child.stdout is not None
    assert child.stdout.readline() == "waits\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == process.INTERRUPTED == 130
    assert errors.split("\n") == ["", "Interrupted: pass --resume.", ""]
    assert path.read_text() == "old"


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(ZeroDivisionError), orderly("Interrupted"):
        print(1 / 0)
    assert capsys.readouterr().err == ""


def test_ctrl_c_at_the_launcher_ends_all_processes_with_one_line(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import time; print('waits\\n', end='', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "examples.launch_local", "--restarts=-1", "sleeper"],
        env=ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(2)] == ["waits\n"] * 2
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of the group
    printed, errors = child.communicate(timeout=60)  # until the last of them has closed its outputs
    assert child.returncode == 130
    assert printed == ""
    [line] = errors.split("\n")[1:-1]
    assert line == "Interrupted: all processes were ended. The same command starts them again."


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 5, None])
def test_a_run_that_was_interrupted_names_the_way_on_and_is_continued(seconds, tmp_path):
    folder = tmp_path / "checkpoints"
    argv = ["--epochs=4", "--seeds=1", "--optimizers=mfac", "--evaluations=44", f"--out={tmp_path}"]
    command = [sys.executable, "-W", "error", "-m", "examples.train_digits", *argv]
    command += ["--checkpoint-dir", str(folder)]
    child = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while (
        not (folder / "mfac-seed0" / "6").exists()
        if seconds is None
        else time.monotonic() < started + seconds
    ):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    errors = child.communicate()[1]
    assert child.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        f"Interrupted: pass --resume to continue from the last checkpoints in {folder}."
    )
    train_digits.main([*argv, "--checkpoint-dir", str(folder), "--resume"])
    results = json.loads((Path(tmp_path) / "results.json").read_text())
    assert results["optimizers"]["mfac"]["evaluations"][0][-1]["step"] == 88
