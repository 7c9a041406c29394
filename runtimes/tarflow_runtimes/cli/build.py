"""`tarflow build`: build TensorRT engines for a bundle before their first use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.options import (
    DEFAULT_BATCH,
    DEFAULT_BYTES,
    DEFAULT_WINDOW,
    Batch,
    BundleArgument,
    EngineDir,
    Guidance,
    Json,
    Shapes,
    Target,
    Tf32,
    Window,
    check_engine,
    shapes_of,
    size_of,
    targets_of,
)
from tarflow_runtimes.cli.progress import StepClock
from tarflow_runtimes.cli.shell import command, new_app, note, print_json
from tarflow_runtimes.errors import Cancelled

if TYPE_CHECKING:
    from tarflow_runtimes.engines.trt.supply import Building, Supplied

app = new_app()


@command(app)
def build(
    bundle: BundleArgument = None,
    *,
    engine: Annotated[str, typer.Option(metavar="trt|trt-rtx", help="TensorRT, or TensorRT for RTX (experimental).")],
    tf32: Tf32 = False,
    batch: Batch = DEFAULT_BATCH,
    guidance: Guidance = None,
    window: Window = DEFAULT_WINDOW,
    target: Target = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Scratch memory per layer, such as 1G. [default: no limit]")
    ] = None,
    engine_dir: EngineDir = None,
    max_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Size limit of all engines; the least recently used are removed.")
    ] = "20G",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Also rebuild engines that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Build and store the engines of a bundle, so that the first image needs no build.

    trt builds on the GPU that runs the engines; trt-rtx needs no GPU and builds for the given architectures. Existing
    engines are not built again.
    """
    check_builds(engine)
    facts = build_engines(
        bundle,
        engine,
        tf32=tf32,
        shapes=shapes_of(batch, guidance, window),
        targets=targets_of(target),
        workspace=None if workspace is None else size_of("--workspace", workspace),
        engine_dir=engine_dir,
        max_bytes=size_of("--max-size", max_size),
        rebuild=rebuild,
    )
    if as_json:
        print_json(facts)


def check_builds(engine: str) -> None:
    """Refuse an engine that needs no build, or that cannot be built here, before any work."""
    from tarflow_runtimes.engines.trt.gpu import gpu_for
    from tarflow_runtimes.engines.trt.package import import_package

    check_engine(engine)
    gpu_for(import_package(engine))


def build_engines(
    path: Path | None,
    engine: str,
    *,
    tf32: bool = False,
    shapes: Shapes | None = None,
    targets: Sequence[str] | None = None,
    workspace: int | None = None,
    engine_dir: Path | None = None,
    max_bytes: int = DEFAULT_BYTES,
    rebuild: bool = False,
) -> dict[str, Any]:
    """Build missing engines, report them on stderr, and return the facts for `--json`."""
    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.engines.trt.gpu import gpu_for
    from tarflow_runtimes.engines.trt.package import import_package
    from tarflow_runtimes.engines.trt.supply import Supply, wanted_engines
    from tarflow_runtimes.model.flow import shipped_bundle

    package = import_package(engine)
    bundle = open_bundle(path or shipped_bundle())
    shapes = shapes or shapes_of(DEFAULT_BATCH, None, DEFAULT_WINDOW)
    wanted = list(wanted_engines(bundle, shapes.profiles(bundle.config)))
    engines: list[dict[str, Any]] = []
    with StepClock("building") as clock:

        def on_building(building: Building) -> None:
            clock.show(int(1000 * (len(engines) + building.share)), 1000 * len(wanted))

        supply = Supply(
            package,
            bundle,
            gpu=gpu_for(package),
            tf32=tf32,
            targets=targets,
            folder=engine_dir,
            workspace=workspace,
            max_bytes=max_bytes,
            on_building=on_building,
        )
        for block, kind, profiles in wanted:
            began = time.perf_counter()
            try:
                supplied = supply.get(block, kind, profiles, rebuild=rebuild)
            except KeyboardInterrupt:
                raise Cancelled(f"interrupted; the {len(engines)} engines that were finished are kept") from None
            engines.append(_facts(block, kind, supplied, supply.cache.path, time.perf_counter() - began))
            _tell(engines[-1])
    built = sum(one["built"] for one in engines)
    note(
        f"{len(engines)} engines for {', '.join(supply.targets)} in {supply.cache.path}:"
        f" {built} built, {len(engines) - built} were there ({clock.seconds:.1f} s)"
    )
    return {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "engine": engine,
        "package": package.name,
        "precision": supply.precision,
        "targets": list(supply.targets),
        "folder": str(supply.cache.path),
        "seconds": clock.seconds,
        "engines": engines,
    }


def _facts(block: int, kind: str, supplied: Supplied, folder: Path, seconds: float) -> dict[str, Any]:
    sidecar = supplied.sidecar
    return {
        "block": block,
        "graph": kind,
        "file": str(folder / f"{sidecar.key}.engine"),
        "bytes": sidecar.size,
        "built": bool(supplied.reason),
        "reason": supplied.reason,
        "profiles": [profile.to_json() for profile in sidecar.made.profiles],
        "seconds": seconds,
    }


def _tell(facts: dict[str, Any]) -> None:
    what = f"block {facts['block']} {facts['graph']}"
    how = f"built in {facts['seconds']:.1f} s ({facts['reason']})" if facts["built"] else "was there"
    note(f"{what}: {how}, {facts['bytes'] / 1e6:.1f} MB")
