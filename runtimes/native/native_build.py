"""Build the shared library with one compiler call per object and one to link, without CMake.

    python runtimes/native/native_build.py [--output FOLDER] [--into FOLDER] [--compiler CXX] [--flags "-g"]

Prints the library's path. Build hooks of packages call `build`.
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

COMMON = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow")
FREESTANDING = ("-ffreestanding", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics")

STATIC = ("-static-libstdc++", "-static-libgcc") if sys.platform.startswith("linux") else ()
"""The compiler's libraries go into the library: a wheel then needs no newer ones than the C library's."""

AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
PORTABLE = {"portable": ("-DTARFLOW_NATIVE_PORTABLE",)}
KERNELS = {
    "x86_64": {"v4_vnni": (*AVX512, "-mavx512vnni"), "v4": AVX512, "v3": AVX2, **PORTABLE},
    "aarch64": {"neon": (), **PORTABLE},
}
"""Flags of each kernel, by architecture; all others have only the portable one."""
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def library_name() -> str:
    """File name of the shared library on this system."""
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


def compile_objects(
    output: Path, *, cxx: str, architecture: str | None = None, flags: tuple[str, ...] = ()
) -> list[Path]:
    """Compile into the folder `output`. Raises subprocess.CalledProcessError."""
    machine = platform.machine().lower()
    output.mkdir(parents=True, exist_ok=True)
    common = (*COMMON, *WARNINGS, "-I", str(HERE / "include"), *flags)

    def compile_one(item: tuple[str, tuple[str, tuple[str, ...]]]) -> Path:
        name, (source, own) = item
        subprocess.run([cxx, *common, *own, "-c", str(HERE / source), "-o", str(output / name)], check=True)
        return output / name

    with ThreadPoolExecutor(2) as pool:
        parts = objects(architecture or ARCHITECTURES.get(machine, machine))
        return list(pool.map(compile_one, parts.items()))


def build(
    output: Path,
    *,
    cxx: str,
    folder: Path | None = None,
    architecture: str | None = None,
    flags: tuple[str, ...] = (),
) -> Path:
    """Compile and link in the folder `output`; returns the library, which goes to `folder` if that is given.

    It appears complete or not at all; running processes keep the previous one.

    Raises:
        subprocess.CalledProcessError: when the compiler or the linker fails.
    """
    made = compile_objects(output, cxx=cxx, architecture=architecture, flags=flags)
    library = (folder or output) / library_name()
    linked = library.with_name(f"{library.name}.{os.getpid()}")
    subprocess.run([cxx, "-shared", *STATIC, *flags, *map(str, made), "-pthread", "-o", str(linked)], check=True)
    return linked.replace(library)


def build_wasm(output: Path, *, cxx: str, flags: tuple[str, ...] = ()) -> Path:
    """The C ABI as a WebAssembly module without imports, one thread; `cxx` is a Clang. Raises as `build` does."""
    output.mkdir(parents=True, exist_ok=True)
    module = output / "tarflow_native.wasm"
    sources = [str(HERE / source) for source in ("core/kernel.cpp", "core/pack.cpp", "src/api.cpp")]
    own = ("-DTARFLOW_NATIVE_PORTABLE", "-DTARFLOW_NATIVE_NO_THREADS", "-I", str(HERE / "include"))
    link = ("-nostdlib", "-Wl,--no-entry", "-Wl,--export-dynamic", "-Wl,--export=__heap_base")
    common = [flag for flag in COMMON if flag not in ("-fPIC", "-fno-trapping-math")]
    target = ("--target=wasm32", "-msimd128", "-mbulk-memory")
    subprocess.run(
        [cxx, *target, *common, *WARNINGS, *FREESTANDING, *own, *flags, *sources, *link, "-o", str(module)], check=True
    )
    return module


def main() -> None:
    """Run the command line program."""
    parser = argparse.ArgumentParser(description="build the native kernel of TarFlow")
    parser.add_argument("--output", type=Path, default=Path("build/native"))
    parser.add_argument("--compiler", default=compiler())
    parser.add_argument("--into", type=Path, help="folder that the library goes to; by default that of --output")
    parser.add_argument("--architecture", help="x86_64, aarch64; by default this machine's")
    parser.add_argument("--flags", default="", help="more flags for compiling and linking")
    parser.add_argument(
        "--wasm", action="store_true", help="build the WebAssembly module instead; needs clang++ and lld"
    )
    arguments = parser.parse_args()
    if not arguments.compiler:
        parser.error("no C++ compiler found: install g++ or clang++, or set CXX")
    flags = tuple(shlex.split(arguments.flags))
    if arguments.wasm:
        print(build_wasm(arguments.output, cxx=arguments.compiler, flags=flags))
        return
    print(
        build(
            arguments.output,
            cxx=arguments.compiler,
            folder=arguments.into,
            architecture=arguments.architecture,
            flags=flags,
        )
    )


if __name__ == "__main__":
    main()
