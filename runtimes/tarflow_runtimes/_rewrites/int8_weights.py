"""Linear layers with float weights -> the same with 8-bit weights, for wide models at small batches.

Formula: W[n, k] ~ s[n, k div BLOCK] q[n, k], q an integer in -127 .. 127, s the largest |W| of its group / 127.
Pattern: Gemm(x [R, K], W [N, K], b [N]) with transB, W a weight of a transformer layer.
Rewrite: MatMulNBits(x, q + 128, s, b) with 8 bits; it rounds x to 8 bits too, by groups of BLOCK, and adds in float32.
The projections into and out of a flow block stay as they are: a hundredth of the weights, and a rounding of (a, b)
goes straight into the patch.

A step of one image does little but read its weights, so that a quarter of the bytes is a third of the time: 24 layers
of 768 x 3072 at 1, 4, 16 rows took 13.6, 17.2, 19.2 ms as Gemm and 4.4, 5.6, 12.4 so (2 cores with AVX-512 VNNI);
with float activations (accuracy level 0) 60 ms and more.

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

Bytes = npt.NDArray[np.uint8]

BLOCK: Final = 128
"""Weights of a row that share a scale. With 64 the rounding errors are a tenth smaller and a step a tenth slower."""

ZERO_POINT: Final = 128
"""What stands for 0 in the operator's unsigned bytes."""

INT8_ACTIVATIONS: Final = 4
"""The operator's accuracy level at which products are of bytes."""

LAYERS: Final = "attn_blocks."
"""How the names of the transformer layers' weights begin."""


def rewrite(model: bytes, config: ModelConfig, weights: Path) -> tuple[bytes, dict[str, Bytes]]:
    """Rewrite every linear layer of a step graph; returns the graph, and its quantised weights by initializer.

    These are no part of the graph: a session is given them beside it, which spares two copies. The float weights are
    read one at a time.

    Raises:
        PatternMismatch: when a layer is of another form, or a weight is not finite.
    """
    graph = Graph(proto.parse_model(model, where="the rewritten step graph"))
    gemms = [node for node in graph.nodes if node.op_type == "Gemm" and node.input[1].startswith(LAYERS)]
    if len(gemms) != 4 * config.layers:
        raise PatternMismatch(f"{len(gemms)} linear layers, expected {4 * config.layers}")
    given: dict[str, Bytes] = {}
    for gemm in gemms:
        x, name, bias = gemm.input
        if {entry.name: proto.attribute(gemm, entry.name) for entry in gemm.attribute} != {"transB": 1}:
            raise PatternMismatch(f"{gemm.name} is more than a linear layer")
        tensor = graph.initializers[name]
        rows, columns = tensor.dims
        given[f"{name}.int8"], scales = quantised(proto.external_array(tensor, weights))
        if not np.isfinite(scales).all():
            raise PatternMismatch(f"{name} holds values that are not finite")
        graph.initializers[f"{name}.int8"] = _outside(f"{name}.int8", given[f"{name}.int8"])
        graph.remove([gemm])
        graph.add(
            "MatMulNBits",
            [x, f"{name}.int8", graph.constant(f"{name}.scale", scales), "", "", bias],
            list(gemm.output),
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=8,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )
    return graph.serialized(), given


def quantised(weight: npt.NDArray[Any]) -> tuple[Bytes, npt.NDArray[Any]]:
    """W [N, K] -> (q + 128 [N, groups, BLOCK], s [N, groups] of W's dtype); the last group is filled up with zeros."""
    rows, columns = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, -columns % BLOCK)))
    groups = padded.reshape(rows, -1, BLOCK)
    scales = (np.abs(groups).max(axis=2) / 127).astype(weight.dtype)
    scales[scales == 0] = 1
    integers = np.rint(groups / scales[:, :, None].astype(np.float32)).clip(-127, 127)
    return (integers + ZERO_POINT).astype(np.uint8), scales


def _outside(name: str, array: Bytes) -> Any:
    """An initializer whose contents the session is given."""
    uint8, location = 2, {"location": "given", "offset": "0", "length": str(array.nbytes)}
    tensor = proto.messages()["TensorProto"](name=name, dims=array.shape, data_type=uint8)
    tensor.data_location = proto.EXTERNAL
    for key, value in location.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
