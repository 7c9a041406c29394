"""Facts about the machine, the model and the memory of this process, for a benchmark."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.bundle.reader import Bundle
from tarflow_runtimes.engines.ort_cpu.cpus import cpu_name, usable_cpus

STATUS: Final = Path("/proc/self/status")


def machine_header() -> dict[str, Any]:
    """The versions and the machine."""
    return {
        "tarflow-sdk": version("tarflow-sdk"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": cpu_name(),
        "cpus": usable_cpus(),
    }


def model_header(bundle: Bundle) -> dict[str, Any]:
    """The model that was measured."""
    config = bundle.config
    return {
        "bundle": bundle.path.name,
        "digest": bundle.digest,
        "precision": bundle.precision,
        "data": config.data,
        "shape": list(config.shape),
        "patches": config.patches,
        "width": config.width,
        "blocks": config.blocks,
        "layers": config.layers,
    }


def resident_bytes() -> int | None:
    """Bytes of memory that this process uses now; None if the system does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """Peak memory of this process in bytes; None if the system does not tell."""
    found = _status("VmHWM")
    if found is None:
        with contextlib.suppress(ImportError):  # not on Windows
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return 1024 * int(value.split()[0])
    return None
