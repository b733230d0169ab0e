"""The runtime stands alone: it runs where torch, onnx, transformers and the exporter are not."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.torch_free import BLOCKED

import loraexport_runtime

RUNTIME = Path(loraexport_runtime.__file__).parent

SERVICE = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
assert not set(sys.modules) & set({BLOCKED})
for name in {BLOCKED}:
    try:
        __import__(name)
    except ImportError as error:
        assert str(error) == "blocked: " + name, error
    else:
        raise AssertionError(name + " was imported")

import numpy as np
import loraexport_runtime as lr

session = lr.load(sys.argv[1], threads=1)
x = np.random.default_rng(3).standard_normal((6, 32)).astype(np.float32)
y = session["qkv"].run(x, segments=[("sql", 2), (None, 1), ("chat", 3)])
session.unload_adapter("chat")
session.load_adapter("spare")
ids = session["words"].run(np.arange(4), segments=[("spare", 4)])
print(y.tobytes().hex(), ids.tobytes().hex())
"""


def test_a_mixed_batch_without_torch(tenants: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", SERVICE, str(tenants)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    session = loraexport_runtime.load(tenants, threads=1)
    x = np.random.default_rng(3).standard_normal((6, 32)).astype(np.float32)
    y = session["qkv"].run(x, segments=[("sql", 2), (None, 1), ("chat", 3)])
    session.load_adapter("sql", tenants / "adapters/spare")
    ids = session["words"].run(np.arange(4), segments=[("sql", 4)])
    assert done.stdout.split() == [y.tobytes().hex(), ids.tobytes().hex()]


@pytest.mark.parametrize(
    "module", sorted(RUNTIME.rglob("*.py")), ids=lambda path: str(path.relative_to(RUNTIME))
)
def test_no_module_imports_the_exporter(module: Path) -> None:
    allowed = {
        "ml_dtypes",
        "numpy",
        "onnxruntime",
        "regex",
        "safetensors",
        *sys.stdlib_module_names,
    }
    # Extras, imported when a generator is opened, or for its first chat; and the reader of YAML,
    # which the exporter and the server bring.
    extras = {
        "grammar.py": "llguidance",
        "sandbox.py": "jinja2",
        "strict_yaml.py": "yaml",
        "tokenizer.py": "tokenizers",
    }
    allowed |= {extras[module.name]} if module.name in extras else set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            depth = len(module.relative_to(RUNTIME).parts)
            assert node.level <= depth, f"{module.name} imports from above its package"
            names = [] if node.level else [str(node.module)]
        for name in names:
            assert name.split(".")[0] in allowed, f"{module.name} imports {name}"
