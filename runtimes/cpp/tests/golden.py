"""Golden files: what the Python runtime computes for a bundle, for parity.cpp and for later versions of Python's own.

    golden.py BUNDLE FILE [--engine ENGINE] [--small]

A golden file is a safetensors file. Its metadata hold `cases`, a JSON list of {"name", "call", "arguments", "arrays"}:
what was called, with which arguments, and for each array that came out its `limit` and `floor`. `floor` is how far
the array moves when every input moves by one unit in the last place: nobody's float32 can be asked for less. Noise is
exact. `--small` is the choice of cases for the file in tests/goldens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import tarflow_runtimes as tfr
from tarflow_runtimes.model.noise import standard_normal

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Case = dict[str, Any]

COPIES = 4
"""Inputs that a floor is the worst of."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": {"weight": 2.0}},
    "annealed": {"guidance": {"weight": 1.5, "attention_temperature": 0.7, "anneal": True}},
    "temperature": {"guidance": {"weight": 1.0, "guide": "a", "attention_temperature": 1.5}},
}
"""What samples are drawn with; `guidance` is a `tfr.Guidance`."""

LIMITS = {"log_det": 1e-5, "log_prob": 1e-5, "log_posteriors": 1e-4}
"""Of |difference| / max(1, |value|), for sums over all dimensions; elsewhere 1e-4 of |difference|."""


def cases(config: tfr.ModelConfig, *, small: bool, denoises: bool = True) -> list[Case]:
    """Calls that make sense for a model; the later ones take the images of the first. `denoises`: also to denoise."""
    found: list[Case] = [{"name": "noise", "call": "noise", "arguments": {"seed": 7, "first_index": 3, "n": 2}}]
    for n in (2,) if small else (17, 3, 1):
        labels = [-1 if i % 3 == 1 else i % config.classes for i in range(n)] if config.classes else None
        for kind, given in KINDS.items():
            if kind == "guided" and not config.classes:
                continue  # without a temperature there is nothing to compare
            arguments = {"n": n, "labels": labels, "seed": 7 + n, "first_index": 2**40, "denoise": False, **given}
            found.append({"name": f"{kind}_{n}", "call": "sample", "arguments": arguments})
    images, first = found[1]["name"], found[1]["arguments"]
    cut = {"n": 5, "labels": None, "seed": 9, "batch_size": 2, "denoise": denoises and config.noise_std is not None}
    found.append({"name": "cut", "call": "sample", "arguments": cut})
    on = {"n": first["n"], "labels": first["labels"], "images": images}
    found += [{"name": call, "call": call, "arguments": on} for call in ("encode", "log_prob")]
    if config.classes:
        found.append({"name": "classify", "call": "classify", "arguments": on})
    if denoises:
        found.append({"name": "denoise", "call": "denoise", "arguments": {**on, "sigma": 0.2, "strength": 0.5}})
    return found


def compute(flow: tfr.Flow, case: Case, images: Any = None, noise: Floats | None = None) -> dict[str, Floats]:
    """The arrays of a case. `noise` replaces the seed of a sample."""
    config, call, arguments = flow.config, case["call"], dict(case["arguments"])
    if call == "noise":
        return {"noise": standard_normal(**arguments, patches=config.patches, patch_values=config.patch_values)}
    if call == "sample":
        if noise is not None:
            arguments |= {"seed": None, "first_index": 0, "noise": noise}
        guidance = tfr.Guidance(**arguments.pop("guidance", {}))
        return {case["name"]: flow.sample(**arguments, guidance=guidance).images}
    labels = arguments["labels"]
    if call == "encode":
        z, log_det = flow.encode(images, labels)
        return {"z": z, "log_det": log_det}
    if call == "log_prob":
        return {"log_prob": flow.log_prob(images, labels)}
    if call == "classify":
        return {"log_posteriors": flow.classify(images)}
    return {"denoised": flow.denoise(images, labels, sigma=arguments["sigma"], strength=arguments["strength"])}


def difference(name: str, actual: Floats, expected: Floats) -> float:
    """The largest |difference|, of sums over all dimensions relative to their size."""
    scale = np.maximum(1.0, np.abs(expected)) if name in LIMITS else 1.0
    return float(np.max(np.abs(actual.astype(np.float64) - expected) / scale))


def _moved(values: Floats, rng: np.random.Generator) -> Floats:
    up = rng.integers(0, 2, values.shape).astype(bool)
    return np.where(up, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf)))


def _floors(flow: tfr.Flow, case: Case, arrays: dict[str, Floats], images: Floats | None) -> dict[str, float]:
    rng = np.random.default_rng(0)
    worst = dict.fromkeys(arrays, 0.0)
    for _ in range(COPIES):
        if case["call"] == "sample":
            config, given = flow.config, case["arguments"]
            noise = standard_normal(
                given["seed"], given.get("first_index", 0), given["n"], config.patches, config.patch_values
            )
            moved = compute(flow, case, noise=_moved(noise, rng))
        else:
            assert images is not None
            moved = compute(flow, case, images=_moved(images, rng))
        worst = {name: max(worst[name], difference(name, moved[name], arrays[name])) for name in arrays}
    return worst


def write(flow: tfr.Flow, target: Path, *, small: bool) -> None:
    """Compute all cases and their floors; a small batch shares the floor of the larger ones of its kind."""
    tensors: dict[str, Floats] = {}
    known: dict[str, float] = {}
    listed = cases(flow.config, small=small, denoises=flow.bundle.precision != "bfloat16")
    for case in listed:
        images = tensors.get(case["arguments"].get("images", ""))
        arrays = compute(flow, case, images)
        exact = case["call"] == "noise"
        floors = dict.fromkeys(arrays, 0.0) if exact else _floors(flow, case, arrays, images)
        for name in floors:
            kind = name.split("_")[0] if case["call"] == "sample" else name
            floors[name] = known[kind] = max(floors[name], known.get(kind, 0.0))
        case["arrays"] = {
            name: {"limit": 0.0 if exact else max(LIMITS.get(name, 1e-4), 4 * floors[name]), "floor": floors[name]}
            for name in arrays
        }
        tensors |= {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(tensors, target, metadata={"cases": json.dumps(listed)})


def read(path: Path) -> tuple[list[Case], dict[str, Floats]]:
    """The cases of a golden file, and all their arrays."""
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--engine", default="ort-cpu")
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    with tfr.load(chosen.bundle, chosen.engine) as opened:
        write(opened, chosen.file, small=chosen.small)
