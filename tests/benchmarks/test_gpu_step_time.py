"""Measured steps of a GPU beside the predicted ones: what can be checked without a GPU."""

import jax
import pytest

from benchmarks import gpu_step_time
from benchmarks.gpu_cases import TREES, Case, Tree, make
from tests.benchmarks.test_gpu_tables import compiled_row


def test_gpus_are_told_by_what_jax_calls_them():
    assert gpu_step_time.target_of("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_step_time.target_of("NVIDIA A100-SXM4-40GB") == "a100"
    assert gpu_step_time.target_of("cpu") is None


def test_update_adam_and_copy_are_timed_in_turn(monkeypatch):
    tree = Tree(4, ((30,), (3, 2)))
    monkeypatch.setitem(TREES, "tiny", tree)
    tx = make(Case("h100", "one GPU", "tiny", "mfac", "float32"))
    update = jax.jit(tx.update, donate_argnums=1)
    seconds = gpu_step_time.seconds_of(tree, tx, update, copied=8, rounds=2)
    assert set(seconds) == {gpu_step_time.OURS, gpu_step_time.ADAM, gpu_step_time.COPY}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())


def test_the_table_has_the_prediction_and_the_share_of_a_copy():
    row = compiled_row()
    moved = sum(row["traffic"].values())
    times = {gpu_step_time.OURS: 2e-3, gpu_step_time.ADAM: 1e-4, gpu_step_time.COPY: 1e-3}
    seconds = {name: {"median": t, "min": t / 2, "max": 2 * t} for name, t in times.items()}
    row |= {"seconds": seconds, "copy_bytes": moved}
    (line,) = gpu_step_time.table([row]).splitlines()[2:3]
    assert "| 2.00 | 1.00 to 4.00 | 50% | 0.10 |" in line


def test_without_a_known_gpu_it_says_so(capsys):
    gpu_step_time.main([])
    assert capsys.readouterr().err.startswith("Left out: cpu is none of NVIDIA H100")


@pytest.mark.parametrize("argument", ["--rounds=0", "--trees=VGG"])
def test_wrong_arguments_are_refused(argument, capsys):
    with pytest.raises(SystemExit):
        gpu_step_time.main([argument])
    assert argument.split("=")[1] in capsys.readouterr().err
