"""The house keeps its measures: files that can be read at once, functions of one screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("mfac_jax", "examples", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Without its docstring, empty lines and comments."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    documented = range(first.lineno, (first.end_lineno or 0) + 1) if is_docstring else ()
    numbers = range(function.lineno, (function.end_lineno or 0) + 1)
    code = [lines[number - 1].strip() for number in numbers if number not in documented]
    return sum(bool(line) and not line.startswith("#") for line in code)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    assert len(lines) <= LONGEST_FILE
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert {f.name: n for f in functions if (n := lines_of_code(f, lines)) > LONGEST_FUNCTION} == {}
