"""`open_graph`: a graph of a bundle for TensorRT, and the digest by which its engine is known.

The axes stay symbolic, so that one engine with one copy of the weights takes every batch, both numbers of branches and
every window: a profile each.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from tarflow_runtimes.bundle.reader import PORTABLE, Bundle
from tarflow_runtimes.engines.trt.network import Graph
from tarflow_runtimes.errors import BundleError

PROVIDER: Final = "trt"

LOOPS: Final = ("step", "window")
"""The decode loop, by one patch at a time and by several."""

KINDS: Final = (*LOOPS, "forward", "gradient")


def open_graph(bundle: Bundle, block: int, kind: str, precision: str) -> Graph:
    """The `kind` graph of a block, to be computed in the bundle's precision or in tf32.

    Its digest is one of the manifest's digests of graph and weights. The bundle's reader has compared the files with
    them, unless it was told not to: gigabytes are not read again.

    Raises:
        EngineError: when the bundle has no graphs for TensorRT.
        BundleError: when the graph has changed since the bundle was opened, or the manifest does not describe it.
    """
    provider = PROVIDER if kind in LOOPS else PORTABLE
    file, weights = bundle.graph(provider, kind, block), bundle.blocks[block].weights
    files = bundle.manifest["files"]
    try:
        described = bundle.manifest["graphs"][provider][kind]
        inputs, outputs = _shapes(described["inputs"]), _shapes(described["outputs"])
    except (KeyError, TypeError) as error:
        raise BundleError(f"bundle {bundle.path.name}: its manifest does not describe {provider}/{kind}") from error
    return Graph(
        kind=kind,
        block=block,
        precision=precision,
        model=bundle.read(file),
        folder=weights.parent,
        digest=_joined(*(files[bundle.name(path)]["sha256"] for path in (file, weights))),
        inputs=inputs,
        outputs=outputs,
        cache_updates=2 * bundle.config.layers + 1 if kind in LOOPS else 0,
        cache_entries=bundle.config.patches,
    )


def _shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {value["name"]: tuple(value["shape"]) for value in values}


def _joined(*digests: str) -> str:
    """One digest of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
