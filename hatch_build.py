"""Put the native kernel into wheels: what `pip install` builds on a machine with a C++ compiler samples with it.

Where there is no compiler the wheel is one of Python alone, which samples with ONNX Runtime; `tarflow doctor` says so.
The variable TARFLOW_NATIVE settles it: `0` builds no kernel, `1` fails where it cannot be built.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "tarflow_runtimes/engines/native"


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]
    """A wheel of this platform, for any Python: the library is loaded with ctypes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library; into the sources for an editable install."""
        wanted = os.environ.get("TARFLOW_NATIVE", "")
        if wanted not in {"", "0", "1"}:
            raise ValueError(f"TARFLOW_NATIVE is {wanted!r}; valid are 0 and 1")
        if wanted == "0":
            return
        sys.path.insert(0, str(Path(self.root) / "runtimes" / "native"))
        import native_build

        cxx = native_build.compiler()
        try:
            if cxx is None:
                raise FileNotFoundError("no C++ compiler: install g++ or clang++, or set CXX")
            self._room = tempfile.TemporaryDirectory()
            editable = version == "editable"
            folder = Path(self.root) / "runtimes" / PLACE if editable else None
            library = native_build.build(Path(self._room.name), cxx=cxx, folder=folder)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"the native kernel is left out, engine ort-cpu it is: {error}")
            return
        if not editable:
            build_data["force_include"][str(library)] = f"{PLACE}/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built on the way."""
        if hasattr(self, "_room"):
            self._room.cleanup()
