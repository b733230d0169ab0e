"""Adapters of embeddings, and the copies of the base that PEFT saves with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.peft_adapters import peft_layers, save_llama

from loraexport.parity.oracle import read_reference_adapter
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.sites import check_base_copies
from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.contract.naming import NO_NAMING, Naming
from loraexport_runtime.errors import AdapterWeightsError

torch.set_num_threads(1)


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize("save_embedding_layers", [False, True])
def test_embedding_adapter_of_peft(tmp_path: Path, save_embedding_layers: bool) -> None:
    wrapped = save_llama(tmp_path, ["embed_tokens"], save_embedding_layers=save_embedding_layers)
    header = read_adapter(tmp_path)
    module = header.modules[EMBEDDING]
    assert module.is_embedding
    assert (module.rank, module.in_features, module.out_features) == (2, 20, 8)
    assert module.scaling == peft_layers(wrapped)[EMBEDDING].scaling["default"] == 3.0
    lora = read_lora_weights(header)[EMBEDDING]
    delta = peft_layers(wrapped)[EMBEDDING].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose((lora.scaling * lora.b @ lora.a).T, delta, rtol=1e-5, atol=1e-6)
    assert list(header.base_copies) == ([EMBEDDING] if save_embedding_layers else [])

    reference = read_reference_adapter(tmp_path, [EMBEDDING])
    a, b, scaling = reference.sites[EMBEDDING]
    np.testing.assert_array_equal(a, lora.a)
    np.testing.assert_array_equal(b, lora.b)
    assert scaling == 3.0


@pytest.fixture(scope="module")
def with_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding LoRA with the base's embedding beside it."""
    folder = tmp_path_factory.mktemp("with_copy")
    save_llama(folder, ["embed_tokens"], save_embedding_layers=True)
    return folder


def copy_digests(weight: np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
    """(site -> module, site -> digest) of a base that has this weight."""
    return {"embed_tokens": EMBEDDING}, {"embed_tokens": digest_array(weight)}


def base_embedding(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"]


def test_equal_base_copy_is_accepted(with_copy: Path) -> None:
    check_base_copies(read_adapter(with_copy), *copy_digests(base_embedding(with_copy)), NO_NAMING)


def test_other_base_copy_is_refused(with_copy: Path) -> None:
    other = base_embedding(with_copy)
    other[3, 3] = np.nextafter(other[3, 3], np.float32(9))
    with pytest.raises(AdapterWeightsError, match=r"differs from the weight of this base.*=False"):
        check_base_copies(read_adapter(with_copy), *copy_digests(other), NO_NAMING)


def test_base_copy_without_a_site_is_refused(with_copy: Path) -> None:
    with pytest.raises(
        AdapterWeightsError, match=r"carries the base weight '.*base_layer\.weight'"
    ):
        check_base_copies(read_adapter(with_copy), {}, {}, NO_NAMING)


def test_base_copy_may_be_stored_wider_than_the_base(tmp_path: Path, with_copy: Path) -> None:
    """A float16 checkpoint, trained in float32: the copy has the same values in another dtype."""
    narrow = base_embedding(with_copy).astype(np.float16)
    tensors = load_file(with_copy / "adapter_model.safetensors")
    tensors[f"base_model.model.{EMBEDDING}.base_layer.weight"] = narrow.astype(np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = (with_copy / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    header = read_adapter(tmp_path)
    check_base_copies(header, *copy_digests(narrow), NO_NAMING)
    with pytest.raises(AdapterWeightsError, match="in a smaller dtype"):
        check_base_copies(header, *copy_digests(base_embedding(with_copy)), NO_NAMING)


def test_base_copy_that_only_rounds_to_the_base_is_refused(with_copy: Path) -> None:
    """The copy was trained on: it is no float16 base, even where float16 hides the difference."""
    rounded = base_embedding(with_copy).astype(np.float16)
    with pytest.raises(AdapterWeightsError, match="differs from the weight of this base"):
        check_base_copies(read_adapter(with_copy), *copy_digests(rounded), NO_NAMING)


def test_embeddings_beside_a_lora_that_is_elsewhere(tmp_path: Path) -> None:
    """PEFT writes them where the vocabulary was resized, or when told to, and reads them again."""
    save_llama(tmp_path / "with", ["q_proj"], save_embedding_layers=True)
    header = read_adapter(tmp_path / "with")
    assert list(header.modules) == ["model.layers.0.self_attn.q_proj"]
    assert sorted(header.base_copies) == ["lm_head", EMBEDDING]
    tensors = load_file(tmp_path / "with/adapter_model.safetensors")
    digests = {
        name: digest_array(tensors[f"base_model.model.{module}.weight"])
        for name, module in (("embed_tokens", EMBEDDING), ("lm_head", "lm_head"))
    }
    naming = Naming("llama", ("model",), ())
    check_base_copies(header, {}, digests, naming)
    with pytest.raises(
        AdapterWeightsError, match=r"lm_head\.weight', which differs from the weight"
    ):
        check_base_copies(header, {}, digests | {"lm_head": digests["embed_tokens"]}, naming)
    del digests["lm_head"]
    with pytest.raises(AdapterWeightsError, match=r"lm_head\.weight', and of this base no weight"):
        check_base_copies(header, {}, digests, naming)
    save_llama(tmp_path / "without", ["q_proj"], save_embedding_layers=False)
    assert not read_adapter(tmp_path / "without").base_copies
