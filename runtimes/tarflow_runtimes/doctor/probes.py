"""`gather`: the facts about this machine, each found by a separate process, which may abort without harm."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.doctor.facts import (
    LIBRARIES,
    MODULES,
    Driver,
    Facts,
    Gpu,
    Library,
    Module,
    Native,
    Provider,
    file_name,
)
from tarflow_runtimes.doctor.requirements import PROVIDERS, native_library, owners

PROBE: Final = Path(__file__).with_name("probe_script.py")

TIMEOUT: Final = 60.0
"""Seconds that a probe may take; loading CUDA's libraries from a cold disk takes several."""


def gather() -> Facts:
    """Run all probes, a few at a time, in about a second. Problems that they find are facts, not exceptions."""
    asked: list[tuple[str, ...]] = [("driver",), ("provider",)]
    asked += [("module", name) for name in MODULES] + [("library", file_name(name)) for name in LIBRARIES]
    if native := native_library():
        asked.append(("native", str(native)))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = dict(zip(asked, pool.map(lambda question: probe(*question), asked), strict=True))
    driver = found[("driver",)]
    gpus = [gpu | {"capability": tuple(gpu["capability"])} for gpu in driver.pop("gpus", ())]
    if "cuda" in driver:
        driver["cuda"] = tuple(driver["cuda"])
    modules = {name: found["module", name] for name in MODULES}
    for module in modules.values():
        module |= {name: tuple(module.get(name, ())) for name in ("libraries", "targets")}
    return Facts(
        system=f"{platform.system()} {platform.machine()}",
        python=f"{platform.python_version()} ({sys.executable})",
        driver=Driver(**driver),
        gpus=tuple(Gpu(**gpu) for gpu in gpus),
        modules={name: Module(**module) for name, module in modules.items()},
        libraries={name: Library(**found["library", file_name(name)]) for name in LIBRARIES},
        provider=Provider(**found[("provider",)]),
        native=Native(**found["native", str(native)]) if native else Native(),
        owners={package: tuple(owners(package)) for package in PROVIDERS},
    )


def probe(*question: str) -> dict[str, Any]:
    """The answer of `probe_script.py` to a question, or {"problem": ...} if it failed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROBE), *question],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"loading it did not end within {TIMEOUT:.0f} s"}
    except OSError as error:
        return {"problem": f"no process to load it in: {error.strerror}"}
    if done.returncode != 0:
        return {"problem": f"loading it ended the process with {_ending(done.returncode)}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"
