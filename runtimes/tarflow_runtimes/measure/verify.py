"""`verify`: repeat the comparison with PyTorch on any engine, with the inputs and outputs stored in the bundle.

The reference holds what PyTorch computed in float32 when the bundle was exported: the trajectory x_0 .. x_K of some
images through the blocks and of the gradient in the opposite direction, the first patches of guided and unguided
inverses of each block, and, if the model is small enough, whole samples. Each block is compared on PyTorch's input to
it, so that errors are attributed to the right block; the whole model is compared from end to end.
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.reader import PORTABLE, Bundle
from tarflow_runtimes.bundle.tolerances import Record, compare, tolerance_for
from tarflow_runtimes.decode.plan import Parallel, Sequential
from tarflow_runtimes.decode.turn import Conditions, Doubles, Floats, Turn
from tarflow_runtimes.engines.api import Passes
from tarflow_runtimes.errors import BundleError, VerificationError
from tarflow_runtimes.model.density import bits_per_dim_of, log_prob_of

UNIT_PER_DIM: Final = 1e-3
"""Nats per dim, see `unit_of`; with a tolerance of 1e-5 it allows an error of 1e-8 nats per dim."""

STAGES: Final = ("forward", "gradient", "inverse", "window")
"""The computations of a block that can be compared."""

KINDS: Final = {"unguided": "", "guided": "_guided", "tempered": "_tempered"}
"""The inverses in the reference, and the name suffixes of the `ort-cpu` graphs that run them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The arrays of reference.npz, in patches [B, N, D], in the order of the data.

    `trajectory` [K+1, B, N, D]: x_0, the images, and the output of each block; `log_det` [K, B];
    `cotangent` [K+1, B, N, D]: last -u/sqrt(prior), first the gradient of log q with respect to the images.
    `unguided`, `guided`, `tempered` [K, B, P+1, D]: the first P+1 patches, in block order, of the inverse of x_{k+1} by
    block k. `guidance` [2, N] and `inverse_temperature` [2] are those of `tempered` and `sample`; `guided` is without a
    temperature. `noise` and `sample` [B, N, D]: latents and the sample; both None unless P = N - 1.
    `bits_per_dim` [B] is None for tokens. `denoised` [B, N, D] is x_0 + noise_std^2 * cotangent_0, None when sigma is
    unknown.
    `labels` [B], the null class written as `classes`; None on models without classes.
    """

    trajectory: Floats
    log_det: Floats
    cotangent: Floats
    unguided: Floats
    guided: Floats
    tempered: Floats
    guidance: Floats
    inverse_temperature: Floats
    log_prob: Floats
    bits_per_dim: Floats | None = None
    labels: npt.NDArray[np.int64] | None = None
    noise: Floats | None = None
    sample: Floats | None = None
    denoised: Floats | None = None

    def save(self, path: Path) -> None:
        """Write the reference to a file `reference.npz`."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, bundle: Bundle) -> Reference:
        """Read the bundle's reference.

        Raises:
            VerificationError: when the bundle has none.
            BundleError: when the reference is damaged or does not fit the bundle's model.
        """
        if bundle.reference is None:
            raise VerificationError(
                f"bundle {bundle.path.name} holds no reference outputs: it was exported with --no-verify",
                hint="export the checkpoint again without --no-verify",
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        try:
            with bundle.reference.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files if name in fields}
            reference = cls(**arrays)
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise BundleError(f"bundle {bundle.path.name}: {bundle.reference.name} is damaged: {error}") from error
        reference.check(bundle)
        return reference

    def check(self, bundle: Bundle) -> None:
        """Raise BundleError unless every array has the shape and dtype that the bundle's model asks for."""
        config = bundle.config
        blocks, patches, values = config.blocks, config.patches, config.patch_values
        batch = self.trajectory.shape[1] if self.trajectory.ndim == 4 else 0
        steps = self.unguided.shape[2] - 1 if self.unguided.ndim == 4 else 0
        image = (batch, patches, values)
        expected = {
            "trajectory": (blocks + 1, *image), "log_det": (blocks, batch), "cotangent": (blocks + 1, *image),
            **dict.fromkeys(KINDS, (blocks, batch, steps + 1, values)),
            "guidance": (2, patches), "inverse_temperature": (2,), "log_prob": (batch,), "bits_per_dim": (batch,),
            "labels": (batch,), "noise": image, "sample": image, "denoised": image,
        }  # fmt: skip
        for name, shape in expected.items():
            array: npt.NDArray[Any] | None = getattr(self, name)
            dtype = np.int64 if name == "labels" else np.float32
            if array is not None and (array.shape != shape or array.dtype != dtype):
                found = f"{array.dtype} {list(array.shape)}"
                raise BundleError(f"bundle {bundle.path.name}: reference {name} is {found}, expected {list(shape)}")
        complete = (self.labels is not None) == bool(config.classes) and (self.noise is None) == (self.sample is None)
        if not complete or batch < 1 or not 1 <= steps < patches:
            raise BundleError(f"bundle {bundle.path.name}: reference outputs are not those of this model")

    @property
    def steps(self) -> int:
        """P, the sequential steps of each block's inverse."""
        return int(self.unguided.shape[2]) - 1

    def conditions(self, kind: str, classes: int) -> Conditions:
        """The conditions of the inverse called `kind`."""
        images, branches = self.trajectory.shape[1], 1 if kind == "unguided" else 2
        labels = None
        if self.labels is not None:
            labels = np.stack([self.labels, np.full_like(self.labels, classes)][:branches])
        temperatures = np.ones((branches, images), np.float32)
        if kind == "tempered":
            temperatures *= self.inverse_temperature[:, None]
        guidance = np.zeros_like(self.guidance) if kind == "unguided" else self.guidance
        return Conditions(labels=labels, guidance=np.stack([guidance] * images), inverse_temperature=temperatures)


def unit_of(dims: int) -> float:
    """The magnitude in nats from which errors of log|det| and log q are measured relative to the value.

    A sum of N*D terms may cancel to zero, but its rounding errors do not: they grow with the number of terms.
    """
    return max(1.0, UNIT_PER_DIM * dims)


def verify(
    bundle: Bundle,
    subject: Passes,
    *,
    blocks: Collection[int] | None = None,
    stages: Collection[str] = STAGES,
    end_to_end: bool = True,
    on_block: Callable[[int], None] | None = None,
) -> tuple[Record, ...]:
    """Run `subject` on the bundle's reference inputs and compare; the result has every comparison, passed or failed.

    `blocks` (default: all) and `stages` select what is compared block by block, `end_to_end` adds the whole model.
    `on_block` is called after each block with its number. `require_passed` turns failed comparisons into an error.

    Raises:
        VerificationError: when the bundle holds no reference.
        BundleError: when the reference does not fit the bundle.
    """
    run = _Run(bundle, subject, Reference.load(bundle))
    for k in range(bundle.config.blocks) if blocks is None else blocks:
        run.block(k, stages)
        if on_block is not None:
            on_block(k)
    if end_to_end:
        run.whole_model()
    return tuple(run.records)


class _Run:
    """One pass over the reference; `records` grows."""

    def __init__(self, bundle: Bundle, subject: Passes, reference: Reference) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.subject = subject
        self.reference = reference
        self.records: list[Record] = []
        verification = bundle.manifest.get("verification")
        floors = verification.get("floors") if isinstance(verification, Mapping) else None
        self.floors = floors if isinstance(floors, Mapping) else {}
        prior = np.float32(1.0) if bundle.prior_variance is None else bundle.prior_variance
        self.deviation: npt.NDArray[np.float32] = np.sqrt(prior)

    def record(
        self,
        where: str,
        stage: str,
        actual: npt.NDArray[Any],
        expected: npt.NDArray[Any],
        graph: tuple[str, str, int] | None = None,
    ) -> None:
        """Compare; `graph` is the provider, kind and block of the graph of the bundle that computed it, if any."""
        tolerance = tolerance_for(self.subject.name, self.subject.precision, stage)
        unit = unit_of(self.config.dims) if stage in ("log_det", "log_prob") else 1.0
        known = graph is not None and graph[0] in (PORTABLE, *self.bundle.graphs)
        file = self.bundle.name(self.bundle.graph(*graph)) if graph is not None and known else None
        record = compare(
            f"{where} {stage}", stage, actual, expected,
            tolerance=tolerance, floors=self.floors, unit=unit, graph=file,
        )  # fmt: skip
        self.records.append(record)

    def block(self, k: int, stages: Collection[str]) -> None:
        """Compare each stage of one block on PyTorch's inputs."""
        reference, labels, where = self.reference, self.reference.labels, f"block {k}"
        x, z = reference.trajectory[k], reference.trajectory[k + 1]
        if "forward" in stages:
            actual_z, log_det = self.subject.forward(k, x, labels)
            runs_graphs = self.subject.provider in (PORTABLE, *self.bundle.graphs)
            graph = (PORTABLE, "forward", k) if runs_graphs else None
            self.record(where, "forward", actual_z, z, graph)
            self.record(where, "log_det", log_det, reference.log_det[k], graph)
        if "gradient" in stages:
            cotangent = reference.cotangent[k + 1]
            actual_z, gradient = self.subject.vjp([k], x, labels, lambda _, images: cotangent[images])
            backward = PORTABLE, "gradient", k
            if "vjp_backward" in self.bundle.graphs.get(self.subject.provider, ()):
                self.record(where, "forward", actual_z, z, (self.subject.provider, "vjp_forward", k))
                backward = self.subject.provider, "vjp_backward", k
            self.record(where, "gradient", gradient, reference.cotangent[k], backward)
        for kind in KINDS:
            if "inverse" in stages:
                turn = Turn(block=k, strategy=Sequential(), steps=reference.steps)
                self.inverse(turn, kind, self.graph("step", kind, k))
            if "window" in stages:
                self.window(k, kind, self.graph("step" if self.subject.provider == PORTABLE else "window", kind, k))

    def graph(self, stem: str, kind: str, block: int) -> tuple[str, str, int]:
        """Which graph runs the inverse called `kind`."""
        provider = self.subject.provider
        return provider, stem + (KINDS[kind] if provider == "ort-cpu" else ""), block

    def inverse(self, turn: Turn, kind: str, graph: tuple[str, str, int]) -> None:
        """The first P steps of a block's inverse."""
        z = self.reference.trajectory[turn.block + 1]
        x, _ = self.subject.invert([turn], z, self.reference.conditions(kind, self.config.classes))
        first = self.in_order(turn.block, x)[:, : self.reference.steps + 1]
        self.record(f"block {turn.block} {kind}", "inverse", first, getattr(self.reference, kind)[turn.block], graph)

    def window(self, k: int, kind: str, graph: tuple[str, str, int]) -> None:
        """One evaluation of correct patches, which must reproduce them: unguided all N - 1, guided the first P."""
        reference = self.reference
        z = reference.trajectory[k + 1]
        expected = self.in_order(k, reference.trajectory[k])
        size = self.config.patches - 1
        if kind != "unguided":
            size = reference.steps
            expected = self.in_order(k, z).copy()
            expected[:, : size + 1] = getattr(reference, kind)[k]
        strategy = Parallel(window=size, tolerance=0.0)
        turn = Turn(block=k, strategy=strategy, steps=1, start=self.in_order(k, expected))
        x, _ = self.subject.invert([turn], z, reference.conditions(kind, self.config.classes))
        actual = self.in_order(k, x)[:, 1 : size + 1]
        where = f"block {k}" if kind == "unguided" else f"block {k} {kind}"
        self.record(where, "window", actual, expected[:, 1 : size + 1], graph)

    def in_order(self, k: int, x: Floats) -> Floats:
        """Convert between the order of the data and that of block k."""
        return x[:, ::-1] if self.bundle.blocks[k].is_reversed else x

    def whole_model(self) -> None:
        """Compare encode, score and denoise and, if the model is small enough, decode and sample, from end to end."""
        reference, labels = self.reference, self.reference.labels
        images, blocks = reference.trajectory[0], range(self.config.blocks)
        log_dets: list[Floats | Doubles] = []
        x = images
        for k in blocks:
            x, log_det = self.subject.forward(k, x, labels)
            log_dets.append(log_det)
        self.density(x / self.deviation, np.sum(log_dets, axis=0))
        if reference.denoised is not None and self.config.noise_std is not None:
            _, gradient = self.subject.vjp(blocks, images, labels, lambda z, _: -z / self.deviation / self.deviation)
            actual = images + np.float32(self.config.noise_std**2) * gradient
            self.record("whole model", "denoise", actual, reference.denoised)
        if reference.noise is not None and reference.sample is not None:
            decode = functools.partial(self.decode, [Turn(block=k, strategy=Sequential()) for k in reversed(blocks)])
            self.record("whole model", "round_trip", decode(x / self.deviation, "unguided"), images)
            self.record("whole model guided", "sample", decode(reference.noise, "tempered"), reference.sample)

    def decode(self, turns: list[Turn], u: Floats, kind: str) -> Floats:
        """Decode latents to the patches of images."""
        conditions = self.reference.conditions(kind, self.config.classes)
        return self.subject.invert(turns, u * self.deviation, conditions)[0]

    def density(self, u: Floats, log_det: Floats | Doubles) -> None:
        """The log-likelihood, summed in float64."""
        prior = np.broadcast_to(self.deviation, u.shape[1:]).astype(np.float64)
        log_prob = log_prob_of(u, log_det - np.log(prior).sum())
        self.record("whole model", "log_prob", log_prob, self.reference.log_prob)
        if self.reference.bits_per_dim is not None:
            bits = bits_per_dim_of(log_prob, self.config)
            self.record("whole model", "bits_per_dim", bits, self.reference.bits_per_dim)
