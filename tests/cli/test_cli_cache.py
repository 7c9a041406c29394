"""`tarflow cache`: what is kept, why an engine is used or not, and what is removed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fake_tensorrt
from fake_cuda import FakeCuda, installed
from tarflow_runtimes.cli.build import build_engines
from tarflow_runtimes.cli.options import BuildOptions

SHAPES = ("--batch", "2", "--window", "1", "--guidance", "0", "--target", "sm_89")
QUICK = ("--engine", "trt-rtx", *SHAPES)


@pytest.fixture(autouse=True)
def _user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def built(class_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the six engines of the class bundle."""
    folder = tmp_path_factory.mktemp("built") / "engines"
    chosen = BuildOptions(batch="2", guidance="0", window="1", target="sm_89", engine_dir=folder)
    build_engines(class_bundle, "trt-rtx", chosen)
    return folder


@pytest.fixture
def kept(built: Path, tmp_path: Path) -> Path:
    """A copy of that folder, named by --engine-dir."""
    return Path(shutil.copytree(built, tmp_path / "engines"))


@pytest.fixture
def own_bundle(class_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the class bundle to damage, of the same name."""
    return Path(shutil.copytree(class_bundle, tmp_path / "own" / class_bundle.name))


def explained(tarflow: Callable, kept: Path, bundle: Path, *options: str) -> list[dict[str, str]]:
    result = tarflow("cache", "explain", bundle, *(options or QUICK), "--engine-dir", kept, "--json")
    assert result.code == 0, result.err
    engines: list[dict[str, str]] = json.loads(result.out)["engines"]
    return engines


def listed(tarflow: Callable, kept: Path) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = json.loads(tarflow("cache", "list", "--engine-dir", kept, "--json").out)["engines"]
    return engines


def test_list(tarflow: Callable, kept: Path) -> None:
    result = tarflow("cache", "list", "--engine-dir", kept)
    lines = result.out.splitlines()
    assert lines[0].startswith("tiny.tarflow block 1 gradient float32, TensorRT for RTX 1.7")
    assert lines[0].endswith("MB, not verified")
    assert lines[-1].startswith("6 engines, ")
    engines = listed(tarflow, kept)
    assert {one["key"] for one in engines} == {path.stem for path in kept.glob("*.engine")}
    for one in engines:
        assert one["bytes"] == sum(path.stat().st_size for path in kept.glob(f"{one['key']}.*")) > 10_000


def test_an_empty_cache(tarflow: Callable) -> None:
    assert tarflow("cache", "list").out.startswith("0 engines, 0.0 MB in ")
    assert tarflow("cache", "explain").out == ""
    assert tarflow("cache", "prune").out == "removed 0 engines and 0 other files, 0.0 MB\n"


def test_explain_says_what_differs(tarflow: Callable, kept: Path, own_bundle: Path) -> None:
    assert [one["reason"] for one in explained(tarflow, kept, own_bundle)] == ["built for this"] * 6
    for options, reason in (
        (("--tf32",), "precision: built float32, wanted tf32"),
        (("--batch", "3"), "profiles: built B 1 to 2, G 1, S 1, wanted B 1 to 3, G 1, S 1"),
        (("--target", "sm_86"), "built with 1.7"),
    ):
        found = explained(tarflow, kept, own_bundle, *QUICK, *options)
        assert all(one["hit"] is None for one in found)
        assert all(one["reason"].startswith(reason) for one in found)
    assert [one["hit"] is not None for one in explained(tarflow, kept, own_bundle, *QUICK, "--batch", "1")] == [
        True
    ] * 6
    import tensorrt_rtx

    version = tensorrt_rtx.__version__
    later = ModuleType("tensorrt_rtx")
    later.__dict__.update(vars(tensorrt_rtx), __version__="1.8.0")
    with fake_tensorrt.package("trt-rtx", later):
        found = explained(tarflow, kept, own_bundle)
    assert all("this is 1.8.0 for sm_89" in one["reason"] for one in found)
    assert all(f"built with {version} for sm_89" in one["reason"] for one in found)


def test_a_flipped_byte_of_a_graph_is_a_miss_of_that_graph(tarflow: Callable, kept: Path, own_bundle: Path) -> None:
    path = own_bundle / "block_01" / "forward.onnx"
    data = path.read_bytes()
    assert b"layer_0" in data
    path.write_bytes(data.replace(b"layer_0", b"layer_2"))
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["files"]["block_01/forward.onnx"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    found = explained(tarflow, kept, own_bundle)
    missed = [(one["block"], one["graph"]) for one in found if not one["hit"]]
    assert missed == [(1, "forward")]
    assert next(one for one in found if not one["hit"])["reason"].startswith("graph_digest: built ")
    result = tarflow("build", own_bundle, *QUICK, "--engine-dir", kept)
    assert "1 built, 5 were there" in result.err


def test_a_truncated_engine_is_a_miss_and_built_again(tarflow: Callable, kept: Path, own_bundle: Path) -> None:
    key = next(one["key"] for one in listed(tarflow, kept) if "block 0 step" in one["name"])
    path = kept / f"{key}.engine"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    found = explained(tarflow, kept, own_bundle)
    assert found[0]["reason"] == f"its file has 100 bytes, not {len(whole)}"
    assert [one["hit"] is not None for one in found] == [False] + [True] * 5
    result = tarflow("build", own_bundle, *QUICK, "--engine-dir", kept)
    assert f"(its file has 100 bytes, not {len(whole)})" in result.err
    assert [one["reason"] for one in explained(tarflow, kept, own_bundle)] == ["built for this"] * 6


def test_explain_without_a_bundle_asks_this_machine(tarflow: Callable, kept: Path) -> None:
    options = ("cache", "explain", "--engine-dir", kept)
    with installed(FakeCuda(driver=0)):
        assert all(line.endswith("there is no GPU here to use it on") for line in tarflow(*options).out.splitlines())
    with installed(FakeCuda(capability=(8, 9))):
        assert all(line.endswith("float32: can be used here") for line in tarflow(*options).out.splitlines())
    with installed(FakeCuda(capability=(12, 0))):
        facts = json.loads(tarflow(*options, "--json").out)
    assert len(facts["engines"]) == 6
    assert all("for sm_120" in one["reason"] for one in facts["engines"])


def test_prune(tarflow: Callable, kept: Path) -> None:
    (kept / f".{'0' * 32}.engine.partial").write_bytes(bytes(10))
    largest = max(one["bytes"] for one in listed(tarflow, kept))
    result = tarflow("cache", "prune", "--max-size", largest, "--engine-dir", kept)
    assert "removed tiny.tarflow block 0 step float32" in result.out
    assert "and 1 other files" in result.out
    facts = json.loads(tarflow("cache", "prune", "--max-size", "0", "--engine-dir", kept, "--json").out)
    assert facts["bytes"] <= largest
    assert listed(tarflow, kept) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("look",), "'look': expected list, explain, prune"),
        (("list", "x.tarflow"), "BUNDLE goes with explain and --engine"),
        (("explain", "x.tarflow"), "BUNDLE goes with explain and --engine"),
        (("explain", "x.tarflow", "--engine", "ort-cpu"), "--engine must be trt or trt-rtx"),
        (("prune", "--max-size", "lots"), "--max-size lots"),
    ],
)
def test_bad_input(refused: Callable, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("cache", *arguments).err
