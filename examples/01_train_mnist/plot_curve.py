"""Draw curve.png from the log.csv of a folder (this one): held-out bits/dim and Bayes accuracy over the epochs."""

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent

with (FOLDER / "log.csv").open(newline="") as file:
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
epochs = [row["epoch"] for row in rows]
figure, left = plt.subplots(figsize=(6, 3))
left.plot(epochs, [row["bits_per_dim"] for row in rows], color="tab:blue")
left.set(xlabel="epoch", ylabel="bits/dim (noisy images)")
right = left.twinx()
right.plot(epochs, [row["accuracy"] for row in rows], color="tab:orange")
right.set(ylabel="Bayes accuracy", ylim=(0, 1))
left.yaxis.label.set_color("tab:blue")
right.yaxis.label.set_color("tab:orange")
figure.tight_layout()
figure.savefig(FOLDER / "curve.png", dpi=110)
