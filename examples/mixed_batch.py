"""Run one batch whose segments use different adapters, without torch, and show what each changes.

python examples/mixed_batch.py artifacts/quickstart
"""

import sys

import numpy as np

import loraexport_runtime


def main(artifact: str) -> None:
    session = loraexport_runtime.load(artifact)
    names = list(session.adapters)
    segments = [(name, 5) for name in names] + [(None, 3)]
    num_tokens = sum(length for _, length in segments)
    print(f"{artifact}: adapters {', '.join(names)}; one batch of {num_tokens} tokens: {segments}")
    for layer_name, layer in session.items():
        width = layer.layer.in_features
        x = np.random.default_rng(0).standard_normal((num_tokens, width)).astype(layer.dtype)
        mixed = layer.run(x, segments=segments)
        base = layer.run(x, segments=[(None, num_tokens)])
        print(f"\n{layer_name}: x {list(x.shape)} -> y {list(mixed.shape)}")
        start = 0
        for name, length in segments:
            rows = slice(start, start + length)
            start += length
            moved = [
                np.linalg.norm((mixed - base)[rows, part.offset : part.offset + part.width])
                / np.linalg.norm(base[rows, part.offset : part.offset + part.width])
                for part in layer.layer.slices
            ]
            shown = "  ".join(
                f"{part.name} {100 * share:6.2f} %"
                for part, share in zip(layer.layer.slices, moved, strict=True)
            )
            print(f"  {name or 'base':10} rows {rows.start:2}-{rows.stop - 1:2} moved: {shown}")
    assert "torch" not in sys.modules, "the runtime needs no torch"
    print("\ntorch was never imported.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
