"""When a row is read again, and that no other row sees it."""

from pathlib import Path

import numpy as np
import pytest
from support.decoders import ADAPTERS, make_prompts, write_family
from support.home import Home

from loraexport_runtime.checking import decoder_steps
from loraexport_runtime.checking.model import BASE, only
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.load import load_generator
from loraexport_runtime.generation.rope import is_long, tokens_until_reread


def test_the_side_of_a_length() -> None:
    assert not is_long(12, 12)
    assert is_long(13, 12)
    assert not is_long(10**6, None)
    # 12 tokens are read, which give one; with it they are 13, and on the other side.
    assert [tokens_until_reread(length, 12) for length in (1, 11, 12, 13)] == [12, 2, 1, None]
    assert tokens_until_reread(5, None) is None


@pytest.fixture(scope="module")
def longrope(home: Home) -> Path:
    return home.artifact(write_family, "Phi-3.5")


@pytest.mark.slow
def test_a_row_that_crosses_changes_no_other(longrope: Path) -> None:
    generator = load_generator(longrope, rows=4)
    prompts, adapters = make_prompts(9, 3, 30, 12), [*ADAPTERS, None, "first"]
    mixed = generator.generate(prompts, adapters=adapters, max_new_tokens=8)
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        alone = generator.generate([prompt], adapters=[adapter], max_new_tokens=8)
        assert alone[0] == mixed[row]


@pytest.mark.slow
def test_long_prompts_are_read_in_parts(longrope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 tokens each here: the logits are those of whole prompts."""
    manifest = Manifest.read(longrope)
    assert isinstance(manifest.kind, Decoder)
    run = decoder_steps.open_runner(longrope, manifest, manifest.kind, ("CPUExecutionProvider", {}))
    prompts, slots = make_prompts(9, 3, 30), (only(1), BASE, only(2))
    tokens = np.array(make_prompts(6, 6, 6))
    whole = run(prompts, tokens, slots)
    monkeypatch.setattr(decoder_steps, "_MOST_LOGITS", 5 * 4 * whole.shape[-1])
    assert np.abs(run(prompts, tokens, slots) - whole).max() < 1e-4 * np.abs(whole).max()
