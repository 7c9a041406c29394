"""Write what the Python runtime computes, for tests/parity.cpp: golden.py BUNDLE FILE. Little-endian, in order."""

import sys
from pathlib import Path

import numpy as np

import tarflow_runtimes as tfr
from tarflow_runtimes._noise import standard_normal


def main(bundle: str, target: str) -> None:
    """Noise, three samples, latents, log|det|, log q, denoised images."""
    with tfr.load(bundle) as flow:
        config = flow.config
        plain = flow.sample(4, labels=[0, 1, 2, 3], seed=7, first_index=3, denoise=False).images
        guided = flow.sample(
            4, labels=[0, 1, -1, 3], seed=8, guidance=2.0, attention_temperature=1.5, anneal_guidance=True
        ).images
        cut = flow.sample(4, seed=9, guidance=1.0, guide="a", attention_temperature=1.2, batch_size=3).images
        z, log_det = flow.encode(plain, [0, 1, 2, 3])
        arrays = [
            standard_normal(7, 3, 4, config.patches, config.patch_values),
            plain,
            guided,
            cut,
            z,
            log_det,
            flow.log_prob(plain, [0, 1, 2, 3]),
            flow.denoise(plain, [0, 1, 2, 3], sigma=0.2, strength=0.5),
        ]
    with Path(target).open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
