"""`tarflow cache`: list the stored engines, explain whether they can be used, and remove unused ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.options import BuildOptions, Json, check_engine, takes_build_options
from tarflow_runtimes.cli.shell import command, new_app, print_json
from tarflow_runtimes.errors import EngineError, InputError

if TYPE_CHECKING:
    from tarflow_runtimes.engines.trt.cache import EngineCache
    from tarflow_runtimes.engines.trt.gpu import Gpu
    from tarflow_runtimes.engines.trt.sidecar import Sidecar

ACTIONS = ("list", "explain", "prune")

app = new_app()


@command(app)
@takes_build_options
def cache(
    action: Annotated[str, typer.Argument(metavar="list|explain|prune")],
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="explain: a .tarflow folder. [default: every engine]")
    ] = None,
    *,
    engine: Annotated[
        str | None,
        typer.Option(metavar="trt|trt-rtx", help="explain: the (experimental) engine; required with BUNDLE."),
    ] = None,
    chosen: BuildOptions,
    as_json: Json = False,
) -> None:
    """Manage the stored TensorRT engines.

    list: all stored engines. explain: whether this machine can use each engine; with BUNDLE and the options of tarflow
    build, which engine serves each graph, or why none does. prune: remove leftovers of killed builds, and engines
    beyond --max-size.
    """
    from tarflow_runtimes.engines.trt.cache import EngineCache

    if action not in ACTIONS:
        raise InputError(f"{action!r}: expected {', '.join(ACTIONS)}", hint="tarflow cache --help")
    if bundle is not None and (action != "explain" or engine is None):
        raise InputError(
            "BUNDLE goes with explain and --engine", hint="tarflow cache explain BUNDLE --engine trt, or trt-rtx"
        )
    kept = EngineCache(chosen.engine_dir)
    if action == "list":
        facts, lines = _list(kept)
    elif action == "prune":
        facts, lines = _prune(kept, chosen.max_bytes)
    elif bundle is None or engine is None:
        facts, lines = _explain_every(kept)
    else:
        check_engine(engine)
        facts, lines = _explain(bundle, engine, chosen)
    if as_json:
        print_json({"folder": str(kept.path)} | facts)
        return
    for line in lines:
        typer.echo(line)


Told = tuple[dict[str, Any], list[str]]
"""The facts for `--json`, and the same as lines for a person."""


def _list(kept: EngineCache) -> Told:
    engines = [_facts(kept, sidecar) for sidecar in kept.entries()]
    lines = [
        f"{one['name']}, {one['package']} for {', '.join(one['targets'])}, {_megabytes(one['bytes'])},"
        f" {one['verified']}"
        for one in engines
    ]
    lines.append(f"{len(engines)} engines, {_megabytes(sum(one['bytes'] for one in engines))} in {kept.path}")
    return {"engines": engines}, lines


def _facts(kept: EngineCache, sidecar: Sidecar) -> dict[str, Any]:
    verdicts = {place: one["passed"] for place, one in sidecar.verifications.items()}
    failed = [place for place, passed in verdicts.items() if not passed]
    return {
        "key": sidecar.key,
        "name": sidecar.name,
        "package": sidecar.built.get("package"),
        "targets": list(sidecar.made.targets),
        "profiles": [dataclasses.asdict(profile) for profile in sidecar.made.profiles],
        "bytes": kept.nbytes(sidecar),
        "built": dict(sidecar.built),
        "verified": f"failed on {failed[0]}" if failed else "verified" if verdicts else "not verified",
        "verifications": verdicts,
    }


def _prune(kept: EngineCache, limit: int) -> Told:
    pruned = kept.prune(limit)
    lines = [f"removed {one.name}" for one in pruned.engines]
    others = len(pruned.leftovers)
    lines.append(f"removed {len(pruned.engines)} engines and {others} other files, {_megabytes(pruned.nbytes)}")
    removed = {"engines": [one.key for one in pruned.engines], "leftovers": list(pruned.leftovers)}
    return removed | {"bytes": pruned.nbytes}, lines


def _explain_every(kept: EngineCache) -> Told:
    from tarflow_runtimes.engines.trt.gpu import present_gpu

    gpu = present_gpu()
    engines = [{"key": one.key, "name": one.name, "reason": _unusable(kept, one, gpu)} for one in kept.entries()]
    return {"engines": engines}, [f"{one['name']}: {one['reason'] or 'can be used here'}" for one in engines]


def _unusable(kept: EngineCache, sidecar: Sidecar, gpu: Gpu | None) -> str:
    """Why this machine cannot use an engine, or an empty string."""
    from tarflow_runtimes.engines.trt.explain import unusable
    from tarflow_runtimes.engines.trt.package import import_package

    if gpu is None:
        return "there is no GPU here to use it on"
    try:
        package = import_package(sidecar.made.engine)
    except EngineError as error:
        return str(error)
    return unusable(sidecar, package.version, gpu, kept.damage(sidecar))


def _explain(path: Path, engine: str, chosen: BuildOptions) -> Told:
    from tarflow_runtimes.bundle.reader import open_bundle

    bundle = open_bundle(path)
    supply = chosen.supply(engine, bundle)
    engines = [
        {"block": block, "graph": kind} | supply.explain(block, kind, profiles).to_json()
        for block, kind, profiles in chosen.wanted(bundle)
    ]
    lines = [
        f"block {one['block']} {one['graph']}: {'hit' if one['hit'] else 'miss'}, {one['reason']}" for one in engines
    ]
    if not all(one["hit"] for one in engines):
        lines.append("tarflow build with the same options builds what is missing; so does the first use")
    return {"engines": engines}, lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
