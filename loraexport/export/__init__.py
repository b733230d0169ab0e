"""Eager modules -> TorchScript and ONNX files."""
