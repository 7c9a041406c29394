"""Sequential sampling: this SDK, the original eager PyTorch sampler and compiled PyTorch, same weights, same noise.

    python benchmarks/sampling.py --reference PATH/TO/ml-tarflow [--model mnist|photos] [--batch 1,16,64] [--json FILE]

The rows of `decoding.py` for these four, also of shapes with random weights (`--random`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _work import CHECKPOINTS, SHAPES, Work
from decoding import numbers, table

SIDES = ["original", "compiled", "ort-cpu", "native"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of the original code (transformer_flow.py)")
    parser.add_argument("--model", choices=sorted(SHAPES), default="mnist")
    parser.add_argument("--random", action="store_true", help="random weights in place of trained ones")
    parser.add_argument("--batch", type=numbers(int), default=[1, 16, 64])
    parser.add_argument("--guidance", type=numbers(float), default=[0.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a batch begins no more rounds")
    parser.add_argument("--json", help="write the results here; cells of an earlier table that were not run stay")
    options = parser.parse_args()
    if not (Path(options.reference) / "transformer_flow.py").is_file():
        parser.error(f"{options.reference} has no transformer_flow.py")
    if options.model not in CHECKPOINTS and not options.random:
        parser.error(f"there are no trained weights of {options.model}: --random")
    options.samplers, options.ceilings = SIDES, None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None if options.random else CHECKPOINTS[options.model]
        table(options, Work.prepare(options.model, checkpoint, Path(folder)))


if __name__ == "__main__":
    main()
