"""`LibTarFlow`: the sampler of libtarflow through ctypes, for comparisons with the Python runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np


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
    """A model and one sampler of it.

    Raises:
        RuntimeError: from any method, with the library's message.
    """

    def __init__(self, library: str | Path, bundle: str | Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("message", "hint"):
            getattr(self._library, f"tarflow_last_{name}").restype = ctypes.c_char_p
        self._library.tarflow_ort_version.restype = ctypes.c_char_p
        model, self._sampler = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._library.tarflow_model_open(str(bundle).encode(), None, ctypes.byref(model)))
        self._check(self._library.tarflow_sampler_create(model, ctypes.byref(self._sampler)))
        self._library.tarflow_model_free(model)

    @property
    def ort_version(self) -> str:
        """Version of the ONNX Runtime that it loaded."""
        return str(self._library.tarflow_ort_version().decode())

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
