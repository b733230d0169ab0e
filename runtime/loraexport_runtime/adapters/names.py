"""The name of a tensor in an adapter's file -> its module and role, as PEFT reads it."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import AdapterWeightsError

_PREFIX = "base_model.model."
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "lora_bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.bias": "base_bias",
    ".base_layer.weight": "base",
    # A state dict that was saved without peft's save_pretrained has the adapter's name in it, which
    # peft takes where the adapter is loaded under this name, its default.
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_B.default.bias": "lora_bias",
    ".lora_embedding_A.default": "embedding_A",
    ".lora_embedding_B.default": "embedding_B",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
_INNER_WRAPPERS = tuple(name for name in _WRAPPERS if name.startswith("_"))
"""Names that no module of a model has; some have a `module`."""
_OTHER_TOOLS = (
    (("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"), "kohya's tools write for diffusion"),
    (("unet.", "text_encoder.", "text_encoder_2.", "transformer."), "diffusers writes"),
)


class TensorNames:
    """Splits the tensor names of one adapter."""

    def __init__(self, modules_to_save: Sequence[str], file: Path) -> None:
        """`file`: for errors."""
        self._saved = tuple(modules_to_save)
        self._file = file

    def split(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """`base_model.model.X.lora_A.weight` -> (`X`, `A`).

        Raises:
            AdapterWeightsError: it is of no kind that is read, or the tensor has no value.
        """
        if 0 in shape:
            raise AdapterWeightsError(
                f"{self._file}: tensor {name!r} is empty: the adapter was saved under ZeRO-3"
                " without gathering its weights, which are lost in this file. Save it again with"
                " stage3_gather_16bit_weights_on_model_save, or from the checkpoint by"
                " zero_to_fp32.py"
            )
        if name.startswith(_PREFIX):
            inner = name.removeprefix(_PREFIX)
            wrapper = next((part for part in _INNER_WRAPPERS if f".{part}" in f".{inner}"), None)
            if wrapper is not None:
                raise self._wrapped(name, wrapper)
            for suffix, role in _ROLES.items():
                if inner.endswith(suffix):
                    return inner.removesuffix(suffix), role
            module, _, parameter = inner.rpartition(".")
            if self._is_saved(module):
                return module, f"saved_{parameter}"
            if parameter == "weight" and len(shape) == 2 and ".lora_" not in name:
                return module, "base"  # an embedding that was resized, as peft takes it
        raise self._no_factor(name)

    def _is_saved(self, module: str) -> bool:
        """PEFT's rule: the module, or one that holds it, has a name that ends in one of these."""
        parts = module.split(".")
        return any(
            ".".join(parts[: count + 1]).endswith(self._saved) for count in range(len(parts))
        )

    def _wrapped(self, name: str, wrapper: str) -> AdapterWeightsError:
        return AdapterWeightsError(
            f"{self._file}: tensor {name!r} was saved out of {_WRAPPERS[wrapper]}'s wrapper"
            f" ({wrapper.rstrip('.')}), and peft does not load such names. Save the model that is"
            " inside it with save_pretrained, or rename the tensors without it"
        )

    def _no_factor(self, name: str) -> AdapterWeightsError:
        where = f"{self._file}: tensor {name!r} is no LoRA factor of a linear or embedding layer"
        as_peft = f"as {_PREFIX}<module>.lora_A.weight would be"
        if _PREFIX in name and not name.startswith(_PREFIX):
            wrapper = next((part for part in _WRAPPERS if name.startswith(part)), None)
            if wrapper is not None:
                return self._wrapped(name, wrapper)
        for prefixes, tool in _OTHER_TOOLS:
            if name.startswith(prefixes) and "lora" in name:
                return AdapterWeightsError(
                    f"{where}, {as_peft}: it is named as {tool}; only adapters of peft's"
                    " save_pretrained are read"
                )
        if not name.startswith("base_model.") and "lora_" in name:
            return AdapterWeightsError(
                f"{where}, {as_peft}: it lacks the prefix {_PREFIX!r}, without which peft does not"
                " load it. Save the adapter with peft's save_pretrained, or rename the tensors"
            )
        if name.startswith(_PREFIX) and ".lora_" in name:
            return AdapterWeightsError(
                f"{where}, {as_peft}: it has the name of an adapter in it, or is of a peft version"
                " that is not known here; save the adapter with peft's save_pretrained"
            )
        return AdapterWeightsError(
            f"{where}, {as_peft}. If it is a weight of the base that was not trained, save the"
            " adapter again with peft: model.save_pretrained(folder, save_embedding_layers=False)"
        )
