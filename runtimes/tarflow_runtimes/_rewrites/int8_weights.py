"""Linear layers with float weights -> the same with 8-bit weights, for wide models at small batches.

Formula: W[n, k] ~ s[n, k div BLOCK] q[n, k], q an integer in -127 .. 127, s the largest |W| of its group / 127.
Pattern: Gemm(x [R, K], W [N, K], b [N]) with transB, W a weight of a transformer layer.
Rewrite: MatMulNBits(x, q + 128, s, b) with 8 bits; it rounds x to 8 bits too, by groups of BLOCK, and adds in float32.
The projections into and out of a flow block stay as they are: a hundredth of the weights, and a rounding of (a, b)
goes straight into the patch.

A step of one image does little but read its weights, so that a quarter of the bytes is a third of the time: 8 layers of
width 768 took 6.4 ms with float32 weights and 2.2 so (2 cores with AVX-512 VNNI). 24 layers of 768 x 3072 at 1, 4, 16
rows took 13.6, 17.2, 19.2 ms as Gemm and 4.4, 5.6, 12.4 so; with x in float (accuracy level 0) 60 ms and more; with one
scale a row (DynamicQuantizeMatMul) 6.3, 8.2, 8.9, and errors a third larger.

Source: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes import _onnx_proto as proto
from tarflow_runtimes._bundle import ModelConfig
from tarflow_runtimes._rewrites._graph import Graph, PatternMismatch
from tarflow_runtimes._rewrites._weights_file import weights_file

BLOCK: Final = 128
"""Weights of a row that share a scale. On MNIST's digits 32, 64, 128, 256 gave a PSNR of 42.3, 42.1, 41.9, 40.7 dB (the
median of 64 images); a step of width 768 took 2.9, 2.5, 2.2, 2.2 ms."""

ZERO_POINT: Final = 128
"""What stands for 0 in the operator's unsigned bytes."""

INT8_ACTIVATIONS: Final = 4
"""The operator's accuracy level at which products are of bytes."""

LAYERS: Final = "attn_blocks."
"""How the names of the transformer layers' weights begin."""

UINT8: Final = 2
"""TensorProto.DataType."""


def rewrite(model: bytes, config: ModelConfig, weights: Path, *, folder: Path) -> bytes:
    """Rewrite every linear layer of a step graph whose tensors lie in `weights`; the new graph's are put into `folder`.

    A file, because ONNX Runtime maps the tensors one after the other while it lays them out for its operators, and
    holds arrays that it is handed twice: 8 blocks of 63 MB took 751 MB at their peak, and 621 so. The file may go when
    the session is open.

    Raises:
        PatternMismatch: when a layer is of another form, or a weight is not finite.
        EngineError: when the file cannot be written.
    """
    graph = Graph(proto.parse_model(model, where="the rewritten step graph"))
    stored = [tensor for tensor in graph.initializers.values() if tensor.data_location == proto.EXTERNAL]
    gemms = [node for node in graph.nodes if node.op_type == "Gemm" and node.input[1].startswith(LAYERS)]
    if len(gemms) != 4 * config.layers:
        raise PatternMismatch(f"{len(gemms)} linear layers, expected {4 * config.layers}")
    rounded = {_rewrite_layer(graph, gemm) for gemm in gemms}
    with weights_file(folder) as file:
        for tensor in stored:
            array = proto.external_array(tensor, weights)
            if tensor.name in rounded:
                if not np.isfinite(array).all():
                    raise PatternMismatch(f"{tensor.name} holds values that are not finite")
                integers, scales = quantised(array)
                for name, values, data_type in (
                    (f"{tensor.name}.int8", integers, UINT8),
                    (f"{tensor.name}.scale", scales, tensor.data_type),
                ):
                    graph.initializers[name] = file.put(name, values, data_type)
            else:
                graph.initializers[tensor.name] = file.put(tensor.name, array, tensor.data_type)
    return graph.serialized()


def _rewrite_layer(graph: Graph, gemm: Any) -> str:
    """Rewrite one linear layer; returns the name of its weight."""
    if {entry.name: proto.attribute(gemm, entry.name) for entry in gemm.attribute} != {"transB": 1}:
        raise PatternMismatch(f"{gemm.name} is more than a linear layer")
    x, weight, bias = gemm.input
    rows, columns = graph.initializers[weight].dims
    graph.remove([gemm])
    graph.add(
        "MatMulNBits",
        [x, f"{weight}.int8", f"{weight}.scale", "", "", bias],
        list(gemm.output),
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=8,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )
    return str(weight)


def quantised(weight: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """W [N, K] -> (q + 128 [N, groups, BLOCK], s [N, groups] of W's dtype); the last group is filled up with zeros."""
    rows, columns = weight.shape
    filled = np.pad(weight, ((0, 0), (0, -columns % BLOCK))) if columns % BLOCK else weight
    groups = filled.reshape(rows, -1, BLOCK)
    scales = np.maximum(groups.max(axis=2), -groups.min(axis=2)) / weight.dtype.type(127)
    scales[scales == 0] = 1
    integers = groups / scales[:, :, None].astype(np.float32)
    np.rint(integers, out=integers)
    integers += ZERO_POINT
    return integers.clip(1, 255, out=integers).astype(np.uint8), scales
