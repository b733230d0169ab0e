"""Hidden states -> one vector per text, as a sentence-transformers directory declares it."""

from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraexport_runtime.contract.foreign import has_file, read_json, read_object, value_of

from ..errors import BaseModelError

_MODES = ("mean_tokens", "cls_token", "max_tokens")


class SentencePooling(nn.Module):
    """mean: sum_t m[t] h[t] / sum_t m[t]; cls: h of the first token; max: over tokens with m[t].

    m is the attention mask; then L2 normalisation, if modules.json lists it.
    """

    def __init__(self, mode: str, normalise: bool) -> None:
        super().__init__()
        self.mode = mode
        self.normalise = normalise

    @classmethod
    def read(cls, directory: Path) -> "SentencePooling":
        """Read modules.json and the pooling's config.

        Raises:
            BaseModelError: the files are missing, or declare what is not supported, by name.
        """
        listed = directory / "modules.json"
        if not has_file(listed):
            raise _no_pooling(directory)
        modules = read_json(listed, BaseModelError)
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            raise BaseModelError(f"{listed}: expected a list of objects; download it again")
        types = [value_of(module, "type", str, listed, BaseModelError) for module in modules]
        kinds = [name.rsplit(".", 1)[-1] for name in types]
        if "Pooling" not in kinds:
            raise _no_pooling(directory)
        inner = value_of(modules[kinds.index("Pooling")], "path", str, listed, BaseModelError)
        file = directory / inner / "config.json"
        if PurePosixPath(inner).is_absolute() or ".." in PurePosixPath(inner).parts:
            raise BaseModelError(f"{listed}: path {inner!r} leaves the folder; download it again")
        config = read_object(file, BaseModelError, "the download is not complete, fetch it again")
        unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if unknown:
            raise BaseModelError(f"{directory}: modules.json lists {unknown[0]}; not supported")
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in config.items()
            if key.startswith("pooling_mode_") and value is True
        ]
        if len(modes) != 1 or modes[0] not in _MODES:
            raise BaseModelError(
                f"{file}: pooling is {modes}; supported is one of {', '.join(_MODES)}"
            )
        return cls(modes[0], "Normalize" in kinds)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden [batch, sequence, n], attention_mask int64 [batch, sequence] -> [batch, n]."""
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        if self.mode == "mean_tokens":
            vector = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        elif self.mode == "cls_token":
            vector = hidden[:, 0]
        else:
            lowest = torch.finfo(hidden.dtype).min
            vector = torch.where(mask > 0, hidden, lowest).amax(1)
        return F.normalize(vector, p=2.0, dim=1) if self.normalise else vector


def _no_pooling(directory: Path) -> BaseModelError:
    return BaseModelError(
        f"{directory}: no pooling is declared (modules.json and its config), which task"
        " sentence-embedding needs; use task feature-extraction"
    )
