"""`tarflow`: the table of verbs, start-up, and how it fails."""

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tarflow_runtimes.cli import main as umbrella
from tarflow_runtimes.cli.main import VERBS, Verb
from tarflow_runtimes.cli.shell import print_json, run

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "PIL")
HELP = Path(__file__).parent / "help"


def words(text: str) -> list[str]:
    """The words of a help text: layout and notation belong to typer and change with its version."""
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
from tarflow_runtimes.cli.main import VERBS, dispatch
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
        ("score", "did you mean tarflow log-prob?"),
        ("zzz", "the commands are train,"),
    ],
)
def test_unknown_verb(refused: Callable, verb: str, hint: str) -> None:
    result = refused(verb, "model.tarflow")
    assert f"unknown command '{verb}'" in result.err
    assert hint in result.err


def test_unknown_options(refused: Callable) -> None:
    assert "unknown option '--vresion'" in refused("--vresion").err
    assert "--colour" in refused("infer", "--colour").err
    assert "'-n'" in refused("infer", "-n", "many").err
    assert "FILES" in refused("log-prob").err
    assert "--output" in refused("encode", "image.png").err


@pytest.mark.parametrize(("verb", "extra"), [("train", "train"), ("export", "export"), ("log-prob", "ort")])
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
    code = "from tarflow_runtimes.cli.shell import *; run(lambda **_: print_json([0] * 100_000), [], name='tarflow')"
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


def test_memory_that_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    def greedy(**_: object) -> None:
        raise MemoryError

    with pytest.raises(SystemExit) as ended:
        run(greedy, [], name="tarflow")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: out of memory\nhint: ")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(broken, [], name="tarflow")


def test_json_is_always_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [math.inf, 1.5, (math.nan,)], "b": {"ü": "\udcff"}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": {"ü": "\udcff"}}


def test_control_characters_stay_out_of_the_terminal(refused: Callable) -> None:
    assert "\x1b" not in refused("inspect", "a\x1b[31m\nb").err


def test_the_documentation_names_options_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "CLI.md").read_text()
    commands = re.findall(r"^tarflow ([\w-]+) (.*)$", text, re.MULTILINE)
    assert {verb for verb, _ in commands} == set(VERBS)
    for verb, rest in commands:
        known = (HELP / f"{verb}.txt").read_text()
        for option in re.findall(r"(?<!\S)(--?[a-z][\w-]*)", rest):
            assert re.search(rf"^ .*{option}\b", known, re.MULTILINE), (verb, option)
