"""Build the shared library with one compiler call for each object and one to link; no CMake.

    python runtimes/native/native_build.py [--output FOLDER] [--compiler CXX] [--flags "-fsanitize=thread -g"]

Prints the library's path. `build` is what a package's build hook calls.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow")
FREESTANDING = ("-ffreestanding", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics")

AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
PORTABLE = {"portable": ("-DTARFLOW_NATIVE_PORTABLE",)}
KERNELS = {
    "x86_64": {"v4": AVX512, "v3": AVX2, **PORTABLE},
    "aarch64": {"neon": (), **PORTABLE},
}
"""Flags of each kernel, by architecture."""
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def library_name() -> str:
    """Of the shared library on this system."""
    return {"win32": "tarflow_native.dll", "darwin": "libtarflow_native.dylib"}.get(
        sys.platform, "libtarflow_native.so"
    )


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first found; GCC or Clang, whose vector extensions the kernels are written in."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def objects(architecture: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Object -> (source, flags)."""
    kernels = KERNELS.get(architecture, PORTABLE)
    define = (f"-DTARFLOW_NATIVE_{architecture.upper()}",) if architecture in KERNELS else ()
    return {
        "api.o": ("src/api.cpp", define),
        "pack.o": ("core/pack.cpp", FREESTANDING),
        **{f"{name}.o": ("core/kernel.cpp", (*FREESTANDING, *flags)) for name, flags in kernels.items()},
    }


def build(output: Path, *, cxx: str, architecture: str | None = None, flags: tuple[str, ...] = ()) -> Path:
    """Compile into the folder `output`; returns the library. Raises subprocess.CalledProcessError."""
    machine = platform.machine().lower()
    architecture = architecture or ARCHITECTURES.get(machine, machine)
    output.mkdir(parents=True, exist_ok=True)
    common = (*COMMON, *WARNINGS, "-I", str(HERE / "include"), *flags)

    def compile_one(item: tuple[str, tuple[str, tuple[str, ...]]]) -> str:
        name, (source, own) = item
        made = str(output / name)
        subprocess.run([cxx, *common, *own, "-c", str(HERE / source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compile_one, objects(architecture).items()))
    library = output / library_name()
    subprocess.run([cxx, "-shared", *flags, *made, "-pthread", "-o", str(library)], check=True)
    return library


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="build the native kernel of TarFlow")
    parser.add_argument("--output", type=Path, default=Path("build/native"))
    parser.add_argument("--compiler", default=compiler())
    parser.add_argument("--architecture", help="x86_64, aarch64; by default this machine's")
    parser.add_argument("--flags", default="", help="more flags for compiling and linking")
    arguments = parser.parse_args()
    if not arguments.compiler:
        parser.error("no C++ compiler found: install g++ or clang++, or set CXX")
    flags = tuple(shlex.split(arguments.flags))
    print(build(arguments.output, cxx=arguments.compiler, architecture=arguments.architecture, flags=flags))


if __name__ == "__main__":
    main()
