"""Other builds: sanitizers, Clang, CMake, WebAssembly under Node, aarch64 under an emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from native_build import build, build_wasm, compile_objects

from tarflow_runtimes.engines.native.library import Library

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "runtimes" / "native"

CASES = [("odd_tokens", "float32"), ("n16", "float32"), ("heads_of_5", "bfloat16"), ("class", "int8")]
"""Widths, heads and values that leave something over, and the usual ones, in every format."""


def made_by(library, block, noise, conditions, **options):
    """The inverse x of the noise, then z and log|det| of x."""
    x = library.invert(
        block, noise, labels=conditions.labels, guidance=conditions.guidance,
        inverse_temperature=conditions.inverse_temperature, branches=conditions.branches, **options,
    )  # fmt: skip
    labels = None if conditions.labels is None else conditions.labels[0]
    return x, *library.forward(block, x, labels=labels, **options)


def expected_of(model, noise, conditions):
    return made_by(model.library, model.blocks[0], noise, conditions)


def written(path, noise):
    """The same from a runner's file."""
    data, size = path.read_bytes(), noise.nbytes
    x, z = (np.frombuffer(part, np.float32).reshape(noise.shape) for part in (data[:size], data[size : 2 * size]))
    return x, z, np.frombuffer(data[2 * size :], np.float64)


def equal(found, expected):
    return all(map(np.array_equal, found, expected))


def build_runner(folder, cxx, run, *, architecture=None, flags=()):
    """runner.cpp with the library's objects."""
    made = compile_objects(folder, cxx=cxx, architecture=architecture, flags=(*flags, "-DTARFLOW_NATIVE_STATIC"))
    runner = folder / "runner"
    own = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-DTARFLOW_NATIVE_STATIC", "-I", NATIVE / "include", "-pthread")
    run(cxx, *own, *flags, HERE / "runner.cpp", *made, "-o", runner)
    return runner


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(models, job, cxx, tools, tmp_path, sanitizer):  # noqa: PLR0917 - fixtures
    _, run = tools
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1")
    runner = build_runner(tmp_path / "build", cxx, run, flags=flags)
    for name, precision in CASES:
        model = models(name, precision)
        for batch, kind, threads in ((11, "guided", 3), (1, "plain", 1), (1, "plain", 2), (2, "guided", 3)):
            noise, conditions = model.noise(batch), model.conditions(batch, kind)
            for kernel in model.library.kernels if threads > 1 else ("-",):
                run(runner, job(model, 0, noise, conditions), kernel, threads, tmp_path / "made")
                found = written(tmp_path / "made", noise)
                assert equal(found, expected_of(model, noise, conditions)), (name, kernel)


@pytest.mark.slow
def test_clang_makes_the_same_bits(models, tools, tmp_path):
    command, _ = tools
    clang = command("clang++", why="apt-get install clang")
    library = Library(build(tmp_path, cxx=clang))
    for name, precision in CASES:
        model = models(name, precision)
        noise, conditions = model.noise(11), model.conditions(11, "guided")
        expected = expected_of(model, noise, conditions)
        packed = library.pack(model.bundle, 0)
        assert np.array_equal(packed.packed, model.blocks[0].packed)
        for kernel in library.kernels:
            assert equal(made_by(library, packed, noise, conditions, kernel=kernel), expected), (name, kernel)


@pytest.mark.slow
def test_cmake_builds_a_target_to_link(models, job, tools, tmp_path):
    command, run = tools
    cmake = command("cmake", why="apt-get install cmake")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(consumer LANGUAGES CXX)\n"
        f"add_subdirectory({NATIVE} native)\nadd_executable(runner {HERE / 'runner.cpp'})\n"
        "target_compile_features(runner PRIVATE cxx_std_17)\ntarget_link_libraries(runner PRIVATE tarflow::native)\n"
    )
    run(cmake, "-S", tmp_path, "-B", tmp_path / "build")
    run(cmake, "--build", tmp_path / "build", "--parallel", "2")
    model = models("n16")
    noise, conditions = model.noise(3), model.conditions(3, "guided")
    run(tmp_path / "build" / "runner", job(model, 0, noise, conditions), "-", 2, tmp_path / "made")
    assert equal(written(tmp_path / "made", noise), expected_of(model, noise, conditions))


@pytest.mark.slow
def test_aarch64_makes_the_same_bits(models, job, tools, tmp_path):
    command, run = tools
    cross = command("aarch64-linux-gnu-g++", why="apt-get install g++-aarch64-linux-gnu qemu-user")
    emulator = command("qemu-aarch64", "qemu-aarch64-static", why="apt-get install qemu-user")
    runner = build_runner(tmp_path / "build", cross, run, architecture="aarch64", flags=("-static",))
    for name, precision in (*CASES, ("no_nvp", "float32")):
        model = models(name, precision)
        for batch, kind in ((7, "guided"), (1, "plain")):
            noise, conditions = model.noise(batch), model.conditions(batch, kind)
            expected = expected_of(model, noise, conditions)
            for kernel in ("aarch64", "portable"):
                run(emulator, runner, job(model, 0, noise, conditions), kernel, 1, tmp_path / "made")
                assert equal(written(tmp_path / "made", noise), expected), (name, kernel)


def test_webassembly_under_node(models, job, tools, tmp_path):
    command, run = tools
    clang, node = command("clang++", why="apt-get install clang lld"), command("node", why="install Node.js 18")
    command("wasm-ld", why="apt-get install lld")
    module = build_wasm(tmp_path, cxx=clang)
    assert module.stat().st_size < 200_000
    for name, precision in (*CASES, ("digits", "float32")):
        model = models(name, precision)
        noise, conditions = model.noise(3), model.conditions(3, "guided")
        run(node, HERE / "runner.mjs", module, job(model, 0, noise, conditions), tmp_path / "made")
        expected = expected_of(model, noise, conditions)
        for found, exact in zip(written(tmp_path / "made", noise), expected, strict=True):
            np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4)


def test_webassembly_with_exact_multiply_adds_makes_the_same_bits(models, job, tools, tmp_path):
    command, run = tools
    clang, node = command("clang++", why="apt-get install clang lld"), command("node", why="install Node.js 18")
    command("wasm-ld", why="apt-get install lld")
    module = build_wasm(tmp_path, cxx=clang, flags=("-DTARFLOW_NATIVE_EXACT",))
    model = models("n16")
    noise, conditions = model.noise(3), model.conditions(3, "guided")
    run(node, HERE / "runner.mjs", module, job(model, 0, noise, conditions), tmp_path / "made")
    assert equal(written(tmp_path / "made", noise), expected_of(model, noise, conditions))
