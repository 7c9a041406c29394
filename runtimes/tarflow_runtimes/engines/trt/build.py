"""`build`: build an engine in a separate process.

The library answers a cancel when it likes: one stage of a photo model's gradient takes seconds. And where it does not
understand a graph it may end the process. A process can be ended at any time, and its end is an error like others. It
gets the name of a package and a job through a pipe, and answers with shares of the build, as numbers, and at last with
what was built, or an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final

from tarflow_runtimes.engines.trt.compile import Built, Job, compile_engine
from tarflow_runtimes.engines.trt.package import Package, import_package
from tarflow_runtimes.errors import Cancelled, EngineError, TarFlowError

OnBuild = Callable[[float], object]
"""Called in the caller's thread with the share of a build that is done, 0 to 1; returning False cancels."""

WORKER: Final = "tarflow_runtimes.engines.trt.worker"

POLL_SECONDS: Final = 0.1
"""Seconds between two calls of the callback."""


def build(package: Package, job: Job, on_build: OnBuild | None = None) -> Built:
    """What `compile_engine` makes of the job.

    Raises:
        EngineError: when TensorRT cannot parse or build the graph, or its process ends without an answer.
        Cancelled: when `on_build` returned False.
    """
    path = os.pathsep.join(filter(None, sys.path))  # what this process imports, the other finds
    ours, theirs = Pipe()
    with ours, tempfile.TemporaryFile() as talk:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=talk,
                stderr=talk,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # an interrupt is for this process
            )
        try:
            answer = _converse(ours, package, job, on_build)
        finally:
            process.kill()
            process.wait()
        talk.seek(0)
        last = talk.read().decode(errors="replace").strip().rpartition("\n")[2]
    if isinstance(answer, TarFlowError):
        raise answer
    if answer is None:
        raise EngineError(
            f"{package.name} ended while it built the {job.graph.name}: {last or f'exit code {process.returncode}'}",
            hint="there may be too little memory; else use another engine, or tarflow convert the bundle to float16",
        )
    return answer


def _converse(pipe: Connection, package: Package, job: Job, on_build: OnBuild | None) -> Built | TarFlowError | None:
    """The last answer; None when the process ends without one."""
    share = 0.0
    try:
        pipe.send((package.engine, job))
        while True:
            answer: float | Built | TarFlowError = pipe.recv() if pipe.poll(POLL_SECONDS) else share
            if not isinstance(answer, float):
                return answer
            share = answer
            if on_build is not None and on_build(share) is False:
                return Cancelled(f"the build of the {job.graph.name} was cancelled")
    except (EOFError, ConnectionError):
        return None


def work(descriptor: int) -> None:
    """The other end of the pipe, in the process of the build."""
    pipe = Connection(descriptor)
    engine, job = pipe.recv()

    def on_share(share: float) -> None:
        try:
            pipe.send(share)
        except OSError:
            os._exit(1)  # the parent process has ended

    with contextlib.suppress(ConnectionError):
        try:
            pipe.send(compile_engine(import_package(engine), job, on_share))
        except TarFlowError as error:
            pipe.send(error)
