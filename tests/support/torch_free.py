"""What a service does not have."""

BLOCKED = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "loraexport")
