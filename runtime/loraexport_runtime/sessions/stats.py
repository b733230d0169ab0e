"""What a session has done since it was opened, as numbers for a service's dashboard."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SessionStats:
    """Counts of a session, all of them since it was opened; `ArtifactSession.stats` gives them."""

    slots_held: int
    """Slots that hold an adapter now."""
    hits: int
    """Adapters that sat in a slot when a run or a pin named them, each once a run."""
    pages: int
    """Adapters that such a run or pin had to copy from host memory into a slot first."""
    evictions: int
    """Adapters that left their slot for another one, by a page-in or a load."""
    waits: int
    """Runs, pins and loads that did not get their slots at once."""
    wait_seconds: float
    """How long these waited for slots, all together; not how long they read files."""
    runs: int
    """Runs that have ended, of a model or of a layer, whether they gave a result or an error."""
    run_seconds: float
    """How long these took, all together, from when they had their slots, page-ins included. Runs
    of several threads overlap, so it may grow faster than the clock."""
    bucket_hits: int
    """Runs that took a bucket which `warm_up` had made; always 0 without `cuda_graphs`."""
    bucket_misses: int
    """Runs that fitted into no bucket, of a session with `cuda_graphs`."""
    kernels: str
    """What computes the sites: stock operators and why, or which kernels."""
