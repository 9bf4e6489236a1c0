"""Checkpoints that were damaged are found, and the newest whole one is continued."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.common import checkpoints
from examples.common.command_line import RefusedError
from examples.common.run_folders import CheckpointError

# Reads that go on after the first has failed may find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step: int) -> dict[str, jax.Array]:
    """Leaves of several dtypes, one of them split over devices."""
    random = np.random.default_rng(step)
    split = NamedSharding(Mesh(np.array(jax.devices()[:4]), "x"), PartitionSpec("x"))
    return {
        "step": jnp.array(step),
        "window": jax.device_put(random.normal(size=(8, 300)).astype(np.float32), split),
        "half": jnp.asarray(random.normal(size=400).astype(ml_dtypes.bfloat16)),
        "mask": jnp.asarray(random.random(30) < 0.5),
    }


def save(folder: Path, *steps: int) -> None:
    with checkpoints.open_folder(folder, enable_async_checkpointing=False) as found:
        for step in steps:
            checkpoints.save(found, step, state(step), {"losses": [step] * 50})


def restore(folder: Path) -> int:
    """The step that is restored, with the state and the record that were saved in it."""
    with checkpoints.open_folder(folder) as found:
        last = checkpoints.restore_newest(found, state(0))
    assert last is not None
    step = int(last.state["step"])
    jax.tree.map(np.testing.assert_array_equal, last.state, state(step))
    assert last.record == {"losses": [step] * 50}
    return step


def invert(path: Path) -> None:
    """Other bytes in the middle, which no length tells."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 8)
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x00garbage" * 20),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "inverted": invert,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 10, 20)
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "inverted",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGE if kind != "inverted"),
    ],
)
def test_with_any_file_damaged_what_is_restored_was_saved(kind, saved, tmp_path, capsys):
    files = [path.relative_to(saved) for path in (saved / "20").rglob("*") if path.is_file()]
    assert len(files) >= 10
    steps = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGE[kind](folder / file)
        steps.append(restore(folder))  # 20 if the damaged file is not needed for it
        told = (
            "The checkpoint of step 20 is damaged, and now called damaged-20: " in capsys.readouterr().err
        )
        assert told == (folder / "damaged-20").exists() == (steps[-1] == 10)
    assert 10 in steps


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.rmtree(folder / name)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def unfinished(folder: Path) -> None:
    folder.rename(folder.with_name("20.orbax-checkpoint-tmp"))


@pytest.mark.parametrize("damage", [emptied, unfinished, without("state"), without("record")])
def test_with_a_folder_damaged_the_older_checkpoint_is_continued_and_its_next_step_saved(
    damage, saved, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    damage(folder / "20")
    assert restore(folder) == 10
    assert f"{folder}: continues after step 10." in capsys.readouterr().err
    save(folder, 20, 30)
    assert restore(folder) == 30


def test_where_no_checkpoint_is_whole_nothing_is_changed(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for step in ("10", "20"):
        cut(folder / step / "record" / "metadata")
    with pytest.raises(CheckpointError, match=r"no checkpoint of 20, 10 is whole: .*pass another --checkp"):
        restore(folder)
    assert {path.name for path in folder.iterdir()} == {"10", "20"}


def test_a_checkpoint_of_other_settings_is_refused_and_not_passed_over(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)

    def check(record):
        raise RefusedError(f"other settings in {record['losses'][0]}")

    with checkpoints.open_folder(folder) as found, pytest.raises(RefusedError, match="settings in 20"):
        checkpoints.restore_newest(found, state(0), check)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with checkpoints.open_folder(tmp_path) as found:
        assert checkpoints.restore_newest(found, state(0)) is None


def test_checkpoints_without_a_sum_of_bits_are_continued(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sum_of_bits", lambda state: None)
        save(tmp_path, 10)
    assert restore(tmp_path) == 10
