"""Code shared by all commands: start, exit codes, errors and messages.

Exit codes: 0 done; 1 the work itself failed; 2 bad input or usage; 130 interrupted. Results go to stdout, messages to
stderr; bad input is one line `error: ...` and, if there is a remedy, one line `hint: ...`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import typer

from tarflow_runtimes.errors import InputError

USAGE_ERROR: Any = (
    typer.BadParameter.__base__
)  # typer's own before 0.26, or click's: the name moved, the class is the same

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

WORK_FAILED = frozenset({"VerificationError"})
"""Errors that mean a failed run rather than bad input, by class name: the packages have no common base class."""


def new_app() -> typer.Typer:
    """An app with plain help: no colours, no boxes, no shell completion."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the app's command; an interrupt ends it with one line and exit code 130."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def interruptible(*args: Any, **options: Any) -> None:
            try:
                with _terminate_like_interrupt():
                    function(*args, **options)
            except KeyboardInterrupt:
                # typer reports an interrupt differently from version to version, so it is caught before typer sees it
                note("interrupted; nothing was written")
                raise typer.Exit(INTERRUPTED) from None

        app.command(context_settings={"max_content_width": 100})(interruptible)
        return function

    return register


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Make SIGTERM clean up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(app: Callable[..., Any], arguments: Sequence[str], *, name: str, extra: str = "ort") -> NoReturn:
    """Run a command's app and exit the process with its exit code; `extra` installs the packages that it needs."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a file name may not be valid text
    try:
        code = app(args=list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except USAGE_ERROR as error:
        message = error.format_message().rstrip(".")
        code = report(message[:1].lower() + message[1:], hint=f"{name} --help lists what it takes")
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # the reader has gone away; without this, Python fails again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    except ModuleNotFoundError as error:
        code = report(
            f"{name} needs the package {error.name}, which is not installed", hint=f'pip install "tarflow-sdk[{extra}]"'
        )
    except MemoryError:
        code = report("out of memory", hint="run fewer images together: --batch-size", code=FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        code = report(f"{where}{error.strerror or error}", code=FAILED)
    except Exception as error:
        # the three packages have separate base classes, all with a hint
        if not hasattr(error, "hint"):
            raise
        code = report(str(error), hint=error.hint, code=_code_of(error))
    raise SystemExit(code if isinstance(code, int) else 0)


def _code_of(error: Exception) -> int:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "Cancelled" in names:
        return INTERRUPTED
    return FAILED if names & WORK_FAILED else BAD_INPUT


def require(right: bool, message: str, hint: str) -> None:
    """Refuse an invalid option.

    Raises:
        InputError: with the message and the hint.
    """
    if not right:
        raise InputError(message, hint=hint)


def report(message: str, *, hint: str = "", code: int = BAD_INPUT) -> int:
    """Print the error and its hint, one line each, and return the exit code."""
    note(f"error: {_one_line(message)}" + (f"\nhint: {_one_line(hint)}" if hint else ""))
    return code


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """Remove control characters, which names in an untrusted file might contain."""
    return "".join(character if character.isprintable() or character.isspace() else "?" for character in text)


def note(text: str) -> None:
    """Print a message for the user on stderr."""
    typer.echo(text, err=True)


def counted(n: int, data: str) -> str:
    """Format a count as `3 images`, or `3 samples` for tokens."""
    return f"{n} {'image' if data == 'image' else 'sample'}{'s' * (n != 1)}"


def print_json(document: object) -> None:
    """Print one JSON object on stdout, for other programs."""
    typer.echo(json_text(document))


def json_text(document: object) -> str:
    """Format one JSON object; infinity and NaN, which JSON lacks, become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def _finite(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document
