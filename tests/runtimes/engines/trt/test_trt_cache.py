"""The folder of engines: what is found, why not, what is refused, what is removed. The engines are a few bytes here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_tensorrt
import tarflow_runtimes as tfr
from tarflow_runtimes.engines.trt.cache import EngineCache
from tarflow_runtimes.engines.trt.explain import unusable
from tarflow_runtimes.engines.trt.folder import EngineFolder, default_folder
from tarflow_runtimes.engines.trt.gpu import Gpu
from tarflow_runtimes.engines.trt.package import import_package
from tarflow_runtimes.engines.trt.profiles import Profile
from tarflow_runtimes.engines.trt.sidecar import Sidecar, Source, Wanted, host, read_sidecar

WANTED = Wanted(
    engine="trt-rtx",
    version="1.7.1",
    host=host(),
    flags=("REQUIRE_USER_ALLOCATION",),
    precision="float32",
    graph="step",
    graph_digest="a" * 64,
    targets=("sm_89",),
    profiles=(Profile(least=1, most=8),),
)
SOURCE = Source(bundle="digits.tarflow", digest="b" * 64, block=2)
GPU = Gpu(name="GPU", target="sm_89", driver="CUDA 13.0")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def store(cache: EngineCache, made: Wanted = WANTED, engine: bytes = b"engine", **options: int) -> Sidecar:
    options = {"max_bytes": 1 << 30} | options
    return cache.store(made, SOURCE, engine, {"package": "TensorRT for RTX 1.7.1"}, **options)


def test_what_is_stored_is_found_and_loaded(cache):
    assert cache.explain(WANTED, SOURCE).reason == "never built"
    sidecar = store(cache)
    found = cache.explain(WANTED, SOURCE)
    assert found.hit == sidecar
    assert cache.load(found.hit) == b"engine"
    assert cache.entries() == [sidecar]
    assert read_sidecar(sidecar.to_text()) == sidecar
    assert {path.name for path in cache.path.iterdir()} == {f"{WANTED.key}.engine", f"{WANTED.key}.json"}
    assert cache.path.stat().st_mode & 0o777 == 0o700


def test_an_engine_for_more_does_for_less_and_not_the_other_way(cache):
    more = dataclasses.replace(
        WANTED,
        targets=("sm_80", "sm_89"),
        profiles=(Profile(least=1, most=2), Profile(least=3, most=8), Profile(least=1, most=8, patches=16)),
    )
    store(cache, more)
    assert cache.explain(WANTED, SOURCE).hit is not None
    cache.remove(more.key)
    store(cache)
    found = cache.explain(more, SOURCE)
    assert found.hit is None
    assert {difference.field for difference in found.differences} == {"targets", "profiles"}
    assert "profiles: built B 1 to 8, G 1, S 1, wanted B 1 to 8, G 1, S 16" in found.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.8.0"}, f"built with 1.7.1 for sm_89 on {host()}, this is 1.8.0 for sm_89 on {host()}"),
        ({"host": "plan9-mips"}, f"built with 1.7.1 for sm_89 on {host()}, this is 1.7.1 for sm_89 on plan9-mips"),
        ({"flags": ("TF32",)}, "flags: built REQUIRE_USER_ALLOCATION, wanted TF32"),
        ({"precision": "float16", "graph_digest": "c" * 64}, "precision: built float32, wanted float16"),
        ({"graph_digest": "c" * 64}, f"graph_digest: built {'a' * 16}, wanted {'c' * 16}"),
        ({"graph": "forward"}, "never built"),
        ({"engine": "trt"}, "never built"),
    ],
)
def test_every_field_of_the_identity_counts_and_is_named(cache, changes, reason):
    store(cache)
    wanted = dataclasses.replace(WANTED, **changes)
    found = cache.explain(wanted, SOURCE)
    assert found.hit is None
    assert found.reason == reason
    assert wanted.key != WANTED.key
    assert found.to_json()["hit"] is None
    assert (found.nearest is None) == (reason == "never built")


def test_the_nearest_engine_is_that_of_the_same_block(cache):
    store(cache, dataclasses.replace(WANTED, graph_digest="c" * 64))
    other = dataclasses.replace(SOURCE, block=3)
    assert cache.explain(WANTED, other).reason == "never built"
    renamed = dataclasses.replace(SOURCE, bundle="other.tarflow")
    assert cache.explain(WANTED, renamed).nearest is not None
    assert cache.explain(WANTED, dataclasses.replace(renamed, digest="d" * 64)).reason == "never built"
    store(cache, dataclasses.replace(WANTED, graph_digest="c" * 64, version="1.6"))
    assert cache.explain(WANTED, SOURCE).nearest.made.version == "1.7.1"


@pytest.mark.parametrize(
    ("data", "reason"), [(b"engi", "its file has 4 bytes, not 6"), (None, "its file is missing"), (b"enginf", "")]
)
def test_a_damaged_engine_is_not_loaded(cache, data, reason):
    sidecar = store(cache)
    path = cache.path / f"{sidecar.key}.engine"
    path.unlink() if data is None else path.write_bytes(data)
    found = cache.explain(WANTED, SOURCE)
    if reason:
        assert found.hit is None
        assert found.reason == reason
    with pytest.raises(tfr.EngineError, match="is damaged: its SHA-256"):
        cache.load(sidecar)


def test_an_engine_behind_a_link_is_not_loaded(cache, tmp_path):
    sidecar = store(cache)
    path = cache.path / f"{sidecar.key}.engine"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(tfr.EngineError, match="damaged"):
        cache.load(sidecar)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(schema=["tarflow-engine", 1]),
        lambda document: document["made"].update(version="1.8.0"),
        lambda document: document["made"].update(targets=["sm_80"]),
        lambda document: document["made"].update(profiles=7),
        lambda document: document.pop("size"),
        lambda document: document.clear(),
    ],
)
def test_a_sidecar_that_does_not_fit_is_no_engine(cache, change):
    path = cache.path / f"{store(cache).key}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    assert cache.entries() == []
    assert cache.explain(WANTED, SOURCE).reason == "never built"
    assert len(cache.prune().leftovers) == 2


def many(cache: EngineCache, count: int, nbytes: int = 1000) -> list[Sidecar]:
    """Engines of which the first was used longest ago."""
    made = [store(cache, dataclasses.replace(WANTED, graph_digest=f"{i:064}"), bytes(nbytes)) for i in range(count)]
    for i, sidecar in enumerate(made):
        os.utime(cache.path / f"{sidecar.key}.json", (i, i))
    return made


def test_engines_not_used_for_longest_go(cache):
    made = many(cache, 4)
    cache.load(made[0])
    size = cache.nbytes(made[0])
    freed = sum(map(cache.nbytes, made[1:3]))
    pruned = cache.prune(max_bytes=2 * size + 500)
    assert [one.key for one in pruned.engines] == [made[1].key, made[2].key]
    assert pruned.nbytes == freed
    assert cache.entries() == [made[0], made[3]]
    assert len(list(cache.path.iterdir())) == 4


def test_storing_makes_room_but_not_of_those_in_use(cache):
    made = many(cache, 3)
    size = cache.nbytes(made[0])
    new = cache.store(WANTED, SOURCE, bytes(1000), {}, max_bytes=2 * size + 500, keep=[made[0].key])
    assert {one.key for one in cache.entries()} == {made[0].key, new.key}


def test_what_belongs_to_no_engine_is_pruned(cache):
    sidecar = store(cache)
    cache.store_beside("kernels-1.7-sm_89.bin", b"kernels")
    assert sidecar in cache.entries()
    keep = {path.name for path in cache.path.iterdir()} | {"notes.txt", "timing-11.4-sm_89.bin"}
    other = "f" * 32
    left = [
        f".{other}.engine.partial",
        f".{other}.json.partial",
        f"{other}.engine",
        f".{other}.lock",
    ]
    for name in (*left, "notes.txt", "timing-11.4-sm_89.bin"):
        (cache.path / name).write_bytes(b"x")
    assert set(cache.prune().leftovers) == set(left)
    assert {path.name for path in cache.path.iterdir()} == keep


def test_what_is_being_written_is_not_pruned(cache):
    other = "e" * 32
    partial = cache.path / f".{other}.engine.partial"
    with cache.lock(other):
        partial.write_bytes(b"x")
        assert cache.prune().leftovers == ()
        assert partial.exists()
    assert cache.prune().leftovers == (partial.name,)


def test_an_engine_that_is_finished_meanwhile_is_not_pruned(cache, monkeypatch):
    sidecar = store(cache)
    path = cache.path / f"{sidecar.key}.json"
    written = path.read_bytes()
    path.unlink()  # it is written last
    lock = EngineFolder.lock

    def finished_before(folder, key, **options):
        path.write_bytes(written)
        return lock(folder, key, **options)

    monkeypatch.setattr(EngineFolder, "lock", finished_before)
    assert cache.prune().leftovers == ()
    assert cache.load(sidecar) == b"engine"


def test_what_lies_beside_is_whole_or_not_there(cache, monkeypatch):
    assert cache.load_beside("kernels.bin") == b""
    cache.store_beside("kernels.bin", b"kernels")
    assert cache.load_beside("kernels.bin") == b"kernels"
    (cache.path / "kernels.bin").write_bytes((cache.path / "kernels.bin").read_bytes()[:-1])
    assert cache.load_beside("kernels.bin") == b""
    monkeypatch.setattr(os, "fsync", full)
    cache.store_beside("more.bin", b"kernels")
    assert not (cache.path / "more.bin").exists()


def test_one_at_a_time_holds_a_lock(cache):
    order: list[str] = []
    waited = threading.Event()

    def second() -> None:
        with cache.lock("d" * 32, on_wait=waited.set):
            order.append("second")

    with cache.lock("d" * 32), cache.lock("e" * 32):
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(10)
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert list(cache.path.iterdir()) == []


def test_an_interrupt_while_waiting_ends_the_wait(cache):
    def stop() -> None:
        raise tfr.Cancelled("enough")

    with cache.lock("d" * 32), pytest.raises(tfr.Cancelled), cache.lock("d" * 32, on_wait=stop):
        pytest.fail("two hold the lock")


def test_a_lock_that_cannot_be_made_is_an_error_with_a_hint(cache, tmp_path):
    (cache.path / f".{'d' * 32}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(tfr.EngineError, match="cannot keep engines there") as caught, cache.lock("d" * 32):
        pytest.fail("a link was followed")
    assert "--engine-dir" in caught.value.hint


def test_an_engine_that_is_removed_while_it_is_loaded_is_whole(cache, monkeypatch):
    sidecar, utime = store(cache), os.utime

    def removed_before(path: Path) -> None:
        cache.remove(sidecar.key)
        utime(path)

    monkeypatch.setattr(os, "utime", removed_before)
    assert cache.load(sidecar) == b"engine"


def test_verifications_are_kept_by_gpu_and_driver(cache):
    def gpu(name: str, driver: str) -> Gpu:
        return Gpu(name=name, target="sm_89", driver=driver)

    sidecar = store(cache)
    for place, passed in ((gpu("A", "1"), True), (gpu("B", "1"), False), (gpu("A", "1"), False), (gpu("A", "2"), True)):
        sidecar = cache.record_verification(sidecar, place, passed=passed, facts={"worst": 1.5})
    assert cache.entries() == [sidecar]
    found = {place: one["passed"] for place, one in sidecar.verifications.items()}
    assert found == {"A, 1": False, "B, 1": False, "A, 2": True}
    assert sidecar.failed_on(gpu("A", "1"))
    assert not any(sidecar.failed_on(place) for place in (gpu("A", "2"), gpu("C", "1"), None))
    assert cache.load(sidecar) == b"engine"


def test_an_engine_that_failed_is_found_only_elsewhere(cache):
    here = Gpu(name="GPU", target="sm_89", driver="1")
    sidecar = cache.record_verification(store(cache), here, passed=False, facts={})
    found = cache.explain(WANTED, SOURCE, here)
    assert (found.hit, found.nearest) == (None, sidecar)
    assert found.reason == "it failed its verification here"
    assert cache.explain(WANTED, SOURCE, dataclasses.replace(here, driver="2")).hit == sidecar
    assert cache.explain(WANTED, SOURCE).hit == sidecar
    more = dataclasses.replace(WANTED, profiles=(Profile(least=1, most=16),))
    again = store(cache, more)
    assert cache.explain(WANTED, SOURCE, here).hit == again


def test_why_an_engine_cannot_be_used_here(cache):
    sidecar = store(cache)
    assert unusable(sidecar, "1.7.1", GPU, "") == ""
    assert unusable(sidecar, "1.7.1", GPU, "its file is missing") == "its file is missing"
    there = f"built with 1.7.1 for sm_89 on {host()}, this is 1.8.0 for sm_120 on {host()}"
    assert unusable(sidecar, "1.8.0", dataclasses.replace(GPU, target="sm_120"), "") == there
    failed = sidecar.verified(GPU, passed=False, facts={})
    assert unusable(failed, "1.7.1", GPU, "") == "it failed its verification here"


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EngineFolder().path == tmp_path / "tarflow" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "tarflow" / "engines"


def test_unsafe_folders_are_refused(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    for mode in (0o770, 0o702):
        shared.chmod(mode)
        with pytest.raises(tfr.EngineError, match="others may write") as caught:
            EngineCache(shared)
        assert f"chmod 700 {shared}" in caught.value.hint
    shared.chmod(0o755)
    EngineCache(shared)
    (tmp_path / "file").write_text("")
    with pytest.raises(tfr.EngineError, match="cannot keep engines there: ") as caught:
        EngineCache(tmp_path / "file")
    assert "--engine-dir" in caught.value.hint
    monkeypatch.setattr(os, "getuid", lambda: os.stat(shared).st_uid + 1)  # noqa: PTH116
    with pytest.raises(tfr.EngineError, match="belongs to another user"):
        EngineCache(shared)


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(tfr.EngineError, match=r"cannot write .*\.engine: No space left"):
        store(cache)
    assert list(cache.path.iterdir()) == []


OLD = "__version__, Builder = '1.6.9', object"
"""A version that came before all that we use."""


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str | None], None]]:
    """`importing(engine, code)`: let the only package of an engine consist of this code; it is missing for None."""

    def use(engine: str, code: str | None) -> None:
        name = fake_tensorrt.MODULES[engine]
        monkeypatch.setattr(importlib.metadata, "distributions", list)
        monkeypatch.setitem(sys.modules, name, None)
        if code is not None:
            del sys.modules[name]
            (tmp_path / f"{name}.py").write_text(code)
            monkeypatch.syspath_prepend(tmp_path)
        import_package.cache_clear()

    yield use
    import_package.cache_clear()


@pytest.mark.parametrize(
    ("engine", "code", "message", "hint"),
    [
        ("trt", None, "needs TensorRT, which is not", '"tarflow-sdk[trt]"'),
        ("trt-rtx", None, "needs TensorRT for RTX, which is not installed", "tarflow-sdk[trt-rtx]"),
        ("trt", "raise ImportError('libnvinfer.so.11: not found')", "libraries do not load: libnvinfer", "tensorrt"),
        ("trt-rtx", "raise OSError('broken')", "its libraries do not load: broken", "tensorrt-rtx-cu13"),
        ("trt-rtx", OLD, "TensorRT for RTX 1.6.9 is too old, 1.7 is needed", "tensorrt-rtx-cu13>=1.7"),
        ("trt", OLD, "TensorRT 1.6.9 is too old, 10.15 is needed", "tensorrt>=10.15"),
        ("trt", "__version__ = '11.4.0'", "without its builder", "--force-reinstall"),
    ],
)
def test_a_package_that_is_not_ready_is_one_line_and_a_remedy(importing, engine, code, message, hint):
    importing(engine, code)
    with pytest.raises(tfr.EngineError, match=message) as caught:
        import_package(engine)
    assert hint in caught.value.hint
    assert "\n" not in f"{caught.value}{caught.value.hint}"


def test_two_distributions_in_one_folder_are_refused(importing, monkeypatch):
    importing("trt", OLD)
    files = [importlib.metadata.PackagePath("tensorrt/__init__.py")]
    installed = [SimpleNamespace(name=f"tensorrt_cu{n}", version="11.4.0", files=files) for n in (12, 13)]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    with pytest.raises(tfr.EngineError, match="overwrite each other in the folder tensorrt/") as caught:
        import_package("trt")
    assert "pip uninstall -y tensorrt-cu12 tensorrt-cu13" in caught.value.hint


def test_other_systems_are_refused(importing, monkeypatch):
    importing("trt-rtx", OLD)
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(tfr.EngineError, match="runs on Linux only"):
        import_package("trt-rtx")
    with pytest.raises(tfr.EngineError, match="on Linux only"):
        EngineFolder(Path("engines"))
