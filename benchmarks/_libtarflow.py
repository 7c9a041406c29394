"""`LibTarFlow`: the sampler of libtarflow through ctypes, for comparisons with the Python runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


class ModelOptions(ctypes.Structure):
    """The C struct `tarflow_model_options`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("ort_library", ctypes.c_char_p),
        ("on_log", ctypes.c_void_p),
        ("log_user_data", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("skip_digests", ctypes.c_int32),
        ("engine", ctypes.c_char_p),
    )


class EngineReport(ctypes.Structure):
    """The C struct `tarflow_engine`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("ort_version", ctypes.c_char_p),
        ("precision", ctypes.c_char_p),
        ("threads", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
    )


class SampleOptions(ctypes.Structure):
    """The C struct `tarflow_sample_options`."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("first_index", ctypes.c_uint64),
        ("noise", ctypes.c_void_p),
        ("guidance", ctypes.c_double),
        ("attention_temperature", ctypes.c_double),
        ("guide", ctypes.c_int32),
        ("anneal_guidance", ctypes.c_int32),
        ("denoise", ctypes.c_int32),
        ("batch_size", ctypes.c_int64),
        ("on_step", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
    )


class LibTarFlow:
    """A model on an engine, and one sampler of it; `engine` describes what runs.

    Raises:
        RuntimeError: from any method, with the library's message.
    """

    def __init__(self, library: str | Path, bundle: str | Path, engine: str) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("message", "hint"):
            getattr(self._library, f"tarflow_last_{name}").restype = ctypes.c_char_p
        model, self._sampler = ctypes.c_void_p(), ctypes.c_void_p()
        chosen = ModelOptions()
        self._library.tarflow_model_options_defaults(ctypes.byref(chosen), ctypes.c_size_t(ctypes.sizeof(chosen)))
        chosen.engine = engine.encode()
        self._check(self._library.tarflow_model_open(str(bundle).encode(), ctypes.byref(chosen), ctypes.byref(model)))
        found = EngineReport(struct_size=ctypes.sizeof(EngineReport))
        self._check(self._library.tarflow_model_engine(model, ctypes.byref(found)))
        on = found.kernel.decode() or f"ONNX Runtime {found.ort_version.decode()}"
        self.engine = f"{on}, {found.threads} threads"
        self._check(self._library.tarflow_sampler_create(model, ctypes.byref(self._sampler)))
        self._library.tarflow_model_free(model)

    def sample(self, noise: np.ndarray, labels: list[int] | None, **options: Any) -> np.ndarray:
        """Noise float32 [n, N, D] -> n images, flat; `options` are fields of `tarflow_sample_options`."""
        chosen = SampleOptions()
        self._library.tarflow_sample_options_defaults(ctypes.byref(chosen), ctypes.c_size_t(ctypes.sizeof(chosen)))
        noise = np.ascontiguousarray(noise, np.float32)
        chosen.noise = noise.ctypes.data
        for name, value in options.items():
            setattr(chosen, name, value)
        classes = None if labels is None else np.array(labels, np.int64)
        images = np.empty(noise.shape, np.float32)
        status = self._library.tarflow_sampler_sample(
            self._sampler,
            ctypes.c_int64(len(noise)),
            None if classes is None else ctypes.c_void_p(classes.ctypes.data),
            ctypes.byref(chosen),
            ctypes.c_void_p(images.ctypes.data),
            ctypes.c_size_t(images.size),
        )
        self._check(status)
        return images.reshape(len(noise), -1)

    def _check(self, status: int) -> None:
        if status:
            message, hint = (getattr(self._library, f"tarflow_last_{name}")().decode() for name in ("message", "hint"))
            raise RuntimeError(f"{message} ({hint})")
