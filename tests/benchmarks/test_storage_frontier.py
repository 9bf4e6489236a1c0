"""Windows of several sizes and storages: which runs, and the table of what they end at."""

from benchmarks import storage_frontier
from examples.common import json_lines

PANEL = storage_frontier.Panel("digits-mlp", None)


def run(storage: str, num_grads: int, seed: int, loss: float, size: int) -> dict:
    return {
        "study": "frontier",
        "problem": "digits-mlp",
        "optimizer": f"mfac, rotated, {storage}, num_grads={num_grads}",
        "seed": seed,
        "limit": None,
        "state_bytes": 100 * size,
        "parameters": 100,
        "evaluations": [{"step": step, "train_loss": loss, "valid_loss": 2 * loss} for step in (0, 8)],
    }


def test_all_combinations_are_run_with_every_seed():
    options = storage_frontier.Options(storages=("int8", "float32"), num_grads=(4, 16), seeds=2)
    runs = storage_frontier.runs_of(options, "digits-mlp")
    assert len(set(runs)) == len(runs) == 8
    assert {run.optimizer for run in runs} <= set(storage_frontier.opt.TRANSFORMS)


def test_the_table_and_the_picture_have_every_window(tmp_path):
    records = [
        run(storage, num_grads, seed, loss + seed / 100, size)
        for storage, num_grads, loss, size in (("int8", 4, 0.5, 40), ("float32", 4, 0.4, 50))
        for seed in (1, 2)
    ]
    text = storage_frontier.table(records, PANEL)
    assert "| rotated, int8, num_grads=4 | 40.0 | 0.5150 ± 0.0071 | 1.030 ± 0.014 | 2 |" in text
    storage_frontier.draw(records, [PANEL], tmp_path / "frontier.png")
    storage_frontier.draw_curves(records, [PANEL], tmp_path / "curves.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000 < (tmp_path / "curves.png").stat().st_size


def test_runs_of_another_length_are_apart():
    records = [run("int8", 4, 1, 0.5, 40), run("int8", 4, 1, 2.0, 40) | {"limit": 10}]
    whole, cut = storage_frontier.panels(records, ["digits-mlp"])
    assert (whole, cut.title()) == (PANEL, "digits-mlp, 10 steps")
    assert "| 0.5 |" in storage_frontier.table(records, whole)
    assert "| 2 |" in storage_frontier.table(records, cut)


def test_stored_runs_are_not_repeated(tmp_path, capsys):
    options = {"problems": ("digits-mlp",), "storages": ("int8",), "num_grads": (4,), "seeds": 2}
    wanted = storage_frontier.runs_of(storage_frontier.Options(**options), "digits-mlp")
    lines = [run("int8", 4, each.seed, 0.5 + each.seed, 40) | each._asdict() for each in wanted]
    json_lines.append(tmp_path / "frontier.jsonl", *lines)
    names = ["--problems", "digits-mlp", "--storages", "int8", "--num-grads", "4", "--seeds", "2"]
    storage_frontier.main([*names, "--out", str(tmp_path)])
    assert "| 2.00 ± 0.71 |" in capsys.readouterr().out
    assert len(json_lines.read(tmp_path / "frontier.jsonl")) == 2
