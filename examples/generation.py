"""One batch of prompts, each with its own adapter, without torch.

    python examples/generation.py artifacts/smollm2

docs/guides/generation.md says how the artifact is built.
"""

import argparse
import sys
from pathlib import Path

from loraexport_runtime import load_generator

SENTENCE = "Aged 43, Quinn Eriksen found work as a painter in Prague."
CAPITAL = "What is the capital of France?"
HONEY = "How would you explain honey to a child?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    args = parser.parse_args()
    generator = load_generator(args.artifact)
    prompts = [SENTENCE, CAPITAL, HONEY]
    names: list[str | None] = [None, *generator.adapters]
    rows = [(prompt, name) for prompt in prompts for name in names]
    completions = generator.generate(
        [prompt for prompt, _ in rows], adapters=[name for _, name in rows], max_new_tokens=48
    )
    for (prompt, name), completion in zip(rows, completions, strict=True):
        print(f"[{name or 'base'}] {prompt}\n{completion.text}\n")
    assert "torch" not in sys.modules, "the runtime needs no torch"


if __name__ == "__main__":
    main()
