"""`tarflow inspect`: the contents of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from tarflow_runtimes.cli.options import BundleArgument, Json
from tarflow_runtimes.cli.shell import command, new_app, print_json, printable

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.reader import Bundle

app = new_app()

SHOWN_LABELS = 10


@command(app)
def inspect(bundle: BundleArgument = None, as_json: Json = False) -> None:
    """Describe a bundle: the model, its files, precision, verification.

    Reads the manifest and checks that every file exists with the right size; runs no graph and computes no digest.
    """
    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.model.flow import shipped_bundle

    facts = _facts(open_bundle(bundle or shipped_bundle(), verify_digests=False))
    if as_json:
        print_json(facts)
    else:
        _print(facts)


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
    """An informational field; empty if it is missing or not an object."""
    value = manifest.get(name)
    return dict(value) if isinstance(value, dict) else {}


def _print(facts: Mapping[str, Any]) -> None:
    """The same facts for a person: one name and value per line."""
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
