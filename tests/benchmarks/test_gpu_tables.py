"""What is read out of programs for GPUs, and what is predicted from that."""

import json

import pytest

from benchmarks import gpu_program, gpu_tables

PROGRAM = """\
HloModule jit_update, is_scheduled=true

%fused_write (p.0: f32[8,100], p.1: f32[100], p.2: s32[]) -> f32[8,100] {
  %p.0 = f32[8,100]{1,0} parameter(0)
  %p.1 = f32[100]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,100]{1,0} dynamic-slice(%p.0, %p.2, %zero), dynamic_slice_sizes={1,100}
  %new = f32[1,100]{1,0} bitcast(%p.1)
  %sum = f32[1,100]{1,0} add(%old, %new)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%p.0, %sum, %p.2, %zero)
}

%fused_both (p.3: f32[8,100], p.4: f32[1,100], p.5: s32[]) -> (f32[8], f32[]) {
  %p.3 = f32[8,100]{1,0} parameter(0)
  %p.4 = f32[1,100]{1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  %put.1 = f32[8,100]{1,0} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5)
  %reduced = f32[8]{0} reduce(%put.1, %p.5), dimensions={1}, to_apply=%add
  ROOT %both = (f32[8]{0}, s32[]) tuple(%reduced, %p.5)
}

%copies (arg: (f32[8,100])) -> (f32[8,100]) {
  %arg = (f32[8,100]{1,0}) parameter(0)
  %part = f32[8,100]{1,0} get-tuple-element(%arg), index=0
  %copy.1 = f32[8,100]{1,0} copy(%part)
  ROOT %out = (f32[8,100]{1,0}) tuple(%copy.1)
}

%leaves (arg.1: (f32[8,100])) -> (f32[8,100]) {
  ROOT %arg.1 = (f32[8,100]{1,0}) parameter(0)
}

ENTRY %main (window: f32[8,100], row: f32[100], index: s32[], flag: pred[]) -> f32[8,100] {
  %window = f32[8,100]{1,0} parameter(0), metadata={op_name="window"}
  %row = f32[100]{0} parameter(1)
  %index = s32[] parameter(2)
  %flag = pred[] parameter(3)
  %read = (f32[8]{0}, s32[]) fusion(%window, %row, %index), kind=kInput, calls=%fused_both
  %tuple.1 = (f32[8,100]{1,0}) tuple(%window)
  %rare = (f32[8,100]{1,0}) conditional(%flag, %tuple.1, %tuple.1), true_computation=%copies, \
false_computation=%leaves
  %solved = (f32[8]{0}, s8[0]{0}) custom-call(%row), custom_call_target="solve"
  ROOT %write = f32[8,100]{1,0} fusion(%window, %row, %index), kind=kLoop, calls=%fused_write
}
"""


def test_slices_and_rows_count_in_place_of_the_arrays_that_they_are_of():
    write = (400 + 400 + 4, 400)  # the row, the old one and the index; of the window the row alone
    both = (3200 + 400 + 4, 32 + 4)  # what is not returned is not written in place
    solved = (400, 32)
    assert gpu_program.traffic(PROGRAM) == tuple(map(sum, zip(write, both, solved, strict=True)))


def test_copies_count_in_all_branches():
    assert gpu_program.copied(PROGRAM, [(8, 100)]) == gpu_program.copied(PROGRAM, [(8, 2, 50)]) == 3200
    assert gpu_program.copied(PROGRAM, [(8, 50), (4, 200)]) == 0


SEQUENCE = """\
000: kCommandBuffer [source       | next=029 (1)]
    001: kCopy         [source       | next=012 (11)] kCopy
    002: kCustomKernel [prev=002 (1) | next=007 (4) ] loop_fusion grid: [1, 1, 1] threads: [1, 1, 1]
    003: kConditional  [prev=002 (1) | sink        ]
      true_branch:
        004: kCopy [source | sink] kCopy
029: kCustomCall    [prev=000 (1) | next=030 (1)] kCustomCall
034: kSequential    [prev=031 (1) | next=037 (1)]   032: kCopy [source | next=033 (1)] kCopy
  033: kTriangularSolve [prev=032 (1) | sink        ] (no description)
067: kConditional   [prev=047 (1) | next=000 (1)]
  false_branch:
    No thunks.  true_branch:
    048: kCopy         [source       | next=052 (4)] kCopy
    052: kWhile        [prev=051 (1) | next=062 (1)]
condition:
        053: kCustomKernel [source       | next=054 (1)] loop_fusion_1 grid: [1, 1, 1] threads: [32, 1, 1]
      body:
        056: kCustomCall   [prev=055 (1) | next=057 (1)] kCustomCall
068: kCustomKernel  [prev=031 (1) | sink] input_fusion grid: [1, 1, 1] threads: [32, 1, 1]
"""


def test_launches_are_counted_without_what_runs_rarely():
    # The graph; the call, the copy, the triangular solve and the last kernel outside of it.
    assert gpu_program.launches(SEQUENCE) == gpu_program.Launches(kernels=6, graphs=1, launches=5, waits=1)


def compiled_row(**changes) -> dict:
    """Made up: a gradient of a MiB."""
    return {
        "target": "h100",
        "mode": "one GPU",
        "tree": "made up",
        "transform": "mfac",
        "storage": "float32",
        "devices": 1,
        "leaves": 4,
        "num_grads": 64,
        "gradient_bytes": 2**20,
        "window_bytes": 2**26,
        "temporaries": 2**20,
        "traffic": {"read": 2 * 2**26 + 3 * 2**20, "written": 2**21},
        "copied": 0,
        "launches": {"kernels": 20, "graphs": 2, "launches": 7, "waits": 1},
        "collectives": {},
    } | changes


def test_the_prediction_is_the_arithmetic_of_its_assumptions():
    row = compiled_row(devices=8, collectives={"all-reduce": [2, 900]})
    predicted = gpu_tables.predict(row)
    assert predicted.traffic == pytest.approx(133 * 2**20 / (0.9 * 3352.32e9))
    assert predicted.kernels == pytest.approx(20 * 2e-6 + 15e-6)
    assert predicted.solve == pytest.approx(64 * 1.5e-6)
    assert predicted.network == pytest.approx(2 * 10e-6 + 2 * 900 / 450e9)
    assert predicted.total == pytest.approx(sum(predicted))
    assert gpu_tables.predict(compiled_row(transform="mfac, inverse")).solve == 0


def test_the_tables_say_what_was_compiled_and_what_is_predicted(tmp_path, capsys):
    rows = [compiled_row(), compiled_row(devices=8, mode="jit", collectives={"all-reduce": [1, 2000]})]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu_tables.main([str(tmp_path / "gpu.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    one = "| made up, m = 64, mfac, float32, H100 | 64 | 1 | 2.05 | 0.03 | 0.00 | 3.0 | 2.0 | 20 |"
    assert f"{one} 5.0 | 2 | 1 | none |" in lines
    assert gpu_tables.beside(compiled_row(num_grads=1024)) == ["", ""]
    assert any("8 H100, jit |" in line and "1 all-reduce, 2 KiB" in line for line in lines)
    assert any(line.startswith("Predicted, not measured") for line in lines)
