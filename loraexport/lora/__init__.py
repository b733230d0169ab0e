"""The mathematics: y[t] = W x[t] + b + scaling[s] * B[s] (A[s] x[t]), s the slot of token t.

segments.py     segments -> slot of each token
strategy.py     the interface of a strategy, and the choice among the four
segmented.py, masked.py, augmented.py, chunked.py
rows.py, blended.py         whole models: what a row uses, and rows that blend several slots
linear.py, embedding.py     the modules that replace a site
reference.py    the float64 oracle; it shares nothing with the rest
"""

from .augmented import Augmented
from .chunked import Chunked
from .masked import Masked
from .segmented import Segmented
from .strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "segmented": Segmented,
    "masked": Masked,
    "augmented": Augmented,
    "chunked": Chunked,
}
