"""From a TarFlow checkpoint to a verified bundle of ONNX graphs."""
