"""The engine `ort-cpu`: ONNX Runtime on the CPU."""
