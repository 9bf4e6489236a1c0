"""What a result was measured with: date, revision, versions and machine."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("mfac_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def record(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """What to write beside a result, with keys `date`, `revision`, `versions` and `machine`.

    Args:
      packages: whose versions to give. A package that is not installed is left out; Python is always there.
    """
    installed = {_normal(d.name): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[_normal(name)] for name in packages if _normal(name) in installed}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision(),
        "versions": versions | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "processor": _processor(), "cpus": os.cpu_count()},
    }


def _normal(name: str) -> str:
    """The name of a package as it is compared: kfac-jax and kfac_jax are the same."""
    return name.replace("-", "_").lower()


def revision(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the folder's repository, with -dirty after changes; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The processor's name as Linux has it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
