"""`tarflow bench`: tables, files, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tarflow_runtimes as tfr

QUICK = ("--rounds", "1", "--no-ceilings", "--batch", "1")


def test_tables_and_files(tarflow: Callable, class_bundle: Path) -> None:
    options = ("--decode", "sequential,parallel:2,auto", "--guidance", "0,1.5", "--json", "b.json", "--plot", "b.png")
    result = tarflow("bench", class_bundle, *QUICK, *options)
    assert result.code == 0, result.err
    assert result.err.splitlines()[0].startswith("auto is sequential: ")
    assert result.err.splitlines()[1:] == ["wrote b.json", "wrote b.png"]
    assert sorted(path.name for path in Path().iterdir()) == ["b.json", "b.png"]
    document = json.loads(Path("b.json").read_text())
    assert (document["schema"], document["schema_version"]) == ("tarflow-bench", 1)
    assert len(document["cases"]) == 6
    with Image.open("b.png") as picture:
        picture.verify()
        assert picture.format == "PNG"
    lines = result.out.splitlines()
    facts = {line.split()[0] for line in lines[: lines.index("")]}
    assert facts == {"bundle", "machine", "cpu", "memory", "measured"}
    rows = [line.split() for line in lines if line.startswith("  cpu")]
    decodes = ("sequential", "parallel:2", "auto")
    cases = [(weight, "1", decode) for weight in ("0", "1.5") for decode in decodes]
    sequential = [case for case in cases if case[2] != "parallel:2"]  # nothing is tuned beside this bundle
    assert [tuple(row[1:4]) for row in rows] == cases + sequential + cases
    for row, case in zip(rows, document["cases"], strict=False):
        assert float(row[5]) == pytest.approx(case["p50_ms"], abs=0.01)
        assert row[8] == f"{case['speedup']:.2f}x"
    assert "\x1b" not in result.out
    assert "\u2026" not in result.out  # nothing is cut


def test_ceilings_stand_beside(tarflow: Callable, class_bundle: Path) -> None:
    options = ("--rounds", "1", "--batch", "1", "--decode", "sequential", "--json", "b.json")
    result = tarflow("bench", class_bundle, *options)
    document = json.loads(Path("b.json").read_text())
    measured, [case] = document["ceilings"], document["cases"]
    ceilings = [line for line in result.out.splitlines() if line.startswith("ceilings")]
    assert [int(line.split()[1]) for line in ceilings] == [1, measured["threads"]]
    assert all(measured["blas"] in line for line in ceilings)
    row = [line for line in result.out.splitlines() if line.startswith("  cpu")][1]
    rates = measured["all_threads"]
    shares = (case["gflops"] / rates["gemm_gflops"], case["gbs"] / rates["gemv_gbs"])
    assert re.findall(r"\((\d+)%\)", row) == [f"{100 * share:.0f}" for share in shares]
    assert result.err == "wrote b.json\n"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--batch", "1,two"), "'two' is not a whole number from 1 on"),
        (("--batch", "0"), "'0' is not a whole number from 1 on"),
        (("--batch", ""), "is not a whole number from 1 on"),
        (("--guidance", "0,nan"), "'nan' is not a guidance weight"),
        (("--guidance", "-1"), "'-1' is not a guidance weight"),
        (("--decode", "sequential,"), "an item is empty"),
        (("--decode", "jacobi"), "unknown way of decoding 'jacobi'"),
        (("--decode", "parallel:0"), "parallel:0"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--rounds", "many"), "'--rounds'"),
        (("--seed", "-1"), "--seed"),
        (("--tolerance", "inf"), "--tolerance"),
        (("--json", "b.txt"), "--json b.txt: cannot tell what to write"),
        (("--plot", "b.svg"), "--plot b.svg: cannot tell what to write"),
        (("--json", "no/b.json"), "the folder no does not exist"),
        (("--engine", "trt2"), "unknown engine 'trt2'"),
        (("--engine", "ort-cpu,fast"), "unknown engine 'fast'"),
    ],
)
def test_bad_values(refused: Callable, class_bundle: Path, arguments: tuple[str, ...], what: str) -> None:
    assert what in refused("bench", class_bundle, "--no-ceilings", *arguments).err


def test_a_bundle_that_is_not_there(refused: Callable) -> None:
    assert "no such directory" in refused("bench", "missing.tarflow", "--no-ceilings").err


def test_files_that_exist_are_kept(
    refused: Callable, tarflow: Callable, class_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("b.json").write_text("old")
    Path("b.png").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(tfr.Flow, "sample", lambda *_, **__: pytest.fail("the work began"))
        assert "exists already" in refused("bench", class_bundle, "--json", "b.json").err
        assert "exists already" in refused("bench", class_bundle, "--plot", "b.png").err
    options = (*QUICK, "--decode", "sequential", "--json", "b.json", "--plot", "b.png", "--overwrite")
    assert tarflow("bench", class_bundle, *options).code == 0
    assert json.loads(Path("b.json").read_text())["cases"]
    with Image.open("b.png") as picture:
        assert picture.format == "PNG"


def test_an_interrupt_leaves_nothing(tarflow: Callable, class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, drawn = tfr.Flow.sample, []

    def interrupted(flow: tfr.Flow, n: int, **options: Any) -> tfr.Sample:
        drawn.append(n)
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return sample(flow, n, **options)

    monkeypatch.setattr(tfr.Flow, "sample", interrupted)
    result = tarflow("bench", class_bundle, "--no-ceilings", "--json", "b.json", "--plot", "b.png")
    assert (result.code, result.out) == (130, "")
    assert result.err == "interrupted; nothing was written\n"
    assert len(drawn) == 10
    assert list(Path().iterdir()) == []
