"""What a batcher has done, as numbers for a service's dashboard."""

from dataclasses import dataclass


@dataclass
class BatchCounts:
    """What the batcher's thread counts."""

    batches: int = 0
    requests: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    seconds: float = 0.0

    def note_run(self, requests: int, tokens: int, padded_tokens: int, seconds: float) -> None:
        """A run of the session."""
        self.batches += 1
        self.requests += requests
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.seconds += seconds


@dataclass(frozen=True)
class BatcherStats:
    """Counts of a batcher since it was made, and what waits now."""

    queued: int
    queued_tokens: int
    batches: int
    """Runs of the session."""
    requests: int
    """Those that were run, by themselves or together."""
    tokens: int
    """Theirs."""
    padded_tokens: int
    """What the runs computed, with what the shorter texts were filled up by."""
    failed: int
    """Requests whose run failed, alone."""
    cancelled: int
    late: int
    """Requests that were not begun in time."""
    seconds: float
    """In runs."""
