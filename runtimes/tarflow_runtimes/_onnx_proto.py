"""The part of the ONNX file format that the load-time rewrites read and write, without the onnx package.

Protocol buffers are described by field numbers: the messages below name the fields of onnx.proto that a rewrite
touches, in a private pool and under a private package name, so that they never meet the real ones in one process.
Fields that are not named survive parsing and serialising untouched.

Source: onnx/onnx.proto; protobuf's rules for unknown fields.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tarflow_runtimes._errors import BundleError, EngineError

PACKAGE: Final = "tarflow_runtimes.onnx_subset"

# Message -> field -> (number, type). A trailing * repeats the field; a capital first letter names a message.
SCHEMA: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "ModelProto": {"graph": (7, "GraphProto"), "opset_import": (8, "OperatorSetIdProto*")},
    "OperatorSetIdProto": {"domain": (1, "string"), "version": (2, "int64")},
    "GraphProto": {
        "node": (1, "NodeProto*"),
        "name": (2, "string"),
        "initializer": (5, "TensorProto*"),
        "input": (11, "ValueInfoProto*"),
        "output": (12, "ValueInfoProto*"),
        "value_info": (13, "ValueInfoProto*"),
    },
    "NodeProto": {
        "input": (1, "string*"),
        "output": (2, "string*"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "AttributeProto*"),
        "domain": (7, "string"),
    },
    "AttributeProto": {
        "name": (1, "string"),
        "f": (2, "float"),
        "i": (3, "int64"),
        "s": (4, "bytes"),
        "ints": (8, "int64*"),
        "type": (20, "int32"),
    },
    "TensorProto": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "float_data": (4, "float*"),
        "int64_data": (7, "int64*"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "external_data": (13, "StringStringEntryProto*"),
        "data_location": (14, "int32"),
    },
    "StringStringEntryProto": {"key": (1, "string"), "value": (2, "string")},
    "ValueInfoProto": {"name": (1, "string"), "type": (2, "TypeProto")},
    "TypeProto": {"tensor_type": (1, "TensorTypeProto")},
    "TensorTypeProto": {"elem_type": (1, "int32"), "shape": (2, "TensorShapeProto")},
    "TensorShapeProto": {"dim": (1, "DimensionProto*")},
    "DimensionProto": {"dim_value": (1, "int64"), "dim_param": (2, "string")},
}
PACKED: Final = {("TensorProto", "float_data"), ("TensorProto", "int64_data")}

FLOAT, INT32, INT64, FLOAT16, BFLOAT16 = 1, 6, 7, 10, 16
"""TensorProto.DataType; NumPy has no bfloat16."""
DTYPES: Final[dict[int, np.dtype[Any]]] = {
    FLOAT: np.dtype("<f4"),
    INT32: np.dtype("<i4"),
    INT64: np.dtype("<i8"),
    FLOAT16: np.dtype("<f2"),
}
EXTERNAL: Final = 1
"""TensorProto.DataLocation of a tensor that lies in another file."""


@functools.cache
def messages() -> dict[str, Any]:
    """The message classes by name.

    Raises:
        EngineError: when protobuf is not installed.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise EngineError("the engine needs the package protobuf", hint='pip install "tarflow-sdk[ort]"') from error
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {name: getattr(field, f"TYPE_{name.upper()}") for name in ("string", "bytes", "float", "int32", "int64")}
    file = descriptor_pb2.FileDescriptorProto(
        name="tarflow_runtimes/onnx_subset.proto", package=PACKAGE, syntax="proto2"
    )
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            base, repeated = kind.rstrip("*"), kind.endswith("*")
            entry = described.field.add(name=name, number=number)
            entry.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if base in kinds:
                entry.type = kinds[base]
                entry.options.packed = (message, name) in PACKED
            else:
                entry.type, entry.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in SCHEMA}


def parse_model(data: bytes, *, where: str) -> Any:
    """A ModelProto; `where` names the file in errors.

    Raises:
        BundleError: when `data` is no ONNX model.
    """
    from google.protobuf.message import DecodeError

    model = messages()["ModelProto"]()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise BundleError(f"{where} is not an ONNX model: {error}", hint="export the checkpoint again") from error
    if not model.graph.node:
        raise BundleError(f"{where} is not an ONNX model: it has no nodes", hint="export the checkpoint again")
    return model


def check_external_data(model: Any, weights: Path, *, where: str) -> None:
    """Refuse a model whose tensors lie anywhere but in `weights`, beside it.

    Raises:
        BundleError: when one does.
    """
    for tensor in model.graph.initializer:
        places = {entry.value for entry in tensor.external_data if entry.key == "location"}
        if tensor.data_location == EXTERNAL and places != {weights.name}:
            place = ", ".join(sorted(places)) or "no file"
            raise BundleError(
                f"{where}: tensor {tensor.name} lies in {place}, expected {weights.name}",
                hint="do not use this bundle; fetch it from its source",
            )


def node(
    op_type: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    *,
    domain: str = "",
    **attributes: float | bytes | list[int],
) -> Any:
    """A NodeProto; the type of an attribute follows from its value."""
    made = messages()["NodeProto"](
        op_type=op_type, input=inputs, output=outputs, domain=domain, name=f"{op_type}:{next(iter(outputs))}"
    )
    for name, value in attributes.items():
        attribute = made.attribute.add(name=name)
        match value:
            case float():
                attribute.f, attribute.type = value, 1
            case int():
                attribute.i, attribute.type = value, 2
            case bytes():
                attribute.s, attribute.type = value, 3
            case _:
                attribute.ints.extend(value)
                attribute.type = 7
    return made


def value_info(name: str, elem_type: int, shape: tuple[int | str, ...] | None) -> Any:
    """A graph input or output; letters in `shape` are symbolic axes, None leaves even their number open."""
    made = messages()["ValueInfoProto"](name=name)
    made.type.tensor_type.elem_type = elem_type
    if shape is None:
        return made
    made.type.tensor_type.shape.SetInParent()
    for size in shape:
        dim = made.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size
    return made


def tensor(name: str, array: npt.NDArray[Any]) -> Any:
    """An initializer; float32, float16, int32 or int64."""
    data_type = next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
    return messages()["TensorProto"](
        name=name, dims=array.shape, data_type=data_type, raw_data=np.ascontiguousarray(array).tobytes()
    )


def array(tensor: Any) -> npt.NDArray[Any] | None:
    """The contents of an initializer that lies in the model itself; None for external ones and other dtypes."""
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None or tensor.data_location == EXTERNAL:
        return None
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))
    data = tensor.float_data if tensor.data_type == FLOAT else tensor.int64_data
    return np.array(data, dtype).reshape(tuple(tensor.dims))


def external_array(tensor: Any, weights: Path) -> npt.NDArray[Any]:
    """The contents of an initializer that lies in `weights`.

    Raises:
        EngineError: when it lies elsewhere, or past the end of the file.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = DTYPES.get(tensor.data_type), tuple(tensor.dims)
    count = int(np.prod(shape))
    if tensor.data_location == EXTERNAL and dtype is not None and place.get("location") == weights.name:
        data = np.fromfile(weights, dtype, count, offset=int(place.get("offset", "0")))
        if data.size == count:
            return data.reshape(shape)
    raise EngineError(f"tensor {tensor.name} cannot be read from {weights.name}")


def attribute(made: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    for entry in made.attribute:
        if entry.name == name:
            return {1: entry.f, 2: entry.i, 3: entry.s, 7: list(entry.ints)}.get(entry.type)
    return default
