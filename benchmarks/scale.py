"""Export and sampling at the size of the published AFHQ model: 8-768-8-8, 256 x 256 x 3, 3 classes, 463 M weights.

    python benchmarks/scale.py [--folder FOLDER] [--json FILE]

Random weights; needs about 4 GB of disk. Time and peak memory are those of the command-line programs as whole
processes, read from the operating system's accounting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAME = "afhq_model_8_768_8_8_0.07.pth"
SHAPE: dict[str, Any] = {
    "image_size": 256, "image_channels": 3, "patch_size": 8, "width": 768, "blocks": 8, "layers": 8, "classes": 3,
    "noise_std": 0.07,
}  # fmt: skip
MAKE = """
import json, sys
from tarflow_sdk import FlowConfig, save_checkpoint
from tarflow_sdk.testing import random_model
save_checkpoint(random_model(FlowConfig(**json.loads(sys.argv[1]))), sys.argv[2])
"""


def measured(*command: str) -> tuple[float, float]:
    """Run a command and return its wall seconds and peak resident memory in GB.

    Raises:
        SystemExit: when it fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    print(process.stdout.read(), end="")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed with status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep checkpoint and bundle here")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, bundle = folder / NAME, folder / "afhq.tarflow"
        if not checkpoint.exists():
            subprocess.run([sys.executable, "-c", MAKE, json.dumps(SHAPE), str(checkpoint)], check=True)
        programs = Path(sys.executable).parent
        seconds, memory = measured(str(programs / "tarflow-export"), str(checkpoint), "-o", str(bundle), "--overwrite")
        weights = checkpoint.stat().st_size - SHAPE["blocks"] * 4 * 1024**2  # without the originals' mask buffers
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        figures = {
            "export_seconds": round(seconds, 1),
            "export_peak_memory_gb": round(memory, 2),
            "bundle_over_weights": round(size / weights, 4),
        }
        seconds, memory = measured(
            str(programs / "tarflow-infer"), str(bundle), "-n", "1", "--labels", "1", "--no-denoise", "--seed", "0",
            "-o", str(folder / "afhq.png"), "--overwrite", "--json",
        )  # fmt: skip
        steps = SHAPE["blocks"] * (1024 - 1)
        figures |= {
            "sample_seconds": round(seconds, 1),
            "sample_ms_per_step": round(1e3 * seconds / steps, 2),
            "sample_peak_memory_gb": round(memory, 2),
        }
    for name, value in figures.items():
        print(f"{name:24s} {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
