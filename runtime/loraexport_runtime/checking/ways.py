"""The ways in which a proof runs ONNX graphs: with stock operators, and with kernels."""

from typing import Any

from ..contract.manifest import Manifest
from ..device.kernels import why_no_kernels
from ..device.providers import session_device
from .rows import label_of


def ways(
    manifest: Manifest, provider: tuple[str, dict[str, Any]], skipped: dict[str, str]
) -> list[tuple[str, bool]]:
    """Each way to run the ONNX graphs on a provider: its label, and whether with kernels.

    Args:
        skipped: gets what keeps the kernels from that, of graphs that call their functions.
    """
    label = label_of(provider[0])
    found = [(label, False)]
    if manifest.functions:
        why = why_no_kernels(manifest, session_device(provider))
        if why is None:
            found.append((f"{label}-kernels", True))
        else:
            skipped[f"onnx-{label}-kernels"] = why
    return found
