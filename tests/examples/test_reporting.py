"""What the examples write: the picture of M-FAC's diagnostics, JSON lines, Markdown, provenance."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import mfac_jax
from examples.common import json_lines, markdown, provenance
from examples.common.diagnostics_plot import plot_diagnostics


def diagnostics_records(steps: int, blocks) -> list[dict]:
    """A record from before the first step, and made-up ones of the same shapes."""
    state = mfac_jax.scale_by_mfac(4, blocks=blocks).init({"a": jnp.zeros((2, 3)), "b": jnp.zeros(5)})
    log, random = mfac_jax.DiagnosticsLog(every=1), np.random.default_rng(0)
    log(0, state)
    made_up = [
        {name: random.uniform(0.1, 1, np.shape(value)).tolist() for name, value in log.records[0].items()}
        for _ in range(steps)
    ]
    numbers = enumerate(made_up, start=1)
    return log.records + [record | {"step": step, "rows_used": min(step, 4)} for step, record in numbers]


@pytest.mark.parametrize(("steps", "blocks"), [(6, None), (6, "leaf"), (0, None)])
def test_the_plot_of_diagnostics_is_a_small_picture(steps, blocks, tmp_path):
    plot_diagnostics(diagnostics_records(steps, blocks), tmp_path / "diagnostics.png")
    assert 10_000 < (tmp_path / "diagnostics.png").stat().st_size < 200_000


def test_a_plot_without_records_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match="records must not be empty: call the log"):
        plot_diagnostics([], tmp_path / "x.png")


def test_json_lines_come_back_and_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    json_lines.append(path, {"loss": 1.5, "losses": [math.nan, math.inf]}, {"loss": None})
    json_lines.append(path, {"nested": {"loss": -math.inf}})
    assert json_lines.read(path) == [
        {"loss": 1.5, "losses": [None, None]},
        {"loss": None},
        {"nested": {"loss": None}},
    ]


def test_a_line_that_was_cut_short_is_named_and_can_be_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    json_lines.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2, is not JSON"):
        json_lines.read(path)
    json_lines.drop_cut_line(path)
    assert json_lines.read(path) == [{"a": 1}]
    json_lines.drop_cut_line(tmp_path / "none.jsonl")


def test_a_table_in_markdown_has_a_line_for_each_row():
    assert markdown.table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_the_record_of_provenance_can_be_json_and_names_packages_as_asked():
    record = provenance.record(["jax", "orbax_checkpoint", "not-installed"])
    assert list(record) == ["date", "revision", "versions", "machine"]
    assert set(record["versions"]) == {"jax", "orbax_checkpoint", "python"}
    assert set(record["machine"]) == {"platform", "processor", "cpus"}
    assert json.loads(json.dumps(record)) == record


def test_there_is_no_revision_outside_of_git(tmp_path):
    assert provenance.revision(tmp_path) is None
