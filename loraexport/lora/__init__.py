"""The mathematics: y[t] = W x[t] + b + scaling[s] * B[s] (A[s] x[t]), s the slot of token t.

segments.py     segments -> slot of each token
strategy.py     the interface of a strategy, and the products that most of them use
segmented.py, masked.py, augmented.py, chunked.py       the four
rows.py, blended.py             whole models: what a row uses, and rows that blend several slots
layer.py, model_sites.py        the modules that take a layer's place: alone, in a whole model
"""

from .augmented import Augmented
from .chunked import Chunked
from .masked import Masked
from .segmented import Segmented
from .strategy import LoraStrategy

STRATEGIES: dict[str, type[LoraStrategy]] = {
    "segmented": Segmented,
    "masked": Masked,
    "augmented": Augmented,
    "chunked": Chunked,
}
