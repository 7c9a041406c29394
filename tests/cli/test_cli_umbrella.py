"""`tarflow`: the table of verbs, start-up, and how it fails."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tarflow_runtimes._cli import umbrella
from tarflow_runtimes._cli.umbrella import VERBS, Verb

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "PIL")
HELP = Path(__file__).parent / "help"


def words(text: str) -> list[str]:
    """The words of a help text: layout and notation belong to typer and change with its version."""
    import re

    return re.findall(r"[\w.-]{2,}", re.sub(r"<[^<>]*>", "", text))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help(tarflow: Callable, arguments: tuple[str, ...]) -> None:
    result = tarflow(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out == (HELP / "tarflow.txt").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(tarflow: Callable, verb: str) -> None:
    """`COLUMNS=80 tarflow VERB --help > tests/cli/help/VERB.txt` takes a new snapshot."""
    result = tarflow(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert words(result.out) == words((HELP / f"{verb}.txt").read_text())
    assert result.out.startswith(f"Usage: tarflow {verb} [OPTIONS]")
    assert all(len(line) <= 80 for line in result.out.splitlines())
    assert "\x1b" not in result.out
    assert tarflow("help", verb) == result


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import contextlib, sys
from tarflow_runtimes._cli.umbrella import VERBS, dispatch
with contextlib.suppress(SystemExit):
    dispatch(["--help"])
assert "typer" not in sys.modules
for verb in VERBS:
    with contextlib.suppress(SystemExit):
        dispatch([verb, "--help"])
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, (verb, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(tarflow: Callable) -> None:
    assert tarflow("--version").out == f"tarflow {importlib.metadata.version('tarflow-sdk')}\n"


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("infr", "did you mean tarflow infer?"),
        ("clasify", "did you mean tarflow classify?"),
        ("zzz", "the verbs are train,"),
    ],
)
def test_unknown_verb(refused: Callable, verb: str, hint: str) -> None:
    result = refused(verb, "model.tarflow")
    assert f"unknown verb '{verb}'" in result.err
    assert hint in result.err


def test_unknown_options(refused: Callable) -> None:
    assert "unknown option '--vresion'" in refused("--vresion").err
    assert "--colour" in refused("infer", "--colour").err
    assert "'-n'" in refused("infer", "-n", "many").err
    assert "FILES" in refused("score").err
    assert "--output" in refused("encode", "image.png").err


@pytest.mark.parametrize(("verb", "extra"), [("train", "train"), ("export", "export"), ("score", "ort")])
def test_a_package_that_is_not_installed(
    refused: Callable, monkeypatch: pytest.MonkeyPatch, verb: str, extra: str
) -> None:
    monkeypatch.setitem(VERBS, verb, Verb(target="no_such_package.cli:app", summary="", extra=VERBS[verb].extra))
    result = refused(verb)
    assert f"tarflow {verb} needs the package no_such_package" in result.err
    assert f'pip install "tarflow-sdk[{extra}]"' in result.err


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from tarflow_runtimes._cli._shell import *; run(lambda **_: print_json([0] * 100_000), [], name='tarflow')"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_while_a_verb_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(umbrella, "dispatch", interrupted)
    with pytest.raises(SystemExit) as ended:
        umbrella.main()
    assert ended.value.code == 130
