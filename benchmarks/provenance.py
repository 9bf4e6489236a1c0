"""What a result was measured with: revision, versions, machine, date."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.common.provenance import revision


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """For a line of results, with the versions of Python and of the packages that are installed."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in packages if name in installed}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision(),
        "versions": versions | {"python": platform.python_version()},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What this runs on."""
    return {"platform": platform.platform(), "processor": _processor(), "cpus": os.cpu_count()}


def _processor() -> str:
    """The processor's name as Linux has it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
