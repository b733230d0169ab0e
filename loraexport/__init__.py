"""loraexport: one YAML spec and one command give multi-LoRA graphs for stock onnxruntime."""

__version__ = "0.1.0"
