"""The base's weights by site, and its digest."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SiteWeights:
    """The frozen weights of one site, in their stored dtype."""

    weight: np.ndarray = field(repr=False)
    """Linear: [out, in]. Embedding: [vocabulary, dim]."""
    bias: np.ndarray | None = field(repr=False)
    """[out]"""


@dataclass(frozen=True)
class Base:
    """The weights of every site, and the digests by which another machine knows them."""

    sites: dict[str, SiteWeights]
    digests: dict[str, str]
    """sha256 of each site's weight, by site; and of embeddings that are none, by module."""
    digest: str
    """sha256 over everything that the base's output depends on, as hexadecimal text."""
    missing: tuple[str, ...] = ()
    """Weights of its model that its files lack, so that no digest but their sites' covers them."""


def digest_of(digests: Mapping[str, str]) -> str:
    """One sha256 for several, by name."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
