"""How adapters may call a base's modules, beside by the names that its sites have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """What is known of the names that a model's adapters bring; see `adapters.sites`."""

    architecture: str | None
    """transformers' own word for the model's class and those around it, such as `bert`."""
    prefixes: tuple[str, ...]
    """Leading names that a model around this one has before these modules, or this one before
    those of the model inside it: `bert`, or `vision_model` of a CLIP."""
    other_parts: tuple[str, ...]
    """Classes of the architecture that are no model around or inside this one: CLIP's text."""


NO_NAMING = Naming(None, (), ())
"""Of a base that no model is known for: adapters call its modules as the sites are called."""
