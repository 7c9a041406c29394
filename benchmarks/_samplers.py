"""`SAMPLERS`: all samplers, each a function that serves one process (`_peer.serve`) from a `Work` folder.

Every sampler takes the same noise and labels and returns float32 images without denoising.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from _peer import serve
from _work import Work

TIGHT = 1e-3
"""Largest change of a value, over the batch, at which the published algorithms stop in their tight variants.

Their images then lie about as near to the sequential ones as ours at the default tolerance of 1e-5, which bounds the
residual of every patch of every image."""

METRIC_IMAGES = 64
MEASURED_IMAGES = 4
"""Images from which GS-Jacobi's strategies are chosen: by its metrics, and by counting iterations."""


class Sampler(NamedTuple):
    """Name in the table, and the function that serves it: `serve(work, reference)`."""

    title: str
    serve: Callable[[Work, str], None]


def serve_original(work: Work, reference: str, *, bfloat16: bool = False) -> None:
    """The original code, imported from its own folder: `Model.reverse`, eager."""
    sys.path.insert(0, reference)
    import torch
    import transformer_flow

    model = transformer_flow.Model(**work.original_shape()).eval()
    model.load_state_dict(torch.load(work.weights, weights_only=True))

    def decode(noise: str, labels: list[int] | None, guidance: float) -> np.ndarray:
        y = None if labels is None else torch.tensor(labels)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return model.reverse(torch.from_numpy(np.load(noise)), y, guidance).float().numpy()  # type: ignore[no-any-return]

    serve(decode, runtime=f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def serve_torch(work: Work, build: Callable[[Any], tuple[Callable[..., Any], dict[str, Any]]]) -> None:
    """A sampler of our PyTorch model: `build(model)` -> (z, labels, guidance) -> images [, detail], and facts of it."""
    import torch

    from tarflow_sdk import Guidance, load_checkpoint

    model = load_checkpoint(work.weights, image_channels=work.config["image_channels"]).eval()
    sampler, facts = build(model)

    def decode(noise: str, labels: list[int] | None, guidance: float) -> tuple[np.ndarray, Any]:
        y = None if labels is None else torch.tensor(labels)
        images, *detail = sampler(torch.from_numpy(np.load(noise)), y, Guidance(weight=guidance))
        return images.numpy(), detail[0] if detail else None

    serve(decode, runtime=f"torch {torch.__version__}, {torch.get_num_threads()} threads", **facts)


def serve_compiled(work: Work, _: str) -> None:
    """Our PyTorch model with a static cache and `torch.compile`, or without it if that does not run."""

    def build(model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        import torch
        from _compiled import StaticSampler, just_in_time

        try:
            torch.compile(lambda x: torch.tanh(x) + 1)(torch.zeros(8))
        except Exception as error:  # noqa: BLE001 - whatever the compiler's reason, the row names it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            eager = StaticSampler(model)
            title = f"PyTorch, static cache, eager (torch.compile failed: {reason[:60]})"
            return lambda *given: (eager(*given),), {"title": title}
        compiled = StaticSampler(model, step=just_in_time())
        return lambda *given: (compiled(*given),), {}

    serve_torch(work, build)


def serve_aot(work: Work, _: str) -> None:
    """The step of `serve_compiled`, compiled ahead of time to a library: AOTInductor."""

    def build(model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        from _compiled import StaticSampler, ahead_of_time

        sampler = StaticSampler(model, step=ahead_of_time(work.folder))
        return lambda *given: (sampler(*given),), {}

    serve_torch(work, build)


def serve_jax(work: Work, _: str) -> None:
    """PyPI's transformer-flows, of these sizes: other weights, no bias of q, k, v and GELU by tanh, so other images."""
    import jax
    import jax.numpy as jnp
    from equinox.nn import make_with_state
    from transformer_flows.transformer_flow import TransformerFlow, sample_model

    config = work.config
    shape = {
        "n_channels": config["image_channels"],
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "channels": config["width"],
        "n_blocks": config["blocks"],
        "layers_per_block": config["layers"],
    }
    if config["classes"]:
        shape |= {"n_classes": config["classes"], "conditioning_type": "embed"}
    model, state = make_with_state(TransformerFlow)(**shape, key=jax.random.key(0))

    def decode(noise: str, labels: list[int] | None, guidance: float) -> np.ndarray:
        y = None if labels is None else jnp.array(labels, jnp.int32)[:, None]
        return np.asarray(sample_model(model, jnp.asarray(np.load(noise)), y, state, guidance=guidance))

    serve(decode, runtime=f"jax {jax.__version__}, transformer-flows {version('transformer-flows')}")


def serve_gs_jacobi(work: Work, _: str, *, tight: bool) -> None:
    """GS-Jacobi with the strategy of its metrics; `tight`: a measured one, no clamp, no caps, a small threshold."""

    def build(model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        import dataclasses

        import torch
        from _published import (
            GS_JACOBI_CLAMP,
            GS_JACOBI_STOP,
            Stop,
            gs_jacobi,
            gs_jacobi_measured_strategy,
            gs_jacobi_strategy,
        )

        images = torch.from_numpy(_drawn(work))
        stop, clamp, strategy = GS_JACOBI_STOP, GS_JACOBI_CLAMP, gs_jacobi_strategy(model, images)
        if tight:
            stop, clamp = Stop(norm="max", bound=TIGHT), None
            z, y = torch.from_numpy(work.noise(MEASURED_IMAGES, seed=0)), work.labels(MEASURED_IMAGES)
            labels = None if y is None else torch.tensor(y)
            strategy = gs_jacobi_measured_strategy(model, images, z, labels, stop=stop)

        def decode(z: Any, y: Any, guidance: Any) -> tuple[Any, Any]:
            decoded, iterations = gs_jacobi(model, z, y, guidance, strategy=strategy, stop=stop, clamp=clamp)
            return decoded, {"iterations": iterations}

        settings = {"stop": dataclasses.asdict(stop), "clamp": clamp}
        return decode, {"strategy": [dataclasses.asdict(segments) for segments in strategy], **settings}

    serve_torch(work, build)


def _drawn(work: Work) -> np.ndarray:
    """Images drawn from the model itself; they replace the training images that the metrics require."""
    import tarflow_runtimes as tfr

    path = work.folder / "images.npy"
    if not path.exists():
        with tfr.load(work.bundle) as flow:
            np.save(path, flow.decode(work.noise(METRIC_IMAGES, seed=0), labels=work.labels(METRIC_IMAGES)))
    return np.asarray(np.load(path))


def serve_selective_jacobi(work: Work, _: str, *, tight: bool) -> None:
    """Selective Jacobi decoding; `tight` has a small threshold."""

    def build(model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        import dataclasses

        from _published import SELECTIVE_STOP, Stop, selective_jacobi

        stop = Stop(norm="max", bound=TIGHT) if tight else SELECTIVE_STOP

        def decode(z: Any, y: Any, guidance: Any) -> tuple[Any, Any]:
            decoded, iterations = selective_jacobi(model, z, y, guidance, stop=stop)
            return decoded, {"iterations": iterations}

        return decode, {"stop": dataclasses.asdict(stop)}

    serve_torch(work, build)


def serve_ours(work: Work, engine: str, plan: Any = None) -> None:
    """This SDK on an engine, with that plan."""
    import tarflow_runtimes as tfr

    flow = tfr.load(work.bundle, engine=engine)

    def decode(noise: str, labels: list[int] | None, guidance: float) -> tuple[np.ndarray, Any]:
        z = np.load(noise)
        sample = flow.sample(
            len(z), noise=z, labels=labels, guidance=guidance, denoise=False, plan=plan, batch_size=len(z)
        )
        return sample.images, None if plan is None else {"blocks": [_said(block) for block in sample.report.blocks]}

    runtime = f"onnxruntime {version('onnxruntime')}" if engine == "ort-cpu" else flow.engine.report()["kernel"]
    serve(decode, runtime=runtime)


def serve_windows(work: Work, window: int) -> None:
    """This SDK, parallel decoding: ONNX Runtime evaluates windows on every CPU engine."""
    from tarflow_runtimes import Parallel

    serve_ours(work, "ort-cpu", Parallel(window=window))


def _said(block: Any) -> str:
    """How a block was decoded, as text."""
    import tarflow_runtimes as tfr

    if not isinstance(block.strategy, tfr.Parallel):
        return f"block {block.block}: sequential"
    window = block.strategy.window or "whole"
    return f"block {block.block}: window {window}, {np.mean(block.calls):.1f} calls (at most {max(block.calls)})"


SAMPLERS: dict[str, Sampler] = {
    "original": Sampler("original, float32", serve_original),
    "original-bf16": Sampler("original, bfloat16 autocast", lambda w, r: serve_original(w, r, bfloat16=True)),
    "compiled": Sampler("PyTorch, torch.compile, static cache", serve_compiled),
    "aot": Sampler("PyTorch, AOTInductor, static cache", serve_aot),
    "jax": Sampler("transformer-flows, JAX, other weights", serve_jax),
    "gs-jacobi": Sampler("GS-Jacobi", lambda w, r: serve_gs_jacobi(w, r, tight=False)),
    "gs-jacobi-tight": Sampler("GS-Jacobi, tight", lambda w, r: serve_gs_jacobi(w, r, tight=True)),
    "selective": Sampler("selective Jacobi", lambda w, r: serve_selective_jacobi(w, r, tight=False)),
    "selective-tight": Sampler("selective Jacobi, tight", lambda w, r: serve_selective_jacobi(w, r, tight=True)),
    "ort-cpu": Sampler("ours, ort-cpu", lambda w, _: serve_ours(w, "ort-cpu")),
    "native": Sampler("ours, native", lambda w, _: serve_ours(w, "native")),
    "window": Sampler("ours, windows of 16", lambda w, _: serve_windows(w, 16)),
    "whole": Sampler("ours, whole blocks", lambda w, _: serve_windows(w, 0)),
    "auto": Sampler("ours, auto", lambda w, _: serve_ours(w, "native", "auto")),
}
"""The keys name the processes."""
