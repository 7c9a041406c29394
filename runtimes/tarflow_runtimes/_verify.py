"""`verify`: repeat on any engine the comparison with PyTorch whose inputs and outputs travel in the bundle.

The reference holds whatever PyTorch computed in float32 when the bundle was exported: the trajectory x_0 .. x_K of some
images through the blocks and that of the gradient back, the first patches of guided and unguided inverses of each
block, and, where the model is small enough, whole samples. Each block is judged on PyTorch's input to it, so that a
fault is named where it is; the whole model is judged from end to end.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._bundle import Bundle
from tarflow_runtimes._engine import Engine, Floats
from tarflow_runtimes._errors import BundleError, VerificationError
from tarflow_runtimes._parity import Record, compare, tolerance_for
from tarflow_runtimes._sampler import inverse_block

Labels = npt.NDArray[np.int64] | None

UNIT_PER_DIM: Final = 1e-3
"""Nats per dim, see `unit_of`; with a tolerance of 1e-5 it allows an error of 1e-8 nats per dim."""

BITS_OFFSET: Final = 7.0
"""log2(128): bits/dim between images in [-1, 1] and on their 0..255 scale."""


class Subject(Protocol):
    """What is verified: the three maps of each block, however they are computed. Patches are in image order."""

    @property
    def name(self) -> str:
        """The engine's name, which picks its line of the table of tolerances."""

    def forward(self, block: int, patches: Floats, labels: Labels) -> tuple[Floats, Floats]:
        """Patches [B, N, D], labels [B] -> z [B, N, D], log|det| [B]."""

    def gradient(self, block: int, patches: Floats, cotangent: Floats, labels: Labels) -> Floats:
        """Derivative of (cotangent . z + log|det|) with respect to the patches, [B, N, D]."""

    def inverse(
        self, block: int, z: Floats, labels: Labels, *, guidance: Floats, inverse_temperature: Floats, steps: int
    ) -> Floats:
        """The first `steps` of the sequential inverse of z [B, N, D]; labels [G, B], guidance [2, N]."""

    def window(self, block: int, patches: Floats, noise: Floats, labels: Labels) -> Floats:
        """All of patches 1 .. N-1 in block order, [B, N-1, D], from the finished patches [B, N, D] before each."""


class EngineSubject:
    """An engine and the sampler's loop over it, as something to verify."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.forward = engine.forward
        self.gradient = engine.gradient
        self.window = engine.window
        self._engine = engine

    def inverse(
        self, block: int, z: Floats, labels: Labels, *, guidance: Floats, inverse_temperature: Floats, steps: int
    ) -> Floats:
        """The first `steps` of the sequential inverse of z."""
        return inverse_block(self._engine, block, z, labels, guidance, inverse_temperature, steps=steps)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The arrays of reference.npz, in patches [B, N, D], image order.

    `trajectory` [K+1, B, N, D]: x_0, the images, and the output of each block; `log_det` [K, B];
    `cotangent` [K+1, B, N, D]: last -u/sqrt(prior), first the gradient of log q with respect to the images.
    `unguided`, `guided` [K, B, P+1, D]: the first P+1 patches, in block order, of the inverse of x_{k+1} by block k.
    `guidance` [2, N] and `inverse_temperature` [2] are those of `guided` and `sample`.
    `noise` and `sample` [B, N, D]: latents and the guided sample; both None unless P = N - 1.
    `denoised` [B, N, D] is x_0 + noise_std^2 * cotangent_0, None when sigma is unknown.
    `labels` [B], the null class written as `classes`; None on models without classes.
    """

    trajectory: Floats
    log_det: Floats
    cotangent: Floats
    unguided: Floats
    guided: Floats
    guidance: Floats
    inverse_temperature: Floats
    log_prob: Floats
    bits_per_dim: Floats
    labels: npt.NDArray[np.int64] | None = None
    noise: Floats | None = None
    sample: Floats | None = None
    denoised: Floats | None = None

    def save(self, path: Path) -> None:
        """Write reference.npz."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, bundle: Bundle) -> Reference:
        """Read the bundle's reference.

        Raises:
            VerificationError: when the bundle has none.
            BundleError: when it is damaged or does not fit the bundle's model.
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
            "unguided": (blocks, batch, steps + 1, values), "guided": (blocks, batch, steps + 1, values),
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


def unit_of(dims: int) -> float:
    """Nats from which errors of log|det| and log q are relative to them.

    A sum of N*D terms may cancel to nothing, but its rounding errors do not: they grow with the number of terms.
    """
    return max(1.0, UNIT_PER_DIM * dims)


def verify(bundle: Bundle, engine: Engine, *, on_block: Callable[[int], None] | None = None) -> tuple[Record, ...]:
    """Verify `engine` and the sampler on it, in the dtype that its report names; the rest is as in `verify_subject`."""
    dtype = str(engine.report().get("dtype", bundle.dtype))
    return verify_subject(bundle, EngineSubject(engine), dtype=dtype, on_block=on_block)


def verify_subject(
    bundle: Bundle, subject: Subject, *, dtype: str | None = None, on_block: Callable[[int], None] | None = None
) -> tuple[Record, ...]:
    """Run `subject` on the bundle's reference inputs and compare; passed or not, every comparison is in the result.

    `dtype` is what the subject computes in, where that is not the bundle's: it picks the tolerances. `on_block` is
    called after each block with its number. Use `require_passed` on the result to turn a miss into an error.

    Raises:
        VerificationError: when the bundle holds no reference.
        BundleError: when the reference does not fit the bundle.
    """
    run = _Run(bundle, subject, Reference.load(bundle), dtype or bundle.dtype)
    blocks: list[_BlockOutputs] = []
    for k in range(bundle.config.blocks):
        blocks.append(run.block(k))
        if on_block is not None:
            on_block(k)
    if run.reference.sample is None:
        run.whole_model_by_blocks(blocks)
    else:
        run.whole_model()
    return tuple(run.records)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _BlockOutputs:
    """What a block made of PyTorch's inputs to it."""

    z: Floats
    log_det: Floats
    gradient: Floats


class _Run:
    """One pass over the reference; `records` grows."""

    def __init__(self, bundle: Bundle, subject: Subject, reference: Reference, dtype: str) -> None:
        self.bundle = bundle
        self.dtype = dtype
        self.config = bundle.config
        self.subject = subject
        self.reference = reference
        self.records: list[Record] = []
        verification = bundle.manifest.get("verification")
        floors = verification.get("floors") if isinstance(verification, Mapping) else None
        self.floors = floors if isinstance(floors, Mapping) else {}
        prior = np.float32(1.0) if bundle.prior is None else bundle.prior
        self.deviation: npt.NDArray[np.float32] = np.sqrt(prior)

    def record(self, where: str, stage: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        tolerance = tolerance_for(self.subject.name, self.dtype, stage)
        unit = unit_of(self.config.dims) if stage in ("log_det", "log_prob") else 1.0
        name = f"{where} {stage}"
        self.records.append(compare(name, stage, actual, expected, tolerance=tolerance, floors=self.floors, unit=unit))

    def block(self, k: int) -> _BlockOutputs:
        """All graphs of one block, each on PyTorch's inputs."""
        reference, labels, where = self.reference, self.reference.labels, f"block {k}"
        x, z = reference.trajectory[k], reference.trajectory[k + 1]
        actual_z, log_det = self.subject.forward(k, x, labels)
        self.record(where, "forward", actual_z, z)
        self.record(where, "log_det", log_det, reference.log_det[k])
        gradient = self.subject.gradient(k, x, reference.cotangent[k + 1], labels)
        self.record(where, "gradient", gradient, reference.cotangent[k])
        window = self.subject.window(k, x, z, labels)
        self.record(where, "window", window, self.in_order(k, x)[:, 1:])
        self.record(
            f"{where} unguided", "inverse", self.first(k, self.inverse(k, z, guided=False)), reference.unguided[k]
        )
        self.record(f"{where} guided", "inverse", self.first(k, self.inverse(k, z, guided=True)), reference.guided[k])
        return _BlockOutputs(z=actual_z, log_det=log_det, gradient=gradient)

    def inverse(self, k: int, z: Floats, *, guided: bool, steps: int | None = None) -> Floats:
        """The first P steps of block k's inverse; with guidance both branches, the second of the null class."""
        branches = 2 if guided else 1
        labels = self.reference.labels
        if labels is not None:
            labels = np.stack([labels, np.full_like(labels, self.config.classes)][:branches])
        guidance = self.reference.guidance if guided else np.zeros_like(self.reference.guidance)
        inverse_temperature = self.reference.inverse_temperature[:branches]
        steps = self.reference.steps if steps is None else steps
        return self.subject.inverse(
            k, z, labels, guidance=guidance, inverse_temperature=inverse_temperature, steps=steps
        )

    def in_order(self, k: int, x: Floats) -> Floats:
        """Image order to the order of block k."""
        return x if self.bundle.blocks[k].order == "identity" else x[:, ::-1]

    def first(self, k: int, x: Floats) -> Floats:
        """The first P+1 patches in the order of block k."""
        return self.in_order(k, x)[:, : self.reference.steps + 1]

    def whole_model_by_blocks(self, blocks: list[_BlockOutputs]) -> None:
        """Density and denoiser from the blocks' results on PyTorch's inputs: a chain of blocks without its cost."""
        u = blocks[-1].z / self.deviation
        self.density(u, np.sum([block.log_det for block in blocks], axis=0))
        self.denoised(blocks[0].gradient)

    def whole_model(self) -> None:
        """Encode, score, denoise, decode and sample with the engine's own intermediate results."""
        reference, labels = self.reference, self.reference.labels
        images = reference.trajectory[0]
        inputs, x, log_det = [], images, np.zeros(len(images), np.float32)
        for k in range(self.config.blocks):
            inputs.append(x)
            x, block_log_det = self.subject.forward(k, x, labels)
            log_det = log_det + block_log_det
        u = x / self.deviation
        self.density(u, log_det)
        gradient = -u / self.deviation
        for k in reversed(range(self.config.blocks)):
            gradient = self.subject.gradient(k, inputs[k], gradient, labels)
        self.denoised(gradient)
        self.record("whole model", "round_trip", self.decode(u, guided=False), images)
        if reference.noise is not None and reference.sample is not None:
            self.record("whole model guided", "sample", self.decode(reference.noise, guided=True), reference.sample)

    def decode(self, u: Floats, *, guided: bool) -> Floats:
        x = u * self.deviation
        for k in reversed(range(self.config.blocks)):
            x = self.inverse(k, x, guided=guided, steps=self.config.patches - 1)
        return x

    def density(self, u: Floats, log_det: Floats) -> None:
        """The log-likelihood, summed in float64."""
        prior = np.broadcast_to(self.deviation, u.shape[1:]).astype(np.float64)
        log_normal = -0.5 * np.square(u, dtype=np.float64).sum(axis=(1, 2)) - 0.5 * self.config.dims * math.log(
            2 * math.pi
        )
        log_prob = log_normal + log_det - np.log(prior).sum()
        self.record("whole model", "log_prob", log_prob, self.reference.log_prob)
        bits = -log_prob / (self.config.dims * math.log(2)) + BITS_OFFSET
        self.record("whole model", "bits_per_dim", bits, self.reference.bits_per_dim)

    def denoised(self, gradient: Floats) -> None:
        """One step of the denoiser, where sigma is known."""
        if self.reference.denoised is not None and self.config.noise_std is not None:
            actual = self.reference.trajectory[0] + np.float32(self.config.noise_std**2) * gradient
            self.record("whole model", "denoise", actual, self.reference.denoised)
