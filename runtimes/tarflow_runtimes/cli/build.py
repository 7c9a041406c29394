"""`tarflow build`: build TensorRT engines for a bundle before their first use."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.options import (
    BuildOptions,
    BundleArgument,
    Json,
    check_engine,
    size_of,
    takes_build_options,
)
from tarflow_runtimes.cli.progress import StepClock
from tarflow_runtimes.cli.shell import command, new_app, note, print_json
from tarflow_runtimes.errors import Cancelled

if TYPE_CHECKING:
    from tarflow_runtimes.engines.trt.supply import Building, Supplied

app = new_app()


@command(app)
@takes_build_options
def build(
    bundle: BundleArgument = None,
    *,
    engine: Annotated[str, typer.Option(metavar="trt|trt-rtx", help="TensorRT, or TensorRT for RTX (experimental).")],
    chosen: BuildOptions,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Scratch memory per layer, such as 1G. [default: no limit]")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Also rebuild engines that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Build and store the engines of a bundle, so that the first image needs no build.

    trt builds on the GPU that runs the engines; trt-rtx needs no GPU and builds for the given architectures. Existing
    engines are not built again.
    """
    check_builds(engine)
    limit = None if workspace is None else size_of("--workspace", workspace)
    facts = build_engines(bundle, engine, chosen, workspace=limit, rebuild=rebuild)
    if as_json:
        print_json(facts)


def check_builds(engine: str) -> None:
    """Refuse an engine that needs no build, or that cannot be built here, before any work."""
    from tarflow_runtimes.engines.trt.gpu import gpu_for
    from tarflow_runtimes.engines.trt.package import import_package

    check_engine(engine)
    gpu_for(import_package(engine))


def build_engines(
    path: Path | None, engine: str, chosen: BuildOptions, *, workspace: int | None = None, rebuild: bool = False
) -> dict[str, Any]:
    """Build missing engines, report them on stderr, and return the facts for `--json`."""
    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.model.flow import shipped_bundle

    bundle = open_bundle(path or shipped_bundle())
    wanted = chosen.wanted(bundle)
    engines: list[dict[str, Any]] = []
    with StepClock("building") as clock:

        def on_building(building: Building) -> None:
            clock.show(int(1000 * (len(engines) + building.share)), 1000 * len(wanted))

        supply = chosen.supply(engine, bundle, workspace=workspace, on_building=on_building)
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
        "package": supply.package.name,
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
        "profiles": [dataclasses.asdict(profile) for profile in sidecar.made.profiles],
        "seconds": seconds,
    }


def _tell(facts: dict[str, Any]) -> None:
    what = f"block {facts['block']} {facts['graph']}"
    how = f"built in {facts['seconds']:.1f} s ({facts['reason']})" if facts["built"] else "was there"
    note(f"{what}: {how}, {facts['bytes'] / 1e6:.1f} MB")
