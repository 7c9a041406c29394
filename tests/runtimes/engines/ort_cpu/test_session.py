"""Sessions: no graph reads what is not its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import tarflow_runtimes as tfr
from tarflow_runtimes.engines.ort_cpu.session import Session

SHIPPED = Path(tfr.__file__).parent / "models/mnist.tarflow"
SECRET = np.arange(8, dtype=np.float32)


def graph_of(path: str) -> onnx.ModelProto:
    """A step whose result holds the first bytes of another file."""
    model = onnx.load_from_string((SHIPPED / "graphs/ort-cpu/step.onnx").read_bytes())
    tensor = model.graph.initializer.add(name="stolen", dims=[8], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": path, "offset": "0", "length": "32"}.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.node.append(onnx.helper.make_node("Identity", ["stolen"], ["loot"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("loot", onnx.TensorProto.FLOAT, [8]))
    return model


@pytest.mark.parametrize("place", ["../secret.bin", "{}/secret.bin", "../block_00/../secret.bin", "link.bin"])
def test_no_graph_reads_a_file_outside_its_blocks_folder(tmp_path, place):
    """ONNX Runtime's own confinement, which the refusal of unlisted files stands on."""
    folder = Path(shutil.copytree(SHIPPED / "block_00", tmp_path / "block_00"))
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = graph_of(place.format(tmp_path)).SerializeToString()
    with pytest.raises(tfr.EngineError, match="cannot open"):
        Session(model, name="step", folder=folder, threads=1)
    inside = folder / "inside.bin"
    inside.write_bytes(SECRET.tobytes())
    assert "loot" in Session(graph_of("inside.bin").SerializeToString(), name="step", folder=folder, threads=1).outputs
