"""Files with one JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Read all lines.

    Raises:
      ValueError: a line is not JSON. The message names the file and the line.
      OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return records


def append(path: Path, *records: dict[str, Any]) -> None:
    """Add a line for each record, and make the folder if there is none. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(without_nan(record), allow_nan=False) + "\n" for record in records)


def drop_cut_line(path: Path) -> None:
    """Remove the last line if a writer that was killed left it incomplete."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])


def without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
