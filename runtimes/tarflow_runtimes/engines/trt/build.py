"""`build`: build an engine in a separate process.

The library reacts to cancellation only between stages: one stage of a photo model's gradient takes seconds. It may also
abort on a graph that it does not support. A separate process can be ended at any time, and its crash is an ordinary
error. It reads a job and a model from stdin, and writes one line of JSON per report to stdout, then the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tarflow_runtimes.engines.trt.compile import Built
from tarflow_runtimes.engines.trt.network import Graph
from tarflow_runtimes.engines.trt.package import Package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.errors import Cancelled, EngineError

OnBuild = Callable[[float], object]
"""Called in the caller's thread with the share of a build that is done, 0 to 1; returning False cancels."""

WORKER: Final = "tarflow_runtimes.engines.trt.worker"

POLL_SECONDS: Final = 0.1
"""Seconds between two calls of the callback."""

CHUNK: Final = 1 << 20
"""Number of bytes that are read at once."""


def build(
    package: Package,
    graph: Graph,
    profiles: Sequence[Profile],
    *,
    targets: Sequence[str] = (),
    workspace: int | None = None,
    timing_cache: Path | None = None,
    on_build: OnBuild | None = None,
) -> Built:
    """Run `compile_engine` with these arguments.

    Raises:
        EngineError: when TensorRT cannot parse or build the graph, or its process ends without an answer.
        Cancelled: when `on_build` returned False.
    """
    job = {
        "engine": package.engine,
        "graph": dataclasses.asdict(dataclasses.replace(graph, model=b"")) | {"model": "", "folder": str(graph.folder)},
        "profiles": [profile.to_json() for profile in profiles],
        "targets": list(targets),
        "workspace": workspace,
        "timing_cache": None if timing_cache is None else str(timing_cache),
    }
    path = os.pathsep.join(filter(None, sys.path))  # the other process has the same import path
    with tempfile.TemporaryFile() as talk:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # an interrupt is for this process
        )
        try:
            answer = _converse(process, json.dumps(job).encode() + b"\n" + graph.model, on_build)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # of what was not written
                    pipe.close()  # type: ignore[union-attr]
        talk.seek(0)
        last = talk.read().decode(errors="replace").strip().rpartition("\n")[2]
    if answer is None:
        raise Cancelled(f"the build of the {graph.name} was cancelled")
    head, engine = answer
    if "error" in head:
        raise EngineError(head["error"], hint=head["hint"])
    if "built" not in head or len(engine) != head["nbytes"]:
        raise EngineError(
            f"{package.name} ended while it built the {graph.name}: {last or f'exit code {process.returncode}'}",
            hint="there may be too little memory; else use another engine, or tarflow convert the bundle to float16",
        )
    facts = head["built"]
    return Built(
        engine=engine, layers=facts["layers"], warnings=tuple(facts["warnings"]), seconds=dict(facts["seconds"])
    )


def _converse(
    process: subprocess.Popen[bytes], question: bytes, on_build: OnBuild | None
) -> tuple[dict[str, Any], bytes] | None:
    """The last report and what follows it; None when the callback cancels."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, and its earlier output says why
        process.stdin.write(question)
        process.stdin.close()
    head: dict[str, Any] = {"share": 0.0}
    rest = bytearray()
    while True:
        ready, _, _ = select.select([process.stdout], [], [], POLL_SECONDS)
        chunk = os.read(process.stdout.fileno(), CHUNK) if ready else b""
        rest += chunk
        while head.keys() == {"share"} and b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            head = json.loads(line)
        if ready and not chunk:
            return head, bytes(rest)
        if on_build is not None and on_build(head.get("share", 1.0)) is False:
            return None
