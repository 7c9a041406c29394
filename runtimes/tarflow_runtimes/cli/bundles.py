"""`tarflow inspect`, `tarflow verify`: what a bundle holds, and whether an engine computes it right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tarflow_runtimes.cli.engine_options import Engine, EngineDir, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app, note, print_json, printable

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.reader import Bundle
    from tarflow_runtimes.bundle.tolerances import Record

inspect_app, verify_app = new_app(), new_app()

BundleArgument = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help="A .tarflow folder. [default: the digits of the package]")
]
SHOWN_LABELS = 10

Json = Annotated[bool, typer.Option("--json", help="Report on stdout as one JSON object.")]


@command(inspect_app)
def inspect(bundle: BundleArgument = None, as_json: Json = False) -> None:
    """Say what a bundle holds: the model, its files, precision, verification.

    Reads the manifest and checks that every file is there with its size; it runs nothing and hashes nothing.
    """
    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.model.flow import shipped_bundle

    facts = _facts(open_bundle(bundle or shipped_bundle(), verify_digests=False))
    if as_json:
        print_json(facts)
    else:
        _print(facts)


@command(verify_app)
def verify(
    bundle: BundleArgument = None,
    *,
    engine: Engine = "ort-cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    as_json: Json = False,
) -> None:
    """Run an engine on the inputs that a bundle carries and compare with PyTorch's outputs, without PyTorch.

    The exit code is 1 when a tolerance is missed. TensorRT's engines keep the outcome; those that missed are not used
    again.
    """
    import tarflow_runtimes as tfr
    from tarflow_runtimes.bundle.tolerances import require_passed
    from tarflow_runtimes.cli.progress import StepClock
    from tarflow_runtimes.measure.verify import verify as run_verification

    options = load_options(tf32=tf32, engine_dir=engine_dir)
    with tfr.load(bundle, engine=engine, **options) as flow, StepClock("verifying") as clock:
        blocks, precision = flow.config.blocks, flow.engine.precision
        records = run_verification(flow.bundle, flow.engine, on_block=lambda block: clock.show(block + 1, blocks))
        facts = {"bundle": str(flow.bundle.path), "digest": flow.bundle.digest}
        facts |= {"engine": flow.engine_name, "precision": precision}
        missed = [record.name for record in records if not record.passed]
        if facts["engine"] in {"trt", "trt-rtx"}:
            from tarflow_runtimes.engines.trt.engine import record_verification

            found = {"bundle": flow.bundle.digest, "comparisons": len(records), "missed": missed}
            record_verification(flow.engine, passed=not missed, facts=found)
    note(comparison_table(records))
    passed = not missed
    if as_json:
        listed = [record.to_json() for record in records]
        print_json(facts | {"passed": passed, "seconds": clock.seconds, "records": listed})
    require_passed(records)
    note(f"all {len(records)} comparisons passed on {facts['engine']}, {precision} ({clock.seconds:.1f} s)")


def comparison_table(records: Iterable[Record]) -> str:
    """One comparison a line: its name, the graph's file, the measure with its value and bound, and whether it holds."""
    header = ("comparison", "graph", "measure", "value", "tolerance", "")
    rows = [header] + [
        (
            record.name,
            record.graph or "-",
            record.measure,
            "not finite" if record.value is None else f"{record.value:.2e}",
            f"{record.tolerance:.2e}",
            "ok" if record.passed else "MISSED",
        )
        for record in records
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _facts(bundle: Bundle) -> dict[str, Any]:
    from tarflow_runtimes.bundle.reader import PORTABLE

    manifest, config = bundle.manifest, bundle.config
    sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    verification, checkpoint = _object(manifest, "verification"), _object(manifest, "checkpoint")
    return {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "model": {
            "data": config.data,
            "shape": list(config.shape),
            "patches": config.patches,
            "patch_values": config.patch_values,
            "width": config.width,
            "blocks": config.blocks,
            "layers": config.layers,
            "heads": config.heads,
            "head_dim": config.head_dim,
            "nvp": config.nvp,
            "parameters": checkpoint.get("parameters"),
        },
        "classes": config.classes,
        "labels": None if config.labels is None else list(config.labels),
        "noise": config.noise,
        "noise_std": config.noise_std,
        "precision": bundle.precision,
        "dtypes": _object(manifest, "dtypes"),
        "opset": manifest.get("opset"),
        "graphs": {PORTABLE: list(bundle.blocks[0].portable)}
        | {provider: list(kinds) for provider, kinds in bundle.graphs.items()},
        "bytes": {
            "graphs": sum(size for name, size in sizes.items() if name.endswith(".onnx")),
            "weights": sum(size for name, size in sizes.items() if name.endswith(".bin")),
            "all": sum(sizes.values()),
        },
        "checkpoint": {name: checkpoint.get(name) for name in ("file", "sha256")},
        "converted": _object(manifest, "converted") or None,
        "verification": {"status": verification.get("status"), "records": len(verification.get("records") or [])},
        "tools": _object(manifest, "tools"),
    }


def _object(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that nothing runs on: empty where it is absent or not an object."""
    value = manifest.get(name)
    return dict(value) if isinstance(value, dict) else {}


def _print(facts: Mapping[str, Any]) -> None:
    """The same facts for a person: a name and a value on each line."""
    model, size, labels = facts["model"], facts["bytes"], facts["labels"]
    data = f"{model['patches']} tokens of {model['patch_values']} values"
    if model["data"] == "image":
        channels, height, width = model["shape"]
        data = f"{height}x{width}, {channels} channel{'s' * (channels != 1)}, {data.replace('tokens', 'patches')}"
    classes = "none" if not facts["classes"] else str(facts["classes"])
    if labels is not None:
        classes += f": {', '.join(labels[:SHOWN_LABELS])}" + ", ..." * (len(labels) > SHOWN_LABELS)
    verified = f"{facts['verification']['status']}, {facts['verification']['records']} records"
    parameters = "" if model["parameters"] is None else f", {model['parameters']:,} parameters"
    others = ", ".join(f"{part} {dtype}" for part, dtype in facts["dtypes"].items() if dtype != facts["precision"])
    graphs = ", ".join(f"{len(kinds)} {provider}" for provider, kinds in facts["graphs"].items())
    checkpoint = facts["checkpoint"]
    lines = {
        "bundle": facts["bundle"],
        "digest": facts["digest"],
        "data": data,
        "model": f"{model['blocks']} blocks of {model['layers']} layers, width {model['width']}, "
        f"{model['heads']} heads of {model['head_dim']}{parameters}" + ("" if model["nvp"] else ", volume preserving"),
        "classes": classes,
        "training noise": f"{facts['noise']}, sigma {'unknown' if facts['noise_std'] is None else facts['noise_std']}",
        "precision": facts["precision"] + (f" ({others})" if others else ""),
        "graphs": f"{graphs}, opset {facts['opset']}",
        "size": f"{_megabytes(size['all'])} (weights {_megabytes(size['weights'])}, "
        f"graphs {_megabytes(size['graphs'])})",
        "checkpoint": f"{checkpoint['file'] or 'unnamed'}, SHA-256 {checkpoint['sha256'] or 'unknown'}",
        "verification": verified,
        "tools": ", ".join(f"{name} {version}" for name, version in facts["tools"].items()),
    }
    if made_from := facts["converted"]:
        lines["converted"] = f"from {made_from.get('precision')}, digest {made_from.get('digest')}"
    for name, text in lines.items():
        typer.echo(f"{name:<14}  {printable(text)}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
