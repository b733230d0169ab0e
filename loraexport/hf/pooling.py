"""Hidden states -> one vector per text, as a sentence-transformers directory declares it."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        try:
            modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
            kinds = [str(one["type"]).rsplit(".", 1)[-1] for one in modules]
            pooling = next(one for one in modules if str(one["type"]).endswith(".Pooling"))
            file = directory / pooling["path"] / "config.json"
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise BaseModelError(
                f"{directory}: no pooling is declared (modules.json and its config), which task"
                " sentence-embedding needs; use task feature-extraction"
            ) from error
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
