"""Sequential sampling and denoising, two sides in turn: libtarflow and the Python runtime, on any of their engines.

    python benchmarks/cpp.py --library build/cpp/libtarflow.so [--sides cpp:ort-cpu,cpp:native] [--batch 1,16,64]

A side is RUNTIME:ENGINE; runtimes are `cpp` and `python`. Each runs in a separate process and is called in turn on the
same bundle, noise and ONNX Runtime; times are medians over the rounds, the ratio is the median of the rounds' ratios,
above 1 if the second side is faster. The images of both sides are compared bit for bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _libtarflow import LibTarFlow
from _peer import Peer, serve
from _work import header, write_json


def serve_python(bundle: str, _: str, engine: str) -> None:
    """The Python runtime."""
    import tarflow_runtimes as tfr

    flow = tfr.load(bundle, engine)

    def sample(noise: str, labels: list[int] | None, guidance: float, *, denoise: bool) -> np.ndarray:
        given = np.load(noise)
        return flow.sample(len(given), labels=labels, noise=given, guidance=guidance, denoise=denoise).images

    report = flow.engine_report
    on = report.get("kernel") or f"ONNX Runtime {report['onnxruntime']}"
    serve(sample, runtime=f"{on}, {report['threads']} threads")


def serve_cpp(bundle: str, library: str, engine: str) -> None:
    """Libtarflow, called through ctypes."""
    opened = LibTarFlow(library, bundle, engine)

    def sample(noise: str, labels: list[int] | None, guidance: float, *, denoise: bool) -> np.ndarray:
        return opened.sample(np.load(noise), labels, guidance=guidance, denoise=int(denoise))

    serve(sample, runtime=opened.engine)


def compare(  # noqa: PLR0917 - both sides and their work
    first: Peer, second: Peer, folder: Path, shape: tuple[int, ...], rounds: int, seconds: float, **options: object
) -> dict[str, object]:
    """Both sides in turn on the same noise, the one that begins changing: seconds, their ratio, whether bits agree.

    At least `rounds` rounds, and as many as `seconds` hold.
    """
    np.save(folder / "noise.npy", np.random.default_rng(shape[0]).standard_normal(shape, dtype=np.float32))
    request = {"noise": str(folder / "noise.npy"), **options}
    images = []
    for peer in (first, second):
        peer.call(**request, save=str(folder / "images.npy"))
        images.append(np.load(folder / "images.npy").ravel())
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - began < seconds:
        order = (first, second) if len(times) % 2 else (second, first)
        taken = {id(peer): peer.call_rested(**request) for peer in order}
        times.append((taken[id(first)], taken[id(second)]))
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(before / after for before, after in times)
    return {
        "rounds": len(times),
        "first_ms": 1e3 * mine,
        "second_ms": 1e3 * theirs,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "bit_identical": bool(np.array_equal(*images)),
        "largest_difference": float(np.abs(images[0] - images[1]).max()),
    }


def shared_library() -> str:
    """The ONNX Runtime of this Python, for libtarflow."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    return str(next((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="libtarflow.so")
    parser.add_argument("--sides", default="cpp:ort-cpu,cpp:native", help="two, as RUNTIME:ENGINE")
    parser.add_argument("--bundle", help="the shipped digits unless given")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--guidance", default="0,1.5")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    parser.add_argument("--seconds", type=float, default=15.0, help="of rounds at least, for each row")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()

    from tarflow_runtimes.bundle.reader import open_bundle
    from tarflow_runtimes.model.flow import shipped_bundle

    os.environ.setdefault("TARFLOW_ORT_LIBRARY", shared_library())
    bundle = open_bundle(arguments.bundle or shipped_bundle(), verify_digests=False)
    config = bundle.config
    sides = arguments.sides.split(",")
    peers = []
    for side in sides:
        runtime, _, engine = side.partition(":")
        script, library = str(Path(__file__).resolve()), str(Path(arguments.library).resolve())
        peers.append(Peer(runtime, script, str(bundle.path), library, engine))
    first, second = peers
    head = header(bundle=bundle.path.name, first=f"{sides[0]}, {first.ready['runtime']}",
                  second=f"{sides[1]}, {second.ready['runtime']}", rounds=arguments.rounds)  # fmt: skip
    print(json.dumps(head))
    print("batch guide denoise   first ms second ms first/second (low..high)  same bits")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for batch in map(int, arguments.batch.split(",")):
            labels = [i % config.classes for i in range(batch)] if config.classes else None
            shape = (batch, config.patches, config.patch_values)
            calls = [(float(guidance), False) for guidance in arguments.guidance.split(",")]
            for guidance, denoise in [*calls, (0.0, True)] if config.noise_std else calls:
                options = {"labels": labels, "guidance": guidance, "denoise": denoise}
                row = compare(first, second, Path(name), shape, arguments.rounds, arguments.seconds, **options)
                rows.append({"batch": batch, "guidance": guidance, "denoise": denoise} | row)
                print(
                    f"{batch:5d} {guidance:5.1f} {denoise!s:>7} {row['first_ms']:10.1f} {row['second_ms']:9.1f}"
                    f" {row['ratio']:10.2f}x {row['ratio_low']:6.2f}..{row['ratio_high']:.2f}  {row['bit_identical']}",
                    flush=True,
                )
                if arguments.json:
                    write_json(arguments.json, {"header": head, "rows": rows})
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        {"python": serve_python, "cpp": serve_cpp}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
