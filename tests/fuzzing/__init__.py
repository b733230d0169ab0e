"""Mutated inputs, drawn from a seed: what `scripts/fuzz` and tests/attacks/test_campaign.py run."""
