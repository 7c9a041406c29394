"""`tarflow COMMAND`: a table of commands, each imported on use, so that `tarflow` itself imports nothing else."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import NoReturn


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """A command: the `module:app` that runs it, one line of help, and the extra that installs its packages."""

    target: str
    summary: str
    extra: str = "ort"


VERBS = {
    "train": Verb(target="tarflow_sdk._train_cli:app", summary="Train a model (needs PyTorch).", extra="train"),
    "export": Verb(
        target="tarflow_export._cli:app",
        summary="Turn a checkpoint into a verified bundle (needs PyTorch).",
        extra="export",
    ),
    "convert": Verb(
        target="tarflow_export._convert_cli:app",
        summary="Convert a bundle to half precision or int8.",
        extra="convert",
    ),
    "build": Verb(
        target="tarflow_runtimes.cli.build:app", summary="Build TensorRT engines for a bundle.", extra="trt-rtx"
    ),
    "cache": Verb(
        target="tarflow_runtimes.cli.cache:app", summary="List, explain and remove TensorRT engines.", extra="trt-rtx"
    ),
    "infer": Verb(target="tarflow_runtimes.cli.infer:app", summary="Draw images from a bundle."),
    "encode": Verb(target="tarflow_runtimes.cli.encode:app", summary="Map images to latents and log|det|."),
    "denoise": Verb(target="tarflow_runtimes.cli.denoise:app", summary="Remove the training noise from images."),
    "log-prob": Verb(
        target="tarflow_runtimes.cli.log_prob:app", summary="Print log-likelihood and bits/dim of images."
    ),
    "classify": Verb(target="tarflow_runtimes.cli.classify:app", summary="Print class posteriors of images."),
    "bench": Verb(target="tarflow_runtimes.cli.bench:app", summary="Measure how fast a bundle decodes here."),
    "tune": Verb(target="tarflow_runtimes.cli.tune:app", summary="Find the fastest way to decode on this machine."),
    "doctor": Verb(target="tarflow_runtimes.cli.doctor:app", summary="Report which engines are ready on this machine."),
    "inspect": Verb(target="tarflow_runtimes.cli.inspect:app", summary="Describe a bundle."),
    "verify": Verb(target="tarflow_runtimes.cli.verify:app", summary="Repeat a bundle's verification on an engine."),
}

RENAMED = {"score": "log-prob"}
"""Former names of commands, used in hints."""


def main() -> NoReturn:
    """Entry point of the console script `tarflow`."""
    try:
        dispatch(sys.argv[1:])
    except KeyboardInterrupt:  # interrupted while a module loads
        raise SystemExit(130) from None


def dispatch(arguments: Sequence[str]) -> NoReturn:
    """Run the command given by the arguments."""
    match list(arguments):
        case [] | ["--help" | "-h" | "help"]:
            _say(_help())
            raise SystemExit(0)
        case ["--version"]:
            from importlib.metadata import version

            _say(f"tarflow {version('tarflow-sdk')}")
            raise SystemExit(0)
        case ["help", verb]:
            arguments = [verb, "--help"]
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        _unknown(verb)
    from tarflow_runtimes.cli.shell import run

    def app(**options: object) -> object:
        # inside `run`, which turns a package that is not installed into one line
        from importlib import import_module

        module, _, attribute = VERBS[verb].target.partition(":")
        return getattr(import_module(module), attribute)(**options)

    run(app, rest, name=f"tarflow {verb}", extra=VERBS[verb].extra)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"""Usage: tarflow COMMAND [OPTIONS] ...

  Train, export, sample and evaluate transformer autoregressive flows.

Commands:
{verbs}

Options:
  --version  Print the version and exit.
  --help     Show this message and exit; tarflow COMMAND --help for a command.
"""


def _unknown(verb: str) -> NoReturn:
    from difflib import get_close_matches

    what = "option" if verb.startswith("-") else "command"
    near = get_close_matches(verb, [*VERBS, *RENAMED], n=1)
    hint = f"did you mean tarflow {RENAMED.get(near[0], near[0])}?" if near else f"the commands are {', '.join(VERBS)}"
    sys.stderr.write(f"error: unknown {what} {verb!r}\nhint: {hint}\n")
    raise SystemExit(2)


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
