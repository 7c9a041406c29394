"""The decode loop on a device with memory of its own: memory, programs, and ONNX Runtime on CUDA."""
