"""`load` opens a bundle on an engine and returns a `Flow`, which samples, scores, encodes, denoises and classifies."""

from __future__ import annotations

import importlib.resources
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.bundle.config import ModelConfig
from tarflow_runtimes.bundle.reader import Bundle, open_bundle
from tarflow_runtimes.decode.batches import BATCH_SIZE, cut
from tarflow_runtimes.decode.plan import DecodeReport, Parallel, Plan, Sequential, Strategy
from tarflow_runtimes.decode.tuned import Identity, TunedPlans, identity_of, plans_path, read_plans
from tarflow_runtimes.decode.turn import Doubles, Floats, Integers
from tarflow_runtimes.engines.api import Engine
from tarflow_runtimes.engines.gpu.array import OnGpu
from tarflow_runtimes.engines.open import Options, open_engine
from tarflow_runtimes.errors import BundleError, DecodeWarning, InputError
from tarflow_runtimes.model.arguments import Label, class_numbers, float_array, guidance_of, integer, seeds_of
from tarflow_runtimes.model.density import bits_per_dim_of, encode_patches, log_prob_of, patchify, score, unpatchify
from tarflow_runtimes.model.guidance import Guidance, conditions_of, real
from tarflow_runtimes.model.noise import standard_normal
from tarflow_runtimes.model.progress import OnStep, decode_patches, progress
from tarflow_runtimes.model.sample import Sample

if TYPE_CHECKING:
    from tarflow_runtimes.engines.trt.supply import OnBuilding

SHIPPED: Final = "mnist.tarflow"
"""The bundle that ships with the package, in its folder `models`."""

Labels = Sequence[Label] | npt.NDArray[Any] | None
Arrays = Floats | OnGpu
"""Arrays that methods accept: float32 NumPy arrays and, for a GPU engine, float32 arrays on the GPU, which are copied
to the host."""
GuidanceArgument = float | Guidance | Sequence[float | Guidance]
PlanArgument = Plan | Strategy | TunedPlans | Literal["auto"] | None


def shipped_bundle() -> Path:
    """The directory of the bundle that ships with the package.

    Raises:
        BundleError: when it is missing.
    """
    path = importlib.resources.files("tarflow_runtimes") / "models" / SHIPPED
    if not isinstance(path, Path) or not path.is_dir():
        raise BundleError(
            "the bundle that ships with the package is missing", hint="reinstall tarflow-sdk, or name a bundle"
        )
    return path


def load(
    path: str | os.PathLike[str] | None = None,
    engine: str = "cpu",
    *,
    tf32: bool = False,
    engine_dir: str | os.PathLike[str] | None = None,
    on_building: OnBuilding | None = None,
    verify_digests: bool = True,
) -> Flow:
    """Open the bundle at `path`, or the one that ships with the package, on an engine.

    The engines are `native`, the C++ kernel of runtimes/native; `ort-cpu`, ONNX Runtime; and, on NVIDIA GPUs, the
    experimental `ort-cuda`, `trt` and `trt-rtx` (docs/GPU.md). `cpu` is native if its library was built and reads the
    precision of the bundle, else ort-cpu. `auto` chooses the first that is ready of trt, trt-rtx, ort-cuda, native and
    ort-cpu. `engine_report` gives the choice and its reason. An engine computes in the precision of the bundle;
    `tarflow convert` makes bundles of other precisions. With `tf32`, a GPU may round the inputs of a float32 bundle's
    matrix products to 11 bits.

    TensorRT engines are stored in `engine_dir`, by default the user's cache folder. `on_building(Building)` is called
    during builds, and may return False to cancel. `verify_digests=False` skips the SHA-256 checks of the files, which
    take seconds for a bundle of gigabytes; sizes and paths are always checked.

    Raises:
        BundleError: when the bundle is missing, damaged, unsafe or of another version.
        EngineError: when the engine is unknown, not installed or cannot run here or on this bundle.
        InputError: when `tf32` is requested for an engine or bundle that does not support it.

    >>> import tarflow_runtimes as tfr
    >>> with tfr.load() as flow:
    ...     flow.sample(10, labels=range(10), seed=0, guidance=1.5).images.shape
    (10, 1, 28, 28)
    """
    bundle = open_bundle(shipped_bundle() if path is None else path, verify_digests)
    folder = None if engine_dir is None else Path(engine_dir)
    opened, reason = open_engine(engine, bundle, Options(tf32=tf32, engine_dir=folder, on_building=on_building))
    return Flow(bundle, opened, reason)


class Flow:
    """A model ready to draw, score, encode, decode, denoise and classify.

    Labels are one per image: class numbers, names where the bundle has them, and -1 or None for the null class;
    `labels=None` is the null class for every image. Images are float32 [B, C, height, width] in the model's range
    [-1, 1], or [B, N, D] of a model of tokens; latents are float32 [B, N, D].

    Guidance is a weight, a `Guidance`, or a list with one of these per image. Images with different guidance, labels
    and seeds can share a batch, and each is the same as when drawn alone.

    Threads: every method except `close` may be called from any number of threads at once; they share only the weights.
    `on_step` is called in the thread that called the method. After `close` (or the end of a `with` block), running
    calls finish or raise EngineError; new ones raise EngineError.

    >>> import tarflow_runtimes as tfr
    >>> with tfr.load() as flow:  # the model that ships
    ...     print(flow.bundle.path.name, flow.config.shape, len(flow.class_names))
    mnist.tarflow (1, 28, 28) 10
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
        """The configuration of the model."""
        return self._bundle.config

    @property
    def engine(self) -> Engine:
        """The engine, for verification and measurements of single blocks; it belongs to this Flow."""
        return self._engine

    @property
    def engine_name(self) -> str:
        """Name of the engine that runs the graphs; if `auto` was given, the one that it chose."""
        return self._engine.name

    @property
    def engine_report(self) -> Mapping[str, Any]:
        """Engine, versions, threads, device, and the reason for choosing this engine, as JSON values."""
        return {**self._engine.report(), "chosen": self._reason}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, or None."""
        return self._bundle.class_names

    def tuned_plans(self, path: str | os.PathLike[str] | None = None) -> TunedPlans:
        """The plans in a file that were tuned for this bundle on this machine and engine, to be passed as `plan`.

        The default is the file next to the bundle, which `plan="auto"` uses as well. If nothing was tuned, or only for
        another machine or version, there are no entries but a `reason`, and decoding is sequential.

        Raises:
            InputError: when the file is damaged.
        """
        return read_plans(plans_path(self._bundle.path) if path is None else Path(path), self.identity())

    def identity(self) -> Identity:
        """What a tuned plan is valid for: this bundle, this engine and its version, and this machine."""
        return identity_of(self._bundle, self._engine.report())

    def close(self) -> None:
        """Free the engine's sessions."""
        self._engine.close()

    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        seed: int | Sequence[int] | None = None,
        noise: Arrays | None = None,
        first_index: int = 0,
        guidance: GuidanceArgument = 0.0,
        denoise: bool = True,
        plan: PlanArgument = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
    ) -> Sample:
        """Draw n images.

        The noise of image i depends only on the seed and first_index + i, not on the batch; without a seed, a random
        one is drawn and reported. With a list of seeds, image i is the first image of seed i. `noise` float32 [n, N, D]
        replaces the seeded noise. `denoise` removes the training noise with one step along the gradient of log q.
        `on_step(Step)` is called as steps finish, and may return False to cancel.

        `plan` says how the blocks are inverted: None for one patch after the other, `Parallel(...)` or `Sequential()`
        for all blocks, a `Plan` with a strategy for each block, or "auto" for what `tarflow tune` measured as fastest
        on this machine for this batch (sequential if nothing was measured). `Sample.report` has statistics per block.

        Raises:
            InputError: on arguments that are out of range or contradict each other.
            Cancelled: when `on_step` returned False; the Flow stays usable.

        >>> import tarflow_runtimes as tfr
        >>> with tfr.load() as flow:
        ...     three = flow.sample(3, labels=[1, 2, -1], seed=7, guidance=[0.0, 1.5, 0.0]).images
        ...     alone = flow.sample(1, labels=[2], seed=7, first_index=1, guidance=1.5).images
        >>> three.shape, bool(abs(three[1] - alone[0]).max() < 1e-4)
        ((3, 1, 28, 28), True)
        """
        config = self.config
        n = integer("n", n, minimum=1)
        first_index = integer("first_index", first_index, below=2**64)
        numbers = class_numbers(labels, n, config)
        chosen = guidance_of(guidance, n, numbers, config)
        sigma = (
            self._sigma(None, "leave the training noise in the images: denoise=False (--no-denoise)")
            if denoise
            else 0.0
        )
        if denoise:
            self._engine.require_vjp()
        seeds: int | tuple[int, ...] | None = None
        if noise is not None:
            if seed is not None:
                raise InputError("both seed and noise were given", hint="leave one of them out")
            if first_index:
                raise InputError(
                    "first_index counts images of a seed, but noise was given", hint="leave one of them out"
                )
            given = self._floats("noise", noise, (n, config.patches, config.patch_values))
        else:
            seeds = secrets.randbits(32) if seed is None else seeds_of(seed, n, first_index)

        def latents(start: int, stop: int) -> Floats:
            shape = config.patches, config.patch_values
            match seeds:
                case None:
                    return given[start:stop]
                case int():
                    return standard_normal(seeds, first_index + start, stop - start, *shape)
            return np.concatenate([standard_normal(one, 0, 1, *shape) for one in seeds[start:stop]])

        def finish(x: Floats, chunk: Integers | None) -> Floats:
            return x + np.float32(sigma**2) * score(self._engine, self._bundle, x, chunk) if denoise else x

        images, report = self._decode(n, latents, numbers, chosen, plan, batch_size, on_step, finish)
        metadata = {
            "digest": self._bundle.digest,
            "engine": self.engine_name,
            "precision": self._engine.precision,
            "seed": "none" if seeds is None else _joined(seeds if isinstance(seeds, tuple) else [seeds]),
            "first_index": str(first_index),
            "guidance": _joined(one.weight for one in chosen),
            "guide": _joined(one.guide for one in chosen),
            "attention_temperature": _joined(one.attention_temperature for one in chosen),
            "anneal_guidance": _joined(one.anneal for one in chosen),
            "denoise": str(bool(denoise)).lower(),
            "decode": "sequential" if plan is None else plan if isinstance(plan, str) else repr(plan),
        }
        return Sample(
            images=images,
            seed=seeds,
            first_index=first_index,
            metadata=metadata,
            report=report,
            to_device=self._engine.to_device,
        )

    def decode(
        self,
        z: Arrays,
        labels: Labels = None,
        *,
        guidance: GuidanceArgument = 0.0,
        plan: PlanArgument = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
    ) -> Floats:
        """Latents z [B, N, D] -> images [B, C, height, width], without denoising.

        Without guidance this is the inverse of `encode`. The arguments are those of `sample`.

        Raises:
            InputError: on arguments that are out of range or contradict each other.
            Cancelled: when `on_step` returned False; the Flow stays usable.

        >>> import numpy as np, tarflow_runtimes as tfr
        >>> with tfr.load() as flow:
        ...     images = np.zeros((2, *flow.config.shape), np.float32)
        ...     z, _ = flow.encode(images, labels=[3, 4])
        ...     bool(abs(flow.decode(z, labels=[3, 4]) - images).max() < 1e-3)
        True
        """
        latents = self._floats("z", z, ("B", self.config.patches, self.config.patch_values))
        n = len(latents)
        numbers = class_numbers(labels, n, self.config)
        chosen = guidance_of(guidance, n, numbers, self.config)
        images, _ = self._decode(
            n, lambda start, stop: latents[start:stop], numbers, chosen, plan, batch_size, on_step, lambda x, _: x
        )
        return images

    def encode(self, images: Arrays, labels: Labels = None) -> tuple[Floats, Doubles]:
        """Images -> (latents z [B, N, D], standard normal under the model; log|det dz/dx| [B] in nats, float64).

        Raises:
            InputError: on images or labels that do not fit the model.

        >>> import numpy as np, tarflow_runtimes as tfr
        >>> with tfr.load() as flow:
        ...     z, log_det = flow.encode(np.zeros((2, 1, 28, 28), np.float32), labels=[3, 4])
        >>> z.shape, log_det.shape
        ((2, 49, 16), (2,))
        """
        pairs = [encode_patches(self._engine, self._bundle, x, y) for x, y in self._batches(images, labels)]
        z, log_det = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        return z, log_det

    def log_prob(self, images: Arrays, labels: Labels = None) -> Doubles:
        """The log-density log q(images | labels) [B], nats. No dequantisation noise is added.

        Raises:
            InputError: on images or labels that do not fit the model.

        >>> import tarflow_runtimes as tfr
        >>> with tfr.load() as flow:  # a digit is most likely under its own label
        ...     seven = flow.sample(1, labels=[7], seed=0).images
        ...     bool(flow.log_prob(seven, labels=[7]) > flow.log_prob(seven, labels=[0]))
        True
        """
        return log_prob_of(*self.encode(images, labels))

    def bits_per_dim(self, images: Arrays, labels: Labels = None) -> Doubles:
        """-log q / (dims ln 2) + 7 [B]: bits per value of the image on its 0..255 scale. The caller dequantises.

        Raises:
            InputError: on images or labels that do not fit the model, and on a model of tokens.

        >>> import numpy as np, tarflow_runtimes as tfr
        >>> with tfr.load() as flow:
        ...     noisy = np.random.default_rng(0).uniform(-1, 1, (1, 1, 28, 28)).astype(np.float32)
        ...     bool(flow.bits_per_dim(noisy) > 7)  # far above the 6.1 of digits
        True
        """
        if self.config.data == "tokens":
            raise InputError("bits/dim is defined for images, but this model's data are tokens", hint="use log_prob")
        return bits_per_dim_of(self.log_prob(images, labels), self.config)

    def denoise(
        self, images: Arrays, labels: Labels = None, *, sigma: float | None = None, strength: float = 1.0
    ) -> Floats:
        """One denoising step: images + strength * sigma^2 * grad log q(images | labels).

        Sigma is the training noise unless given.

        Raises:
            InputError: on arguments that do not fit, or when sigma is neither known nor given.

        Source: Zhai et al. 2024, section 2.5 (Tweedie's formula).

        >>> import tarflow_runtimes as tfr
        >>> with tfr.load() as flow:  # the last step of `sample`
        ...     noisy = flow.sample(1, labels=[7], seed=0, denoise=False).images
        ...     clean = flow.sample(1, labels=[7], seed=0).images
        ...     bool(abs(flow.denoise(noisy, labels=[7]) - clean).max() < 1e-5)
        True
        """
        scale = np.float32(real("strength", strength) * self._sigma(sigma, "pass sigma (--sigma)") ** 2)
        parts = [x + scale * score(self._engine, self._bundle, x, y) for x, y in self._batches(images, labels)]
        return unpatchify(np.concatenate(parts), self.config)

    def classify(self, images: Arrays) -> Doubles:
        """Log posteriors log p(class | image) [B, classes], float64, by Bayes' rule under a uniform prior.

        Raises:
            InputError: on a model without classes, or images that do not fit it.

        >>> import tarflow_runtimes as tfr
        >>> with tfr.load() as flow:
        ...     flow.classify(flow.sample(4, labels=[3, 1, 4, 1], seed=0).images).argmax(axis=1).tolist()
        [3, 1, 4, 1]
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
        guidance: Sequence[Guidance],
        plan: PlanArgument,
        batch_size: int | None,
        on_step: OnStep | None,
        finish: Callable[[Floats, Integers | None], Floats],
    ) -> tuple[Floats, DecodeReport]:
        """Decode the latents of n images, batch by batch."""
        size = BATCH_SIZE if batch_size is None else integer("batch_size", batch_size, minimum=1)
        steps = self.config.blocks * (self.config.patches - 1)
        batches = cut(n, size)
        plan_for = self._plans_of(plan)
        finished, report = [], DecodeReport()
        for number, batch in enumerate(batches):
            y = None if labels is None else labels[batch]
            conditions = conditions_of(guidance[batch], y, self.config)
            on_done = progress(on_step, chunk=number, chunks=len(batches), steps=steps)
            chosen = plan_for(batch.stop - batch.start, conditions.branches)
            u = latents(batch.start, batch.stop)
            x, how = decode_patches(self._engine, self._bundle, u, conditions, on_done, chosen)
            finished.append(finish(x, y))
            report = report.extended(how, batch.start)
        _warn(report)
        return unpatchify(np.concatenate(finished), self.config), report

    def _plans_of(self, plan: PlanArgument) -> Callable[[int, int], Plan | None]:
        """The plan for this number of images and branches."""
        blocks = self.config.blocks
        match plan:
            case None:
                return lambda _images, _branches: None
            case "auto":
                plan = self.tuned_plans()
            case Sequential() | Parallel():
                plan = Plan(blocks=(plan,) * blocks)
        if isinstance(plan, TunedPlans):
            plans = plan
            return lambda images, branches: plans.plan(images, branches, blocks)
        if not isinstance(plan, Plan):
            raise InputError(
                f"plan must be None, 'auto', Sequential(), Parallel(...), a Plan or TunedPlans, got {plan!r}"
            )
        if len(plan.blocks) != blocks:
            raise InputError(f"the plan has {len(plan.blocks)} strategies, the model {blocks} blocks")
        chosen = plan
        return lambda _images, _branches: chosen

    def _batches(self, images: Arrays, labels: Labels) -> Iterator[tuple[Floats, Integers | None]]:
        """Patches and class numbers of at most BATCH_SIZE images at a time; the arguments are checked first."""
        given = self._images(images)
        numbers = class_numbers(labels, len(given), self.config)
        for batch in cut(len(given), BATCH_SIZE):
            yield patchify(given[batch], self.config), None if numbers is None else numbers[batch]

    def _images(self, images: Arrays) -> Floats:
        return self._floats("images", images, ("B", *self.config.shape))

    def _floats(self, name: str, value: object, shape: Sequence[int | str]) -> Floats:
        """`float_array` of an array on the host or on a device."""
        return float_array(name, self._engine.to_host(value), shape)


def _joined(values: Iterable[object]) -> str:
    """One word where all images have the same, else one for each image."""
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return words[0] if len(set(words)) == 1 else ",".join(words)


def _warn(report: DecodeReport) -> None:
    """Warn once per call about sequential fallbacks and overflows."""
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
