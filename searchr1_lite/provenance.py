"""When, where, with what and by which command a figure was made: what every result file says of itself."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from searchr1_lite.config import ROOT


def provenance(libraries: Sequence[str]) -> dict[str, Any]:
    """date (ISO, UTC), machine (cpu, cores, threads, system), versions (Python and `libraries`) and command."""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": threads, "system": platform.system()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in libraries},
        "command": command(),
    }


def command() -> str:
    """What a person types from the project's root to do this again, without where it lay on this machine."""
    program = Path(sys.argv[0]).absolute()
    if "ipykernel" in sys.argv[0]:
        return "a notebook"
    name = program.name
    if name == "__main__.py":
        name = "searchr1"
    elif program.suffix == ".py" and program.is_relative_to(ROOT):
        name = f"python {program.relative_to(ROOT).as_posix()}"
    return " ".join([name, *map(_as_typed_from_root, sys.argv[1:])])


def _as_typed_from_root(argument: str) -> str:
    path = Path(argument)
    return Path(os.path.relpath(path, ROOT)).as_posix() if path.is_absolute() else argument


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
