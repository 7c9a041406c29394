"""`load` and `Flow`: a bundle on an engine, and everything that can be done with it."""

from __future__ import annotations

import importlib.resources
import math
import os
import secrets
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._arguments import Label, class_numbers, float_array, guidance_of, integer, real
from tarflow_runtimes._bundle import Bundle, ModelConfig, open_bundle
from tarflow_runtimes._density import PIXEL_SCALE_BITS, encode_patches, log_prob_of, patchify, score, unpatchify
from tarflow_runtimes._device.array import OnGpu
from tarflow_runtimes._engine import Engine, Floats, Integers
from tarflow_runtimes._engines import Options, open_engine
from tarflow_runtimes._errors import BundleError, DecodeWarning, InputError
from tarflow_runtimes._noise import standard_normal
from tarflow_runtimes._plan import DecodeReport, Parallel, Plan, Sequential, Strategy
from tarflow_runtimes._sample import Sample
from tarflow_runtimes._sampler import Guidance, OnStep, decode_patches, progress
from tarflow_runtimes._tuned import Identity, TunedPlans, identity_of, plans_path, read_plans

if TYPE_CHECKING:
    from tarflow_runtimes._trt._supply import OnBuilding

SHIPPED: Final = "mnist.tarflow"
"""The bundle that comes with the package, in its folder `models`."""

BATCH_SIZE: Final = 64
"""Images that run together unless told otherwise; it bounds memory, the engine cuts further where that is faster."""

Doubles = npt.NDArray[np.float64]
Labels = Sequence[Label] | npt.NDArray[Any] | None
Arrays = Floats | OnGpu
"""What methods take: NumPy's float32 arrays and, on an engine of a GPU, float32 arrays that lie there, which are copied
to the host."""
PlanArgument = Plan | Strategy | TunedPlans | Literal["auto"] | None


def shipped_bundle() -> Path:
    """The directory of the bundle that comes with the package.

    Raises:
        BundleError: when it is not there.
    """
    path = importlib.resources.files("tarflow_runtimes") / "models" / SHIPPED
    if not isinstance(path, Path) or not path.is_dir():
        raise BundleError(
            "the bundle that comes with the package is missing", hint="reinstall tarflow-sdk, or name a bundle"
        )
    return path


def load(
    path: str | os.PathLike[str] | None = None,
    engine: str = "ort-cpu",
    *,
    weights: str = "stored",
    dtype: str | None = None,
    engine_dir: str | os.PathLike[str] | None = None,
    on_building: OnBuilding | None = None,
    verify_digests: bool = True,
) -> Flow:
    """Open the bundle at `path`, or the one that comes with the package, on an engine.

    Engines are `ort-cpu` and, on an NVIDIA GPU, `ort-cuda`, `trt` and `trt-rtx` (docs/GPU.md). `auto` takes the first
    that is ready of trt, trt-rtx, ort-cuda and ort-cpu, and says why in `engine_report`.

    `weights="int8"` rounds the linear layers to 8 bits for sampling and decoding: about three times as fast on wide
    models at small batches, and not the same images (`tarflow verify --weights int8` measures the difference). All
    else, the density and the denoiser, runs on the weights as they are stored.
    `dtype` is what an engine on a GPU computes linear layers and caches in: "float32", "tf32", "float16" or
    "bfloat16", by default what the bundle is stored in. TensorRT's engines are kept in `engine_dir`, by default the
    user's cache folder; `on_building(Building)` hears of those that are built, and may return False to cancel.
    `verify_digests=False` skips the SHA-256 of the files (seconds for a bundle of gigabytes); sizes and paths are
    always checked.

    Raises:
        BundleError: when the bundle is missing, damaged, unsafe or too new.
        EngineError: when the engine is unknown, not installed or cannot run here: no driver, no GPU.
        InputError: when `weights` are neither "stored" nor "int8", or `dtype` is none that the engine has.

    >>> import tarflow_runtimes as tfr
    >>> with tfr.load() as flow:  # doctest: +SKIP
    ...     flow.sample(10, labels=range(10), seed=0, guidance=1.5).save("grid.png")
    """
    bundle = open_bundle(shipped_bundle() if path is None else path, verify_digests)
    folder = None if engine_dir is None else Path(engine_dir)
    options = Options(weights=weights, dtype=dtype, engine_dir=folder, on_building=on_building)
    opened, reason = open_engine(engine, bundle, options)
    return Flow(bundle, opened, reason)


class Flow:
    """A model ready to draw, score, encode, decode, denoise and classify.

    Labels are one per image: class numbers, names where the bundle has them, and -1 or None for the null class;
    `labels=None` is the null class for every image. Images are float32 [B, C, height, width] in the model's range
    [-1, 1], latents float32 [B, N, D].

    Threads: every method but `close` may be called from any number of threads at once; they share the weights and
    nothing else. `on_step` is called in the thread that called the method. After `close` (or the end of a `with`)
    calls that are running finish, or raise EngineError; new ones raise EngineError.
    """

    def __init__(self, bundle: Bundle, engine: Engine, engine_reason: str = "asked for") -> None:
        self._bundle = bundle
        self._engine = engine
        self._reason = engine_reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Flow {self._bundle.path.name} on {self._engine.name}>"

    @property
    def bundle(self) -> Bundle:
        """The opened bundle."""
        return self._bundle

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self._bundle.config

    @property
    def engine(self) -> str:
        """Name of the engine that runs the graphs, also when `auto` chose it."""
        return self._engine.name

    @property
    def engine_report(self) -> Mapping[str, Any]:
        """What runs where: versions, threads, rewrites, and why this engine. JSON values."""
        return {**self._engine.report(), "chosen": self._reason}

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, or None."""
        return self._bundle.labels

    @property
    def backend(self) -> Engine:
        """The engine itself, block by block, for verification; it belongs to this Flow."""
        return self._engine

    def tuned_plans(self, path: str | os.PathLike[str] | None = None) -> TunedPlans:
        """The plans of a file that were tuned for this bundle on this machine and engine; `plan` takes them.

        The default is the file beside the bundle, and what `plan="auto"` uses. Where nothing was tuned, or for another
        machine or version, there are no entries and a `reason`, and decoding is sequential: exact, and safe anywhere.

        Raises:
            InputError: when the file is damaged.
        """
        return read_plans(plans_path(self._bundle.path) if path is None else Path(path), self.identity())

    def identity(self) -> Identity:
        """What a tuned plan holds for: this bundle on this engine, its version and this machine."""
        return identity_of(self._bundle, self._engine)

    def close(self) -> None:
        """Free the engine's sessions."""
        self._engine.close()

    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        seed: int | None = None,
        noise: Arrays | None = None,
        first_index: int = 0,
        guidance: float = 0.0,
        guide: str = "ab",
        attention_temperature: float = 1.0,
        anneal_guidance: bool = False,
        denoise: bool = True,
        plan: PlanArgument = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
    ) -> Sample:
        """Draw n images.

        a += g (a - a_u), b += g (b - b_u) at each patch, where (a_u, b_u) come from the null class with attention
        logits divided by `attention_temperature`; g = `guidance`, or rises to it along each block with
        `anneal_guidance`; `guide` says whether a, b or both are guided. `denoise` removes the training noise with one
        step along the gradient of log q.

        Image i is a function of the seed and first_index + i alone, in whatever batch it is drawn; without a seed one
        is drawn and reported. `noise` float32 [n, N, D] replaces the seeded noise. `on_step(Step)` may return False
        to cancel.

        `plan` says how the blocks are inverted: None for one patch after the other, `Parallel(...)` or `Sequential()`
        for all blocks, a `Plan` with a strategy for each, or "auto" for what `tarflow tune` found fastest on this
        machine for this batch (sequential where nothing was measured). `Sample.report` says how it went.

        Raises:
            InputError: on arguments out of range or that contradict each other.
            Cancelled: when `on_step` returned False; the Flow stays usable.
        """
        config = self.config
        n = integer("n", n, minimum=1)
        first_index = integer("first_index", first_index, below=2**64)
        numbers = class_numbers(labels, n, config)
        chosen = guidance_of(guidance, guide, attention_temperature, anneal_guidance, labels=numbers, config=config)
        sigma = (
            self._sigma(None, "leave the training noise in the images: denoise=False (--no-denoise)")
            if denoise
            else 0.0
        )
        if noise is not None:
            if seed is not None:
                raise InputError("both seed and noise were given", hint="leave one of them out")
            if first_index:
                raise InputError(
                    "first_index counts images of a seed, but noise was given", hint="leave one of them out"
                )
            given = self._floats("noise", noise, (n, config.patches, config.patch_values))
        else:
            seed = secrets.randbits(32) if seed is None else integer("seed", seed, below=2**64)

        def latents(start: int, stop: int) -> Floats:
            if seed is None:
                return given[start:stop]
            return standard_normal(seed, first_index + start, stop - start, config.patches, config.patch_values)

        def finish(x: Floats, chunk: Integers | None) -> Floats:
            return x + np.float32(sigma**2) * score(self._engine, self._bundle, x, chunk) if denoise else x

        images, report = self._decode(n, latents, numbers, chosen, plan, batch_size, on_step, finish)
        metadata = {
            "digest": self._bundle.digest,
            "engine": self.engine,
            "weights": str(self.engine_report["weights"]),
            "seed": "none" if seed is None else str(seed),
            "first_index": str(first_index),
            "guidance": repr(chosen.weight),
            "guide": chosen.guide,
            "attention_temperature": repr(chosen.temperature),
            "anneal_guidance": str(chosen.anneal).lower(),
            "denoise": str(bool(denoise)).lower(),
            "decode": "sequential" if plan is None else plan if isinstance(plan, str) else repr(plan),
        }
        decoder = self._engine.decoder
        return Sample(
            images=images,
            seed=seed,
            first_index=first_index,
            metadata=metadata,
            report=report,
            to_device=None if decoder is None else decoder.to_device,
        )

    def decode(
        self,
        z: Arrays,
        labels: Labels = None,
        *,
        guidance: float = 0.0,
        guide: str = "ab",
        attention_temperature: float = 1.0,
        anneal_guidance: bool = False,
        plan: PlanArgument = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
    ) -> Floats:
        """Latents z [B, N, D] -> images [B, C, height, width], without denoising.

        It is the inverse of `encode` when unguided. The arguments are those of `sample`.

        Raises:
            InputError: on arguments out of range or that contradict each other.
            Cancelled: when `on_step` returned False; the Flow stays usable.
        """
        latents = self._floats("z", z, ("B", self.config.patches, self.config.patch_values))
        numbers = class_numbers(labels, len(latents), self.config)
        chosen = guidance_of(
            guidance, guide, attention_temperature, anneal_guidance, labels=numbers, config=self.config
        )
        images, _ = self._decode(
            len(latents),
            lambda start, stop: latents[start:stop],
            numbers,
            chosen,
            plan,
            batch_size,
            on_step,
            lambda x, _: x,
        )
        return images

    def encode(self, images: Arrays, labels: Labels = None) -> tuple[Floats, Doubles]:
        """Images -> (z [B, N, D], standard normal under the model, log|det dz/dx| [B], nats, float64).

        Raises:
            InputError: on images or labels that do not fit the model.
        """
        pairs = [encode_patches(self._engine, self._bundle, x, y) for x, y in self._chunks(images, labels)]
        z, log_det = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        return z, log_det

    def log_prob(self, images: Arrays, labels: Labels = None) -> Doubles:
        """The log-density log q(images | labels) [B], nats. No dequantisation noise is added.

        Raises:
            InputError: on images or labels that do not fit the model.
        """
        return log_prob_of(*self.encode(images, labels))

    def bits_per_dim(self, images: Arrays, labels: Labels = None) -> Doubles:
        """-log q / (dims ln 2) + 7 [B]: bits per value of the image on its 0..255 scale. The caller dequantises.

        Raises:
            InputError: on images or labels that do not fit the model.
        """
        return -self.log_prob(images, labels) / (self.config.dims * math.log(2.0)) + PIXEL_SCALE_BITS

    def denoise(
        self, images: Arrays, labels: Labels = None, *, sigma: float | None = None, strength: float = 1.0
    ) -> Floats:
        """One denoising step: images + strength * sigma^2 * grad log q(images | labels).

        Sigma is the training noise unless given.

        Raises:
            InputError: on arguments that do not fit, or when sigma is neither known nor given.

        Source: Zhai et al. 2024, section 2.5 (Tweedie's formula).
        """
        scale = np.float32(real("strength", strength) * self._sigma(sigma, "pass sigma (--sigma)") ** 2)
        parts = [x + scale * score(self._engine, self._bundle, x, y) for x, y in self._chunks(images, labels)]
        return self._to_images(np.concatenate(parts))

    def classify(self, images: Arrays) -> Doubles:
        """Log posteriors log p(class | image) [B, classes], float64, by Bayes' rule under a uniform prior.

        Raises:
            InputError: on a model without classes, or images that do not fit it.
        """
        if not self.config.classes:
            raise InputError("this model has no classes, so it cannot classify", hint="use a class-conditional model")
        given = self._images(images)
        per_class = [self.log_prob(given, [label] * len(given)) for label in range(self.config.classes)]
        log_probs = np.stack(per_class, axis=1)
        shifted = log_probs - log_probs.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

    def _sigma(self, sigma: float | None, remedy: str) -> float:
        if sigma is not None:
            return real("sigma", sigma, positive=True)
        if self.config.noise_std is None:
            why = "was trained with uniform noise" if self.config.noise == "uniform" else "has no known training noise"
            raise InputError(f"this model {why}, so that sigma of the denoiser is unknown", hint=remedy)
        return self.config.noise_std

    def _decode(  # noqa: PLR0917 - private, and called twice
        self,
        n: int,
        latents: Callable[[int, int], Floats],
        labels: Integers | None,
        guidance: Guidance,
        plan: PlanArgument,
        batch_size: int | None,
        on_step: OnStep | None,
        finish: Callable[[Floats, Integers | None], Floats],
    ) -> tuple[Floats, DecodeReport]:
        """Latents of n images, chunk by chunk, to images."""
        size = BATCH_SIZE if batch_size is None else integer("batch_size", batch_size, minimum=1)
        steps = self.config.blocks * (self.config.patches - 1)
        starts = range(0, n, size)
        chosen = self._plans_of(plan, guidance, {min(size, n - start) for start in starts})
        finished, report = [], DecodeReport()
        for chunk, start in enumerate(starts):
            stop = min(n, start + size)
            y = None if labels is None else labels[start:stop]
            on_done = progress(on_step, chunk=chunk, chunks=len(starts), steps=steps)
            x, how = decode_patches(
                self._engine, self._bundle, latents(start, stop), y, guidance, on_done, chosen[stop - start]
            )
            finished.append(finish(x, y))
            report = report.extended(how, start)
        _warn(report)
        return self._to_images(np.concatenate(finished)), report

    def _plans_of(self, plan: PlanArgument, guidance: Guidance, batches: Collection[int]) -> dict[int, Plan | None]:
        """The plan for batches of each of these sizes."""
        blocks = self.config.blocks
        match plan:
            case None:
                return dict.fromkeys(batches)
            case "auto":
                plan = self.tuned_plans()
            case Sequential() | Parallel():
                plan = Plan(blocks=(plan,) * blocks)
        if isinstance(plan, TunedPlans):
            plans = plan
            return {images: plans.plan(images, guidance.branches, blocks) for images in batches}
        if not isinstance(plan, Plan):
            raise InputError(
                f"plan must be None, 'auto', Sequential(), Parallel(...), a Plan or TunedPlans, got {plan!r}"
            )
        if len(plan.blocks) != blocks:
            raise InputError(f"the plan has {len(plan.blocks)} strategies, the model {blocks} blocks")
        return dict.fromkeys(batches, plan)

    def _chunks(self, images: Arrays, labels: Labels) -> Iterator[tuple[Floats, Integers | None]]:
        """Patches and class numbers of at most BATCH_SIZE images at a time; the arguments are checked first."""
        given = self._images(images)
        numbers = class_numbers(labels, len(given), self.config)
        for start in range(0, len(given), BATCH_SIZE):
            chunk = slice(start, start + BATCH_SIZE)
            yield patchify(given[chunk], self.config.patch_size), None if numbers is None else numbers[chunk]

    def _images(self, images: Arrays) -> Floats:
        config = self.config
        return self._floats("images", images, ("B", config.image_channels, config.image_size, config.image_size))

    def _floats(self, name: str, value: object, shape: Sequence[int | str]) -> Floats:
        """`float_array` of an array on the host or on the engine's device."""
        decoder = self._engine.decoder
        return float_array(name, value if decoder is None else decoder.to_host(value), shape)

    def _to_images(self, patches: Floats) -> Floats:
        return unpatchify(patches, self.config.image_channels, self.config.image_size, self.config.patch_size)


def _warn(report: DecodeReport) -> None:
    """Say once per call what went another way than asked."""
    for block in report.blocks:
        if block.sequential_images:
            warnings.warn(
                f"block {block.block}: parallel decoding met values that are not finite, so that"
                f" {len(block.sequential_images)} of {len(block.calls)} images were decoded sequentially there",
                DecodeWarning,
                stacklevel=4,
            )
    if report.non_finite:
        warnings.warn(
            f"{len(report.non_finite)} images hold values that are not finite: the model overflowed",
            DecodeWarning,
            stacklevel=4,
        )
