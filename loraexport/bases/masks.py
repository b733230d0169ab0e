"""A batch's attention_mask -> what a model takes for it.

Gemma 3 that looks ahead (EmbeddingGemma) makes its masks by torch.vmap, which torch.jit does not
trace: these are made here.
"""

from typing import Any

import torch
from torch import Tensor


def attention_masks(config: Any, attention_mask: Tensor) -> Tensor | dict[str, Tensor]:
    """attention_mask int64 [batch, n], or by kind of layer bool [batch, 1, n, n].

    Token i sees token j, if j is no padding and, in a layer with a window w, |i - j| < w.
    """
    if config.model_type != "gemma3_text" or not config.use_bidirectional_attention:
        return attention_mask
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    near = (places.unsqueeze(1) - places).abs() < config.sliding_window
    shown = (attention_mask != 0)[:, None, None]
    return {
        "full_attention": shown & torch.ones_like(near),
        "sliding_attention": shown & near,
    }
