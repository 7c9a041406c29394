"""Quality of the shipped digits: how often a classifier (the judge) sees the requested label, Bayes accuracy, bits/dim.

    python benchmarks/quality.py [--bundle BUNDLE] [--guidance 1,2,3] [--count 1000] [--json FILE]

The judge is a small convolutional network trained on the 4,500 digits that the model was trained on, and tested on the
500 that neither has seen (examples/01_train_mnist/holdout.txt). Samples come from the bundle, through ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tarflow_runtimes as tfr
from tarflow_sdk._data import AUGMENTATIONS, load_images, load_indices

HOLDOUT = Path(__file__).parents[1] / "examples" / "01_train_mnist" / "holdout.txt"
JUDGE_EPOCHS = 30
CLASSES = 10


def network() -> nn.Sequential:
    """A judge of 28 x 28 digits, 0.2 million weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 9, CLASSES),
    )  # fmt: skip


def train_judge(images: Tensor, labels: Tensor) -> nn.Sequential:
    """Fit a judge on images [n, 1, 28, 28] in [-1, 1] with slight deformations and noise."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge = network()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = JUDGE_EPOCHS * (len(images) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // 100) == 0:
            order = torch.randperm(len(images), generator=generator)
        chosen = order[step % (len(images) // 100) * 100 :][:100]
        x = AUGMENTATIONS["digits"](images[chosen], generator)
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
        loss = nn.functional.cross_entropy(judge(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def agreement(judge: nn.Sequential, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the judge sees the label, bool [n]."""
    seen = judge(torch.from_numpy(np.clip(images, -1, 1))).argmax(dim=1).numpy()
    return np.asarray(seen == labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="default: the shipped one")
    parser.add_argument("--guidance", default="0,1,2,3")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    data = load_images("mnist5k")
    held = load_indices(HOLDOUT, len(data))
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[held] = False
    train, test = data.take(kept.nonzero().flatten()), data.take(held)
    assert train.labels is not None
    assert test.labels is not None
    every = torch.arange(len(train))
    judge = train_judge(train.model_range(every), train.labels)
    x, y = test.model_range(torch.arange(len(test))).numpy(), test.labels.numpy()
    figures: dict[str, Any] = {"judge_accuracy": float(agreement(judge, x, y).mean())}

    flow = tfr.load(arguments.bundle)
    noisy = x + flow.config.noise_std * np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    figures["bayes_accuracy"] = float((flow.classify(x).argmax(axis=1) == y).mean())
    figures["bayes_accuracy_noisy"] = float((flow.classify(noisy).argmax(axis=1) == y).mean())
    figures["bits_per_dim_noisy"] = float(flow.bits_per_dim(noisy, labels=y.tolist()).mean())
    labels = np.arange(arguments.count) % CLASSES
    for guidance in map(float, arguments.guidance.split(",")):
        out = flow.sample(arguments.count, labels=labels.tolist(), seed=0, guidance=guidance, batch_size=100)
        right = agreement(judge, out.images, labels)
        figures[f"agreement_guidance_{guidance:g}"] = float(right.mean())
        per_class = [round(float(right[labels == c].mean()), 2) for c in range(CLASSES)]
        figures[f"agreement_guidance_{guidance:g}_per_class"] = per_class
    for name, value in figures.items():
        print(f"{name:36s} {value if isinstance(value, list) else format(value, '.4f')}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
