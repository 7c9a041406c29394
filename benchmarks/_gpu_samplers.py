"""The samplers of `gpu.py`, each a function that serves one process (`_peer.serve`) from a `Work` folder.

A name is `original`, `graphed-DTYPE`, or `ENGINE-DTYPE` for this SDK. All times include the transfers of latents and
images from and to the host.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _peer import first_line, serve
from _work import ROOT, Work

Sampler = tuple[Callable[..., Any], dict[str, Any]]
"""A function that answers requests, and facts about the sampler."""

DTYPES = ("float32", "float16", "bfloat16")


def title(name: str, device: str) -> str:
    """The title of a row of the table."""
    kind, _, dtype = name.rpartition("-")
    if name == "original":
        return "original PyTorch, eager, bfloat16"
    if kind == "graphed":
        return f"PyTorch, static cache, {'CUDA graph' if device == 'cuda' else 'no graph'}, {dtype}"
    stands_in = " over the host's memory" if device == "cpu" and kind != "ort-cpu" else ""
    return f"ours, {kind}{stands_in}, {dtype}"


def dtype_of(name: str) -> str:
    """The dtype of a sampler's linear layers and caches."""
    return "bfloat16" if name == "original" else name.rpartition("-")[2]


def serve_sampler(name: str, work: Work, *, reference: str, device: str) -> None:
    """Serve the sampler of that name on a device, `cuda` or `cpu`; if it does not start, answer with the reason."""
    kind, _, dtype = name.rpartition("-")
    try:
        if name == "original":
            decode, facts = _original(work, reference, device)
        elif kind == "graphed":
            decode, facts = _graphed(work, device, dtype)
        else:
            decode, facts = _ours(work, kind, dtype, device)
    except Exception as error:  # noqa: BLE001 - whatever the reason, the table names it
        facts = {"error": first_line(error)}
        print(json.dumps(facts), flush=True)
        return
    serve(decode, **facts)


def _original(work: Work, reference: str, device: str) -> Sampler:
    """The original code, imported from its own folder: `Model.reverse` under autocast, as its own scripts run it."""
    sys.path.insert(0, reference)
    import torch
    import transformer_flow

    model = transformer_flow.Model(**work.original_shape()).eval()
    model.load_state_dict(torch.load(work.weights, weights_only=True))
    model.to(device)

    def decode(noise: str, labels: list[int] | None, guidance: float, **_: Any) -> np.ndarray:
        y = None if labels is None else torch.tensor(labels, device=device)
        z = torch.from_numpy(np.load(noise)).to(device)
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            return model.reverse(z, y, guidance).float().cpu().numpy()  # type: ignore[no-any-return]

    return decode, {"runtime": f"torch {torch.__version__}"}


def _graphed(work: Work, device: str, dtype: str) -> Sampler:
    """Our PyTorch model with static caches and a CUDA graph of one step."""
    import torch
    from _graphed import GraphedSampler

    from tarflow_sdk import Guidance, load_checkpoint

    model = load_checkpoint(work.weights, image_channels=work.config["image_channels"])
    sampler = GraphedSampler(model, device=device, dtype=getattr(torch, dtype))

    def decode(noise: str, labels: list[int] | None, guidance: float, **_: Any) -> np.ndarray:
        y = None if labels is None else torch.tensor(labels)
        images = sampler(torch.from_numpy(np.load(noise)), y, Guidance(weight=guidance))
        return images.float().cpu().numpy()  # type: ignore[no-any-return]

    return decode, {"runtime": f"torch {torch.__version__}"}


def _ours(work: Work, engine: str, dtype: str, device: str) -> Sampler:
    """This SDK: sequential, or parallel with a window."""
    import tarflow_runtimes as tfr

    flow = open_flow(work, engine, dtype, device)

    def decode(noise: str, labels: list[int] | None, guidance: float, window: int | None) -> tuple[np.ndarray, Any]:
        z = np.load(noise)
        plan = None if window is None else tfr.Parallel(window=window)
        options: dict[str, Any] = {"labels": labels, "guidance": guidance, "plan": plan, "batch_size": len(z)}
        sample = flow.sample(len(z), noise=z, denoise=False, **options)
        calls = [count for block in sample.report.blocks for count in block.calls]
        return sample.images, {"calls_mean": float(np.mean(calls)), "calls_max": max(calls)}

    return decode, {"report": dict(flow.engine_report)}


def open_flow(work: Work, engine: str, dtype: str, device: str) -> Any:
    """The bundle of that dtype on an engine; on a CPU `ort-cuda` over the host's memory stands in for it."""
    import tarflow_runtimes as tfr

    bundle = bundle_of(work, dtype)
    if device == "cuda" or engine == "ort-cpu":
        return tfr.load(bundle, engine=engine)
    if engine != "ort-cuda":
        raise ValueError(f"nothing stands in for engine {engine!r} on a CPU")
    sys.path.append(str(ROOT / "tests" / "helpers"))
    import host_device

    return host_device.open_flow(bundle)


def bundle_of(work: Work, dtype: str) -> Path:
    """The bundle in a dtype, converted when first asked for."""
    if dtype == "float32":
        return work.bundle
    path = work.folder / f"{dtype}.tarflow"
    if not path.exists():
        from tarflow_export import convert_bundle

        convert_bundle(work.bundle, path, precision=dtype, verify=False)
    return path
