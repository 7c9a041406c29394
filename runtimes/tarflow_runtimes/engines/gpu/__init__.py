"""The decode loop on a device with its own memory: buffers, programs, and ONNX Runtime on CUDA."""
