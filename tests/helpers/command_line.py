"""The commands as a shell meets them, in this process: exit code, stdout, stderr."""

import dataclasses
import importlib.metadata
import sys

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
