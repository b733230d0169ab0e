"""What a generation engine has done, as numbers for a service's dashboard."""

from dataclasses import dataclass


@dataclass
class GenerationCounts:
    """What the engine's thread counts."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    chunks: int = 0
    steps: int = 0
    step_rows: int = 0


@dataclass(frozen=True)
class GenerationStats:
    """Counts of an engine since it was opened, and what it does now."""

    rows: int
    """Answers that may be computed at the same time."""
    length: int
    """Tokens of a prompt and its answer that a row holds."""
    running: int
    """Answers in rows now."""
    queued: int
    """Answers that wait."""
    queued_tokens: int
    """Of their prompts and answers, at most."""
    finished: int
    """Answers that ended by a token, a text or their length."""
    cancelled: int
    failed: int
    prompt_tokens: int
    """Of the answers that were admitted."""
    generated_tokens: int
    prefix_hits: int
    """Answers whose prompt began with what a row had read under the same adapter."""
    prefix_tokens: int
    """So many tokens did not have to be read again for them."""
    chunks: int
    """Runs that read prompts."""
    steps: int
    """Runs that gave a token to every row that decodes."""
    step_rows: int
    """Tokens that these gave, all together."""
    slots_held: int
    """Slots that hold an adapter now."""
    pages: int
    """Adapters that were copied from host memory into a slot for an answer."""
    evictions: int
    """Adapters that left their slot for another one."""
    kernels: str
    """What computes the sites: stock operators and why, or which kernels."""
