"""The process in which an engine is built; see `build`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from tarflow_runtimes.engines.trt.compile import Built, compile_engine
from tarflow_runtimes.engines.trt.network import Graph
from tarflow_runtimes.engines.trt.package import import_package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.errors import TarFlowError


def main() -> None:
    """Answer the question on stdin."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the library must not mix with answers
    job = json.loads(sys.stdin.buffer.readline())
    try:
        built = _answer(job, sys.stdin.buffer.read(), answers)
    except TarFlowError as error:
        _say(answers, {"error": str(error), "hint": error.hint})
        return
    facts = {"layers": built.layers, "warnings": built.warnings, "seconds": built.seconds}
    _say(answers, {"built": facts, "nbytes": len(built.engine)})
    answers.write(built.engine)
    answers.close()


def _answer(job: dict[str, Any], model: bytes, answers: BinaryIO) -> Built:
    graph = job["graph"] | {"model": model, "folder": Path(job["graph"]["folder"])}

    def on_share(share: float) -> None:
        try:
            _say(answers, {"share": share})
        except OSError:
            os._exit(1)  # the parent process has gone away

    return compile_engine(
        import_package(job["engine"]),
        Graph(**graph),
        [Profile.from_json(profile) for profile in job["profiles"]],
        targets=job["targets"],
        workspace=job["workspace"],
        timing_cache=None if job["timing_cache"] is None else Path(job["timing_cache"]),
        on_share=on_share,
    )


def _say(answers: BinaryIO, report: dict[str, Any]) -> None:
    answers.write(json.dumps(report).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
