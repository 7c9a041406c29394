"""The commands as a shell meets them, in this process: exit code, stdout, stderr."""

import dataclasses
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], command: str, *arguments: object) -> Result:
    """Run `command arguments...`, by the entry point that the package declares for it."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry.load()()
    written = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, written.out, written.err)


LOADED = """
import atexit, sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name=sys.argv[0])
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
entry.load()()
"""


def loaded_by(command: str, *arguments: str) -> set[str]:
    """The modules that a command has imported when it ends well."""
    code = f"import sys; sys.argv = {[command, *arguments]!r}\n{LOADED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stderr.split())


def script(command: str) -> Path:
    """The file that a shell finds under that name."""
    return Path(sys.executable).with_name(command)
