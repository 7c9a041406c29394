"""`Sample`: the result of the sampler, with methods to convert and save it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tarflow_runtimes.decode.plan import DecodeReport
from tarflow_runtimes.engines.gpu.array import DeviceArray
from tarflow_runtimes.errors import InputError
from tarflow_runtimes.io.pictures import to_uint8
from tarflow_runtimes.io.write import PICTURES, check_output, check_pictures, write_pictures


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """Images drawn by `Flow.sample`.

    `images` is float32 [B, C, height, width] in the model's range, about [-1, 1] and not clipped, or [B, N, D] for a
    model of tokens. `seed` is the seed of the noise, or one per image; None if the caller gave the noise. `metadata`
    describes how the images were made, and is written into PNG files. `report` describes how the blocks were inverted.
    `to_device` copies arrays to the engine's device, if it has one.
    """

    images: npt.NDArray[np.float32]
    seed: int | tuple[int, ...] | None
    first_index: int = 0
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    report: DecodeReport = dataclasses.field(default_factory=DecodeReport)
    to_device: Callable[[npt.NDArray[np.float32]], DeviceArray] | None = dataclasses.field(default=None, repr=False)

    @property
    def images_device(self) -> DeviceArray | None:
        """The images [B, C, height, width] in the memory of the engine's device; None if the engine has no device.

        Every access copies the images again, so keep the result. `torch.from_dlpack(sample.images_device)` and CuPy's
        `from_dlpack` use it without a copy (it has `__dlpack__` and `__cuda_array_interface__`). Its memory lives as
        long as it or any array made from it, even after the Flow is closed.
        """
        return None if self.to_device is None else self.to_device(self.images)

    def uint8(self) -> npt.NDArray[np.uint8]:
        """The images as 8-bit values [B, height, width, C]: rint(127.5 * clip(x, -1, 1) + 127.5).

        Raises:
            InputError: when a value is not finite.
        """
        return to_uint8(self.images)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `grid.png`, a folder of PNG files, `images.npy` or `images.npz`; returns the files written.

        Existing files are replaced; a failed save leaves nothing new behind.

        Raises:
            InputError: when the images cannot be written there, or not in this format.
        """
        name = os.fspath(path) if Path(path).suffix else f"{Path(path)}/"  # without an ending: a folder
        output = check_output(name, kinds=PICTURES, overwrite=True, option="")
        names = [f"{self.first_index + index:06d}.png" for index in range(len(self.images))]
        check_pictures(output, self.images.shape[1:], names=names)
        text = {f"tarflow:{key}": value for key, value in self.metadata.items()}
        arrays = {} if self.seed is None else {"seed": self.seed}
        try:
            return write_pictures(output, self.images, names=names, text=text, arrays=arrays)
        except OSError as error:
            raise InputError(
                f"{path}: cannot write there ({error.strerror})", hint="give a folder that you may write to"
            ) from error
